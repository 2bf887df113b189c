"""Several drafters at once, their drafts merged into one tree."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from functools import reduce
from operator import or_
from time import perf_counter

import numpy as np

from ...models.decoder import Taps
from ...types import NO_PARENT, Draft
from ..contracts import Drafter, Market, Observation, Proposal, Sequence
from ..sampling import certainty, host_row
from ..tree import DEFAULT_SCORE, expected_accepted, merge
from .benefit import Benefit
from .rates import checked_nodes

_DEPTHS = 8  # deeper nodes share the last cell
_PRIOR = 10.0  # expected acceptances: the weight of the drafter's own scores at first
_DECAY = 0.995  # per observation, so that the factors follow a change of text
_SEQUENCE_PRIOR, _SEQUENCE_DECAY, _MAX_SEQUENCE_FACTOR = (
    2.0,
    0.97,
    1.3,
)  # the same for one sequence; its factor is at most that


class Calibration:
    """How much more or less often than announced a drafter's nodes are accepted: by depth over all sequences, and of
    each sequence's first nodes, since texts differ."""

    def __init__(self) -> None:
        self._announced = [_PRIOR] * _DEPTHS
        self._accepted = [_PRIOR] * _DEPTHS
        self._own: dict[int, tuple[float, float]] = {}  # sequence id -> (announced, accepted) of its first nodes

    @property
    def factors(self) -> list[float]:
        """By depth."""
        return [accepted / announced for accepted, announced in zip(self._accepted, self._announced, strict=True)]

    def apply(self, id: int, draft: Draft) -> Draft:
        """The draft of sequence `id` with corrected scores."""
        if not len(draft):
            return draft
        announced, accepted = self._own.get(id, (_SEQUENCE_PRIOR, _SEQUENCE_PRIOR))
        of_depth, first = self.factors, min(accepted / announced, _MAX_SEQUENCE_FACTOR)
        scores, depths = [], list[int]()  # lists: most drafts have a handful of nodes
        for score, parent in zip(_scores(draft), draft.parents.tolist(), strict=True):
            depths.append(min(depths[parent] + 1, _DEPTHS - 1) if parent != NO_PARENT else 0)
            scores.append(min(score * of_depth[depths[-1]] * (first if parent == NO_PARENT else 1.0), 0.99))
        corrected = np.array(scores, dtype=np.float32)
        return Draft(draft.tokens, draft.parents, draft.sources, corrected, draft.q, draft.replacement)

    def update(self, id: int, draft: Draft, truth: list[int]) -> None:
        """`draft` as proposed, before correction."""
        tested = checked_nodes(draft, truth)
        if not tested:
            return
        scores = _scores(draft)
        first = [node for node, depth, _ in tested if depth == 0]
        expected = sum(scores[node] for node in first) * self._accepted[0] / self._announced[0]
        announced, accepted = self._own.get(id, (_SEQUENCE_PRIOR, _SEQUENCE_PRIOR))
        right = any(ok for _, depth, ok in tested if depth == 0)
        self._own[id] = _SEQUENCE_DECAY * announced + min(expected, 1.0), _SEQUENCE_DECAY * accepted + right
        self._announced = [_PRIOR + (x - _PRIOR) * _DECAY for x in self._announced]
        self._accepted = [_PRIOR + (x - _PRIOR) * _DECAY for x in self._accepted]
        for node, depth, right in tested:
            cell = min(depth, _DEPTHS - 1)
            self._announced[cell] += scores[node]
            self._accepted[cell] += right

    def forget(self, id: int) -> None:
        self._own.pop(id, None)


def _scores(draft: Draft) -> list[float]:
    return [DEFAULT_SCORE] * len(draft) if draft.scores is None else draft.scores.tolist()


@dataclass(slots=True, eq=False)
class _Call:
    """One drafter's draft for one sequence in this step."""

    index: int  # of the drafter
    expected: float  # tokens that the drafters before it are expected to add
    draft: Draft
    seconds: float  # its share of the call


class Merged(Drafter):
    """Calls the drafters one after another and keeps the nodes of highest expected acceptance.

    Each drafter's scores are corrected by its measured acceptance at each depth, which counts all nodes that it
    proposed, kept or not: the committed tokens show which were right. A node keeps the name of the first drafter, in
    the order given, that proposed it; give the cheap ones first.

    Where the market has a rate a drafter is called for a sequence only if it is expected to add at least as many tokens
    per second of its time, beyond those of the drafters before it (see Benefit). Without one all are called, always.
    """

    name = "merged"
    paper = ""

    def __init__(self, drafters: Seq[Drafter]) -> None:
        assert drafters, "nothing to merge"
        self.drafters = list(drafters)
        self.benefits = [Benefit() for _ in self.drafters]
        self._calibrations = [Calibration() for _ in self.drafters]
        self._followers = [i for i, drafter in enumerate(self.drafters) if drafter.follows]
        self._calls: dict[int, list[_Call]] = {}
        self._market = Market()  # of the last proposal

    @property
    def taps(self) -> Taps:
        """Top-k of the drafters called for most sequences: for the others the outputs scan a few rows again."""
        calls = Counter(one.index for each in self._calls.values() for one in each)
        most = [i for i, times in calls.items() if 2 * times >= len(self._calls)]
        topk = max((self.drafters[i].taps.topk for i in most), default=0)
        return replace(reduce(or_, [drafter.taps for drafter in self.drafters]), topk=topk)

    def begin(self, sequence: Sequence) -> None:
        for drafter in self.drafters:
            drafter.begin(sequence)
        self._calls[sequence.id] = []

    def propose(self, sequences: Seq[Sequence], budgets: Seq[int], market: Market) -> Proposal:
        self._market, seconds = market, dict.fromkeys((d.name for d in self.drafters), 0.0)
        merged = [Draft.empty()] * len(sequences)
        for sequence in sequences:
            self._calls[sequence.id] = []
        if not any(budgets):
            return Proposal(merged, seconds)
        drafting = [i for i, n in enumerate(budgets) if n > 0]
        for index, (drafter, benefit) in enumerate(zip(self.drafters, self.benefits, strict=True)):
            expected = [expected_accepted(draft) if market.rate > 0 and len(draft) else 0.0 for draft in merged]
            chosen = drafting
            if market.rate > 0:
                candidates, before = [sequences[i] for i in drafting], [expected[i] for i in drafting]
                chosen = [drafting[k] for k in benefit.select(candidates, before, market.rate)]
            if chosen:
                asked, nodes = [sequences[i] for i in chosen], [budgets[i] for i in chosen]
                forward_floor = max(market.floor, market.rate * benefit.forward_s / len(chosen))
                began = perf_counter()
                drafts = drafter.propose(asked, nodes, replace(market, forward_floor=forward_floor)).drafts
                seconds[drafter.name] += (spent := perf_counter() - began)
                share = benefit.record_call(spent, asked, drafts)
                for i, draft in zip(chosen, drafts, strict=True):
                    self._calls[sequences[i].id].append(_Call(index, expected[i], draft, share))
                    corrected = self._calibrations[index].apply(sequences[i].id, draft)
                    # A draft that stays alone keeps what merging loses: q.
                    merged[i] = merge([merged[i], corrected], budgets[i]) if len(merged[i]) else corrected
        return Proposal(merged, seconds)

    def observe(self, sequence: Sequence, seen: Observation) -> None:
        self._record_certainty(sequence, seen)
        calls = self._calls[sequence.id]
        for index in self._followers:
            if all(one.index != index for one in calls):
                self.drafters[index].observe(sequence, seen)
        if not calls:  # most of the time in a large batch, so it must cost nothing
            return
        gained = self._gains(seen)
        for one in calls:
            began = perf_counter()
            self._calibrations[one.index].update(sequence.id, one.draft, seen.new_tokens)
            drafter = self.drafters[one.index]
            drafter.observe(sequence, seen)
            if seen.kind == "step":
                seconds = one.seconds + perf_counter() - began
                self.benefits[one.index].record_step(sequence.id, one.expected, gained.get(drafter.name, 0.0), seconds)
        self._calls[sequence.id] = []

    def _record_certainty(self, sequence: Sequence, seen: Observation) -> None:
        """The target's certainty of its next token, for costly drafters that have not read this text yet."""
        waiting = [benefit for benefit in self.benefits if benefit.needs_certainty(sequence.id, self._market.rate)]
        if waiting and seen.new_tokens:
            path = seen.accepted.path
            row = path[-1] + 1 if path else 0
            value = certainty(host_row(seen.outputs.logits(row)), sequence.params)
            for benefit in waiting:
                benefit.record_certainty(sequence.id, value)

    def _gains(self, seen: Observation) -> dict[str, float]:
        """Accepted tokens by the drafter that proposed them first, less what the rows of its nodes cost."""
        gains: dict[str, float] = {}
        for name in seen.draft.sources:
            gains[name] = gains.get(name, 0.0) - self._market.floor
        for node in seen.accepted.path:
            gains[seen.draft.sources[node]] += 1
        return gains

    def end(self, sequence: Sequence) -> None:
        self._calls.pop(sequence.id, None)
        for drafter, benefit, calibration in zip(self.drafters, self.benefits, self._calibrations, strict=True):
            benefit.forget(sequence.id)
            calibration.forget(sequence.id)
            drafter.end(sequence)

    def explain(self) -> list[str]:
        return [
            f"{drafter.name}: {benefit.explain()}"
            for drafter, benefit in zip(self.drafters, self.benefits, strict=True)
        ] + [line for drafter in self.drafters for line in drafter.explain()]
