"""Views of a decoder: other ways through the same weights, over the same KV layout, at no cost of memory.

A view runs in the storage of the decoder that it was made from, keeps its guarantees (a row's result depends on that
row alone) and has buffers of its own, so its outputs and the decoder's live side by side. Views of views work.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..errors import UnsupportedModel
from .batch import PAGE_SIZE, ForwardBatch
from .decoder import Decoder
from .native import NativeDecoder
from .two_speed import TwoSpeed

if TYPE_CHECKING:
    from .torch_decoder import TorchDecoder

View: TypeAlias = "NativeDecoder | TorchDecoder | TwoSpeed"


def skip_sublayers(decoder: Decoder, attention: Collection[int] = (), mlp: Collection[int] = ()) -> View:
    """The decoder without the attention of some layers and the MLP of some layers (numbered from 0).

    A skipped attention neither writes nor reads keys and values of its layer: what such a view leaves in the cache is
    good for itself only. `view.skip(attention, mlp)` changes the sets between forwards, in microseconds.
    Raises ParameterError for a layer that is not there, UnsupportedModel for a decoder without views.
    """
    view = _view(decoder)
    view.skip(attention, mlp)
    return view


def trim_head(decoder: Decoder, ids: NDArray[np.int64]) -> View:
    """The decoder with its output head cut to the tokens `ids`: their logits are the same to the bit, all others -inf.

    The cut weights are a copy. Raises ParameterError for ids outside the vocabulary or none, UnsupportedModel for a
    decoder without views.
    """
    view = _view(decoder)
    view.trim(ids)
    return view


def keep_pages(batch: ForwardBatch, kept: Sequence[NDArray[np.int64]]) -> ForwardBatch:
    """A step whose rows see some of the cached text only: of each sequence's full pages those in `kept[b]` (ascending),
    and all behind them, the last, partly filled page and the provisional region.

    Rows are written to the same places as without it, and positions stay. Not for layers with a sliding window, which
    counts places.
    """
    assert batch.compact is None, "pages are left out before some of the others are read in few bits"
    full = batch.committed // PAGE_SIZE
    parts = [np.concatenate((t[keep], t[n:])) for t, keep, n in zip(batch.page_tables, kept, full, strict=True)]
    tables = np.zeros((len(parts), max(map(len, parts), default=0)), dtype=np.int32)
    for row, part in zip(tables, parts, strict=True):
        row[: len(part)] = part
    dropped = full - np.array([len(keep) for keep in kept], dtype=np.int32)
    return replace(batch, page_tables=tables, committed=(batch.committed - PAGE_SIZE * dropped).astype(np.int32))


def _view(decoder: Decoder) -> View:
    if isinstance(decoder, NativeDecoder | TwoSpeed):
        return decoder.view()
    from .torch_decoder import TorchDecoder  # torch, only now

    if not isinstance(decoder, TorchDecoder):
        raise UnsupportedModel(
            f"a {type(decoder).__name__} has no views of its weights; the CPU decoder and the torch decoder have"
        )
    return decoder.view()
