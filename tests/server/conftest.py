"""Servers over an engine without a model; tests here can import `fake` and `live`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def serve() -> Iterator[Callable[..., Any]]:
    """Starts a server over an engine and returns it; it stops with the test."""
    from live import Live

    with ExitStack() as stack:
        yield lambda engine, **options: stack.enter_context(Live(engine, **options))
