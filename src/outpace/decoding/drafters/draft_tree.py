"""A tree of drafts grown by the draft model's own probabilities."""

from __future__ import annotations

from heapq import heappop, heappush, nlargest

from ...errors import ParameterError
from ...registry import register
from ...types import NO_PARENT, Logits
from ..contracts import Market
from .grown import Candidate, Draws, Grown, Growth, edit_rows, likeliest
from .sources import Source


class _Frontier:
    """The nodes of a growth that were not expanded, the likeliest to be reached first."""

    def __init__(self, growth: Growth) -> None:
        self.growth = growth
        self._waiting: list[tuple[float, int]] = []  # heap of (-reach, node)

    def offer(self, parent: int, candidates: list[Candidate]) -> None:
        """Children of `parent`."""
        for child in candidates:
            node = self.growth.add(parent, *child)
            heappush(self._waiting, (-self.growth.reach[node], node))

    def pick(self, width: int, max_depth: int, min_reach: float) -> list[int]:
        """Up to `width` nodes to expand, whose children may still enter the best of the budget."""
        reach, budget = self.growth.reach, self.growth.budget
        full = len(reach) >= budget
        floor = max(min_reach, nlargest(budget, reach)[-1] if full else 0.0)
        picked: list[int] = []
        while self._waiting and len(picked) < width and -self._waiting[0][0] > floor:
            node = heappop(self._waiting)[1]
            if self.growth.depths[node] + 1 < max_depth:
                picked.append(node)
        return picked


@register(
    family="SPEC",
    title="Draft model, dynamic tree",
    paper="https://arxiv.org/abs/2406.16858",
    exactness="identical",
    needs=("draft model",),
    claim="3.05x to 4.26x with a trained head (EAGLE-2)",
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

    def _rows(self, budget: int) -> int:
        return min(budget, self.max_depth - 1) * self.width

    def _grow(self, growing: list[Growth], logits: Logits, market: Market) -> None:
        frontiers = [_Frontier(one) for one in growing]
        nodes = [(frontier, NO_PARENT) for frontier in frontiers]  # of the rows of `logits`
        stop = max(self.min_reach, market.forward_floor, market.floor)
        for forwards in range(self.max_depth):
            self._offer_children(nodes, logits)
            nodes, rows = [], []
            for frontier in frontiers:
                if forwards >= min(frontier.growth.budget, self.max_depth - 1):
                    continue
                picked = frontier.pick(self.width, self.max_depth, stop)
                if picked:
                    rows.append(frontier.growth.run(picked))
                    nodes += [(frontier, node) for node in picked]
            if not nodes:
                break
            logits = self.source.extend(rows)
        for one in growing:
            one.finish(self.name, market.floor, most=one.budget)

    def _offer_children(self, nodes: list[tuple[_Frontier, int]], logits: Logits) -> None:
        """The children of each node, of which `logits` has a row."""
        contexts = [(frontier.growth.sequence, frontier.growth.path(node)) for frontier, node in nodes]
        edited = edit_rows(logits, contexts)
        ids, p = likeliest(edited, self.branches)
        for row, (frontier, node) in enumerate(nodes):
            sequence, path = contexts[row]
            frontier.offer(node, self._candidates(sequence, len(path), edited[row], ids[row], p[row]))
