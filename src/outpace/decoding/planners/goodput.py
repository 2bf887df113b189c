"""Goodput: as many draft nodes as make the expected tokens per second largest, none if none pay."""

from __future__ import annotations

from itertools import accumulate, chain
from operator import truediv

from ...registry import register
from ...types import Draft
from ..contracts import Market
from ..tree import keep_best, reaches
from .costs import StepCosts
from .planner import Planner, StepBudget

_DECAY, _SLOW_DECAY = 0.9, 0.95  # of averages over steps
_LEARNING_RATE = 0.03  # share of one step's error that corrects the cost of its number of rows beside plain's
_PEAK = 0.8  # share of the best step's expected rate that the next steps are assumed to reach
_TOLERANCE = 0.01  # of a step's tokens: choices that differ by less are equal
_TRIAL = 3  # nodes that are verified to measure their cost, though they are not expected to pay
# Steps without drafts until a trial: before and after that many rows were measured _MEASURED times
_TRIAL_EARLY, _TRIAL_LATER, _MEASURED = 16, 256, 8
_SHOWN = (4, 8, 16, 32)  # rows whose cost `explain` shows


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

    where `rate` is the engine's tokens per second: that of its last steps, that of plain decoding, or nearly that
    expected of this step, whichever is highest. This maximises tokens per second in the long run; the quotient of one
    step alone would draft too little in steps that are expected to accept much. Drafts that do not pay are dropped, and
    what is left is plain decoding.

    Liu et al., "Optimizing Speculative Decoding for Serving Large Language Models Using Goodput" (SmartSpec), section
    4: a length for each request from load and acceptance; here over trees and over the whole batch, so that n is also
    the hardware-aware tree size of Sequoia (arXiv 2402.12374, section 3.3) and PPD (arXiv 2405.18628, section 4.2).
    The market has a `rate`, so that sources whose gain does not repay their time are skipped.

    The table was measured in a loop of equal steps, at another moment; a row that cost nothing there may cost a
    tenth of a step between others. So the step times of plain decoding and, beside them, of 2, 4, 8, ... rows are
    corrected by those of the steps that are run, and where drafts are not expected to pay a few are verified now
    and then: a table that was measured on a busy machine would otherwise never be corrected.
    """

    name = "goodput"
    paper = "https://arxiv.org/abs/2406.14066"
    needs_costs = True

    def __init__(self, costs: StepCosts | None = None) -> None:
        super().__init__(costs)
        self._scale = 1.0  # ratio of present step times to the table's
        self._factors = [1.0] * 20  # the same relative to plain decoding, by the logarithm of the rows
        self._measured = [0] * len(self._factors)  # steps of that many rows
        self._prompt_factors = [1.0] * len(self._factors)  # of steps with prompts, by all their rows
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

    def offer(self, budget: StepBudget) -> tuple[list[int], Market]:
        self._sequences = sequences = len(budget.caps)
        times = self._times(sequences, budget.nodes, budget.context)
        rate, floor = self._rate(sequences, times[0]), 0.0
        if budget.nodes:
            known = self._measured[_bin(sequences + min(_TRIAL, budget.nodes))] >= _MEASURED
            self._trying = self._idle >= (_TRIAL_LATER if known else _TRIAL_EARLY)
            if not self._trying:  # n nodes of this probability each at most cost what they bring, whatever n
                floor = rate * min((time - times[0]) / n for n, time in enumerate(times[1:], 1))
        return [min(cap, budget.nodes) for cap in budget.caps], Market(floor=floor, rate=rate)

    def _times(self, sequences: int, nodes: int, context: float) -> list[float]:
        """Seconds of a step with 0 to `nodes` draft rows, as things are; fewer rows are never slower."""
        curve = self._table.curve(sequences + nodes, context)[sequences - 1 :].tolist()
        scale, factors = self._scale, self._factors
        times = [scale * factors[_bin(rows)] * seconds for rows, seconds in enumerate(curve, sequences)]
        return list(accumulate(reversed(times), min))[::-1]

    def choose(self, drafts: list[Draft], budget: StepBudget) -> list[Draft]:
        if not any(map(len, drafts)):
            return drafts
        sequences = len(drafts)
        reach = [reaches(draft) for draft in drafts]
        best = sorted(chain.from_iterable(each.tolist() for each in reach), reverse=True)[: budget.nodes]
        # Mostly a handful of nodes, where lists are faster than arrays
        gains = list(accumulate(best, initial=float(sequences)))
        # The cost of few rows is bounded by that of more rows, also where this draft has fewer
        times = self._times(sequences, budget.nodes, budget.context)[: len(best) + 1]
        rate = max(self._rate(sequences, times[0]), _PEAK * max(map(truediv, gains, times)))
        net = [gain - rate * time for gain, time in zip(gains, times, strict=True)]
        # Of choices that are nearly equal take the one with the fewest rows: it depends least on expectations.
        most = max(net)
        enough = [value >= most - _TOLERANCE * gain for value, gain in zip(net, gains, strict=True)]
        count = max(enough.index(True), min(_TRIAL, len(best)) if self._trying else 0)
        return keep_best(drafts, count, reach)

    def _rate(self, sequences: int, plain_s: float) -> float:
        """Tokens per second of the engine. `plain_s`: seconds of a plain step."""
        plain = sequences / plain_s
        tokens, seconds = self._recent
        return max(plain, tokens / seconds) if seconds else plain

    def observe(
        self, rows: int, context: float, tokens: int, draft_s: float, step_s: float, prompt_rows: int = 0
    ) -> float:
        if prompt_rows:
            step_s = self._observe_mixed(rows, prompt_rows, context, step_s)
        else:
            self._observe_step(rows, context, step_s)
        self._idle = self._idle + 1 if rows <= self._sequences else 0
        self._recent = (_SLOW_DECAY * self._recent[0] + tokens, _SLOW_DECAY * self._recent[1] + draft_s + step_s)
        self._steps += 1
        self._rows += rows
        self._tokens += tokens
        self._spent += draft_s + step_s
        return step_s

    def _observe_mixed(self, rows: int, prompt_rows: int, context: float, step_s: float) -> float:
        """Returns the seconds of the `rows` that decode. Prompts' rows have factors of their own: they give no logits,
        and there are more of them than the table knows. Where every step reads prompts, most of an error is held to be
        the machine's; steps without prompts put that right."""
        cell = _bin(rows + prompt_rows)
        seconds = self._scale * self._prompt_factors[cell] * self._table.step(rows + prompt_rows, context)
        error = min(max(step_s / seconds, 0.5), 2.0)
        self._prompt_factors[cell] *= error**_LEARNING_RATE
        self._scale *= error ** (1 - _DECAY)
        own = self._factors[_bin(rows)] * self._table.step(rows, context)
        whole = self._prompt_factors[cell] * self._table.step(rows + prompt_rows, context)
        return step_s * min(own / whole, 1.0)

    def _observe_step(self, rows: int, context: float, step_s: float) -> None:
        cell = _bin(rows)
        # Twice as slow at most: an interrupted step says nothing about the next one.
        error = min(max(step_s / (self._scale * self._factors[cell] * self._table.step(rows, context)), 0.5), 2.0)
        self._scale *= error ** (1 - _DECAY)
        if cell != _bin(self._sequences):  # the factors of the others are relative to this one
            self._measured[cell] += 1
            # The table counts as one step.
            self._factors[cell] *= error ** max(_LEARNING_RATE, 1 / (1 + self._measured[cell]))
            for more in range(cell + 1, len(self._factors)):  # not measured yet
                if self._measured[more] or more == _bin(self._sequences):
                    break
                self._factors[more] = self._factors[cell]

    def plain_seconds(self, sequences: int, context: float) -> float:
        return self._scale * self._factors[_bin(sequences)] * self._table.step(sequences, context)

    def explain(self) -> list[str]:
        if not self._steps:
            return ["no step yet"]
        one = self._table.step(1, 0)
        factors = [self._factors[_bin(n)] / self._factors[0] for n in _SHOWN]
        rows = ", ".join(
            f"{n} tokens {factor * self._table.step(n, 0) / one:.2f}" for n, factor in zip(_SHOWN, factors, strict=True)
        )
        first = 1e3 * one * self._scale * self._factors[0]
        return [
            f"a step that checks one token takes {first:.1f} ms; how many times as long others take: {rows}",
            f"{self._steps} steps checked {self._rows / self._steps:.1f} tokens and gave "
            f"{self._tokens / self._steps:.2f} each on average, {self._tokens / self._spent:.1f} tokens/s",
        ]


def _bin(rows: int) -> int:
    """0 for one row, 1 for two, 2 for 3 and 4, 3 for 5 to 8, ..."""
    return (rows - 1).bit_length()
