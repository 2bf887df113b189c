"""The first tokens and the latest: a window with sinks."""

from __future__ import annotations

from ...registry import register
from ...types import FloatArray
from .policy import KVPolicy, Scored


@register(
    kind="policy",
    family="KVC",
    title="Streaming window with attention sinks",
    paper="https://arxiv.org/abs/2309.17453",
    exactness="approximate",
    claim="stable perplexity to 4 million tokens; what lies between is forgotten",
)
class Streaming(KVPolicy):
    """Keeps the sinks and the latest places.

    Xiao et al., "Efficient Streaming Language Models with Attention Sinks"."""

    name = "streaming"
    paper = "https://arxiv.org/abs/2309.17453"

    def score(self, layer: int, head: int, there: Scored) -> FloatArray:
        return there.positions.astype("float32")
