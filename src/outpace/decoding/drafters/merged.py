"""Several drafters at once, their drafts merged into one tree."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from time import perf_counter

import numpy as np

from ...types import NO_PARENT, Draft, IntArray
from ..contracts import Drafter, Observation, Sequence
from ..sampling import certainty, host_row
from ..tree import DEFAULT_SCORE, merge, promise
from .rates import judged_nodes
from .worth import Worth

_DEPTHS = 8  # deeper nodes share the last cell
_TRUST = 10.0  # expected acceptances that the drafter's own scores are worth at first
_FADE = 0.995  # per observation, so that the factors follow a change of text
_TRUST_OWN, _FADE_OWN, _MOST_OWN = 2.0, 0.97, 1.3  # the same for one sequence; its factor is at most that


class Calibration:
    """How much more or less often than announced a drafter's nodes are accepted: by depth over all sequences, and of
    each sequence's first nodes, since texts differ."""

    def __init__(self) -> None:
        self._announced = [_TRUST] * _DEPTHS
        self._accepted = [_TRUST] * _DEPTHS
        self._own: dict[int, tuple[float, float]] = {}  # sequence id -> (announced, accepted) of its first nodes

    @property
    def factors(self) -> list[float]:
        """By depth."""
        return [accepted / announced for accepted, announced in zip(self._accepted, self._announced, strict=True)]

    def apply(self, id: int, draft: Draft) -> Draft:
        """The draft of sequence `id` with corrected scores."""
        if not len(draft):
            return draft
        announced, accepted = self._own.get(id, (_TRUST_OWN, _TRUST_OWN))
        of_depth, first = self.factors, min(accepted / announced, _MOST_OWN)
        scores, depths = [], list[int]()  # lists: most drafts have a handful of nodes
        for score, parent in zip(_scores(draft), draft.parents.tolist(), strict=True):
            depths.append(min(depths[parent] + 1, _DEPTHS - 1) if parent != NO_PARENT else 0)
            scores.append(min(score * of_depth[depths[-1]] * (first if parent == NO_PARENT else 1.0), 0.99))
        corrected = np.array(scores, dtype=np.float32)
        return Draft(draft.tokens, draft.parents, draft.sources, corrected, draft.q, draft.replacement)

    def update(self, id: int, draft: Draft, truth: IntArray) -> None:
        """`draft` as proposed, before correction."""
        tested = judged_nodes(draft, truth)
        if not tested:
            return
        scores = _scores(draft)
        first = [node for node, depth, _ in tested if depth == 0]
        promised = sum(scores[node] for node in first) * self._accepted[0] / self._announced[0]
        announced, accepted = self._own.get(id, (_TRUST_OWN, _TRUST_OWN))
        right = any(ok for _, depth, ok in tested if depth == 0)
        self._own[id] = _FADE_OWN * announced + min(promised, 1.0), _FADE_OWN * accepted + right
        self._announced = [_TRUST + (x - _TRUST) * _FADE for x in self._announced]
        self._accepted = [_TRUST + (x - _TRUST) * _FADE for x in self._accepted]
        for node, depth, right in tested:
            cell = min(depth, _DEPTHS - 1)
            self._announced[cell] += scores[node]
            self._accepted[cell] += right

    def forget(self, id: int) -> None:
        self._own.pop(id, None)


def _scores(draft: Draft) -> list[float]:
    return [DEFAULT_SCORE] * len(draft) if draft.scores is None else draft.scores.tolist()


@dataclass(slots=True, eq=False)
class _Asked:
    """What one drafter was asked for one sequence in this step."""

    index: int  # of the drafter
    expected: float  # tokens that the drafters before it promised
    draft: Draft
    seconds: float  # its share of the call


class Merged(Drafter):
    """Asks the drafters in turn and keeps the nodes of highest expected acceptance.

    Each drafter's scores are corrected by its measured acceptance at each depth. What a drafter would have proposed
    is judged whether or not its nodes made it into the tree: the committed tokens decide either way. A node keeps the
    name of the first drafter, in the order given, that proposed it; give the cheap ones first.

    With a `price` a drafter is asked for a sequence only where the tokens that it is expected to add to those of the
    drafters before it are worth its time (see Worth). Without one all are asked, always.
    """

    name = "merged"
    paper = ""

    def __init__(self, drafters: Seq[Drafter]) -> None:
        assert drafters, "nothing to merge"
        self.drafters = list(drafters)
        self.worths = [Worth() for _ in self.drafters]
        self._calibrations = [Calibration() for _ in self.drafters]
        self._asked: dict[int, list[_Asked]] = {}

    @property
    def expects_topk(self) -> int:
        """Of those who are asked for most sequences: for a few the outputs scan a few rows again."""
        asked = Counter(one.index for each in self._asked.values() for one in each)
        most = [i for i, times in asked.items() if 2 * times >= len(self._asked)]
        return max((self.drafters[i].expects_topk for i in most), default=0)

    def begin(self, sequence: Sequence) -> None:
        for drafter in self.drafters:
            drafter.begin(sequence)
        self._asked[sequence.id] = []

    def propose(self, sequences: Seq[Sequence], budgets: Seq[int]) -> list[Draft]:
        merged = [Draft.empty()] * len(sequences)
        for sequence in sequences:
            self._asked[sequence.id] = []
        if not any(budgets):
            return merged
        places_with_room = [i for i, n in enumerate(budgets) if n > 0]
        asking = [sequences[i] for i in places_with_room]
        for index in range(len(self.drafters)):
            promised = [promise(draft) if self.price > 0 and len(draft) else 0.0 for draft in merged]
            places = places_with_room
            if self.price > 0:
                expected = [promised[i] for i in places]
                places = [places[k] for k in self.worths[index].paying(asking, expected, self.price)]
            if places:
                drafts, seconds = self._ask(index, [sequences[i] for i in places], [budgets[i] for i in places])
                for i, draft in zip(places, drafts, strict=True):
                    self._asked[sequences[i].id].append(_Asked(index, promised[i], draft, seconds))
                    corrected = self._calibrations[index].apply(sequences[i].id, draft)
                    # A draft that stays alone keeps what merging loses: q.
                    merged[i] = merge([merged[i], corrected], budgets[i]) if len(merged[i]) else corrected
        return merged

    def _ask(self, index: int, sequences: list[Sequence], nodes: list[int]) -> tuple[list[Draft], float]:
        drafter, worth = self.drafters[index], self.worths[index]
        drafter.floor, drafter.price = self.floor, self.price
        drafter.forward_floor = max(self.floor, self.price * worth.forward_s / len(sequences))
        began = perf_counter()
        drafts = drafter.propose(sequences, nodes)
        return drafts, worth.took(perf_counter() - began, sequences, drafts)

    def observe(self, sequence: Sequence, seen: Observation) -> None:
        self._look(sequence, seen)
        asked = self._asked[sequence.id]
        if not asked:  # most of the time in a large batch, so it must cost nothing
            return
        gained = self._gains(seen)
        for one in asked:
            began = perf_counter()
            self._calibrations[one.index].update(sequence.id, one.draft, seen.new_tokens)
            drafter = self.drafters[one.index]
            drafter.observe(sequence, seen)
            if seen.outputs is not None:
                seconds = one.seconds + perf_counter() - began
                self.worths[one.index].learned(sequence.id, one.expected, gained.get(drafter.name, 0.0), seconds)
        self._asked[sequence.id] = []

    def _look(self, sequence: Sequence, seen: Observation) -> None:
        """How sure of its next token the target was, for those who have not read this text because reading is dear."""
        waiting = [worth for worth in self.worths if worth.waits(sequence.id, self.price)]
        outputs = seen.first if seen.outputs is None else seen.outputs
        if waiting and outputs is not None:
            path = [] if seen.accepted is None else seen.accepted.path.tolist()
            row = path[-1] + 1 if path else 0
            sure = certainty(host_row(outputs.logits(row)), sequence.params)
            for worth in waiting:
                worth.saw(sequence.id, sure)

    def _gains(self, seen: Observation) -> dict[str, float]:
        """Accepted tokens by the drafter that proposed them first, less what the rows of its nodes cost."""
        gains: dict[str, float] = {}
        for name in seen.draft.sources:
            gains[name] = gains.get(name, 0.0) - self.floor
        if seen.accepted is not None:
            for node in seen.accepted.path.tolist():
                gains[seen.draft.sources[node]] += 1
        return gains

    def end(self, sequence: Sequence) -> None:
        self._asked.pop(sequence.id, None)
        for drafter, worth, calibration in zip(self.drafters, self.worths, self._calibrations, strict=True):
            worth.forget(sequence.id)
            calibration.forget(sequence.id)
            drafter.end(sequence)

    def seconds_by_source(self, total: float) -> dict[str, float]:
        return {d.name: worth.spent() for d, worth in zip(self.drafters, self.worths, strict=True)}

    def explain(self) -> list[str]:
        return [
            f"{drafter.name}: {worth.explain()}" for drafter, worth in zip(self.drafters, self.worths, strict=True)
        ] + [line for drafter in self.drafters for line in drafter.explain()]
