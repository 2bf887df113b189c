"""The contract of everything that runs a target or draft model, whatever the device."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from ..cache.storage import KVStorage
from ..errors import ParameterError, UnsupportedModel
from ..types import FloatArray, Logits, Precision
from .batch import ForwardBatch
from .config import ModelConfig

if TYPE_CHECKING:
    import torch


class Device(Protocol):
    """Where a decoder runs: a torch.device, or `Cpu`."""

    @property
    def type(self) -> str: ...

    @property
    def index(self) -> int | None: ...


@dataclass(frozen=True, slots=True)
class Cpu:
    """The device of decoders that need no torch."""

    type: str = "cpu"
    index: int | None = None

    def __str__(self) -> str:
        return self.type


@dataclass(frozen=True, slots=True)
class Taps:
    """What a step is to give beside its logits. Whoever reads it declares it, and `|` joins what all of them want.

    hidden    layers after which the residual stream is given
    queries   layers whose queries are given, rotated and scaled as their attention uses them
    topk      the largest k for which the likeliest tokens of nearly every row are read
    """

    hidden: tuple[int, ...] = ()
    queries: tuple[int, ...] = ()
    topk: int = 0

    def __or__(self, other: Taps) -> Taps:
        if other == self:
            return self
        hidden, queries = {*self.hidden, *other.hidden}, {*self.queries, *other.queries}
        return Taps(tuple(sorted(hidden)), tuple(sorted(queries)), max(self.topk, other.topk))


NO_TAPS = Taps()


@dataclass(slots=True, eq=False)
class DecoderOutput:
    """`rows`: logits f32[R, V] of `batch.logit_rows`; `hidden[layer]` f32[T, D] and `queries[layer]` f32[T, Hq, C] as
    Taps has them.

    All may be views of buffers that the next forward of the same decoder overwrites: copy what must live longer.
    """

    rows: Logits
    hidden: dict[int, Logits] = field(default_factory=dict)
    queries: dict[int, Logits] = field(default_factory=dict)

    @property
    def logits(self) -> torch.Tensor:
        """`rows` as a tensor, which shares their memory."""
        if not isinstance(self.rows, np.ndarray):
            return self.rows
        import torch

        return torch.from_numpy(self.rows)


class Decoder(ABC):
    """A model that runs packed steps over a KV storage that it made. It advances nothing by itself."""

    config: ModelConfig
    precision: Precision
    device: Device
    weight_bytes: int  # read by one decoding step: all weights but the embedding rows not looked up

    #: Whether a row's result is the same whatever other rows share the step. Without it `identical` is not promised.
    row_invariant: bool

    @abstractmethod
    def new_storage(self, num_pages: int) -> KVStorage:
        """KV memory for `num_pages` pages, in this decoder's layout."""

    @abstractmethod
    def forward(self, batch: ForwardBatch, storage: KVStorage, taps: Taps = NO_TAPS) -> DecoderOutput:
        """Run one packed step; writes the rows' keys and values to their places in `storage`. Raises ParameterError for
        taps that it does not have."""

    def final_norm(self, hidden: Logits) -> FloatArray:
        """The norm in front of the output head, of the residual stream after the last layer. f32[n, D] -> f32[n, D].

        Raises UnsupportedModel where a decoder has none.
        """
        raise UnsupportedModel(f"{type(self).__name__} gives out no final hidden states; the CPU and torch decoders do")

    def embedding(self, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        """Rows of the embedding table, f32[n, D], as they are before the model's own `embedding_scale`.

        `ForwardBatch.embeddings` are of the same kind (the step scales them), so given the rows of its tokens a step
        gives the same bits. Raises UnsupportedModel where a decoder has no such table.
        """
        raise UnsupportedModel(f"{type(self).__name__} does not give out its embeddings; the CPU and torch decoders do")


def checked_layers(config: ModelConfig, layers: Collection[int]) -> frozenset[int]:
    """Raises ParameterError for a layer that the model does not have."""
    wrong = sorted(i for i in layers if not 0 <= i < config.num_layers)
    if wrong:
        raise ParameterError(f"no layer {wrong[0]}: the model has the layers 0 to {config.num_layers - 1}")
    return frozenset(layers)


def checked_ids(config: ModelConfig, ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """Sorted, each once. Raises ParameterError for none, or one outside the vocabulary."""
    kept = np.unique(np.asarray(ids, dtype=np.int64))
    if not len(kept) or kept[0] < 0 or kept[-1] >= config.vocab_size:
        raise ParameterError(f"an output head is cut to some of the tokens 0 to {config.vocab_size - 1}, not to {ids}")
    return kept
