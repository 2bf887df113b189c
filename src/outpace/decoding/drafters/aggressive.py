"""Aggressive Decoding, input-guided: a reference that the output is expected to repeat is the draft."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from heapq import heappop, heappush, nsmallest
from typing import Any

import numpy as np

from ...registry import register
from ...types import NO_PARENT
from ..contracts import DrafterContext, Sequence
from .nodes import Cell, NodeDrafter, Nodes, NodeState, check_range
from .rates import Rates

_LONGEST = 32  # longer matches are all alike
_SURE = 4  # tokens of a match that settle where the copy goes on
_LOST = 3  # tokens since the copy broke off, as far as they are told apart
_BREAK = -1  # between the parts of the reference; never proposed

# Rows of the table of acceptance rates: the best match by its length, the other matches by theirs, then what is tried
# when the copy broke off, by the tokens since, and the start. Its columns are depths, as far as they matter.
_LENGTHS = (1, 2, 3, 4, 6, 9, 16)
_ROW = np.searchsorted(_LENGTHS, np.arange(_LONGEST + 1), side="right").tolist()
_OTHER = len(_LENGTHS) + 1
_REPLACED, _INSERTED = 2 * _OTHER, 2 * _OTHER + _LOST
_START = _INSERTED + _LOST
_COLUMNS = 6
_BEST_PRIOR = (0.0, 0.3, 0.5, 0.6, 0.7, 0.8, 0.88, 0.94)  # chosen on code edits; no match has length 0
_FIRST_PRIOR = (*_BEST_PRIOR, *(0.2 * p for p in _BEST_PRIOR), 0.2, 0.1, 0.05, 0.15, 0.1, 0.05, 0.6)
_LATER_PRIOR = 0.9  # acceptance of later tokens


class Alignment:
    """How a growing output lies in a reference, which the output itself extends.

    `lengths[p]`: how many tokens, up to the output's last, also stand before place p of the reference, 0 if absent.
    `place` is where the copy goes on, or broke off `lost` tokens ago. Reading a token costs the number of places where
    the reference has it.
    """

    def __init__(self, *parts: list[int]) -> None:
        self.reference: list[int] = []
        self.lengths: dict[int, int] = {}
        self.place = self.lost = 0
        self.read = 0  # tokens of the output
        self._places: dict[int, list[int]] = {}
        for part in parts:
            for token in (*part, _BREAK):
                self._append(token)

    def _append(self, token: int) -> None:
        self._places.setdefault(token, []).append(len(self.reference))
        self.reference.append(token)

    def extend(self, tokens: Iterable[int]) -> None:
        """Read on in the output. A sure match, the best one, moves `place`."""
        for token in tokens:
            before = self.lengths
            self.lengths = {p + 1: min(before.get(p, 0) + 1, _LONGEST) for p in self._places.get(token, ())}
            if self.reference[self.place] == token:
                self.place, self.lost = self.place + 1, 0
            else:
                self.lost += 1
                best = self.ranked(_SURE, 1)
                if best:
                    self.place, self.lost = best[0], 0
            self._append(token)
            self.read += 1

    def ranked(self, shortest: int, most: int) -> list[int]:
        """Places behind matches: the longest first, of equal ones the nearest after `place`, then before it."""
        lengths, place = self.lengths, self.place
        found = (p for p, length in lengths.items() if length >= shortest)
        return nsmallest(most, found, key=lambda p: (-lengths[p], p < place, abs(p - place)))


@dataclass(slots=True)
class _State(NodeState):
    alignment: Alignment


@register(
    family="SPEC",
    title="Aggressive Decoding, input-guided",
    paper="https://arxiv.org/abs/2205.10350",
    exactness="identical",
    claim="7x to 9x on grammar correction and simplification",
)
@dataclass(slots=True, eq=False)
class Aggressive(NodeDrafter[_State]):
    """Copies from a reference: the request's prediction, from its start on, then the prompt, then the output so far.
    After a mismatch the copy goes on where the longest suffix of the output stands in the reference, nearest behind
    the last place; and it is tried whether the output replaced tokens of the reference or inserted some. What is
    proposed is a tree of the likeliest of these continuations.

    Ge et al., "Lossless Acceleration for Seq2seq Generation with Aggressive Decoding", section
    3.1 (input-guided). There the draft is one continuation and the input the only reference.

    Parameters: `max_tokens` most nodes; `min_match` shortest suffix to re-align by; `branches` places tried at once;
    `min_score` least probability of being reached that a node must have.
    A node's score is the measured acceptance for the length of the match behind it, and its depth.
    """

    name = "iad"
    paper = "https://arxiv.org/abs/2205.10350"

    max_tokens: int = 64
    min_match: int = 1
    branches: int = 3
    min_score: float = 0.02
    _states: dict[int, _State] = field(default_factory=dict, init=False, repr=False)
    _rates: Rates = field(init=False, repr=False)

    def __post_init__(self) -> None:
        check_range(self.name, "max_tokens", self.max_tokens, 1)
        check_range(self.name, "min_match", self.min_match, 1, _LONGEST)
        check_range(self.name, "branches", self.branches, 1)
        check_range(self.name, "min_score", self.min_score, 0, 1)
        self._rates = Rates([[first] + [_LATER_PRIOR] * (_COLUMNS - 1) for first in _FIRST_PRIOR])

    @classmethod
    def create(cls, context: DrafterContext, **options: Any) -> Aggressive:
        return cls(**options)

    def begin(self, sequence: Sequence) -> None:
        prompt = sequence.tokens[: sequence.prompt_length]
        self._states[sequence.id] = _State(Alignment(*filter(None, (sequence.prediction, prompt))))
        if not sequence.prediction:
            self._states[sequence.id].alignment.place = len(prompt)  # nothing is copied before a match

    def _grow(self, sequence: Sequence, state: _State, nodes: Nodes, budget: int, floor: float) -> None:
        """Best first over the next tokens of all continuations."""
        alignment, rates = state.alignment, self._rates.value
        alignment.extend(sequence.tokens[sequence.prompt_length + alignment.read :])
        heap: list[tuple[float, int, int, int, int, Cell]] = []  # -reach, ticket, parent, place, depth, cell
        floor, most = max(self.min_score, floor), min(budget, self.max_tokens)

        def offer(parent: int, place: int, row: int, depth: int, reach: float, ticket: int) -> None:
            if place < len(alignment.reference) and alignment.reference[place] != _BREAK:
                cell = (row, min(depth, _COLUMNS - 1))
                heappush(heap, (reach * float(rates[cell]), ticket, parent, place, depth, cell))

        for ticket, (place, row) in enumerate(self._continuations(alignment)):
            offer(NO_PARENT, place, row, 0, -1.0, ticket)
        while heap and len(nodes) < most and -heap[0][0] >= floor:
            reach, ticket, parent, place, depth, cell = heappop(heap)
            node = nodes.add(parent, alignment.reference[place], float(rates[cell]), cell)
            offer(node, place + 1, cell[0], depth + 1, reach, ticket)

    def _continuations(self, alignment: Alignment) -> list[tuple[int, int]]:
        """(place in the reference, row of its rates)."""
        found = [
            (place, _ROW[alignment.lengths[place]] + (_OTHER if rank else 0))
            for rank, place in enumerate(alignment.ranked(self.min_match, self.branches))
        ]
        lost = alignment.lost
        if 0 < lost < _LONGEST and _BREAK not in alignment.reference[alignment.place : alignment.place + lost]:
            row = min(lost, _LOST) - 1
            found += [(alignment.place + lost, _REPLACED + row), (alignment.place, _INSERTED + row)]
        elif not alignment.read:
            found.append((alignment.place, _START))
        return found
