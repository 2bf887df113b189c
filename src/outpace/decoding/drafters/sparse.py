"""Sparse views of a KV cache: a draft forward reads some pages of the text, the verifying one reads all.

A page of keys and values is read or left out whole, by all layers and heads alike; the last pages, where the
provisional region lies, always stay. Keys carry their own positions (rotary), so what is left keeps its place in the
text. Which pages: the first ones and a window of the last ones (`Streaming`), or chosen ones.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np

from ...errors import MethodError, ParameterError
from ...models.batch import PAGE_SIZE, ForwardBatch
from ...models.decoder import Decoder
from ...models.native import NativeDecoder
from ...models.views import keep_pages
from ...types import IntArray
from ..contracts import DrafterContext, Sequence


def pages_of(tokens: int) -> int:
    """Whole pages for so many tokens."""
    return -(-tokens // PAGE_SIZE)


class Streaming:
    """A KVView: the first `sinks` tokens, which attention falls back on, and the last `window`, rounded up to pages.

    Xiao et al., "Efficient Streaming Language Models with Attention Sinks" (arXiv 2309.17453). Raises ParameterError
    out of range.
    """

    def __init__(self, method: str, sinks: int, window: int) -> None:
        for name, value, least in (("sinks", sinks, 0), ("window", window, 1)):
            if value < least:
                raise ParameterError(f"{method}:{name}={value} is out of range: it must be at least {least} tokens")
        self.sinks, self.window = pages_of(sinks), pages_of(window)

    def pages(self, whole: int) -> IntArray:
        """Which of `whole` full pages are kept, ascending."""
        first = np.arange(min(self.sinks, whole))
        return np.concatenate((first, np.arange(max(whole - self.window, len(first)), whole)))

    def __call__(self, batch: ForwardBatch, sequences: Seq[Sequence]) -> ForwardBatch:
        return keep_pages(batch, [self.pages(int(n) // PAGE_SIZE) for n in batch.committed])


def require_whole_attention(decoder: Decoder, method: str) -> None:
    """Raises MethodError for a model some of whose layers see a window only: they gain nothing from a sparse view, and
    their window counts places that such a view leaves out."""
    if "sliding" in decoder.config.layer_types:
        raise MethodError(
            f"method {method!r} reads part of the KV cache, which works where all layers see the whole text, and "
            "this model has sliding-window layers; use swift, quantspec or a method that drafts by lookup"
        )


def require_cpu(context: DrafterContext, method: str) -> NativeDecoder:
    """The target, if it is the CPU decoder. Raises MethodError otherwise."""
    if not isinstance(context.target, NativeDecoder):
        where = (
            "no target" if context.target is None else f"a {type(context.target).__name__} on {context.target.device}"
        )
        raise MethodError(
            f'method {method!r} needs the CPU decoder as target (device="cpu"), and there is {where}; use swift, '
            "magicdec or a method that drafts by lookup"
        )
    return context.target
