"""Drafts grown from the logits of a source (`sources.py`): what all their shapes share.

A shape derives from `Grown` and says how many rows of the source a draft may need (`_rows`) and how it grows
(`_grow`): it takes the logits after the last tokens, chooses nodes, and runs those whose children it wants as rows.

Shapes: `B` sequences, `R` rows of one forward, `V` vocabulary, `k` candidates per row.
"""

from __future__ import annotations

from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from enum import Enum, IntEnum
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...ops.select import row_logsumexp, row_topk
from ...types import NO_PARENT, Draft, FloatArray, Logits, SamplingParams
from ..contracts import Drafter, DrafterContext, Market, Observation, Proposal, Sequence
from ..sampling import choose, host_row, process
from .rates import Rates, checked_nodes
from .sources import Rows, Source
from .trimmed import model_source

NO_ROW = -1
_EDGES = (0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 0.85, 0.95)  # bins of the source's probability of its choice
_PRIOR = (  # acceptance by Choice in each bin to start from
    (0.05, 0.08, 0.12, 0.2, 0.35, 0.5, 0.68, 0.82, 0.9, 0.97),
    (0.15, 0.2, 0.25, 0.35, 0.45, 0.55, 0.68, 0.8, 0.88, 0.96),
    (0.3, 0.3, 0.35, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.97),
    (0.01, 0.04, 0.08, 0.15, 0.28, 0.43, 0.6, 0.77, 0.9, 0.97),
    (0.65, 0.15, 0.06, 0.04, 0.03, 0.02, 0.02, 0.01, 0.01, 0.01),
)


class Choice(IntEnum):
    """How a node was chosen; its acceptance depends on that and on the confidence of the source."""

    GREEDY = 0  # the likeliest token, for a target that is greedy
    COUPLED = 1  # a coupled draw
    SAMPLED = 2  # a draw that carries q; its confidence is the largest of q, which does not depend on the draw
    OUTRIGHT = 3  # the likeliest token, for a target that samples
    SIBLING = 4  # one of several draws of a node, without replacement; counted by its place among them


Cell = tuple[Choice, int]  # and the bin of the confidence


class Candidate(NamedTuple):
    """A child proposed outright, with the estimated probability that it is accepted if its parent is."""

    token: int
    score: float
    cell: Cell | None = None


class Draws(Enum):
    """What a drafter proposes where the target samples. It follows from the verifier."""

    #: Its own draw with the uniform that the target will draw with: it agrees the more often the closer the two
    #: distributions are (Daliri et al., arXiv 2408.07978). Only for a verifier whose output ignores the draft.
    COUPLED = "coupled"
    #: Draws of its own, independent of the verifier's, and with them the distribution that they were drawn from.
    SAMPLED = "sampled"
    #: The likeliest tokens, outright: where the draft is merged with others, which loses distributions.
    LIKELIEST = "likeliest"

    @classmethod
    def of(cls, context: DrafterContext) -> Draws:
        if not context.sampled:
            return cls.COUPLED
        return cls.LIKELIEST if context.merged else cls.SAMPLED


@dataclass(slots=True, eq=False)
class Growth:
    """The draft of one sequence and round: a token tree in the making, parents before children.

    `root`: how many tokens stand before its first node. A node is expanded by running its row; the logits of that row
    give its children. `reach` is the product of the scores down to a node, its own included.
    """

    sequence: Sequence
    budget: int
    root: int
    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    reach: list[float] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    cells: list[Cell | None] = field(default_factory=list)  # of a node's score, if it is a measured one
    q: list[FloatArray] = field(default_factory=list)  # of every node or of none
    rows: list[int] = field(default_factory=list)  # of the source, NO_ROW for nodes that were not run
    row_parents: list[int] = field(default_factory=list)  # by row
    kept: list[int] = field(default_factory=list)  # the nodes of the draft
    draft: Draft = field(default_factory=Draft.empty)

    def add(self, parent: int, token: int, score: float, cell: Cell | None = None, q: FloatArray | None = None) -> int:
        """A child of `parent` (NO_PARENT: of the last token); returns the node."""
        node, below = len(self.tokens), parent >= 0
        self.tokens.append(token)
        self.parents.append(parent)
        self.scores.append(score)
        self.reach.append(score * self.reach[parent] if below else score)
        self.depths.append(self.depths[parent] + 1 if below else 0)
        self.cells.append(cell)
        self.rows.append(NO_ROW)
        if q is not None:
            self.q.append(q)
        return node

    def path(self, node: int) -> list[int]:
        """Tokens from a child of the last token down to `node`."""
        path: list[int] = []
        while node >= 0:
            path.append(self.tokens[node])
            node = self.parents[node]
        return path[::-1]

    def run(self, nodes: list[int]) -> Rows:
        """The rows of `nodes`, whose parents have theirs, for the source to run."""
        for node in nodes:
            parent = self.parents[node]
            self.rows[node] = len(self.row_parents)
            self.row_parents.append(self.rows[parent] if parent >= 0 else NO_PARENT)
        return Rows(self.sequence, [self.tokens[node] for node in nodes], self.row_parents)

    def finish(self, source: str, floor: float, most: int | None = None) -> None:
        """Make the draft: nodes reached and accepted with probability `floor` at least, and of these the likeliest
        `most`."""
        likeliest = sorted(range(len(self.tokens)), key=self.reach.__getitem__, reverse=True)[:most]
        self.kept = kept = sorted(node for node in likeliest if self.reach[node] >= floor)
        place = {node: i for i, node in enumerate(kept)} | {NO_PARENT: NO_PARENT}
        self.draft = Draft(
            np.array([self.tokens[node] for node in kept], dtype=np.int64),
            np.array([place[self.parents[node]] for node in kept], dtype=np.int64),
            [source] * len(kept),
            np.array([self.scores[node] for node in kept], dtype=np.float32),
            np.stack([self.q[node] for node in kept]) if self.q and kept else None,
            replacement=False,
        )


class Grown(Drafter):
    """Grows drafts from the logits of `source`. Sequences that it does not admit get empty drafts.

    `draws`: what is proposed where the target samples; a shape that never samples takes SAMPLED as LIKELIEST.
    """

    def __init__(self, source: Source, draws: Draws = Draws.COUPLED) -> None:
        self.source, self.draws = source, draws
        self.confidence = Rates(_PRIOR)  # measured acceptance of single choices, by kind and confidence
        self._growths: dict[int, Growth] = {}  # by sequence id, of rounds that are not over

    @classmethod
    def create(cls, context: DrafterContext, *, trim: int = 0, **options: Any) -> Grown:
        """With the draft model as source, its head cut to `trim` tokens at most (0: never). Override for another."""
        return cls(model_source(context, cls.name, trim), Draws.of(context), **options)

    @abstractmethod
    def _rows(self, budget: int) -> int:
        """The most rows of the source that a draft of `budget` nodes needs."""

    @abstractmethod
    def _grow(self, growing: list[Growth], logits: Logits, market: Market) -> None:
        """Grow and finish each. `logits` f32[B, V] after the last tokens, valid until a forward."""

    def begin(self, sequence: Sequence) -> None:
        self.source.begin(sequence)

    def end(self, sequence: Sequence) -> None:
        self._growths.pop(sequence.id, None)
        self.source.end(sequence)

    def propose(self, sequences: Seq[Sequence], budgets: Seq[int], market: Market) -> Proposal:
        for sequence in sequences:
            self._growths.pop(sequence.id, None)
            self.source.rollback(sequence)  # of a step that was abandoned
        pairs = zip(sequences, budgets, strict=True)
        wanted = [Growth(s, budget, len(s.tokens)) for s, budget in pairs if budget > 0]
        admitted = self.source.admit([one.sequence for one in wanted], [self._rows(one.budget) for one in wanted])
        growing = [one for one, fits in zip(wanted, admitted, strict=True) if fits]
        if growing:
            keeps = False
            try:
                self._grow(growing, self.source.catch_up([one.sequence for one in growing]), market)
                keeps = self.source.keeps
            finally:
                if not keeps:
                    for one in growing:
                        self.source.rollback(one.sequence)
            self._growths.update((one.sequence.id, one) for one in growing)
        grown = self._growths
        return Proposal([grown[s.id].draft if s.id in grown else Draft.empty() for s in sequences])

    def observe(self, sequence: Sequence, seen: Observation) -> None:
        one, rows = self._growths.pop(sequence.id, None), list[int]()
        if one is not None:
            truth = sequence.tokens[one.root : one.root + len(one.draft)]
            for node, _, right in checked_nodes(one.draft, truth):
                cell, row = one.cells[one.kept[node]], one.rows[one.kept[node]]
                if cell is not None:
                    self.confidence.update(cell, right)
                if right and row != NO_ROW:
                    rows.append(row)
        self.source.observe(sequence, rows)

    def _rate(self, cell: Cell) -> float:
        return float(self.confidence.value[cell])

    def _candidates(
        self, sequence: Sequence, depth: int, row: Logits, ids: list[int], p: list[float]
    ) -> list[Candidate]:
        """Children to propose outright at `depth`, from processed logits f32[V] and the likeliest ids.

        Where the target samples and the verifier is coupled, the coupled draw comes first, with its measured
        acceptance; the others share what is left in proportion to their probabilities.
        """
        likely = [Candidate(token, score) for token, score in zip(ids, p, strict=True) if score > 0]
        if self.draws is not Draws.COUPLED or sequence.params.greedy:
            return likely
        drawn, own = coupled_draw(row, sequence.params, len(sequence.tokens) + depth)
        cell = cell_of(Choice.COUPLED, own)
        rate = self._rate(cell)
        rest = (1 - rate) / max(1 - own, 1e-6)
        others = [Candidate(c.token, min(c.score * rest, 1.0)) for c in likely if c.token != drawn]
        return [Candidate(drawn, rate, cell), *others]


def cell_of(kind: Choice, p: float) -> Cell:
    """Where the acceptance of a choice of probability `p` is counted."""
    return kind, bisect_right(_EDGES, p)


def coupled_draw(row: Logits, params: SamplingParams, position: int) -> tuple[int, float]:
    """The token at `position` from processed logits f32[V], as the target will draw it, and its probability (T = 1)."""
    token = choose(host_row(row), params, position)
    return token, float(np.exp(float(row[token]) - row_logsumexp(row[None])[0]))


def edit_rows(logits: Logits, rows: list[tuple[Sequence, list[int]]]) -> Logits:
    """Penalties and bias of each row's sequence, given the draft tokens on the way to it. f32[R, V]"""
    if not any(sequence.params.edits_logits for sequence, _ in rows):
        return logits
    edited = host_row(logits).copy()
    for row, (sequence, path) in enumerate(rows):
        if sequence.params.edits_logits:
            edited[row] = _on_path(edited[row], sequence, path)
    return edited


def _on_path(logits: FloatArray, sequence: Sequence, path: list[int]) -> FloatArray:
    """`process` as if `path` had been emitted; leaves the history as it was."""
    history = sequence.history
    for token in path:
        history.append(token)
    edited = process(logits, sequence.params, history)
    history.truncate(len(sequence.tokens))
    return edited


def likeliest(logits: Logits, k: int) -> tuple[list[list[int]], list[list[float]]]:
    """Ids and probabilities of the k likeliest tokens of each row. [R, k] each"""
    values, ids = row_topk(logits, min(k, logits.shape[1]))
    return ids.tolist(), np.exp(values - row_logsumexp(logits)[:, None]).tolist()


def dense(distribution: NDArray[np.float64], vocab_size: int) -> FloatArray:
    """A row of q over the target's vocabulary, of which the source may lack the last ids. f32[V]"""
    q = np.zeros(vocab_size, dtype=np.float32)
    q[: len(distribution)] = distribution
    return q
