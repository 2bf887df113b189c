"""No drafting: plain decoding on the same path as everything else."""

from __future__ import annotations

from collections.abc import Sequence as Seq

from ...registry import register
from ...types import Draft
from ..contracts import Drafter, Market, Proposal, Sequence


@register(family="SPEC", title="Plain decoding", paper="", exactness="identical")
class Plain(Drafter):
    """Proposes nothing: one token per step."""

    name = "plain"
    paper = ""

    def propose(self, sequences: Seq[Sequence], budgets: Seq[int], market: Market) -> Proposal:
        return Proposal([_NOTHING] * len(sequences))


_NOTHING = Draft.empty()
