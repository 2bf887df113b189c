"""The target's answers of a step, read lazily and once for whoever asks.

Shapes: `R` rows, `V` vocabulary.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from ..ops.select import row_argmax, row_topk


class StepOutputs:
    """Logits f32[R, V] of a whole packed step; argmax and top-k are computed for all rows at the first request.

    `expect_topk`: the k that a drafter will ask for afterwards (0: none); then one scan of the logits serves both.
    """

    def __init__(self, logits: torch.Tensor, expect_topk: int = 0) -> None:
        self.logits = logits
        self._expected = min(expect_topk, logits.shape[1])
        self._argmax: NDArray[np.int64] | None = None
        self._topk: tuple[NDArray[np.float32], NDArray[np.int64]] | None = None

    def argmax(self) -> NDArray[np.int64]:
        if self._argmax is None:
            if self._topk is not None or self._expected:
                self._argmax = self.topk(max(self._expected, 1))[1][:, 0]
            else:
                self._argmax = row_argmax(self.logits)
        return self._argmax

    def topk(self, k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Largest k logits of each row, in falling order (ties: smaller id first), and their ids. [R, k] each."""
        if self._topk is None or self._topk[0].shape[1] < k:
            self._topk = row_topk(self.logits, max(k, self._expected))
        values, ids = self._topk
        return values[:, :k], ids[:, :k]


class TargetOutputs:
    """The rows `start:stop` of a step: one sequence's."""

    def __init__(self, step: StepOutputs, start: int, stop: int) -> None:
        self._step, self._rows = step, slice(start, stop)

    @classmethod
    def of(cls, logits: torch.Tensor) -> TargetOutputs:
        """Outputs of a step of one sequence."""
        return cls(StepOutputs(logits), 0, len(logits))

    def __len__(self) -> int:
        return self._rows.stop - self._rows.start

    def logits(self, row: int) -> torch.Tensor:
        """Raw logits f32[V] of one row; a view, not to be written to."""
        return self._step.logits[self._rows.start + row]

    def argmax(self) -> NDArray[np.int64]:
        return self._step.argmax()[self._rows]

    def topk(self, k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        values, ids = self._step.topk(k)
        return values[self._rows], ids[self._rows]
