"""MagicDec: the target with part of its KV cache drafts for the target with all of it."""

from __future__ import annotations

from typing import Any

from ...registry import register
from ..contracts import DrafterContext
from .draft_model import DraftChain
from .grown import Draws
from .sources import ModelSource, SelfSource, Source
from .sparse import Streaming, require_whole_attention


@register(
    family="SPEC",
    title="Self-drafting with a sparse KV cache (MagicDec)",
    paper="https://arxiv.org/abs/2408.11049",
    exactness="identical",
    needs=("full attention in every layer", "draft model (optional)"),
    claim="up to 2.51x (Llama-3.1-8B, batches of 32 to 256)",
)
class MagicDec(DraftChain):
    """The draft reads the first tokens and a window of the last ones, so that its cost does not grow with the text; the
    target verifies with the whole cache. It pays where reading keys and values costs more than reading weights: long
    texts, and batches.

    The draft is made by the target in its own cache, or, if one is given, by a draft model, whose own cache is read
    in the same way (it then also reads the prompt in linear time).

    Sadhukhan et al., "MagicDec: Breaking the Latency-Throughput Tradeoff for Long Context Generation with Speculative
    Decoding", section 4 (self-speculation with StreamingLLM's fixed budget).

    Parameters: `sinks` first tokens and `window` last tokens that are read, both rounded up to pages of 16; those of
    the chain (see DraftChain). Raises MethodError for a model with sliding-window layers, ParameterError out of range.
    """

    name = "magicdec"
    paper = "https://arxiv.org/abs/2408.11049"

    def __init__(
        self,
        source: Source,
        draws: Draws = Draws.COUPLED,
        max_tokens: int = 6,
        min_reach: float = 0.3,
        sinks: int = 16,
        window: int = 256,
    ) -> None:
        super().__init__(source, draws, max_tokens, min_reach)
        require_whole_attention(source.decoder, self.name)
        source.view = Streaming(self.name, sinks, window)

    @classmethod
    def create(cls, context: DrafterContext, **options: Any) -> MagicDec:  # type: ignore[override]
        source: Source
        if context.draft is not None:
            source = ModelSource(context.draft, context.draft_pages, context.vocab_size)
        else:
            source = SelfSource.of(context, cls.name)
        return cls(source, Draws.of(context), **options)
