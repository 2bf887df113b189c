"""Drafting by a model whose head is cut to the tokens that the target uses most."""

from __future__ import annotations

from typing import Any

from ...registry import register
from ..contracts import DrafterContext
from .grown import Draws
from .specdec import SpecDec
from .trimmed import model_source


@register(
    family="SPEC",
    title="Draft model with a trimmed vocabulary (VocabTrim)",
    paper="https://arxiv.org/abs/2506.22694",
    exactness="identical",
    needs=("draft model",),
    claim="16 % over the same drafter (Llama-3.2-3B)",
)
class VocabTrim(SpecDec):
    """The chain of `specdec` from a draft model whose head knows `trim` tokens: a forward reads fewer weights, and a
    token outside the head is never drafted. The other methods with a draft model take `trim` as an option.

    The paper counts tokens that the target generated on a calibration set. Here they are counted online in what the
    target has read and written (see TrimmedSource), so nothing has to be prepared and the head follows the text.

    Goel et al., "VocabTrim: Vocabulary Pruning for Efficient Speculative Decoding in LLMs", section 3.

    Parameters: `trim` tokens of the head at most (a smaller vocabulary stays whole, 0: any does); the others as in
    `specdec`. Raises ParameterError out of range.
    """

    name = "vocabtrim"
    paper = "https://arxiv.org/abs/2506.22694"

    @classmethod
    def create(cls, context: DrafterContext, *, trim: int = 32768, **options: Any) -> VocabTrim:
        return cls(model_source(context, cls.name, trim), Draws.of(context), **options)
