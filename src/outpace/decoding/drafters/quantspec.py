"""QuantSpec: the target's own weights in int4 draft for the target."""

from __future__ import annotations

from typing import Any

from ...errors import MethodError
from ...registry import register
from ..contracts import DrafterContext
from .draft_model import DraftChain
from .grown import Draws
from .sources import SelfSource
from .sparse import require_cpu


@register(
    family="SPEC",
    title="Self-drafting with int4 weights (QuantSpec)",
    paper="https://arxiv.org/abs/2502.10424",
    exactness="identical",
    needs=("int8 or bfloat16 target on a CPU",),
    claim="over 90 % accepted, up to about 2.5x (long contexts, GPU)",
)
class QuantSpec(DraftChain):
    """The target's weights, rounded to int4, draft in the target's own KV cache; the target as it was loaded verifies.
    No second model, no second cache, nothing of the text read twice.

    Tiwari et al., "QuantSpec: Self-Speculative Decoding with Hierarchical Quantized KV Cache", section 4. Of its two
    halves this is the one of the weights. The hierarchical KV cache, of which the draft reads the upper four bits only,
    is not built: keys and values are bfloat16 here, for drafting and verifying alike.

    Parameters: those of the chain (see DraftChain). Raises MethodError for a target in int4 (nothing coarser is left)
    or float32 (its cache has another layout), or on CUDA.
    """

    name = "quantspec"
    paper = "https://arxiv.org/abs/2502.10424"

    def __init__(
        self, source: SelfSource, draws: Draws = Draws.COUPLED, max_tokens: int = 8, min_reach: float = 0.35
    ) -> None:
        super().__init__(source, draws, max_tokens, min_reach)

    @classmethod
    def create(cls, context: DrafterContext, **options: Any) -> QuantSpec:  # type: ignore[override]
        source = SelfSource.of(context, cls.name)
        target = require_cpu(context, cls.name)
        if target.precision not in ("int8", "bfloat16") or context.target_in is None:
            raise MethodError(
                f"method {cls.name!r} drafts with the target's int4 weights in the target's cache, which works for a "
                f"target in int8 or bfloat16, not in {target.precision}; choose --precision int8 (the default), or "
                "another method"
            )
        source.decoder = context.target_in("int4")
        return cls(source, Draws.of(context), **options)
