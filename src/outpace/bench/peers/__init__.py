"""Other engines in the same run as ours, each in a process of its own or behind a URL. See `peer.py`, `open.py`."""
