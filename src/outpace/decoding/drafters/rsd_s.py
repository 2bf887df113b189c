"""Recursive speculative decoding by stochastic beam search."""

from __future__ import annotations

from ...errors import ParameterError
from ...registry import register
from .grown import Draws
from .levels import NONE, Children, LevelTree
from .sources import Source


@register(
    family="SPEC",
    title="Draft model, tree drawn by stochastic beam search (RSD-S)",
    paper="https://arxiv.org/abs/2402.14160",
    exactness="identical",
    needs=("draft model",),
)
class RsdS(LevelTree):
    """Each level holds the `width` texts of the largest Gumbel values among all continuations of the level before:
    texts drawn without replacement from the draft model, likely branches carried on and unlikely ones ended early.

    Ending branches early keeps rejection sampling exact: which branch gets the next node is decided by the Gumbel
    values of the branches, and a node's value is independent of its token, given the siblings drawn before it (see
    `levels.py`; siblings of a lower value are never chosen before it). Exact in distribution under the rejection
    verifier; under the coupled verifier (identical) it is the plain beam search of the likeliest texts, and where the
    target samples its coupled draw joins the candidates (see Draws).

    Jeon et al., "Recursive Speculative Decoding: Accelerating LLM Inference via Sampling Without Replacement",
    section 3.2.2; Kool, van Hoof and Welling, "Stochastic Beams and Where to Find Them" (arXiv 1903.06059).

    Parameters: `width` nodes of a level; `max_depth` levels. Raises ParameterError out of range.
    """

    name = "rsd-s"
    paper = "https://arxiv.org/abs/2402.14160"

    def __init__(self, source: Source, draws: Draws = Draws.COUPLED, width: int = 3, max_depth: int = 5) -> None:
        for key, value in (("width", width), ("max_depth", max_depth)):
            if value < 1:
                raise ParameterError(f"{self.name}:{key}={value} is out of range: it must be at least 1")
        super().__init__(source, draws, max_depth)
        self.width = width

    def _rows(self, budget: int) -> int:
        return min(budget, self.width * (self.max_depth - 1))

    @property
    def _most_children(self) -> int:
        return self.width

    def _fill(self, families: list[Children], depth: int, limit: int, floor: float) -> list[int]:
        nodes: list[int] = []
        while len(nodes) < min(self.width, limit):
            best = max(families, key=lambda family: family.value)
            if best.value == NONE or best.reach < floor:
                break
            nodes.append(best.take())
        return nodes
