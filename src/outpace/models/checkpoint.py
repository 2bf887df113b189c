"""The contract of a model source: a config, named tensors, and what the tokenizer needs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .config import ModelConfig
from .formats import Format


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """Contents of `tokenizer.json` and of `tokenizer_config.json` (chat template and special tokens in it)."""

    tokenizer_json: str
    tokenizer_config: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Raw:
    """A matrix as the file has it. `data`: u8[N, bytes per row], a view of the file; `rows` i64[N]: the file's row of
    each output, None where they are in order; `label`: file and tensor, for messages."""

    data: NDArray[np.uint8]
    form: Format
    rows: NDArray[np.int64] | None
    label: str


class Checkpoint(ABC):
    """Read-only. Tensors carry their `transformers` names and layout, whatever the file's own convention (see
    models.block). They are exactly those that the configuration calls for: a file is refused when it is opened
    otherwise (models.layout).
    """

    config: ModelConfig

    @abstractmethod
    def names(self) -> set[str]: ...

    @abstractmethod
    def tensor(self, name: str) -> NDArray[np.float32]:
        """Read (and dequantise) one tensor. Raises CorruptModel, or UnsupportedModel for an unknown quantisation."""

    def rows(self, name: str, first: int, last: int) -> NDArray[np.float32]:
        """Rows first..last-1 of `tensor(name)`, for less than the whole where that is possible. Threads may call it at
        the same time."""
        return self.tensor(name)[first:last]

    def raw(self, name: str) -> Raw | None:
        """A matrix in the file's own format, nothing computed; None where it is only to be had as floats."""
        return None

    @abstractmethod
    def tokenizer_files(self) -> TokenizerFiles: ...
