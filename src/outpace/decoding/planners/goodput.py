"""Goodput: as many draft nodes as make the expected tokens per second largest, none if none pay."""

from __future__ import annotations

from itertools import accumulate, chain
from operator import truediv

from ...registry import register
from ...types import Draft
from ..contracts import Drafter
from ..tree import keep_best, reaches
from .costs import StepCosts
from .planner import Planner, Room

_FADE, _SLOW = 0.9, 0.95  # of averages over steps
_BEND = 0.03  # of the error of one step goes to what its number of rows costs beside plain decoding
_PEAK = 0.8  # of the rate that a step promises is taken as what steps will give
_EQUAL = 0.01  # of a step's tokens is no difference
_TRIAL = 3  # nodes that are verified to see what they cost, though they do not seem to pay
_OFTEN, _SELDOM, _KNOWN = 16, 256, 8  # steps without drafts until then, before and after so many steps with some
_SHOWN = (4, 8, 16, 32)  # rows whose cost `explain` tells


@register(
    kind="planner",
    family="SPEC",
    title="Goodput from measured step times",
    paper="https://arxiv.org/abs/2406.14066",
    exactness="identical",
    needs=("measured step times",),
    claim="up to 3.2x lower mean latency (SmartSpec)",
)
class Goodput(Planner):
    """With T(rows) the measured time of a step, and nodes in falling order of the probability of being accepted,
    verifies the n nodes that maximise

        sum of their probabilities - rate * T(sequences + n),

    where `rate` is what the engine makes of a second: the tokens per second of its last steps, of plain decoding, or
    nearly those that this step promises, whichever is most. That maximises tokens per second in the long run, where the
    quotient of one step alone would be too careful in steps that promise much. Drafts that do not pay are dropped, and
    what is left is plain decoding.

    Liu et al., "Optimizing Speculative Decoding for Serving Large Language Models Using Goodput" (SmartSpec), section
    4: a length for each request from load and acceptance; here over trees and over the whole batch, so that n is also
    the hardware-aware tree size of Sequoia (arXiv 2402.12374, section 3.3) and PPD (arXiv 2405.18628, section 4.2).
    Before drafting it tells the drafter the rate (`price`), so that sources that do not repay their time rest.

    The table was measured in a loop of equal steps, at another moment; a row that seemed free there may cost a tenth of
    a step in the traffic of real ones. So the step times of plain decoding and, beside them, of 2, 4, 8, ... rows are
    corrected by those of the steps that are run, and where drafts do not seem to pay some are verified now and then: a
    table that was measured on a busy machine would otherwise never be found out.
    """

    name = "goodput"
    paper = "https://arxiv.org/abs/2406.14066"
    needs_costs = True

    def __init__(self, costs: StepCosts | None = None) -> None:
        super().__init__(costs)
        self._scale = 1.0  # of this moment's step times to the table's
        self._bends = [1.0] * 20  # the same beside plain decoding, by the logarithm of the rows
        self._seen = [0] * len(self._bends)  # steps of so many rows
        self._sequences = 1  # of the last step
        self._idle = 0  # steps since one verified drafts
        self._trying = False
        self._recent = (0.0, 0.0)  # tokens of all sequences and seconds, older steps fading
        self._steps = self._rows = self._tokens = 0
        self._spent = 0.0

    @property
    def _table(self) -> StepCosts:
        assert self.costs is not None
        return self.costs

    def budgets(self, drafter: Drafter, room: Room) -> list[int]:
        self._sequences = sequences = len(room.caps)
        times = self._times(sequences, room.nodes, room.context)
        drafter.price = rate = self._rate(sequences, times[0])
        if room.nodes:  # n nodes of this probability each at most cost what they bring, whatever n
            drafter.floor = rate * min((time - times[0]) / n for n, time in enumerate(times[1:], 1))
            known = self._seen[_bin(sequences + min(_TRIAL, room.nodes))] >= _KNOWN
            self._trying = self._idle >= (_SELDOM if known else _OFTEN)
            if self._trying:
                drafter.floor = 0.0
        return [min(cap, room.nodes) for cap in room.caps]

    def _times(self, sequences: int, nodes: int, context: float) -> list[float]:
        """Seconds of a step with 0 to `nodes` draft rows, as things are; fewer rows are never slower."""
        curve = self._table.curve(sequences + nodes, context)[sequences - 1 :].tolist()
        scale, bends = self._scale, self._bends
        times = [scale * bends[_bin(rows)] * seconds for rows, seconds in enumerate(curve, sequences)]
        return list(accumulate(reversed(times), min))[::-1]

    def choose(self, drafts: list[Draft], room: Room) -> list[Draft]:
        if not any(map(len, drafts)):
            return drafts
        sequences = len(drafts)
        reach = [reaches(draft) for draft in drafts]
        best = sorted(chain.from_iterable(each.tolist() for each in reach), reverse=True)[: room.nodes]
        # Mostly a handful of nodes, where lists are faster than arrays
        gains = list(accumulate(best, initial=float(sequences)))
        # What few rows cost is bounded by what more of them do, also where this draft has not as many
        times = self._times(sequences, room.nodes, room.context)[: len(best) + 1]
        rate = max(self._rate(sequences, times[0]), _PEAK * max(map(truediv, gains, times)))
        worth = [gain - rate * time for gain, time in zip(gains, times, strict=True)]
        # Of choices that are as good as equal the one with the fewest rows: it promises least that may not come.
        most = max(worth)
        enough = [value >= most - _EQUAL * gain for value, gain in zip(worth, gains, strict=True)]
        count = max(enough.index(True), min(_TRIAL, len(best)) if self._trying else 0)
        return keep_best(drafts, count, reach)

    def _rate(self, sequences: int, plain_s: float) -> float:
        """Tokens a second is worth. `plain_s`: seconds of a plain step."""
        plain = sequences / plain_s
        tokens, seconds = self._recent
        return max(plain, tokens / seconds) if seconds else plain

    def observe(self, rows: int, context: float, tokens: int, draft_s: float, step_s: float) -> None:
        cell = _bin(rows)
        # Twice as slow at most: an interrupted step says nothing of the next one.
        error = min(max(step_s / (self._scale * self._bends[cell] * self._table.step(rows, context)), 0.5), 2.0)
        self._scale *= error ** (1 - _FADE)
        self._idle = self._idle + 1 if rows <= self._sequences else 0
        if cell != _bin(self._sequences):  # plain decoding is what the others are beside
            self._seen[cell] += 1
            self._bends[cell] *= error ** max(_BEND, 1 / (1 + self._seen[cell]))  # the table counts as one step
            for more in range(cell + 1, len(self._bends)):  # nothing is known of those yet
                if self._seen[more] or more == _bin(self._sequences):
                    break
                self._bends[more] = self._bends[cell]
        self._recent = (_SLOW * self._recent[0] + tokens, _SLOW * self._recent[1] + draft_s + step_s)
        self._steps += 1
        self._rows += rows
        self._tokens += tokens
        self._spent += draft_s + step_s

    def plain_seconds(self, sequences: int, context: float) -> float:
        return self._scale * self._bends[_bin(sequences)] * self._table.step(sequences, context)

    def explain(self) -> list[str]:
        if not self._steps:
            return ["no step yet"]
        one = self._table.step(1, 0)
        bends = [self._bends[_bin(n)] / self._bends[0] for n in _SHOWN]
        rows = ", ".join(
            f"{n} rows {bend * self._table.step(n, 0) / one:.2f}" for n, bend in zip(_SHOWN, bends, strict=True)
        )
        return [
            f"a step of one row takes {1e3 * one * self._scale * self._bends[0]:.1f} ms; beside that: {rows}",
            f"{self._steps} steps verified {self._rows / self._steps:.1f} rows and gave "
            f"{self._tokens / self._steps:.2f} tokens each, {self._tokens / self._spent:.1f} tokens/s",
        ]


def _bin(rows: int) -> int:
    """0 for one row, 1 for two, 2 for 3 and 4, 3 for 5 to 8, ..."""
    return (rows - 1).bit_length()
