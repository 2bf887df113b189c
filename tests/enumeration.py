"""Every outcome of code that makes random choices, each with its probability: nothing is estimated.

The code runs once per outcome; its random choices are replaced by `Enumeration.draw` and `Enumeration.uniform`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np


class Enumeration:
    """Walks the tree of choices depth first. Within one outcome `probability` is the product of those made so far."""

    def __init__(self) -> None:
        self._answers: list[int] = []
        self._options: list[int] = []
        self._at, self.probability = 0, 1.0

    def outcomes(self) -> Iterator[None]:
        while True:
            self._at, self.probability = 0, 1.0
            yield
            while self._answers and self._answers[-1] + 1 == self._options[-1]:
                self._answers.pop()
                self._options.pop()
            if not self._answers:
                return
            self._answers[-1] += 1

    def choose(self, probabilities: list[float]) -> int:
        """An index; those without probability are never returned."""
        possible = [i for i, p in enumerate(probabilities) if p > 0]
        if self._at == len(self._answers):
            self._answers.append(0)
            self._options.append(len(possible))
        chosen = possible[self._answers[self._at]]
        self._at += 1
        self.probability *= probabilities[chosen]
        return chosen

    def draw(self, weights: np.ndarray, u: Any) -> int:
        """Stands for `sampling.draw`."""
        exact = weights.astype(np.float64)
        return self.choose((exact / exact.sum()).tolist())

    def uniform(self, *key: Any) -> _Uniform:
        """Stands for `sampling.uniform` where it is only compared."""
        return _Uniform(self)


class _Uniform:
    def __init__(self, enumeration: Enumeration) -> None:
        self._enumeration = enumeration

    def __lt__(self, threshold: float) -> bool:
        accept = min(1.0, threshold)
        return self._enumeration.choose([accept, 1 - accept]) == 0
