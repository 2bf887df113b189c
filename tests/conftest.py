"""Settings for all tests; puts this folder on the path, so that tests can import `toy`."""

import sys
from pathlib import Path

from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parent))

# a first example may compile a kernel, and machines differ in speed
settings.register_profile("outpace", deadline=None)
settings.load_profile("outpace")
