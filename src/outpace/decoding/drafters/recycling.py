"""Token Recycling: the candidates that the target once named after a token are proposed after it again."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from heapq import heappop, heappush

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
# Acceptance to start from, by bin of the recorded probability: the record is of another context.
_PRIOR = (0.01, 0.02, 0.05, 0.09, 0.17, 0.28, 0.4, 0.5, 0.6, 0.7, 0.3)


class Adjacency:
    """The k most likely successors of each token when the target last answered after it.

    ids i32[V, k] in falling order of probability, bins u8[V, k] which _EDGES that probability passed.
    """

    def __init__(self, vocab_size: int, k: int) -> None:
        self.ids = np.full((vocab_size, k), _NOTHING, dtype=np.int32)
        self.bins = np.zeros((vocab_size, k), dtype=np.uint8)

    def record(self, tokens: IntArray, values: NDArray[np.float32], ids: IntArray) -> None:
        """Answers after `tokens` [n]: top logits and their ids [n, k]. Of equal tokens the last row stays."""
        weights = np.exp(values - values[:, :1])
        share = weights / weights.sum(axis=1, keepdims=True)
        self.bins[tokens] = np.searchsorted(_EDGES, share)
        self.ids[tokens] = ids

    def seed(self, tokens: IntArray) -> None:
        """Fill empty rows with the successors in a text, the most frequent first."""
        if len(tokens) < 2:
            return
        size, k = self.ids.shape
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
class _State:
    matrix: Adjacency
    draft: Draft = field(default_factory=Draft.empty)
    cells: list[tuple[int, int]] = field(default_factory=list)  # (rank, bin) of each node


@register(
    family="SPEC",
    title="Token Recycling",
    paper="https://arxiv.org/abs/2408.08696",
    exactness="identical",
)
@dataclass(slots=True, eq=False)
class Recycling(Drafter):
    """Keeps for each token the k likeliest next tokens of the target's last answer after it, from every
    verified row, rejected ones too, and proposes a tree by walking this adjacency matrix from the last
    token. Rows that are still empty are filled from the prompt's bigrams.

    Luo et al., "Turning Trash into Treasure: Accelerating Inference of Large Language Models with Token
    Recycling", section 3. There the tree is a fixed template; here it is grown best first by the measured
    acceptance of an entry's rank and recorded probability, so that a small budget goes where it is likely
    to be accepted.

    Parameters: `vocab_size`; `k` successors kept; `max_tokens` most nodes; `min_score` least probability
    of being reached that a node must have; `owner_of` tells whose sequence it is. Sequences of one owner
    share a matrix and those of two never do, so that nobody's text shapes (and by its timing betrays) what
    is proposed to another; by default all sequences have one owner. `max_owners` matrices of 5 bytes * V *
    k are kept; the longest idle goes.
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
        self._rates = Rates(np.tile(np.array(_PRIOR, dtype=np.float32), (self.k, 1)))

    @classmethod
    def create(cls, context: DrafterContext) -> Recycling:
        if context.owner_of is None:
            return cls(context.vocab_size)
        return cls(context.vocab_size, owner_of=context.owner_of)

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
            self._grow(self._states[s.id], s.tokens[-1], min(b, self.max_tokens), rates)
            for s, b in zip(sequences, budgets, strict=True)
        ]

    def _grow(self, state: _State, root: int, budget: int, rates: list[list[float]]) -> Draft:
        """Best first: a candidate that becomes a node offers its likeliest successor and its next sibling."""
        ids, bins = state.matrix.ids, state.matrix.bins
        tokens: list[int] = []
        parents: list[int] = []
        scores: list[float] = []
        state.cells = cells = []
        heap: list[tuple[float, int, int, int, list[int], list[int], float]] = []
        ticket = 0

        def offer(parent: int, rank: int, successors: list[int], where: list[int], reach: float) -> None:
            nonlocal ticket
            if rank < len(successors) and successors[rank] >= 0:
                ticket += 1
                gain = reach * rates[rank][where[rank]]
                heappush(heap, (-gain, ticket, parent, rank, successors, where, reach))

        if budget:
            offer(NO_PARENT, 0, ids[root].tolist(), bins[root].tolist(), 1.0)
        while heap and len(tokens) < budget:
            gain, _, parent, rank, successors, where, reach = heappop(heap)
            if -gain < self.min_score:
                break
            token, cell = successors[rank], (rank, where[rank])
            tokens.append(token)
            parents.append(parent)
            scores.append(rates[rank][where[rank]])
            cells.append(cell)
            offer(parent, rank + 1, successors, where, reach)
            offer(len(tokens) - 1, 0, ids[token].tolist(), bins[token].tolist(), -gain)
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
        root = sequence.tokens[-len(seen.new_tokens) - 1]
        tokens = np.concatenate(([root], seen.draft.tokens))
        values, ids = seen.outputs.topk(self.k)
        if seen.accepted is not None and len(seen.accepted.path):
            # Of several rows with one token the accepted one counts: write it last.
            path = seen.accepted.path + 1
            order = np.concatenate((np.delete(np.arange(len(tokens)), path), path))
            tokens, values, ids = tokens[order], values[order], ids[order]
        state.matrix.record(tokens, values, ids)

    def end(self, sequence: Sequence) -> None:
        self._states.pop(sequence.id, None)
