"""What an audit found, as data, and the statistics that it rests on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from math import ceil, comb, inf, log, sqrt
from typing import Any

#: A check of frequencies fails below this p-value, divided by the number of such checks: one false alarm in 10,000
ALARM = 1e-4
#: What every audit says that it could have seen is seen with this probability
SURE = 0.95


@dataclass(frozen=True, slots=True)
class Check:
    """One question and its answer.

    kind      sampler, enumeration, walk, frequencies, ragged, streams, seeds, owners, file, url
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
    assert len(observed) == len(expected), "a count for each expectation"
    if any(o > 0 and e <= 0 for o, e in zip(observed, expected, strict=True)):
        return float("inf"), len(observed) - 1, 0.0
    cells = [(o, e) for o, e in zip(observed, expected, strict=True) if e > 0]
    statistic, freedom = sum((o - e) ** 2 / e for o, e in cells), len(cells) - 1
    if freedom < 1:
        return statistic, 0, 1.0
    return statistic, freedom, _tail(statistic, freedom)


def seen_one_in(looks: int) -> int:
    """The rarest fault that so many looks without a find exclude: were one look in so many at fault, or more
    of them, a fault would have been found with probability SURE. 0 for no looks, about looks / 3 for many."""
    return int(1 / (1 - (1 - SURE) ** (1 / looks))) if looks else 0


def looks_for(one_in: int) -> int:
    """How many looks it takes to see one fault in so many with probability SURE."""
    return ceil(log(1 - SURE) / log(1 - 1 / one_in))


def seen_variation(texts: int, freedom: int, level: float) -> float:
    """The total variation from which on chi-square over so many texts finds a shift, whatever its shape over the cells,
    with probability SURE at this level.

    A shift by d has at least the noncentrality 4 texts d^2 (Cauchy and Schwarz); the noncentral distribution is taken
    to be normal, as Patnaik's approximation is for many cells.
    """
    if not texts or freedom < 1:
        return inf
    critical = _solve(lambda x: _tail(x, freedom) - level, freedom, 40.0 * freedom + 400)
    moved = _solve(lambda n: critical - (freedom + n - 1.645 * sqrt(2 * (freedom + 2 * n))), 0, 40 * critical)
    return sqrt(moved / (4 * texts))


def _solve(falling: Callable[[float], float], low: float, high: float) -> float:
    """Where a falling function is zero, by halves."""
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if falling(middle) > 0 else (low, middle)
    return (low + high) / 2


def _tail(statistic: float, freedom: int) -> float:
    """Probability that chi-square is larger."""
    import torch

    half = torch.tensor([freedom / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


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
