"""Token Recycling: the candidates that the target once named after a token are proposed after it again."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import ParameterError
from ...registry import register
from ...types import NO_PARENT, Draft, IntArray
from ..contracts import Drafter, DrafterContext, Observation, Sequence
from .rates import Rates, judged_nodes

_NOTHING = -1  # an empty entry of the matrix
_EDGES = np.array([0.01, 0.03, 0.07, 0.15, 0.3, 0.5, 0.7, 0.85, 0.95], dtype=np.float32)
_SEEDED = len(_EDGES) + 1  # the bin of entries that come from the prompt's bigrams
# Acceptance to start from, by bin of the recorded probability. The record is of another context, so it is less. As
# measured with SmolLM2 on coding, summarization and writing; from there each engine learns its own.
_PRIOR = (0.005, 0.015, 0.025, 0.05, 0.12, 0.24, 0.3, 0.38, 0.42, 0.58, 0.25)
_PAIR_PRIOR = (0.008, 0.02, 0.035, 0.07, 0.16, 0.33, 0.5, 0.57, 0.7, 0.82, 0.25)

SLOTS = 1 << 16  # of pairs
_MIX, _WORD, _SHIFT = 0x9E3779B97F4A7C15, (1 << 64) - 1, 64 - 16  # multiplicative hash to 16 bits


class Adjacency:
    """The k most likely successors of each token, and of each pair of tokens, when the target last answered there.

    A row is one context: rows 0..V-1 are the single tokens, the other SLOTS rows are pairs, placed by a hash; the
    latest pair takes the place. ids i32[V + SLOTS, k] in falling order of probability, bins u8[V + SLOTS, k] which
    _EDGES that probability passed.
    """

    def __init__(self, vocab_size: int, k: int) -> None:
        self.vocab_size = vocab_size
        self.ids = np.full((vocab_size + SLOTS, k), _NOTHING, dtype=np.int32)
        self.bins = np.zeros((vocab_size + SLOTS, k), dtype=np.uint8)
        self._pair = np.full(SLOTS, _NOTHING, dtype=np.int64)  # which pair a hashed row belongs to

    def find(self, before: int, token: int) -> int:
        """The row of the pair (before, token) if it is known, else that of the token."""
        pair = before * self.vocab_size + token
        slot = (pair * _MIX & _WORD) >> _SHIFT
        return self.vocab_size + slot if self._pair[slot] == pair else token

    def record(self, before: IntArray, tokens: IntArray, values: NDArray[np.float32], ids: IntArray) -> None:
        """Answers after `tokens` [n], each preceded by `before` [n]: top logits and their ids [n, k].

        Of equal contexts the last one stays.
        """
        weights = np.exp(values - values[:, :1])
        bins = np.searchsorted(_EDGES, weights / weights.sum(axis=1, keepdims=True))
        pairs = before * self.vocab_size + tokens
        slots = ((pairs.astype(np.uint64) * np.uint64(_MIX)) >> np.uint64(_SHIFT)).astype(np.int64)
        self._pair[slots] = pairs
        for rows in (tokens, self.vocab_size + slots):
            self.bins[rows] = bins
            self.ids[rows] = ids

    def seed(self, tokens: IntArray) -> None:
        """Fill empty rows of single tokens with the successors in a text, the most frequent first."""
        if len(tokens) < 2:
            return
        size, k = self.vocab_size, self.ids.shape[1]
        pairs, counts = np.unique(tokens[:-1] * size + tokens[1:], return_counts=True)
        first, second = np.divmod(pairs, size)
        order = np.lexsort((-counts, first))
        first, second = first[order], second[order]
        starts = np.flatnonzero(np.diff(first, prepend=-1))
        rank = np.arange(len(first)) - np.repeat(starts, np.diff(starts, append=len(first)))
        kept = (rank < k) & (self.ids[first, 0] == _NOTHING)
        self.ids[first[kept], rank[kept]] = second[kept]
        self.bins[first[kept], rank[kept]] = _SEEDED


@dataclass(slots=True)
class _Row:
    """A row of the matrix, reached with probability `reach` behind `token`; its rates begin at row `base`."""

    token: int
    ids: list[int]
    bins: list[int]
    base: int
    reach: float


@dataclass(slots=True)
class _State:
    matrix: Adjacency
    draft: Draft = field(default_factory=Draft.empty)
    cells: list[tuple[int, int]] = field(default_factory=list)  # row and column of each node's rate


@register(
    family="SPEC",
    title="Token Recycling",
    paper="https://arxiv.org/abs/2408.08696",
    exactness="identical",
)
@dataclass(slots=True, eq=False)
class Recycling(Drafter):
    """Keeps for each token the k likeliest next tokens of the target's last answer after it, from every verified row,
    rejected ones too, and proposes a tree by walking this adjacency matrix from the last token. Rows that are still
    empty are filled from the prompt's bigrams.

    Luo et al., "Turning Trash into Treasure: Accelerating Inference of Large Language Models with Token Recycling",
    section 3. Two things differ. There the tree is a fixed template; here it is grown best first by the measured
    acceptance of an entry's rank and recorded probability, so that a small budget goes where it is likely to be
    accepted. And the matrix has rows for pairs of tokens beside those for single ones; a known pair comes first.

    Parameters: `vocab_size`; `k` successors kept; `max_tokens` most nodes; `min_score` least probability of being
    reached that a node must have; `owner_of` tells whose sequence it is. Sequences of one owner share a matrix and
    those of two never do, so that nobody's text shapes (and by its timing betrays) what is proposed to another;
    by default all sequences have one owner. At most `max_owners` matrices of 5 * k bytes for each token and pair are
    kept; the one whose last sequence began the longest ago goes.
    """

    name = "recycling"
    paper = "https://arxiv.org/abs/2408.08696"

    vocab_size: int
    k: int = 8
    max_tokens: int = 64
    min_score: float = 0.004
    owner_of: Callable[[Sequence], Hashable] = lambda sequence: None
    max_owners: int = 16
    _matrices: dict[Hashable, Adjacency] = field(default_factory=dict, init=False, repr=False)
    _states: dict[int, _State] = field(default_factory=dict, init=False, repr=False)
    _rates: Rates = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not 1 <= self.k <= self.vocab_size:
            raise ParameterError(f"recycling needs k from 1 to the vocabulary size {self.vocab_size}, not {self.k}")
        self._rates = Rates([_PRIOR] * self.k + [_PAIR_PRIOR] * self.k)

    @property
    def expects_topk(self) -> int:
        return self.k

    @classmethod
    def create(cls, context: DrafterContext, **options: Any) -> Recycling:
        if context.owner_of is None:
            return cls(context.vocab_size, **options)
        return cls(context.vocab_size, owner_of=context.owner_of, **options)

    def begin(self, sequence: Sequence) -> None:
        owner = self.owner_of(sequence)
        matrix = self._matrices.pop(owner, None)
        if matrix is None:
            matrix = Adjacency(self.vocab_size, self.k)
            while len(self._matrices) >= self.max_owners:
                del self._matrices[next(iter(self._matrices))]
        self._matrices[owner] = matrix  # last: the most recently used
        matrix.seed(np.array(sequence.tokens, dtype=np.int64))
        self._states[sequence.id] = _State(matrix)

    def propose(self, sequences: Seq[Sequence], budgets: Seq[int]) -> list[Draft]:
        rates: list[list[float]] = self._rates.value.tolist()
        return [
            self._grow(self._states[s.id], s.tokens[-2:], min(b, self.max_tokens), rates)
            for s, b in zip(sequences, budgets, strict=True)
        ]

    def _grow(self, state: _State, context: list[int], budget: int, rates: list[list[float]]) -> Draft:
        """Best first: a candidate that becomes a node offers its likeliest successor and its next sibling."""
        matrix, k = state.matrix, self.k
        tokens: list[int] = []
        parents: list[int] = []
        scores: list[float] = []
        state.cells = cells = []
        heap: list[tuple[float, int, int, int, _Row]] = []

        def offer(parent: int, rank: int, row: _Row, ticket: int) -> None:
            if rank < k and row.ids[rank] >= 0:
                gain = row.reach * rates[row.base + rank][row.bins[rank]]
                heappush(heap, (-gain, ticket, parent, rank, row))

        def row_after(before: int, token: int, reach: float) -> _Row:
            found = matrix.find(before, token)
            base = k if found >= matrix.vocab_size else 0
            return _Row(token, matrix.ids[found].tolist(), matrix.bins[found].tolist(), base, reach)

        if budget:
            offer(NO_PARENT, 0, row_after(context[0], context[-1], 1.0), 0)
        while heap and len(tokens) < budget:
            gain, _, parent, rank, row = heappop(heap)
            if -gain < self.min_score:
                break
            node, token, cell = len(tokens), row.ids[rank], (row.base + rank, row.bins[rank])
            tokens.append(token)
            parents.append(parent)
            scores.append(rates[cell[0]][cell[1]])
            cells.append(cell)
            offer(parent, rank + 1, row, 2 * node + 1)
            offer(node, 0, row_after(row.token, token, -gain), 2 * node + 2)
        state.draft = Draft(
            np.array(tokens, dtype=np.int64),
            np.array(parents, dtype=np.int64),
            [self.name] * len(tokens),
            np.array(scores, dtype=np.float32),
        )
        return state.draft

    def observe(self, sequence: Sequence, seen: Observation) -> None:
        state = self._states[sequence.id]
        for node, _, right in judged_nodes(state.draft, seen.new_tokens):
            self._rates.update(state.cells[node], right)
        state.draft, state.cells = Draft.empty(), []
        if seen.outputs is None:
            return
        root = len(sequence.tokens) - len(seen.new_tokens) - 1
        tokens = np.concatenate(([sequence.tokens[root]], seen.draft.tokens))
        before = tokens[np.concatenate(([0], seen.draft.parents + 1))]
        before[0] = sequence.tokens[max(root - 1, 0)]
        values, ids = seen.outputs.topk(self.k)
        if seen.accepted is not None and len(seen.accepted.path):
            # Of several rows with one context the accepted one counts: write it last.
            path = seen.accepted.path + 1
            order = np.concatenate((np.delete(np.arange(len(tokens)), path), path))
            before, tokens, values, ids = before[order], tokens[order], values[order], ids[order]
        state.matrix.record(before, tokens, values, ids)

    def end(self, sequence: Sequence) -> None:
        self._states.pop(sequence.id, None)
