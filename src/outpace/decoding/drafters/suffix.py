"""Suffix automaton drafting: what followed the longest suffix that was seen before."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import count
from typing import Any

import numpy as np

from ...registry import register
from ...types import NO_PARENT, Draft, FloatArray
from ..contracts import DrafterContext, Sequence
from ..sampling import Stream, draw, uniform
from .automaton import SuffixAutomaton
from .nodes import Cell, NodeDrafter, Nodes, NodeState, check_range
from .owners import OwnerOf, PerOwner, one_owner
from .rates import Rates

_BREAK = -1  # between two outputs in a memory; never proposed
_LONGEST_MATCH = 64  # tokens of the text that are looked up in a memory

# How far a match reached and how its continuation fared: the cells of the table of acceptance rates.
_LENGTHS = (1, 2, 3, 4, 6, 9, 16)  # a match falls into the last bin that it reaches
_LENGTH_BIN = np.searchsorted(_LENGTHS, np.arange(_LENGTHS[-1] + 1), side="right").tolist()
_PRIOR = (  # as measured with SmolLM2 on coding, summarization and writing; no match has length 0
    (0.04, 0.06, 0.08, 0.12, 0.20, 0.30),
    (0.06, 0.08, 0.10, 0.16, 0.30, 0.45),
    (0.06, 0.12, 0.18, 0.23, 0.47, 0.62),
    (0.08, 0.16, 0.22, 0.28, 0.60, 0.70),
    (0.10, 0.20, 0.25, 0.33, 0.64, 0.74),
    (0.11, 0.24, 0.35, 0.40, 0.72, 0.82),
    (0.13, 0.27, 0.42, 0.55, 0.80, 0.90),
    (0.14, 0.30, 0.47, 0.63, 0.85, 0.92),
)
# Rows of the table: the text's own matches, those in the owner's memory, and tokens sampled from the counts, for which
# the column is that of the most frequent continuation.
_OWN, _REMEMBERED, _SAMPLED = 0, len(_PRIOR), 2 * len(_PRIOR)


def _share_bin(count: int, total: int) -> int:
    """0 to 3: share of the continuations below 1/8, 1/4, 1/2, 1; 4: the only one, once; 5: the only one, more
    often.
    """
    if count >= total:
        return 5 if count > 1 else 4
    return 3 if 2 * count >= total else 2 if 4 * count >= total else 1 if 8 * count >= total else 0


def _row(matched: int) -> int:
    return _LENGTH_BIN[min(matched, _LENGTHS[-1])]


class Memory:
    """The last outputs of one owner, at most `limit` tokens.

    An automaton forgets nothing, so there are two: when the newer has grown to half the limit, the older one goes.
    """

    def __init__(self, limit: int) -> None:
        self._half = max(limit // 2, 1)
        self.automata: list[SuffixAutomaton] = []  # the newer first

    def add(self, output: list[int]) -> None:
        kept = output[-self._half + 1 :] if self._half > 1 else []
        if not self.automata or self.automata[0].size + len(kept) + 1 > self._half:
            self.automata = [SuffixAutomaton(), *self.automata[:1]]
        self.automata[0].extend([*kept, _BREAK])


@dataclass(frozen=True, slots=True)
class _Context:
    """Where a text stands in an automaton: the state of its longest suffix there, how long that is, and the first row
    of its rates."""

    automaton: SuffixAutomaton
    state: int
    matched: int
    base: int


@dataclass(slots=True)
class _State(NodeState):
    memory: Memory | None
    automaton: SuffixAutomaton
    before: int  # tokens of the automaton's text before those of the sequence: its prediction


_Candidate = tuple[float, int, int, int, float, Cell, _Context]  # -reach, ticket, parent, token, score, cell, after


@register(
    family="SPEC",
    title="Suffix automaton over prompt, output and prediction",
    paper="https://arxiv.org/abs/2411.04975",
    exactness="identical",
    claim="up to 5.3x on agentic tasks",
)
@dataclass(slots=True, eq=False)
class Suffix(NodeDrafter[_State]):
    """Finds the longest suffix of the text that occurred before, or in the request's prediction, and proposes what
    followed it, the most frequent and then the most recent continuation first, as a tree grown by estimated acceptance.
    Shorter suffixes offer more continuations of the next token. A loop is followed round.

    Where the verifier uses q (`sampled_over` is the size of the vocabulary) and the request samples, the draft is a
    chain drawn from the counts of what followed, which are its q.

    Oliaro et al., "SuffixDecoding" (sections 3 and 4: pattern matching by suffix trees over the request and over
    earlier outputs, trees scored by frequency); automaton for retrieval: Hu et al., "SAM Decoding" (arXiv 2411.10666,
    section 3).

    Parameters: `contexts` suffixes tried for the next token; `branches` continuations per suffix;
    `max_tokens` most nodes; `min_score` least probability of being reached that a node must have; `memory` tokens of
    an owner's earlier outputs that are searched too (0: none), of at most `max_owners` owners.
    A node's score is the measured acceptance for its match length and its share of the continuations.
    """

    name = "suffix"
    paper = "https://arxiv.org/abs/2411.04975"

    contexts: int = 3
    branches: int = 3
    max_tokens: int = 48
    min_score: float = 0.01
    memory: int = 0
    max_owners: int = 16
    owner_of: OwnerOf = one_owner
    sampled_over: int | None = None
    _memories: PerOwner[Memory] = field(init=False, repr=False)
    _states: dict[int, _State] = field(default_factory=dict, init=False, repr=False)
    _rates: Rates = field(default_factory=lambda: Rates(_PRIOR * 3), init=False, repr=False)

    def __post_init__(self) -> None:
        for least, names in ((1, ("contexts", "branches", "max_tokens")), (0, ("memory",))):
            for name in names:
                check_range(self.name, name, getattr(self, name), least)
        check_range(self.name, "min_score", self.min_score, 0, 1)
        self._memories = PerOwner(self.owner_of, lambda: Memory(self.memory), self.max_owners)

    @classmethod
    def create(cls, context: DrafterContext, **options: Any) -> Suffix:
        sampled_over = context.vocab_size if context.sampled and not context.merged else None
        return cls(owner_of=context.owner_of or one_owner, sampled_over=sampled_over, **options)

    def begin(self, sequence: Sequence) -> None:
        prediction = SuffixAutomaton([*sequence.prediction, _BREAK] if sequence.prediction else [])
        memory = self._memories.of(sequence) if self.memory else None
        self._states[sequence.id] = _State(memory, prediction, prediction.size)

    def end(self, sequence: Sequence) -> None:
        state = self._states.pop(sequence.id, None)
        if state is not None and state.memory is not None:
            state.memory.add(sequence.output)

    def _grow(self, sequence: Sequence, state: _State, nodes: Nodes, budget: int, floor: float) -> Draft | None:
        state.automaton.extend(sequence.tokens[state.automaton.size - state.before :])
        contexts = self._contexts(sequence, state)
        most, floor = min(budget, self.max_tokens), max(self.min_score, floor)
        if self.sampled_over is not None and not sequence.params.greedy:
            return self._sample(sequence, contexts, nodes, most, floor, self.sampled_over)
        self._grow_tree(contexts, nodes, most, floor)
        return None

    def _contexts(self, sequence: Sequence, state: _State) -> list[_Context]:
        """Where the text stands in itself and in its owner's memory."""
        own = state.automaton
        suffix = own.link[own.end] if own.size else 0
        found = [_Context(own, suffix, own.length[suffix], _OWN)]
        if state.memory is not None:
            recent = sequence.tokens[-_LONGEST_MATCH:]
            found += [_Context(one, *one.match(recent), _REMEMBERED) for one in state.memory.automata]
        return found

    def _grow_tree(self, contexts: list[_Context], nodes: Nodes, budget: int, floor: float) -> None:
        """Best first: the candidate most likely to be reached becomes a node and offers its continuations."""
        rates: list[list[float]] = self._rates.value.tolist()
        heap: list[_Candidate] = []
        tickets = count()
        for context in contexts:
            self._offer(heap, tickets, context, NO_PARENT, -1.0, rates)
        while heap and len(nodes) < budget:
            reach, _, parent, token, score, cell, after = heappop(heap)
            if -reach < floor:
                break
            node = nodes.add(parent, token, score, cell)
            self._offer(heap, tickets, after, node, reach, rates)

    def _offer(
        self,
        heap: list[_Candidate],
        tickets: Iterator[int],
        context: _Context,
        node: int,
        reach: float,
        rates: list[list[float]],
    ) -> None:
        """Push the continuations of `node`, whose context is given. `reach` is negative, for the heap."""
        automaton, state = context.automaton, context.state
        suffixes = self.contexts if node == NO_PARENT else 1
        offered: set[int] = {_BREAK}
        length, counts = automaton.length, automaton.count
        while suffixes and state > 0:
            # Behind a node the context may be shorter than the longest string of its state.
            matched = min(context.matched, length[state])
            after = automaton.continuations(state)[: self.branches]
            total = sum(counts[s] for s in automaton.next[state].values()) if len(after) > 1 else 0
            for token, following in after:
                if token in offered:
                    continue
                offered.add(token)
                cell = (context.base + _row(matched), _share_bin(counts[following], total))
                score = rates[cell[0]][cell[1]]
                then = _Context(automaton, following, matched + 1, context.base)
                heappush(heap, (reach * score, next(tickets), node, token, score, cell, then))
            suffixes -= bool(after)
            state = automaton.link[state]

    def _sample(
        self, sequence: Sequence, contexts: list[_Context], nodes: Nodes, budget: int, floor: float, vocab_size: int
    ) -> Draft | None:
        """A chain drawn from the counts of what followed the longest match. What it rests on, and so its length, is
        known before a token is drawn."""
        context = max(contexts, key=lambda c: c.matched)  # of equal ones the first: the text itself
        automaton, state, matched = context.automaton, context.state, context.matched
        rows: list[FloatArray] = []
        node, reach = NO_PARENT, 1.0
        while len(nodes) < budget:
            while state > 0 and automaton.next[state].keys() <= {_BREAK}:
                state = automaton.link[state]
            if state <= 0:
                break
            after = {token: s for token, s in automaton.next[state].items() if token != _BREAK}
            matched = min(matched, automaton.length[state])
            counts = np.array([automaton.count[s] for s in after.values()], dtype=np.float32)
            cell = (_SAMPLED + _row(matched), _share_bin(int(counts.max()), int(counts.sum())))
            score = float(self._rates.value[cell])
            reach *= score
            if reach < floor:
                break
            index = draw(counts, uniform(sequence.params.seed, nodes.root, Stream.DRAFT, len(nodes)))
            token = list(after)[index]
            rows.append(np.zeros(vocab_size, dtype=np.float32))
            rows[-1][list(after)] = counts / counts.sum()
            node = nodes.add(node, token, score, cell)
            state, matched = after[token], matched + 1
        draft = nodes.draft(self.name)
        if rows:
            draft.q = np.stack(rows)
        return draft
