"""Every outcome of code that makes random choices, each with its probability: nothing is estimated.

The code runs once per outcome. Its random choices, `sampling.uniform`, `draw` and `choose`, are answered by an
`Enumeration`, in whatever module they were imported into (`scripted`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from ..decoding import sampling
from ..types import SamplingParams


class Enumeration:
    """Walks the tree of choices depth first. Within one outcome `probability` is the product of those made so far."""

    def __init__(self) -> None:
        self._answers: list[int] = []
        self._options: list[int] = []
        self._at, self.probability = 0, 1.0

    def outcomes(self) -> Iterator[None]:
        """One turn for each outcome. Not to be left early: what was not walked is walked by the next call."""
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

    def choose_token(self, processed: np.ndarray, params: SamplingParams, position: int) -> int:
        """Stands for `sampling.choose`, which draws in compiled code."""
        return self.choose(sampling.distribution_of(processed, params).tolist())

    def uniform(self, *key: Any) -> Comparable:
        """Stands for `sampling.uniform` where it is only compared, or handed to `draw`."""
        return Comparable(self)


class Comparable:
    """A uniform number in [0, 1) that has not been read yet. Anything but a comparison is a TypeError."""

    def __init__(self, enumeration: Enumeration) -> None:
        self._enumeration = enumeration

    def __lt__(self, threshold: float) -> bool:
        below = min(1.0, max(0.0, threshold))
        return self._enumeration.choose([below, 1 - below]) == 0

    def __le__(self, threshold: float) -> bool:
        return self < threshold

    def __gt__(self, threshold: float) -> bool:
        return not self < threshold

    def __ge__(self, threshold: float) -> bool:
        return not self < threshold


@contextmanager
def scripted() -> Iterator[Enumeration]:
    """While it lasts, an enumeration answers the random choices of every module. One thread at a time."""
    script = Enumeration()
    stand_ins: list[tuple[Callable[..., Any], Callable[..., Any]]] = [
        (sampling.uniform, script.uniform),
        (sampling.draw, script.draw),
        (sampling.choose, script.choose_token),
    ]
    replaced: list[tuple[Any, str, Any]] = []
    try:
        for module in list(sys.modules.values()):
            names = getattr(module, "__dict__", {})
            for original, stand_in in stand_ins:
                if names.get(original.__name__) is original:
                    replaced.append((module, original.__name__, original))
                    names[original.__name__] = stand_in
        yield script
    finally:
        for module, name, original in replaced:
            setattr(module, name, original)
