"""One model in two precisions: the smaller weights for steps of few rows, the others for many."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray

from ..cache.storage import KVStorage
from .batch import ForwardBatch
from .decoder import NO_TAPS, Decoder, DecoderOutput, Taps
from .native import NativeDecoder

_FEW = 8  # rows up to which int4, which reads less, is quicker than int8, which computes less


class TwoSpeed(Decoder):
    """For draft models, whose drafts may be a little worse but must be quick: a step of one row waits for the memory,
    so int4 weights take two thirds of the time of int8; reading a prompt waits for the arithmetic, where int8 is
    several times quicker. Both write the same keys and values, as far as their rounding goes.

    Not row-invariant: a row's bits depend on how many rows share its step. `few` and `many` share a KV layout.
    """

    row_invariant = False

    def __init__(self, few: NativeDecoder, many: NativeDecoder) -> None:
        self.few, self.many = few, many
        self.config, self.precision, self.device = few.config, few.precision, few.device
        self.weight_bytes = few.weight_bytes
        self.threads = few.threads

    def new_storage(self, num_pages: int) -> KVStorage:
        return self.many.new_storage(num_pages)

    def forward(self, batch: ForwardBatch, storage: KVStorage, taps: Taps = NO_TAPS) -> DecoderOutput:
        decoder = self.few if len(batch.tokens) <= _FEW else self.many
        return decoder.forward(batch, storage, taps)

    def embedding(self, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        return self.few.embedding(tokens)

    def view(self, threads: int | None = None) -> TwoSpeed:
        return TwoSpeed(self.few.view(threads), self.many.view(threads))

    def skip(self, attention: Collection[int], mlp: Collection[int]) -> None:
        self.few.skip(attention, mlp)
        self.many.skip(attention, mlp)

    def trim(self, ids: NDArray[np.int64]) -> None:
        self.few.trim(ids)
        self.many.trim(ids)
