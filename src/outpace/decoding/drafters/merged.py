"""Several drafters at once, their drafts merged into one tree."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import replace

import numpy as np

from ...types import Draft, FloatArray, IntArray
from ..contracts import Drafter, Observation, Sequence
from ..tree import DEFAULT_SCORE, merge, node_depths
from .rates import judged_nodes

_DEPTHS = 8  # deeper nodes share the last cell
_TRUST = 10.0  # expected acceptances that the drafter's own scores are worth at first
_FADE = 0.995  # per observation, so that the factors follow a change of text


class Calibration:
    """How much more or less often than announced a drafter's nodes are accepted, by depth."""

    def __init__(self) -> None:
        self._announced = np.full(_DEPTHS, _TRUST)
        self._accepted = np.full(_DEPTHS, _TRUST)

    @property
    def factors(self) -> FloatArray:
        return (self._accepted / self._announced).astype(np.float32)

    def apply(self, draft: Draft) -> Draft:
        """The draft with corrected scores."""
        if not len(draft):
            return draft
        scores = _scores(draft) * self.factors[_cells(draft)]
        return replace(draft, scores=np.minimum(scores, 0.99, dtype=np.float32))

    def update(self, draft: Draft, truth: IntArray) -> None:
        """`draft` as proposed, before correction."""
        tested = judged_nodes(draft, truth)
        if not tested:
            return
        scores = _scores(draft)
        self._announced = _TRUST + (self._announced - _TRUST) * _FADE
        self._accepted = _TRUST + (self._accepted - _TRUST) * _FADE
        for node, depth, right in tested:
            cell = min(depth, _DEPTHS - 1)
            self._announced[cell] += scores[node]
            self._accepted[cell] += right


def _scores(draft: Draft) -> FloatArray:
    return np.full(len(draft), DEFAULT_SCORE, dtype=np.float32) if draft.scores is None else draft.scores


def _cells(draft: Draft) -> IntArray:
    return np.minimum(node_depths(draft.parents), _DEPTHS - 1)


class Merged(Drafter):
    """Asks every drafter for a full draft and keeps the nodes of highest expected acceptance.

    Each drafter's scores are corrected by its measured acceptance at each depth. What a drafter would have proposed
    is judged whether or not its nodes made it into the tree: the committed tokens decide either way. A node keeps the
    name of the first drafter, in the order given, that proposed it.
    """

    name = "merged"
    paper = ""

    def __init__(self, drafters: Seq[Drafter]) -> None:
        assert drafters, "nothing to merge"
        self.drafters = list(drafters)
        self._calibrations = [Calibration() for _ in self.drafters]
        self._proposed: dict[int, list[Draft]] = {}

    @property
    def expects_topk(self) -> int:
        return max(drafter.expects_topk for drafter in self.drafters)

    def begin(self, sequence: Sequence) -> None:
        for drafter in self.drafters:
            drafter.begin(sequence)
        self._proposed[sequence.id] = []

    def propose(self, sequences: Seq[Sequence], budgets: Seq[int]) -> list[Draft]:
        per_drafter = [drafter.propose(sequences, budgets) for drafter in self.drafters]
        merged = []
        for i, (sequence, budget) in enumerate(zip(sequences, budgets, strict=True)):
            own = [drafts[i] for drafts in per_drafter]
            self._proposed[sequence.id] = own
            corrected = [c.apply(draft) for c, draft in zip(self._calibrations, own, strict=True)]
            merged.append(merge(corrected, budget))
        return merged

    def observe(self, sequence: Sequence, seen: Observation) -> None:
        for calibration, draft in zip(self._calibrations, self._proposed[sequence.id], strict=False):
            calibration.update(draft, seen.new_tokens)
        self._proposed[sequence.id] = []
        for drafter in self.drafters:
            drafter.observe(sequence, seen)

    def end(self, sequence: Sequence) -> None:
        self._proposed.pop(sequence.id, None)
        for drafter in self.drafters:
            drafter.end(sequence)
