"""What an audit found, as data, and the statistics that it rests on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from math import comb, sqrt
from typing import Any

#: A check of frequencies fails below this p-value, divided by the number of such checks: one false alarm in 10,000
ALARM = 1e-4


@dataclass(frozen=True, slots=True)
class Check:
    """One question and its answer.

    kind      enumeration, walk, frequencies, ragged, streams, seeds, owners, file, url
    subject   what was looked at, such as "rejection, top-p"
    holds     whether what is declared is what was found
    evidence  a sentence with the figures
    """

    kind: str
    subject: str
    holds: bool
    evidence: str
    numbers: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def chi_square(observed: Sequence[float], expected: Sequence[float]) -> tuple[float, int, float]:
    """(statistic, degrees of freedom, p-value) of counts against expected counts, both over all cells, so that they
    have one sum. Cells that nothing is expected in must be empty, else the p-value is 0."""
    import torch

    assert len(observed) == len(expected), "a count for each expectation"
    if any(o > 0 and e <= 0 for o, e in zip(observed, expected, strict=True)):
        return float("inf"), len(observed) - 1, 0.0
    cells = [(o, e) for o, e in zip(observed, expected, strict=True) if e > 0]
    statistic, freedom = sum((o - e) ** 2 / e for o, e in cells), len(cells) - 1
    if freedom < 1:
        return statistic, 0, 1.0
    half = torch.tensor([freedom / 2, statistic / 2], dtype=torch.float64)
    return statistic, freedom, float(torch.special.gammaincc(half[0], half[1]))


def total_variation(observed: Sequence[float], expected: Sequence[float]) -> float:
    """Half the sum of differences of two distributions over the same cells; neither needs to be normalised."""
    a, b = sum(observed), sum(expected)
    return sum(abs(o / a - e / b) for o, e in zip(observed, expected, strict=True)) / 2


def wilson(right: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """Confidence interval (95 %) of a share, by Wilson's score."""
    if not total:
        return 0.0, 1.0
    share, unit = right / total, z * z / total
    middle = (share + unit / 2) / (1 + unit)
    spread = z * sqrt(share * (1 - share) / total + unit / (4 * total)) / (1 + unit)
    return max(0.0, middle - spread), min(1.0, middle + spread)


def sign_test(lost: int, won: int) -> float:
    """Two-sided p-value (McNemar, exact) that so uneven a split of the pairs that differ comes by chance."""
    n = lost + won
    if not n:
        return 1.0
    tail = sum(comb(n, k) for k in range(min(lost, won) + 1)) / 2**n
    return min(1.0, 2 * tail)
