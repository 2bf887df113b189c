"""Goodput: as many draft nodes as make the expected tokens per second largest, none if none pay."""

from __future__ import annotations

import numpy as np

from ...registry import register
from ...types import Draft
from ..contracts import Drafter
from .costs import StepCosts
from .planner import Planner, Room, keep_best, reaches

_FADE = 0.9  # of what is averaged over steps


@register(
    kind="planner",
    family="SPEC",
    title="Goodput from measured step times",
    paper="https://arxiv.org/abs/2406.14066",
    exactness="identical",
    needs=("measured step times",),
)
class Goodput(Planner):
    """With T(rows) the measured time of a step and nodes in falling order of the probability of being accepted,
    verifies the n nodes that maximise

        (sequences + the sum of their probabilities) / (drafting time + T(sequences + n)).

    Liu et al., "Optimizing Speculative Decoding for Serving Large Language Models Using Goodput" (SmartSpec), section
    4: a length for each request from load and acceptance; here over trees and over the whole batch, so that n is also
    the hardware-aware tree size of Sequoia (arXiv 2402.12374, section 3.3) and PPD (arXiv 2405.18628, section 4.2).
    Before drafting it tells the drafter what a second is worth (`price`), so that sources that do not repay their time
    rest.
    """

    name = "goodput"
    paper = "https://arxiv.org/abs/2406.14066"
    needs_costs = True

    def __init__(self, costs: StepCosts | None = None) -> None:
        super().__init__(costs)
        self._scale = 1.0  # of this moment's step times to the table's
        self._drafting = 0.0  # seconds of a step
        self._rate = 0.0  # tokens per second of all sequences
        self._steps = self._rows = self._tokens = 0
        self._spent = 0.0

    @property
    def _table(self) -> StepCosts:
        assert self.costs is not None
        return self.costs

    def budgets(self, drafter: Drafter, room: Room) -> list[int]:
        sequences = len(room.caps)
        curve = self._table.curve(sequences + room.nodes, room.context)
        plain = sequences / (self._scale * float(curve[sequences - 1]))
        drafter.price = max(self._rate, plain)
        # The cheapest row that is left gives the least probability that can repay one.
        added = np.diff(curve[sequences - 1 :]) * self._scale
        drafter.floor = drafter.price * float(np.maximum(added, 0).min(initial=0.0)) if len(added) else 1.0
        return [min(cap, room.nodes) for cap in room.caps]

    def choose(self, drafts: list[Draft], room: Room) -> list[Draft]:
        sequences = len(drafts)
        reach = [reaches(draft) for draft in drafts]
        best = np.sort(np.concatenate(reach))[::-1][: room.nodes] if drafts else np.empty(0, dtype=np.float32)
        gains = sequences + np.concatenate(([0.0], np.cumsum(best)))
        times = self._scale * self._table.curve(sequences + len(best), room.context)[sequences - 1 :] + self._drafting
        return keep_best(drafts, int(np.argmax(gains / times)), reach)

    def observe(self, rows: int, context: float, tokens: int, draft_s: float, step_s: float) -> None:
        expected = self._table.step(rows, context)
        # An interrupted step says nothing of the next one.
        self._scale += (1 - _FADE) * (min(max(step_s / expected, 0.5), 2.0) - self._scale)
        self._drafting += (1 - _FADE) * (draft_s - self._drafting)
        self._rate += (1 - _FADE) * (tokens / (draft_s + step_s) - self._rate)
        self._steps += 1
        self._rows += rows
        self._tokens += tokens
        self._spent += draft_s + step_s

    def plain_seconds(self, sequences: int, context: float) -> float:
        return self._scale * self._table.step(sequences, context)

    def explain(self) -> list[str]:
        if not self._steps:
            return ["no step yet"]
        one = self._table.step(1, 0)
        rows = ", ".join(f"{n} rows {self._table.step(n, 0) / one:.2f}" for n in (4, 8, 16, 32))
        return [
            f"a step of one row takes {1e3 * one * self._scale:.1f} ms; beside that: {rows}",
            f"{self._steps} steps verified {self._rows / self._steps:.1f} rows and gave "
            f"{self._tokens / self._steps:.2f} tokens each, {self._tokens / self._spent:.1f} tokens/s",
        ]
