"""What the tables of known keys share (gguf_keys, hf_keys)."""

from __future__ import annotations

from typing import Any


def names(text: str) -> frozenset[str]:
    """The words of a text."""
    return frozenset(text.split())


def shown(value: Any) -> str:
    """A value as a message shows it: not longer than a line."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
