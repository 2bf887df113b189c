"""Suffix automaton drafting: what followed the longest suffix that was seen before."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from heapq import heappop, heappush

import numpy as np

from ...registry import register
from ...types import NO_PARENT, Draft
from ..contracts import Drafter, Observation, Sequence
from .rates import Rates, judged_nodes

_COUNT_WALK = 48  # suffix links followed to count one token; only loops have longer chains


class SuffixAutomaton:
    """All substrings of a growing text. An append takes amortised constant time.

    A state stands for the substrings that end at the same places: `length` of the longest of them, `link`
    to the state of its longest suffix that ends at more places, `next` token -> state, `count` of the
    places, `last` of them. The text itself is in state `end`; the longest suffix that also occurs earlier
    is in `link[end]`. Blumer et al., "The smallest automaton recognizing the subwords of a text" (1985).
    """

    __slots__ = ("count", "end", "last", "length", "link", "next", "size")

    def __init__(self, tokens: Iterable[int] = ()) -> None:
        self.next: list[dict[int, int]] = [{}]
        self.link, self.length, self.count, self.last = [-1], [0], [0], [-1]
        self.end = 0
        self.size = 0  # of the text
        self.extend(tokens)

    def extend(self, tokens: Iterable[int]) -> None:
        for token in tokens:
            self._append(int(token))

    def _append(self, token: int) -> None:
        successors, link, length = self.next, self.link, self.length
        new, state = self._state({}, self.size + 1), self.end
        while state >= 0 and token not in successors[state]:
            successors[state][token] = new
            state = link[state]
        if state < 0:
            link[new] = 0
        else:
            target = successors[state][token]
            if length[target] > length[state] + 1:
                target = self._split(state, token, target)
            link[new] = target
        self.end = state = new
        count, last = self.count, self.last
        for _ in range(_COUNT_WALK):
            if state <= 0:
                break
            count[state] += 1
            last[state] = self.size
            state = link[state]
        self.size += 1

    def _split(self, state: int, token: int, target: int) -> int:
        """A copy of `target` for its strings short enough to follow `state`; returns it."""
        successors, link = self.next, self.link
        short = self._state(dict(successors[target]), self.length[state] + 1)
        link[short], self.count[short], self.last[short] = link[target], self.count[target], self.last[target]
        link[target] = short
        while state >= 0 and successors[state].get(token) == target:
            successors[state][token] = short
            state = link[state]
        return short

    def _state(self, successors: dict[int, int], length: int) -> int:
        self.next.append(successors)
        self.link.append(-1)
        self.length.append(length)
        self.count.append(0)
        self.last.append(-1)
        return len(self.next) - 1

    def continuations(self, state: int) -> list[tuple[int, int]]:
        """(token, state after it), the most frequent first, then the most recent."""
        after = self.next[state]
        if len(after) < 2:
            return list(after.items())
        count, last = self.count, self.last
        return sorted(after.items(), key=lambda item: (count[item[1]], last[item[1]]), reverse=True)


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
Cell = tuple[int, int]


def _share_bin(count: int, total: int) -> int:
    """0 to 3: share of the continuations below 1/8, 1/4, 1/2, 1; 4: the only one, once; 5: the only one, more
    often.
    """
    if count >= total:
        return 5 if count > 1 else 4
    return 3 if 2 * count >= total else 2 if 4 * count >= total else 1 if 8 * count >= total else 0


@dataclass(slots=True)
class _State:
    automaton: SuffixAutomaton
    draft: Draft = field(default_factory=Draft.empty)
    cells: list[Cell] = field(default_factory=list)


@register(
    family="SPEC",
    title="Suffix automaton over prompt and output",
    paper="https://arxiv.org/abs/2411.04975",
    exactness="identical",
)
@dataclass(slots=True, eq=False)
class Suffix(Drafter):
    """Finds the longest suffix of the text that occurred before and proposes what followed it, the most
    frequent and then the most recent continuation first, as a tree grown by estimated acceptance. Shorter
    suffixes offer more continuations of the next token. A loop is followed round.

    Oliaro et al., "SuffixDecoding" (sections 3 and 4: pattern matching by suffix trees, trees scored by
    frequency); automaton for retrieval: Hu et al., "SAM Decoding" (arXiv 2411.10666, section 3).

    Parameters: `contexts` suffixes tried for the next token; `branches` continuations per suffix;
    `max_tokens` most nodes; `min_score` least probability of being reached that a node must have.
    A node's score is the measured acceptance for its match length and its share of the continuations.
    """

    name = "suffix"
    paper = "https://arxiv.org/abs/2411.04975"

    contexts: int = 3
    branches: int = 3
    max_tokens: int = 48
    min_score: float = 0.01
    _states: dict[int, _State] = field(default_factory=dict, init=False, repr=False)
    _rates: Rates = field(default_factory=lambda: Rates(_PRIOR), init=False, repr=False)

    def begin(self, sequence: Sequence) -> None:
        self._states[sequence.id] = _State(SuffixAutomaton(sequence.tokens))

    def propose(self, sequences: Seq[Sequence], budgets: Seq[int]) -> list[Draft]:
        rates: list[list[float]] = self._rates.value.tolist()
        return [
            self._grow(self._states[s.id], min(b, self.max_tokens), rates)
            for s, b in zip(sequences, budgets, strict=True)
        ]

    def _grow(self, state: _State, budget: int, rates: list[list[float]]) -> Draft:
        """Best first: the candidate most likely to be reached becomes a node and offers its continuations."""
        automaton = state.automaton
        heap: list[tuple[float, int, int, int, int, int, float, Cell]] = []
        tokens: list[int] = []
        parents: list[int] = []
        scores: list[float] = []
        state.cells = cells = []
        self._offer(heap, automaton, automaton.link[automaton.end], NO_PARENT, -1.0, 0, rates)
        while heap and len(tokens) < budget:
            reach, _, node_state, match, parent, token, score, cell = heappop(heap)
            if -reach < self.min_score:
                break
            node = len(tokens)
            tokens.append(token)
            parents.append(parent)
            scores.append(score)
            cells.append(cell)
            self._offer(heap, automaton, node_state, node, reach, match, rates)
        state.draft = Draft(
            np.array(tokens, dtype=np.int64),
            np.array(parents, dtype=np.int64),
            [self.name] * len(tokens),
            np.array(scores, dtype=np.float32),
        )
        return state.draft

    def _offer(
        self,
        heap: list[tuple[float, int, int, int, int, int, float, Cell]],
        automaton: SuffixAutomaton,
        state: int,
        node: int,
        reach: float,
        match: int,
        rates: list[list[float]],
    ) -> None:
        """Push the continuations of `node`, whose context is in `state`. `reach` is negative, for the heap."""
        contexts = self.contexts if node == NO_PARENT else 1
        offered: set[int] = set()
        length, count = automaton.length, automaton.count
        while contexts and state > 0:
            # Behind a node the context may be shorter than the longest string of its state.
            reached = min(match, length[state]) if match else length[state]
            after = automaton.continuations(state)[: self.branches]
            total = sum(count[s] for s in automaton.next[state].values()) if len(after) > 1 else 0
            for token, following in after:
                if token in offered:
                    continue
                offered.add(token)
                cell = (_LENGTH_BIN[min(reached, _LENGTHS[-1])], _share_bin(count[following], total))
                score = rates[cell[0]][cell[1]]
                heappush(heap, (reach * score, len(heap), following, reached + 1, node, token, score, cell))
            contexts -= bool(after)
            state = automaton.link[state]

    def observe(self, sequence: Sequence, seen: Observation) -> None:
        state = self._states[sequence.id]
        for node, _, right in judged_nodes(state.draft, seen.new_tokens):
            self._rates.update(state.cells[node], right)
        state.draft, state.cells = Draft.empty(), []
        state.automaton.extend(sequence.tokens[state.automaton.size :])

    def end(self, sequence: Sequence) -> None:
        self._states.pop(sequence.id, None)
