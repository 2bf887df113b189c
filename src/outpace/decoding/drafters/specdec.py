"""A chain that ends when a rejection becomes likely."""

from __future__ import annotations

from ...errors import ParameterError
from ...registry import register
from .draft_model import DraftChain
from .grown import Draws
from .sources import Source


@register(
    family="SPEC",
    title="Draft model, chain of adaptive length (SpecDec++)",
    paper="https://arxiv.org/abs/2405.19715",
    exactness="identical",
    needs=("draft model",),
    claim="2.04x to 2.26x (Llama-2-chat 70B with 7B)",
)
class SpecDec(DraftChain):
    """The draft model stops when the predicted probability that at least one of its tokens is rejected passes a
    threshold; the paper shows that the optimal way of stopping has this form.

    The paper predicts each token's acceptance by a head trained on the draft model. Here nothing is trained: the
    prediction is the measured acceptance of tokens of the same confidence, counted online in bins (see DraftChain).
    Where the planner knows what a forward and a row cost, its floors raise the threshold's complement.

    Huang, Guo and Wang, "SpecDec++: Boosting Speculative Decoding via Adaptive Candidate Lengths", section 3.

    Parameters: `max_tokens` longest draft; `threshold` of the probability of a rejection, above which drafting ends.
    Raises ParameterError out of range.
    """

    name = "specdec"
    paper = "https://arxiv.org/abs/2405.19715"

    def __init__(
        self, source: Source, draws: Draws = Draws.COUPLED, max_tokens: int = 16, threshold: float = 0.7
    ) -> None:
        if not 0 <= threshold <= 1:
            raise ParameterError(f"{self.name}:threshold={threshold} is out of range: it must be from 0 to 1")
        super().__init__(source, draws, max_tokens, min_reach=1 - threshold)
