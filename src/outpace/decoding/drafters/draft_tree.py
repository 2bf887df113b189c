"""A tree of drafts grown by the draft model's own probabilities."""

from __future__ import annotations

from dataclasses import dataclass, field
from heapq import heappop, heappush, nlargest
from typing import Any

import numpy as np
import torch

from ...models.batch import Span
from ...models.decoder import Decoder
from ...ops.masks import Tree
from ...registry import register
from ...types import NO_PARENT, Draft
from ..contracts import DrafterContext, Sequence
from .draft_model import NO_CELL, NO_OFFSET, DraftModel, Growing, edit_rows, likeliest


@dataclass(slots=True)
class _Candidates:
    """A tree in the making. A candidate is expanded when its own row was run; then it has an offset."""

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    reach: list[float] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    cells: list[int] = field(default_factory=list)
    row_parents: list[int] = field(default_factory=list)  # of expanded candidates, by offset
    waiting: list[tuple[float, int]] = field(default_factory=list)  # heap of (-reach, candidate)

    def add(
        self, parent: int, tokens: list[int], p: list[float], drawn: int | None = None, cell: int = NO_CELL
    ) -> None:
        """Children of `parent`, with their scores; the token `drawn` was drawn coupled, its rate is in `cell`."""
        above, depth = (self.reach[parent], self.depths[parent] + 1) if parent >= 0 else (1.0, 0)
        for token, score in zip(tokens, p, strict=True):
            heappush(self.waiting, (-above * score, len(self.tokens)))
            self.tokens.append(token)
            self.parents.append(parent)
            self.scores.append(score)
            self.reach.append(above * score)
            self.depths.append(depth)
            self.offsets.append(NO_OFFSET)
            self.cells.append(cell if token == drawn else NO_CELL)

    def expand(self, budget: int, width: int, max_depth: int, min_reach: float) -> list[int]:
        """Up to `width` candidates whose children may still enter the best `budget`; they get offsets."""
        full = len(self.reach) >= budget
        floor = max(min_reach, nlargest(budget, self.reach)[-1] if full else 0.0)
        picked: list[int] = []
        while self.waiting and len(picked) < width and -self.waiting[0][0] > floor:
            node = heappop(self.waiting)[1]
            if self.depths[node] + 1 < max_depth:
                picked.append(node)
        for node in picked:
            self.offsets[node] = len(self.row_parents)
            parent = self.parents[node]
            self.row_parents.append(self.offsets[parent] if parent >= 0 else NO_PARENT)
        return picked

    def path(self, node: int) -> list[int]:
        path: list[int] = []
        while node >= 0:
            path.append(self.tokens[node])
            node = self.parents[node]
        return path[::-1]

    def best(self, budget: int, source: str) -> tuple[Draft, list[int], list[int]]:
        """The `budget` candidates most likely to be reached, their offsets and cells; parents before children."""
        ranked = sorted(range(len(self.tokens)), key=self.reach.__getitem__, reverse=True)
        kept = sorted(ranked[:budget])
        place = {node: i for i, node in enumerate(kept)} | {NO_PARENT: NO_PARENT}
        draft = Draft(
            np.array([self.tokens[node] for node in kept], dtype=np.int64),
            np.array([place[self.parents[node]] for node in kept], dtype=np.int64),
            [source] * len(kept),
            np.array([self.scores[node] for node in kept], dtype=np.float32),
        )
        return draft, [self.offsets[node] for node in kept], [self.cells[node] for node in kept]


@register(
    family="SPEC",
    title="Draft model, tree grown by its own probabilities",
    paper="https://arxiv.org/abs/2410.11744",
    exactness="identical",
    needs=("draft model",),
)
class DraftTree(DraftModel):
    """Each forward of the draft model expands the `width` candidates most likely to be reached, wherever in the tree
    they are; the candidates that are likeliest in the end make the draft. Growing stops when no child can displace
    one of them. Where the target samples, the coupled draw joins a node's candidates (see DraftModel). All nodes are
    proposed outright, so every verifier takes them.

    Xiong et al., "DySpec: Faster Speculative Decoding with Dynamic Token Tree Structure", section 4 (greedy growth,
    `width` = 1); Li et al., "EAGLE-2" (arXiv 2406.16858), section 4 (expansion and reranking).

    Parameters: `branches` candidates per expanded node; `width` nodes expanded per forward; `max_depth` of the tree;
    `min_reach` least probability of being reached for a node to be expanded.
    """

    name = "draft-tree"
    paper = "https://arxiv.org/abs/2410.11744"

    def __init__(
        self,
        decoder: Decoder,
        num_pages: int,
        vocab_size: int,
        branches: int = 6,
        width: int = 4,
        max_depth: int = 8,
        min_reach: float = 0.1,
        coupled: bool = True,
    ) -> None:
        super().__init__(decoder, num_pages, vocab_size, coupled)
        self.branches, self.width, self.max_depth, self.min_reach = branches, width, max_depth, min_reach

    @classmethod
    def create(cls, context: DrafterContext, **options: Any) -> DraftTree:
        decoder = cls._decoder_of(context)
        return cls(decoder, context.draft_pages, context.vocab_size, coupled=not context.sampled, **options)

    def _places(self, budget: int) -> int:
        return min(budget, self.max_depth - 1) * self.width

    def _grow(self, growing: list[Growing], logits: torch.Tensor) -> None:
        trees = [_Candidates() for _ in growing]
        rows = [(i, NO_PARENT) for i in range(len(growing))]
        for forwards in range(self.max_depth):
            contexts = [(growing[i].sequence, trees[i].path(node)) for i, node in rows]
            edited = edit_rows(logits, contexts)
            ids, p = likeliest(edited, self.branches)
            for row, (i, node) in enumerate(rows):
                sequence, path = contexts[row]
                if self.coupled and not sequence.params.greedy:
                    self._add_drawn(trees[i], node, ids[row], p[row], edited[row], sequence, len(path))
                else:
                    trees[i].add(node, ids[row], p[row])
            rows = []
            kvs, spans = [], []
            for i, (one, tree) in enumerate(zip(growing, trees, strict=True)):
                if forwards >= min(one.budget, self.max_depth - 1):
                    continue
                picked = tree.expand(one.budget, self.width, self.max_depth, self.min_reach)
                if picked:
                    self.cache.reserve(one.state.kv, len(tree.row_parents))
                    mask = Tree(np.array(tree.row_parents, dtype=np.int64), rooted=False)
                    start = len(tree.row_parents) - len(picked)
                    tokens = [tree.tokens[node] for node in picked]
                    spans.append(Span(tokens, self.cache.length(one.state.kv), mask, start))
                    kvs.append(one.state.kv)
                    rows += [(i, node) for node in picked]
            if not rows:
                break
            logits = self._forward(kvs, spans)
        for one, tree in zip(growing, trees, strict=True):
            self.cache.reserve(one.state.kv, len(tree.row_parents))
            one.state.draft, one.state.offsets, one.state.cells = tree.best(one.budget, self.name)

    def _add_drawn(
        self,
        tree: _Candidates,
        node: int,
        ids: list[int],
        p: list[float],
        row: torch.Tensor,
        sequence: Sequence,
        depth: int,
    ) -> None:
        """The likeliest children and the coupled draw. The draw has its measured acceptance; the others share what
        is left in proportion to their probabilities."""
        drawn, own, cell = self._draw(row, sequence.params, len(sequence.tokens) + depth)
        rate = float(self._draws.value[cell])
        rest = (1 - rate) / max(1 - own, 1e-6)
        tokens, scores = [drawn], [rate]
        for token, likely in zip(ids, p, strict=True):
            if token != drawn:
                tokens.append(token)
                scores.append(min(likely * rest, 1.0))
        tree.add(node, tokens, scores, drawn, cell)
