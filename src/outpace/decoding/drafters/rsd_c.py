"""Recursive speculative decoding with constant branching factors."""

from __future__ import annotations

from math import prod

from ...errors import ParameterError
from ...registry import register
from .grown import Draws
from .levels import NONE, Children, LevelTree
from .sources import Source


@register(
    family="SPEC",
    title="Draft model, tree drawn without replacement, constant branching (RSD-C)",
    paper="https://arxiv.org/abs/2402.14160",
    exactness="identical",
    needs=("draft model",),
)
class RsdC(LevelTree):
    """Every node of a level gets the same number of children, drawn from its distribution without replacement by
    Gumbel top-k; siblings that differ waste no row of the target. The tree's shape is fixed in advance, so it says
    nothing of the tokens: a smaller budget cuts the last siblings of the last level first.

    Exact in distribution under the rejection verifier, which tests siblings in the order of the draws, each against
    its distribution without those before. Under the coupled verifier (identical) the children are the likeliest
    tokens, and where the target samples its coupled draw joins them (see Draws).

    Jeon et al., "Recursive Speculative Decoding: Accelerating LLM Inference via Sampling Without Replacement",
    section 3.2.1.

    Parameters: `branching` children of a node on each level, joined by '-'. Raises ParameterError out of range.
    """

    name = "rsd-c"
    paper = "https://arxiv.org/abs/2402.14160"

    def __init__(self, source: Source, draws: Draws = Draws.COUPLED, branching: str = "2-2-1-1") -> None:
        parts = branching.split("-")
        if not all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts):
            raise ParameterError(
                f"{self.name}:branching={branching!r} is out of range: it must be whole numbers of at least 1, one for "
                "each level, joined by '-', such as 3-2-1"
            )
        self.branching = [int(part) for part in parts]
        super().__init__(source, draws, max_depth=len(parts))

    def _rows(self, budget: int) -> int:
        return min(budget, sum(prod(self.branching[: depth + 1]) for depth in range(self.max_depth - 1)))

    @property
    def _most_children(self) -> int:
        return max(self.branching)

    def _fill(self, families: list[Children], depth: int, limit: int, floor: float) -> list[int]:
        nodes: list[int] = []
        for _ in range(self.branching[depth]):  # first children first
            for family in families:
                if len(nodes) < limit and family.value > NONE and family.reach >= floor:
                    nodes.append(family.take())
        return nodes
