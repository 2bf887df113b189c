"""Trees grown level by level, each level in one forward, with children drawn without replacement.

The children of a node are drawn from its distribution by Gumbel top-k, in falling order of their Gumbel values. A value
is drawn *before* the token that gets it: the largest Gumbel value of a set of tokens depends on their total weight
alone, and which of them has it is independent of it (Maddison, Tarlow and Minka, "A* Sampling", 2014). So

    value of the first child    that of its parent, the largest of all texts below the parent
    its token                   drawn from the parent's distribution
    value of the next           a Gumbel of the weight that is left, conditioned to lie below the last
    its token                   drawn from what is left of the distribution

Whatever chooses among nodes by their values alone therefore knows nothing of their tokens, beyond that siblings differ,
and leaves rejection sampling exact.

Shapes: `B` sequences, `R` nodes of a level, `V` vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np

from ...types import NO_PARENT, FloatArray, Logits
from ..contracts import Market
from ..sampling import Stream, distribution_of, draw, host_row, uniform
from .grown import Candidate, Choice, Draws, Grown, Growth, dense, edit_rows, likeliest
from .rates import Rates
from .sources import Source

NONE = float("-inf")  # the value of a child that does not exist
_LEAST_WEIGHT = 1e-6  # of what is left of a distribution; below it rounding would choose the token
_MAX_RANK = 9
Luck = dict[int, tuple[float, float]]  # node -> its Gumbel value, and the log-probability of the text down to it


class Children(ABC):
    """The children of a node that were not added yet. `value` orders the next child among those of other nodes; it
    does not depend on the child's token. -inf: there are no more."""

    value: float

    def __init__(self, growth: Growth, parent: int) -> None:
        self.growth, self.parent = growth, parent
        self.above = growth.reach[parent] if parent >= 0 else 1.0

    @property
    @abstractmethod
    def reach(self) -> float:
        """Estimated probability that the next child is reached and accepted."""

    @abstractmethod
    def take(self) -> int:
        """Add the next child; returns the node."""


class Ranked(Children):
    """Children proposed outright, the likeliest first."""

    def __init__(self, growth: Growth, parent: int, candidates: list[Candidate]) -> None:
        super().__init__(growth, parent)
        self._left = sorted(candidates, key=lambda c: c.score)  # the next one is the last
        self.value = self.reach

    @property
    def reach(self) -> float:
        return self.above * self._left[-1].score if self._left else NONE

    def take(self) -> int:
        best = self._left.pop()
        node = self.growth.add(self.parent, best.token, best.score, best.cell)
        self.value = self.reach
        return node


class Drawn(Children):
    """Children drawn without replacement. `q` f32[V] the distribution after the parent; `rates` as in Grown."""

    def __init__(self, growth: Growth, parent: int, q: FloatArray, luck: Luck, rates: Rates) -> None:
        super().__init__(growth, parent)
        self._q, self._left, self._luck, self._rates = q, q.astype(np.float64), luck, rates
        self._whole = float(self._left.sum())
        self._rank = 0
        self.value, self._path_logprob = luck[parent]

    @property
    def reach(self) -> float:
        return self.above * float(self._rates.value[self._cell])

    @property
    def _cell(self) -> tuple[Choice, int]:
        return Choice.SIBLING, min(self._rank, _MAX_RANK)

    def take(self) -> int:
        one, cell = self.growth, self._cell
        number = 2 * len(one.tokens)
        token = draw(self._left, self._uniform(number))
        node = one.add(self.parent, token, float(self._rates.value[cell]), cell, self._q)
        self._luck[node] = self.value, self._path_logprob + float(np.log(self._left[token] / self._whole))
        self._left[token] = 0.0
        self._rank += 1
        weight = float(self._left.sum()) / self._whole
        self.value = self._below(weight, self._uniform(number + 1)) if weight > _LEAST_WEIGHT else NONE
        return node

    def _uniform(self, number: int) -> float:
        return uniform(self.growth.sequence.params.seed, self.growth.root, Stream.DRAFT, number)

    def _below(self, weight: float, u: float) -> float:
        """A Gumbel variable of location log(weight of the text so far and what is left), below the last value."""
        location = self._path_logprob + np.log(weight)
        return float(location - np.log(np.exp(location - self.value) - np.log(max(u, 1e-300))))


class LevelTree(Grown):
    """Grows a tree level by level; `_fill` chooses the nodes of a level. Where the draft may be sampled (see Draws) all
    children are drawn without replacement and carry q; else they are the likeliest, proposed outright."""

    def __init__(self, source: Source, draws: Draws, max_depth: int) -> None:
        super().__init__(source, draws)
        self.max_depth = max_depth

    @abstractmethod
    def _fill(self, families: list[Children], depth: int, limit: int, floor: float) -> list[int]:
        """Add at most `limit` nodes of one level, children of `families`, of a reach of `floor` at least; returns them.
        May look at `value` and `reach` of families, not at tokens."""

    def _grow(self, growing: list[Growth], logits: Logits, market: Market) -> None:
        stop = max(market.forward_floor, market.floor)
        luck: list[Luck] = [{NO_PARENT: (0.0, 0.0)} for _ in growing]
        level = [[NO_PARENT] for _ in growing]  # the nodes whose children come next; `logits` has their rows, in order
        for depth in range(self.max_depth):
            families = self._families(growing, level, luck, logits)
            rows = []
            for i, one in enumerate(growing):
                limit = one.budget - len(one.tokens)
                added = self._fill(families[i], depth, limit, market.floor) if families[i] else []
                more = depth + 1 < self.max_depth and len(one.tokens) < one.budget
                level[i] = [node for node in added if more and one.reach[node] >= stop]
                if level[i]:
                    rows.append(one.run(level[i]))
            if not rows:
                break
            logits = self.source.extend(rows)
        for one in growing:
            one.finish(self.name, market.floor)

    def _families(
        self, growing: list[Growth], level: list[list[int]], luck: list[Luck], logits: Logits
    ) -> list[list[Children]]:
        """The children of each node of the level, by sequence."""
        parents = [(i, node) for i, nodes in enumerate(level) for node in nodes]
        paths = [(growing[i].sequence, growing[i].path(node)) for i, node in parents]
        edited = edit_rows(logits, paths)
        ids, p = likeliest(edited, self._most_children)
        families: list[list[Children]] = [[] for _ in growing]
        for row, (i, node) in enumerate(parents):
            sequence, path = paths[row]
            one, params = growing[i], sequence.params
            family: Children
            if self.draws is Draws.SAMPLED and not params.greedy:
                q = dense(distribution_of(host_row(edited[row]), params), self.source.vocab_size)
                family = Drawn(one, node, q, luck[i], self.confidence)
            else:
                family = Ranked(one, node, self._candidates(sequence, len(path), edited[row], ids[row], p[row]))
            families[i].append(family)
        return families

    @property
    @abstractmethod
    def _most_children(self) -> int:
        """Of one node."""
