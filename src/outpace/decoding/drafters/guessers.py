"""Third drafters of a hierarchy: they guess on from what the middle one has settled on, a few tokens at a time.

A round: `start`, then `guess` again and again while the middle's drafts grow, then `observe` once their fate is known.
A wrong guess costs a row of the middle's forward and nothing else.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import numpy as np

from ...types import NO_PARENT, Logits
from ..contracts import Sequence
from .grown import Growth, coupled_draw
from .ngram import NgramIndex
from .sources import ModelSource, Rows

_LONGEST_NGRAM = 4


class Guesser(ABC):
    """State per sequence is made in `begin` and dropped in `end`."""

    def begin(self, sequence: Sequence) -> None:  # noqa: B027
        """A sequence starts."""

    def start(self, growing: list[Growth], most: int) -> None:  # noqa: B027
        """A round starts, in which a draft gets at most `most` guesses after each node."""

    @abstractmethod
    def guess(self, growing: list[Growth], counts: list[int]) -> list[list[int]]:
        """At most `counts[i]` tokens behind the nodes of each, which grow from call to call."""

    def observe(self, sequence: Sequence, right: int) -> None:  # noqa: B027
        """The round is over: so many of its leading nodes were right."""

    def rollback(self, sequence: Sequence) -> None:  # noqa: B027
        """The round is over, or was never begun, and its end not known."""

    def end(self, sequence: Sequence) -> None:  # noqa: B027
        """The sequence is over. Safe to call twice."""


class LookupGuesser(Guesser):
    """What followed the same few tokens the last time."""

    def __init__(self) -> None:
        self._indexes: dict[int, _SuffixIndex] = {}

    def begin(self, sequence: Sequence) -> None:
        self._indexes[sequence.id] = _SuffixIndex(1, _LONGEST_NGRAM)

    def guess(self, growing: list[Growth], counts: list[int]) -> list[list[int]]:
        guesses = []
        for one, count in zip(growing, counts, strict=True):
            index = self._indexes[one.sequence.id]
            index.extend(one.sequence.tokens[len(index.tokens) :])
            guesses.append(index.after([*one.sequence.tokens[-_LONGEST_NGRAM:], *one.tokens], count))
        return guesses

    def end(self, sequence: Sequence) -> None:
        self._indexes.pop(sequence.id, None)


class _SuffixIndex(NgramIndex):
    def after(self, text: list[int], count: int) -> list[int]:
        """What followed the longest suffix of `text`, which need not be the end of what is indexed."""
        for last, n in zip(reversed(self._last), reversed(self._lengths), strict=True):
            place = last.get(tuple(text[-n:])) if n <= len(text) else None
            if place is not None:
                return self.tokens[place : place + count]
        return []


@dataclass(slots=True)
class _Chain:
    """Rows of the third model in one round: `rows[i]` holds node i of the draft."""

    rows: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    guessed: list[tuple[int, int]] = field(default_factory=list)  # (token, row) of the last guesses that were run


class ModelGuesser(Guesser):
    """A small model with a streaming window over its own cache."""

    def __init__(self, source: ModelSource, coupled: bool) -> None:
        self.source, self.coupled = source, coupled
        self._chains: dict[int, _Chain] = {}

    def begin(self, sequence: Sequence) -> None:
        self.source.begin(sequence)

    def start(self, growing: list[Growth], most: int) -> None:
        sequences = [one.sequence for one in growing]
        rows = [one.budget * most for one in growing]
        fits = self.source.admit(sequences, rows)
        admitted = [sequence for sequence, fit in zip(sequences, fits, strict=True) if fit]
        if admitted:
            self.source.catch_up(admitted)
            self._chains.update((sequence.id, _Chain()) for sequence in admitted)

    def guess(self, growing: list[Growth], counts: list[int]) -> list[list[int]]:
        guesses: dict[int, list[int]] = {one.sequence.id: [] for one in growing}
        left = {one.sequence.id: n for one, n in zip(growing, counts, strict=True) if one.sequence.id in self._chains}
        active = [one for one in growing if left.get(one.sequence.id, 0) > 0]
        rows = [self._unread(one) for one in active]
        while active:
            logits = self.source.extend(rows)
            ends = np.cumsum([len(r.tokens) for r in rows]) - 1
            for one, end in zip(active, ends.tolist(), strict=True):
                said = guesses[one.sequence.id]
                said.append(self._choose(logits[end], one, len(said)))
                left[one.sequence.id] -= 1
            active = [one for one in active if left[one.sequence.id] > 0]
            rows = [self._further(one, guesses[one.sequence.id][-1]) for one in active]
        return [guesses[one.sequence.id] for one in growing]

    def _choose(self, logits: Logits, one: Growth, ahead: int) -> int:
        if one.sequence.params.greedy or not self.coupled:
            return int(logits.argmax())
        return coupled_draw(logits, one.sequence.params, one.root + len(one.tokens) + ahead)[0]

    def _unread(self, one: Growth) -> Rows:
        """The nodes that are new since the last guesses; those that were guessed have their rows."""
        chain = self._chains[one.sequence.id]
        for token, row in chain.guessed:
            if len(chain.rows) == len(one.tokens) or one.tokens[len(chain.rows)] != token:
                break
            chain.rows.append(row)
        chain.guessed = []
        new = one.tokens[len(chain.rows) :]
        for _ in new:
            chain.rows.append(self._add(chain, chain.rows[-1] if chain.rows else NO_PARENT))
        return Rows(one.sequence, new, chain.parents)

    def _further(self, one: Growth, token: int) -> Rows:
        chain = self._chains[one.sequence.id]
        row = self._add(chain, chain.guessed[-1][1] if chain.guessed else chain.rows[-1])
        chain.guessed.append((token, row))
        return Rows(one.sequence, [token], chain.parents)

    @staticmethod
    def _add(chain: _Chain, parent: int) -> int:
        chain.parents.append(parent)
        return len(chain.parents) - 1

    def observe(self, sequence: Sequence, right: int) -> None:
        chain = self._chains.pop(sequence.id, None)
        self.source.observe(sequence, [] if chain is None else chain.rows[:right])

    def rollback(self, sequence: Sequence) -> None:
        self._chains.pop(sequence.id, None)
        self.source.rollback(sequence)

    def end(self, sequence: Sequence) -> None:
        self._chains.pop(sequence.id, None)
        self.source.end(sequence)
