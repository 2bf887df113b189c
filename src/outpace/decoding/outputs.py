"""The target's outputs of a step, computed at first use and kept for the step.

Shapes: `R` rows, `V` vocabulary.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..models.decoder import DecoderOutput
from ..ops.select import row_argmax, row_topk
from ..types import Logits

_ALL = slice(None)


class StepOutputs:
    """Logits f32[R, V] of a whole packed step; argmax is computed for all rows at the first request, top-k too if it is
    expected, else for the rows requested. Beside them what was tapped.

    `expect_topk`: the k that a drafter will request afterwards, for most rows (0: none); then one scan of the logits
    serves both. `threads`: that look for them.
    """

    def __init__(self, output: DecoderOutput, expect_topk: int = 0, threads: int = 1) -> None:
        self.output, self.logits, self._threads = output, output.rows, threads
        self._expected = min(expect_topk, output.rows.shape[1])
        self._argmax: NDArray[np.int64] | None = None
        self.found: list[int] = []  # the argmax of each row, once somebody asked
        self.drawn: dict[int, int] = {}  # tokens that were drawn from rows already
        self._topk: tuple[NDArray[np.float32], NDArray[np.int64]] | None = None

    def argmax(self) -> NDArray[np.int64]:
        if self._argmax is None:
            scanned = self._topk is not None or self._expected
            self._argmax = self.topk(1)[1][:, 0] if scanned else row_argmax(self.logits, self._threads)
        return self._argmax

    def best(self) -> list[int]:
        """`argmax`, as a list."""
        if not self.found:
            self.found = self.argmax().tolist()
        return self.found

    def topk(self, k: int, rows: slice = _ALL) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Largest k logits of `rows`, in falling order (ties: smaller id first), and their ids. [rows, k] each."""
        if self._topk is None or self._topk[0].shape[1] < k:
            if rows != _ALL and k > self._expected:
                return row_topk(self.logits[rows], k, self._threads)
            self._topk = row_topk(self.logits, max(k, self._expected), self._threads)
        values, ids = self._topk
        return values[rows, :k], ids[rows, :k]


class TargetOutputs:
    """One sequence's part of a step: the logits `start:stop`, and `rows` of what was tapped. A chunk of a prompt has
    more rows than logits."""

    __slots__ = ("_rows", "_start", "_step", "_stop")

    def __init__(self, step: StepOutputs, start: int, stop: int, rows: slice) -> None:
        self._step, self._start, self._stop, self._rows = step, start, stop, rows

    @classmethod
    def of(cls, logits: Logits) -> TargetOutputs:
        """Outputs of a step of one sequence."""
        return cls(StepOutputs(DecoderOutput(logits)), 0, len(logits), _ALL)

    def __len__(self) -> int:
        return self._stop - self._start

    def logits(self, row: int) -> Logits:
        """Raw logits f32[V] of one row; a view, not to be written to."""
        return self._step.logits[self._start + row]

    def hidden(self, layer: int) -> Logits:
        """The residual stream after a layer, f32[n, D]; see Taps."""
        return self._step.output.hidden[layer][self._rows]

    def queries(self, layer: int) -> Logits:
        """The queries of a layer, f32[n, Hq, C]; see Taps."""
        return self._step.output.queries[layer][self._rows]

    def argmax(self) -> NDArray[np.int64]:
        return self._step.argmax()[self._start : self._stop]

    def best(self, row: int) -> int:
        """The argmax of one row."""
        step = self._step
        return (step.found or step.best())[self._start + row]

    def drawn(self, row: int) -> int | None:
        """The token that was drawn from a row before the verification, if one was; see Verifier.prepare."""
        return self._step.drawn.get(self._start + row)

    def draw(self, row: int, token: int) -> None:
        """Keep a drawn token for `drawn`."""
        self._step.drawn[self._start + row] = token

    def topk(self, k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        return self._step.topk(k, slice(self._start, self._stop))
