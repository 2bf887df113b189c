"""Token Recycling: the candidates that the target once named after a token are proposed after it again."""

from __future__ import annotations

from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import Any

import numpy as np

from ...errors import ParameterError
from ...models.decoder import Taps
from ...registry import register
from ...types import NO_PARENT
from ..contracts import DrafterContext, Observation, Sequence
from .adjacency import NOTHING, Adjacency
from .nodes import NodeDrafter, Nodes, NodeState, check_range
from .owners import OwnerOf, PerOwner, one_owner
from .rank_tree import PUBLISHED, Path, fitted
from .rates import Rates

TREES = ("dynamic", "published", "fitted")
_DEPTHS = 12  # of the table by depth and rank; deeper nodes are not in a fitted tree
_REFIT = 32  # drafts of one size between two fits
# Acceptance to start from, by bin of the recorded probability. The record is of another context, so it is less. As
# measured with SmolLM2 on coding, summarization and writing; from there each engine learns its own.
_PRIOR = (0.005, 0.015, 0.025, 0.05, 0.12, 0.24, 0.3, 0.38, 0.42, 0.58, 0.25)
_PAIR_PRIOR = (0.008, 0.02, 0.035, 0.07, 0.16, 0.33, 0.5, 0.57, 0.7, 0.82, 0.25)


@dataclass(slots=True)
class _Row:
    """A row of the matrix, reached with probability `reach` behind `token`; its rates begin at row `base`."""

    token: int
    ids: list[int]
    bins: list[int]
    base: int
    reach: float


@dataclass(slots=True)
class _State(NodeState):
    matrix: Adjacency


@register(
    family="SPEC",
    title="Token Recycling",
    paper="https://arxiv.org/abs/2408.08696",
    exactness="identical",
    claim="about 2x at all sizes, in less than 2 MB",
)
@dataclass(slots=True, eq=False)
class Recycling(NodeDrafter[_State]):
    """Keeps for each token the k likeliest next tokens of the target's last answer after it, from every verified row,
    rejected ones too, and proposes a tree by walking this adjacency matrix from the last token. Rows that are still
    empty are filled from the prompt's bigrams.

    Luo et al., "Turning Trash into Treasure: Accelerating Inference of Large Language Models with Token Recycling",
    section 3. The matrix has rows for pairs of tokens beside those for single ones, which the paper has not; a known
    pair comes first. The tree is one of three:
      dynamic    grown best first by the measured acceptance of an entry's rank and recorded probability, so that a
                 small budget goes where it is likely to be accepted
      published  the paper's template of ranks, its most promising nodes if the budget is below its 80 nodes
      fitted     the template that is best for the measured acceptance by depth and rank

    Parameters: `vocab_size`; `k` successors kept; `max_tokens` most nodes; `min_score` least probability of being
    reached that a node must have (not for the published tree); `owner_of` gives the owner of a sequence: sequences of
    one owner share a matrix of 5 * k bytes for each token and pair, at most `max_owners` are kept.
    """

    name = "recycling"
    paper = "https://arxiv.org/abs/2408.08696"

    vocab_size: int
    k: int = 8
    tree: str = "dynamic"
    max_tokens: int = 80
    min_score: float = 0.004
    owner_of: OwnerOf = one_owner
    max_owners: int = 16
    _matrices: PerOwner[Adjacency] = field(init=False, repr=False)
    _states: dict[int, _State] = field(default_factory=dict, init=False, repr=False)
    _rates: Rates = field(init=False, repr=False)
    _shapes: dict[int, list[Path]] = field(default_factory=dict, init=False, repr=False)  # fitted, by budget
    _drafts: int = field(default=0, init=False, repr=False)  # since the last fit

    def __post_init__(self) -> None:
        if not 1 <= self.k <= self.vocab_size:
            raise ParameterError(f"recycling needs k from 1 to the vocabulary size {self.vocab_size}, not {self.k}")
        if self.tree not in TREES:
            raise ParameterError(f"recycling:tree={self.tree!r} is unknown; there are: {', '.join(TREES)}")
        check_range(self.name, "max_tokens", self.max_tokens, 1)
        check_range(self.name, "min_score", self.min_score, 0, 1)
        by_rank = 0.55 * 0.45 ** np.arange(self.k)  # to start from; each engine learns its own
        dynamic = [_PRIOR] * self.k + [_PAIR_PRIOR] * self.k
        self._rates = Rates(dynamic if self.tree == "dynamic" else np.tile(by_rank, (_DEPTHS, 1)))
        self._matrices = PerOwner(self.owner_of, lambda: Adjacency(self.vocab_size, self.k), self.max_owners)

    @property
    def taps(self) -> Taps:
        return Taps(topk=self.k)

    @classmethod
    def create(cls, context: DrafterContext, **options: Any) -> Recycling:
        return cls(context.vocab_size, owner_of=context.owner_of or one_owner, **options)

    def begin(self, sequence: Sequence) -> None:
        matrix = self._matrices.of(sequence)
        matrix.seed(np.array(sequence.tokens, dtype=np.int64))
        self._states[sequence.id] = _State(matrix)

    def _grow(self, sequence: Sequence, state: _State, nodes: Nodes, budget: int, floor: float) -> None:
        before, last = sequence.tokens[-2:][0], sequence.tokens[-1]
        budget = min(budget, self.max_tokens)
        if self.tree == "dynamic":
            self._grow_best(state.matrix, nodes, budget, before, last, max(self.min_score, floor))
        else:
            shape = PUBLISHED[:budget] if self.tree == "published" else self._fitted(budget)
            self._follow(state.matrix, nodes, shape, before, last, floor)

    def _grow_best(self, matrix: Adjacency, nodes: Nodes, budget: int, before: int, last: int, floor: float) -> None:
        """Best first: a candidate that becomes a node offers its likeliest successor and its next sibling."""
        k, rates = self.k, self._rates.value.tolist()
        heap: list[tuple[float, int, int, int, _Row]] = []

        def offer(parent: int, rank: int, row: _Row, ticket: int) -> None:
            if rank < k and row.ids[rank] >= 0:
                gain = row.reach * rates[row.base + rank][row.bins[rank]]
                heappush(heap, (-gain, ticket, parent, rank, row))

        def row_after(before: int, token: int, reach: float) -> _Row:
            found = matrix.find(before, token)
            base = k if found >= matrix.vocab_size else 0
            return _Row(token, matrix.ids[found].tolist(), matrix.bins[found].tolist(), base, reach)

        offer(NO_PARENT, 0, row_after(before, last, 1.0), 0)
        while heap and len(nodes) < budget:
            gain, _, parent, rank, row = heappop(heap)
            if -gain < floor:
                break
            token, cell = row.ids[rank], (row.base + rank, row.bins[rank])
            node = nodes.add(parent, token, rates[cell[0]][cell[1]], cell)
            offer(parent, rank + 1, row, 2 * node + 1)
            offer(node, 0, row_after(row.token, token, -gain), 2 * node + 2)

    def _fitted(self, budget: int) -> list[Path]:
        """The best shape for what was measured so far; fitted again every now and then."""
        self._drafts += 1
        if self._drafts > _REFIT:
            self._shapes.clear()
            self._drafts = 0
        if budget not in self._shapes:
            self._shapes[budget] = fitted(self._rates.value, budget, self.min_score)
        return self._shapes[budget]

    def _follow(self, matrix: Adjacency, nodes: Nodes, shape: list[Path], before: int, last: int, floor: float) -> None:
        """The tree of a shape. Where the matrix has no candidate of a rank, what hangs below is left out."""
        rates = self._rates.value
        ends: dict[Path, tuple[int, int, int, float]] = {(): (NO_PARENT, before, last, 1.0)}
        for path in shape:
            above = ends.get(path[:-1])
            if above is None:
                continue
            parent, before, token, reach = above
            successor = int(matrix.ids[matrix.find(before, token), path[-1]]) if path[-1] < self.k else NOTHING
            cell = (min(len(path), _DEPTHS) - 1, path[-1])
            if successor == NOTHING:
                continue
            score = float(rates[cell])
            if reach * score >= floor:
                node = nodes.add(parent, successor, score, cell)
                ends[path] = (node, token, successor, reach * score)

    def observe(self, sequence: Sequence, seen: Observation) -> None:
        state = self._states[sequence.id]
        self._check(sequence, state)
        if seen.kind == "prefill":
            return
        root = len(sequence.tokens) - len(seen.new_tokens) - 1
        tokens = np.concatenate(([sequence.tokens[root]], seen.draft.tokens))
        before = tokens[np.concatenate(([0], seen.draft.parents + 1))]
        before[0] = sequence.tokens[max(root - 1, 0)]
        values, ids = seen.outputs.topk(self.k)
        if seen.accepted.path:
            # Of several rows with one context the accepted one counts: write it last.
            path = np.array(seen.accepted.path) + 1
            order = np.concatenate((np.delete(np.arange(len(tokens)), path), path))
            before, tokens, values, ids = before[order], tokens[order], values[order], ids[order]
        state.matrix.record(before, tokens, values, ids)
