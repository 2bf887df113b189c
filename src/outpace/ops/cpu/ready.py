"""Makes the kernels ready before the first step needs them: loaded from the cache, or compiled with a word about it.

The first token then waits for the model alone, and loading runs beside the reading of the weights.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from numba import int64

from .compiled import address_of, is_cached
from .sample import sample_rows
from .search import top_rows
from .step import attention, decoder_step
from .team import post, serve, work


def make_ready() -> None:
    """Load or compile every entry point, in the types that callers pass. Takes no time when that is done."""
    for function in (decoder_step, attention, sample_rows, top_rows):
        address_of(function)
    serve.compile((int64,) * 4)
    post.compile((int64,) * 4)
    work.compile((int64,) * 3)


@contextmanager
def made_ready() -> Iterator[None]:
    """Kernels get ready while the block runs, and are when it ends. Compiling, once per machine, comes first."""
    if not is_cached(decoder_step):
        print("compiling the CPU kernels for this machine (once, about a minute)…", file=sys.stderr, flush=True)
        make_ready()  # here and not beside: Ctrl-C must end it
    loading = threading.Thread(target=make_ready, name="outpace-kernels", daemon=True)
    loading.start()
    try:
        yield
    finally:
        loading.join()
