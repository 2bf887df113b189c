"""The contract of everything that runs a target or draft model, whatever the device."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..cache.storage import KVStorage
from ..types import Precision
from .batch import ForwardBatch
from .config import ModelConfig


@dataclass(slots=True, eq=False)
class DecoderOutput:
    """`logits` f32[R, V] of `batch.logit_rows`; `hidden[layer]` f32[T, D], the residual stream after that layer.

    Both may be views of buffers that the next forward of the same decoder overwrites: copy what must live longer.
    """

    logits: torch.Tensor
    hidden: dict[int, torch.Tensor]


class Decoder(ABC):
    """A model that runs packed steps over a KV storage that it made. It advances nothing by itself."""

    config: ModelConfig
    precision: Precision
    device: torch.device
    weight_bytes: int  # read by one decoding step: all weights but the embedding rows not looked up

    #: Whether a row's result is the same whatever other rows share the step. Without it `identical` is not promised.
    row_invariant: bool

    @abstractmethod
    def new_storage(self, num_pages: int) -> KVStorage:
        """KV memory for `num_pages` pages, in this decoder's layout."""

    @abstractmethod
    def forward(self, batch: ForwardBatch, storage: KVStorage, hidden_layers: Sequence[int] = ()) -> DecoderOutput:
        """Run one packed step; writes the rows' keys and values to their places in `storage`."""
