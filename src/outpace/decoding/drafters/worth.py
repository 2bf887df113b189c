"""Whether asking a drafter repays its time: measured cost against measured gain."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from ...types import Draft
from ..contracts import node_depths

_EDGES = (0.25, 0.5, 1.0, 2.0, 4.0)  # of what the drafters before it promise: bins of the table of gains
_PRIOR = (1.0, 0.8, 0.6, 0.4, 0.3, 0.2)  # tokens gained, to start from: hopeful, so that each is tried
_WEIGHT = 6.0  # steps that the prior is worth
_HORIZON = 60.0  # steps over which gains and ratios are averaged
_TIMES = 0.9  # fade of measured times
_SHORT, _LONG = 8, 64  # steps until a drafter that does not pay is tried again, at first and at most


@dataclass(slots=True)
class _Customer:
    """One sequence: how its gains compare with what the table expects, and when the drafter is tried next."""

    gained: float = _WEIGHT
    foretold: float = _WEIGHT
    skipped: int = 0
    nap: int = _SHORT


class Worth:
    """Bookkeeping for one drafter.

    The gain of a step is the number of accepted tokens that no drafter before it proposed. It is expected from a table
    by what those promised (beside a long certain lookup a draft model adds little), times how this sequence compares
    with the others. Where it does not pay it is tried again after 8 skipped steps, then 16, up to 64.
    """

    def __init__(self) -> None:
        self._gain = list(_PRIOR)
        self._trials = [_WEIGHT] * len(_PRIOR)
        self._customers: dict[int, _Customer] = {}
        self.round_s = 0.0  # of one call of `propose`
        self.forward_s = 0.0  # of one level of a draft
        self.observe_s = 0.0
        self._unreported = 0.0
        self.asked = self.skipped = self.gained = 0

    def pays(self, id: int, promised: float, price: float, sequences: int) -> bool:
        """`price`: tokens that a second is worth; `sequences` share a call's time."""
        customer = self._customers.setdefault(id, _Customer())
        gain = self._gain[bisect_right(_EDGES, promised)] * customer.gained / customer.foretold
        if gain >= price * self.cost(sequences):
            customer.skipped, customer.nap = 0, _SHORT
            return True
        customer.skipped += 1
        if customer.skipped > customer.nap:
            customer.skipped, customer.nap = 0, min(2 * customer.nap, _LONG)
            return True
        self.skipped += 1
        return False

    def cost(self, sequences: int) -> float:
        """Seconds for one sequence of so many."""
        return self.round_s / max(sequences, 1) + self.observe_s

    def took(self, seconds: float, drafts: Seq[Draft]) -> None:
        """A call of `propose`."""
        levels = max((int(node_depths(d.parents).max()) + 1 for d in drafts if len(d)), default=1)
        self.round_s = _mix(self.round_s, seconds)
        self.forward_s = _mix(self.forward_s, seconds / levels)
        self._unreported += seconds
        self.asked += len(drafts)

    def learned(self, id: int, promised: float, gain: int, seconds: float) -> None:
        """A step was committed in which the drafter was asked for sequence `id`; observing it took `seconds`."""
        cell = bisect_right(_EDGES, promised)
        customer = self._customers.setdefault(id, _Customer())
        keep = 1 - 1 / _HORIZON
        customer.foretold = keep * customer.foretold + self._gain[cell]
        customer.gained = keep * customer.gained + gain
        self._trials[cell] = min(self._trials[cell] + 1, _HORIZON)
        self._gain[cell] += (gain - self._gain[cell]) / self._trials[cell]
        self.observe_s = _mix(self.observe_s, seconds)
        self.gained += gain

    def forget(self, id: int) -> None:
        self._customers.pop(id, None)

    def explain(self) -> str:
        chances = self.asked + self.skipped
        if not self.asked:
            return "never asked" if chances else "no step yet"
        return (
            f"asked in {self.asked} of {chances} steps, {1e3 * self.cost(1):.2f} ms and "
            f"{self.gained / self.asked:.2f} accepted tokens of its own each time"
        )

    def spent(self) -> float:
        """Seconds of drafting since the last call."""
        seconds, self._unreported = self._unreported, 0.0
        return seconds


def _mix(average: float, new: float) -> float:
    return new if average == 0 else _TIMES * average + (1 - _TIMES) * new
