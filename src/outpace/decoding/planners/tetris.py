"""TETRIS: the draft tokens most likely to be accepted, over the whole batch, fill a fixed budget."""

from __future__ import annotations

from ...registry import register
from ...types import Draft
from ..contracts import Market
from ..tree import keep_best, reaches
from .planner import Planner, StepBudget


@register(
    kind="planner",
    family="SPEC",
    title="TETRIS",
    paper="https://arxiv.org/abs/2502.15197",
    exactness="identical",
    needs=("scores of draft nodes",),
)
class Tetris(Planner):
    """Every sequence drafts as much as it may; of all nodes of all sequences those with the highest cumulative score
    are verified, as many as the step has rows for. Wu et al., "TETRIS: Optimal Draft Token Selection for Batch
    Speculative Decoding", section 4 (greedy selection is optimal, since no node outweighs its parent). With one
    sequence this is the fixed budget."""

    name = "tetris"
    paper = "https://arxiv.org/abs/2502.15197"

    def offer(self, budget: StepBudget) -> tuple[list[int], Market]:
        return [min(cap, budget.nodes) for cap in budget.caps], Market()

    def choose(self, drafts: list[Draft], budget: StepBudget) -> list[Draft]:
        return keep_best(drafts, budget.nodes, [reaches(draft) for draft in drafts])
