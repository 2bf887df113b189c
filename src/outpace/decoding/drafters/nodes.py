"""A draft in the making, and the base of drafters that grow one node by node from what they know of the text.

Such a drafter may be skipped: a step in which it was not called is not observed either. It therefore reads all that it
knows of the text from `sequence.tokens` when it is called, and a draft is checked against the tokens after its root.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np

from ...errors import ParameterError
from ...types import Draft
from ..contracts import Drafter, Market, Observation, Proposal, Sequence
from .rates import Rates, checked_nodes

Cell = tuple[int, ...]  # of the table of acceptance rates on which a node's score rests


@dataclass(slots=True)
class Nodes:
    """A token tree in the making; equal children of one node are one node.

    `root` is the number of tokens that the sequence had: nodes at depth d are guesses of token `root + d`.
    """

    root: int = 0
    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    cells: list[Cell] = field(default_factory=list)
    _index: dict[tuple[int, int], int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.tokens)

    def find(self, parent: int, token: int) -> int | None:
        return self._index.get((parent, token))

    def add(self, parent: int, token: int, score: float, cell: Cell) -> int:
        """The node of `token` below `parent`: a new one, or the one that is there."""
        node = self._index.setdefault((parent, token), len(self.tokens))
        if node == len(self.tokens):
            self.tokens.append(token)
            self.parents.append(parent)
            self.scores.append(score)
            self.cells.append(cell)
        return node

    def draft(self, source: str) -> Draft:
        return Draft(
            np.array(self.tokens, dtype=np.int64),
            np.array(self.parents, dtype=np.int64),
            [source] * len(self.tokens),
            np.array(self.scores, dtype=np.float32),
        )

    def update_rates(self, rates: Rates, tokens: list[int]) -> None:
        """Count in `rates` which nodes the text proves right or wrong."""
        truth = tokens[self.root : self.root + len(self)]
        if truth:
            for node, _, right in checked_nodes(self.draft(""), truth):
                rates.update(self.cells[node], right)


@dataclass(slots=True)
class NodeState:
    """What a NodeDrafter keeps of a sequence: the nodes last proposed, until they are checked."""

    nodes: Nodes = field(default_factory=Nodes, init=False)


S = TypeVar("S", bound=NodeState)


class NodeDrafter(Drafter, Generic[S]):
    """A drafter whose nodes are scored by measured acceptance. What remains is `begin`, which makes the state, and
    `_grow`."""

    _states: dict[int, S]
    _rates: Rates

    @abstractmethod
    def _grow(self, sequence: Sequence, state: S, nodes: Nodes, budget: int, floor: float) -> Draft | None:
        """Add at most `budget` (above 0) nodes; `floor` as in Market. May return the draft made of them, if it
        holds more than they."""

    def propose(self, sequences: Seq[Sequence], budgets: Seq[int], market: Market) -> Proposal:
        drafts = []
        for sequence, budget in zip(sequences, budgets, strict=True):
            state = self._states[sequence.id]
            self._check(sequence, state)
            state.nodes.root = len(sequence.tokens)
            made = self._grow(sequence, state, state.nodes, budget, market.floor) if budget > 0 else None
            drafts.append(state.nodes.draft(self.name) if made is None else made)
        return Proposal(drafts)

    def observe(self, sequence: Sequence, seen: Observation) -> None:
        self._check(sequence, self._states[sequence.id])

    def end(self, sequence: Sequence) -> None:
        self._states.pop(sequence.id, None)

    def _check(self, sequence: Sequence, state: S) -> None:
        state.nodes.update_rates(self._rates, sequence.tokens)
        state.nodes = Nodes()


def check_range(method: str, parameter: str, value: float, least: float, most: float = math.inf) -> None:
    """Raises ParameterError for a value outside [least, most]."""
    if not least <= value <= most:
        allowed = f"at least {least}" if most == math.inf else f"from {least} to {most}"
        raise ParameterError(f"{method}:{parameter}={value} is out of range: it must be {allowed}")


def chain_length(score: float, floor: float, longest: int) -> int:
    """How many tokens of a chain are reached and accepted with at least the probability `floor`, each accepted with
    probability `score`."""
    if floor <= 0 or score >= 1:
        return longest
    if score <= floor:
        return int(score == floor)
    return min(longest, int(math.log(floor) / math.log(score) + 1e-9))
