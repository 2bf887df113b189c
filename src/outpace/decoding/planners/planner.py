"""The contract of planners: how the rows of a step are shared between sequences and their drafts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import ClassVar

from ...types import Draft
from ..contracts import Market
from .costs import StepCosts


@dataclass(frozen=True, slots=True)
class StepBudget:
    """Draft rows that a step may have. `caps[i]` most draft nodes of sequence i, `nodes` of all together, `contexts[i]`
    tokens it has in the KV cache."""

    caps: list[int]
    nodes: int
    contexts: list[int]

    @property
    def context(self) -> float:
        """Mean of the sequences."""
        return sum(self.contexts) / len(self.contexts) if self.contexts else 0.0


class Planner(ABC):
    """Decides before drafting how much each sequence may draft, and after it which nodes are verified.

    `costs` are the measured step times; a planner that needs them says so by `needs_costs`.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    needs_costs: ClassVar[bool] = False

    def __init__(self, costs: StepCosts | None = None) -> None:
        assert costs is not None or not self.needs_costs, f"planner {self.name!r} needs measured step times"
        self.costs = costs

    @abstractmethod
    def offer(self, budget: StepBudget) -> tuple[list[int], Market]:
        """Most nodes to draft for each sequence, and what they have to repay."""

    def choose(self, drafts: list[Draft], budget: StepBudget) -> list[Draft]:
        """The nodes that are verified, at most `budget.nodes` in all. A node's ancestors stay with it."""
        return drafts

    def observe(
        self, rows: int, context: float, tokens: int, draft_s: float, step_s: float, prompt_rows: int = 0
    ) -> float:
        """A step of `rows` rows committed `tokens`; drafting took `draft_s`, the rest of the step `step_s`, which holds
        what `prompt_rows` more rows took. Returns the seconds of the first: by the step times, or else by rows."""
        if self.costs is None:
            return step_s * rows / (rows + prompt_rows)
        return step_s * self.costs.step(rows, context) / self.costs.step(rows + prompt_rows, context)

    def plain_seconds(self, sequences: int, context: float) -> float:
        """Seconds a token of plain decoding takes each of so many sequences at once; 0 where nothing was measured."""
        return 0.0 if self.costs is None else self.costs.step(sequences, context)

    def explain(self) -> list[str]:
        """What it did and why, in lines for a person."""
        return []


def share_rows(available: int, caps: Seq[int]) -> list[int]:
    """Deal `available` draft rows out fairly: nobody above their cap, what one leaves goes to the others.

    >>> share_rows(12, [3, 100, 100])
    [3, 5, 4]
    """
    shares = [0] * len(caps)
    if available <= 0:
        return shares
    left = available
    by_cap = sorted(range(len(caps)), key=lambda i: caps[i])
    for done, i in enumerate(by_cap):
        shares[i] = min(max(0, caps[i]), -(-left // (len(caps) - done)))
        left -= shares[i]
    return shares
