"""The same number of rows for every sequence."""

from __future__ import annotations

from ...registry import register
from ..contracts import Market
from .planner import Planner, StepBudget, share_rows


@register(
    kind="planner",
    family="SPEC",
    title="Fair shares of a fixed number of rows",
    paper="",
    exactness="identical",
)
class Fixed(Planner):
    """Each sequence drafts up to its fair share of the step's rows, whatever comes of it. What a method named by hand
    gets: it shows what the method does by itself."""

    name = "fixed"
    paper = ""

    def offer(self, budget: StepBudget) -> tuple[list[int], Market]:
        return share_rows(budget.nodes, budget.caps), Market()
