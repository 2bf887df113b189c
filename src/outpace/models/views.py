"""Views of a decoder: other ways through the same weights, over the same KV layout, at no cost of memory.

A view runs in the storage of the decoder that it was made from, keeps its guarantees (a row's result depends on that
row alone) and has buffers of its own, so its outputs and the decoder's live side by side. Views of views work.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray

from ..errors import UnsupportedModel
from .decoder import Decoder
from .native import NativeDecoder
from .torch_decoder import TorchDecoder

View = NativeDecoder | TorchDecoder


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


def _view(decoder: Decoder) -> View:
    if not isinstance(decoder, NativeDecoder | TorchDecoder):
        raise UnsupportedModel(
            f"a {type(decoder).__name__} has no views of its weights; the CPU decoder and the torch decoder have"
        )
    return decoder.view()
