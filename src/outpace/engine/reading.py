"""What reading a prompt tells beside its next token: how likely each of its tokens was, and a vector for the text.

Both are gathered while the prompt is read, chunk by chunk, so that neither [T, V] logits nor [T, D] hidden states are
kept. Shapes: `n` rows of a chunk, `V` vocabulary, `D` width.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ..ops.select import row_logsumexp, row_topk
from ..types import FloatArray, Logits, Pooling, PromptReading

Norm = Callable[[Logits], FloatArray]


class PromptReader:
    """Gathers what one prompt gives. `logprobs`: as SamplingParams.prompt_logprobs; `pooling`: as RequestOptions has
    it; `norm`: the model's final norm, [n, D] -> [n, D]."""

    def __init__(self, tokens: list[int], logprobs: int | None, pooling: Pooling | None, norm: Norm) -> None:
        self._tokens, self._norm = tokens, norm
        self._k, self._pooling = logprobs, pooling
        self.restart()

    @property
    def wants_logits(self) -> bool:
        return self._k is not None

    @property
    def wants_hidden(self) -> bool:
        return self._pooling is not None

    def restart(self) -> None:
        """Its pages were lost: the prompt is read from the beginning again."""
        self._logprobs: list[float] = []
        self._top: list[list[tuple[int, float]]] = []
        self._sum: NDArray[np.float64] | None = None
        self._read = 0

    def add(self, at: int, logits: Logits | None, hidden: Logits | None) -> None:
        """The rows `at`.. of the prompt: raw logits [n, V], hidden states after the last layer [n, D]."""
        assert at == self._read, f"prompt rows come in order: {at} after {self._read}"
        rows = logits if logits is not None else hidden
        assert rows is not None
        self._read += len(rows)
        if logits is not None:
            self._score(logits, self._tokens[at + 1 : at + 1 + len(logits)])
        if hidden is not None:
            self._pool(hidden)

    def _score(self, logits: Logits, following: list[int]) -> None:
        """Each row tells how likely the token behind it was; the last one of the prompt has none."""
        assert self._k is not None
        scored = logits[: len(following)]
        if not len(scored):
            return
        norm = row_logsumexp(scored)  # row by row in one order: the same whatever else a chunk holds
        chosen = np.array([float(row[token]) for row, token in zip(scored, following, strict=True)])
        self._logprobs += (chosen - norm).tolist()
        if self._k:
            values, ids = row_topk(scored, min(self._k, scored.shape[1]))
            pairs = zip(ids.tolist(), (values - norm[:, None]).tolist(), strict=True)
            self._top += [list(zip(row, found, strict=True)) for row, found in pairs]
        else:
            self._top += [[] for _ in following]

    def _pool(self, hidden: Logits) -> None:
        rows = self._norm(hidden if self._pooling == "mean" else hidden[-1:]).sum(axis=0, dtype=np.float64)
        self._sum = rows if self._sum is None or self._pooling == "last" else self._sum + rows

    def result(self) -> PromptReading:
        """Of what was read so far: the whole prompt, unless the request ended before."""
        embedding = None
        if self._sum is not None:
            length = float(np.linalg.norm(self._sum))
            embedding = (self._sum / (length or 1.0)).astype(np.float32)
        wants = self._k is not None
        return PromptReading(self._logprobs if wants else None, self._top if wants else None, embedding)
