"""A tree of drafts grown by the draft model's own probabilities."""

from __future__ import annotations

from dataclasses import dataclass, field
from heapq import heappop, heappush, nlargest
from typing import Any

import numpy as np
import torch

from ...errors import ParameterError
from ...registry import register
from ...types import NO_PARENT, Draft
from ..contracts import DrafterContext, Sequence
from .grown import NO_ROW, Cell, Choice, Draws, Grown, Growth, cell_of, coupled_draw, edit_rows, likeliest
from .sources import ModelSource, Rows, Source


@dataclass(slots=True, eq=False)
class _Candidates:
    """A tree in the making. A candidate is expanded when its own row was run."""

    growth: Growth
    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    reach: list[float] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    cells: list[Cell | None] = field(default_factory=list)
    row_parents: list[int] = field(default_factory=list)  # of expanded candidates, by row
    waiting: list[tuple[float, int]] = field(default_factory=list)  # heap of (-reach, candidate)

    def add(self, parent: int, tokens: list[int], p: list[float], cell: Cell | None = None) -> None:
        """Children of `parent`, with their scores; `cell` is that of the first, if it was drawn coupled."""
        above, depth = (self.reach[parent], self.depths[parent] + 1) if parent >= 0 else (1.0, 0)
        for token, score in zip(tokens, p, strict=True):
            heappush(self.waiting, (-above * score, len(self.tokens)))
            self.tokens.append(token)
            self.parents.append(parent)
            self.scores.append(score)
            self.reach.append(above * score)
            self.depths.append(depth)
            self.rows.append(NO_ROW)
            self.cells.append(cell)
            cell = None

    def expand(self, width: int, max_depth: int, min_reach: float) -> list[int]:
        """Up to `width` candidates whose children may still enter the best of the budget; they get rows."""
        budget = self.growth.budget
        full = len(self.reach) >= budget
        floor = max(min_reach, nlargest(budget, self.reach)[-1] if full else 0.0)
        picked: list[int] = []
        while self.waiting and len(picked) < width and -self.waiting[0][0] > floor:
            node = heappop(self.waiting)[1]
            if self.depths[node] + 1 < max_depth:
                picked.append(node)
        for node in picked:
            self.rows[node] = len(self.row_parents)
            parent = self.parents[node]
            self.row_parents.append(self.rows[parent] if parent >= 0 else NO_PARENT)
        return picked

    def path(self, node: int) -> list[int]:
        path: list[int] = []
        while node >= 0:
            path.append(self.tokens[node])
            node = self.parents[node]
        return path[::-1]

    def finish(self, source: str, floor: float) -> None:
        """The draft: the candidates most likely to be reached and accepted, `floor` at least; parents first."""
        one = self.growth
        ranked = sorted(range(len(self.tokens)), key=self.reach.__getitem__, reverse=True)[: one.budget]
        kept = sorted(node for node in ranked if self.reach[node] >= floor)
        place = {node: i for i, node in enumerate(kept)} | {NO_PARENT: NO_PARENT}
        one.draft = Draft(
            np.array([self.tokens[node] for node in kept], dtype=np.int64),
            np.array([place[self.parents[node]] for node in kept], dtype=np.int64),
            [source] * len(kept),
            np.array([self.scores[node] for node in kept], dtype=np.float32),
        )
        one.rows, one.cells = [self.rows[node] for node in kept], [self.cells[node] for node in kept]


@register(
    family="SPEC",
    title="Draft model, dynamic tree",
    paper="https://arxiv.org/abs/2406.16858",
    exactness="identical",
    needs=("draft model",),
)
class DraftTree(Grown):
    """Each forward of the draft model expands the `width` candidates most likely to be reached, wherever in the tree
    they are; the candidates that are likeliest in the end make the draft. Growing stops when no child can displace
    one of them. Where the target samples, the coupled draw joins a node's candidates (see Draws). All nodes are
    proposed outright, so every verifier takes them.

    Li et al., "EAGLE-2: Faster Inference of Language Models with Dynamic Draft Trees", section 4 (expansion and
    reranking by the product of the draft model's confidences), here with any model instead of a trained head.

    Parameters: `branches` candidates per expanded node; `width` nodes expanded per forward; `max_depth` of the tree;
    `min_reach` least probability of being reached for a node to be expanded. Raises ParameterError out of range.
    """

    name = "draft-tree"
    paper = "https://arxiv.org/abs/2406.16858"

    def __init__(
        self,
        source: Source,
        draws: Draws = Draws.COUPLED,
        branches: int = 6,
        width: int = 4,
        max_depth: int = 8,
        min_reach: float = 0.1,
    ) -> None:
        super().__init__(source, draws)
        for key, value in (("branches", branches), ("width", width), ("max_depth", max_depth)):
            if value < 1:
                raise ParameterError(f"{self.name}:{key}={value} is out of range: it must be at least 1")
        if not 0 <= min_reach <= 1:
            raise ParameterError(f"{self.name}:min_reach={min_reach} is out of range: it must be from 0 to 1")
        self.branches, self.width, self.max_depth, self.min_reach = branches, width, max_depth, min_reach

    @classmethod
    def create(cls, context: DrafterContext, **options: Any) -> DraftTree:
        return cls(ModelSource.of(context, cls.name), Draws.of(context), **options)

    def _rows(self, budget: int) -> int:
        return min(budget, self.max_depth - 1) * self.width

    def _grow(self, growing: list[Growth], logits: torch.Tensor) -> None:
        trees = [_Candidates(one) for one in growing]
        nodes = [(tree, NO_PARENT) for tree in trees]  # of the rows of `logits`
        stop = max(self.min_reach, self.forward_floor, self.floor)
        for forwards in range(self.max_depth):
            self._add_children(nodes, logits)
            nodes, grown = [], []
            for tree in trees:
                if forwards >= min(tree.growth.budget, self.max_depth - 1):
                    continue
                picked = tree.expand(self.width, self.max_depth, stop)
                if picked:
                    tokens = [tree.tokens[node] for node in picked]
                    grown.append(Rows(tree.growth.sequence, tokens, tree.row_parents))
                    nodes += [(tree, node) for node in picked]
            if not nodes:
                break
            logits = self.source.extend(grown)
        for tree in trees:
            tree.finish(self.name, self.floor)

    def _add_children(self, nodes: list[tuple[_Candidates, int]], logits: torch.Tensor) -> None:
        """Offer the children of each node, of which `logits` has a row."""
        contexts = [(tree.growth.sequence, tree.path(node)) for tree, node in nodes]
        edited = edit_rows(logits, contexts)
        ids, p = likeliest(edited, self.branches)
        for row, (tree, node) in enumerate(nodes):
            sequence, path = contexts[row]
            if self.draws is Draws.COUPLED and not sequence.params.greedy:
                tree.add(node, *self._with_draw(ids[row], p[row], edited[row], sequence, len(path)))
            else:
                tree.add(node, ids[row], p[row])

    def _with_draw(
        self, ids: list[int], p: list[float], row: torch.Tensor, sequence: Sequence, depth: int
    ) -> tuple[list[int], list[float], Cell]:
        """The coupled draw and the likeliest children, their scores, and the draw's cell. The draw has its measured
        acceptance; the others share what is left in proportion to their probabilities."""
        drawn, own = coupled_draw(row, sequence.params, len(sequence.tokens) + depth)
        cell = cell_of(Choice.COUPLED, own)
        rate = self._rate(cell)
        rest = (1 - rate) / max(1 - own, 1e-6)
        tokens, scores = [drawn], [rate]
        for token, likely in zip(ids, p, strict=True):
            if token != drawn:
                tokens.append(token)
                scores.append(min(likely * rest, 1.0))
        return tokens, scores, cell
