"""QuantSpec: the target's own weights in int4, over a copy of its own KV cache in few bits, draft for the target."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import replace
from typing import Any

from ...cache.quantized import QuantizedPages
from ...errors import MethodError, ParameterError
from ...models.batch import ForwardBatch
from ...models.native import NativeDecoder
from ...ops.cpu import isa
from ...registry import register
from ..contracts import DrafterContext, Sequence
from .draft_model import DraftChain
from .grown import Draws
from .sources import SelfSource
from .sparse import require_cpu

_BITS = {"bf16": 16, "int8": 8, "int4": 4}


class CompactView:
    """A KVView: complete pages but the `recent` last ones of each sequence are read from their copy in few bits."""

    def __init__(self, store: QuantizedPages, recent: int) -> None:
        self.store, self.recent = store, recent

    def __call__(self, batch: ForwardBatch, sequences: Seq[Sequence]) -> ForwardBatch:
        return replace(batch, compact=self.store.compact([sequence.kv for sequence in sequences], self.recent))


@register(
    family="SPEC",
    title="Self-drafting with int4 weights and KV cache (QuantSpec)",
    paper="https://arxiv.org/abs/2502.10424",
    exactness="identical",
    needs=("target on a CPU, not in float32 or int4",),
    claim="over 90 % accepted, up to about 2.5x (long contexts, GPU)",
)
class QuantSpec(DraftChain):
    """The target's weights, rounded to int4, draft over the target's own text; the target as it was loaded verifies.
    No second model, nothing of the text read twice.

    The draft reads keys and values in the upper four bits of a hierarchical code, or in both halves (eight bits), of
    complete pages, and as the target left them of the most recent ones and of the draft itself. The paper verifies with
    the eight bits; here the target verifies with its own bf16 cache, which it keeps anyway, so that its output is that
    of plain decoding to the bit. The copy therefore costs memory instead of saving it: see QuantizedPages.

    Tiwari et al., "QuantSpec: Self-Speculative Decoding with Hierarchical Quantized KV Cache", section 4.

    Parameters: `kv` what the draft reads: int4, int8, bf16 (the target's own cache, no copy), or auto: int8 on a CPU
    with integer dot products, else bf16; `recent` full pages of 16 tokens that are always read as they are; those of
    the chain (see DraftChain). Beside a file of four bits only the cache is read any faster, not the weights. Raises
    MethodError for a target in int4 (nothing coarser is left) or float32 (its cache has another layout), on CUDA, or
    for few bits on a CPU without them; ParameterError out of range.
    """

    name = "quantspec"
    paper = "https://arxiv.org/abs/2502.10424"

    def __init__(
        self,
        source: SelfSource,
        draws: Draws = Draws.COUPLED,
        max_tokens: int = 8,
        min_reach: float = 0.35,
        kv: str = "auto",
        recent: int = 4,
    ) -> None:
        super().__init__(source, draws, max_tokens, min_reach)
        if recent < 0:
            raise ParameterError(f"{self.name}:recent={recent} is out of range: it must be at least 0 pages")
        self.store: QuantizedPages | None = None
        if kv != "bf16":
            self.store = QuantizedPages(source.cache, _BITS[kv])
            source.view = CompactView(self.store, recent)

    @classmethod
    def create(cls, context: DrafterContext, *, kv: str = "auto", **options: Any) -> QuantSpec:  # type: ignore[override]
        source = SelfSource.of(context, cls.name)
        target = require_cpu(context, cls.name)
        if target.precision not in ("file", "int8", "bfloat16") or context.target_in is None:
            raise MethodError(
                f"method {cls.name!r} drafts with the target's int4 weights in the target's cache, which works for a "
                f"target in its file's formats, int8 or bfloat16, not in {target.precision}; choose --precision auto, "
                "or another method"
            )
        few_bits = cls._chosen(kv, target)
        source.decoder = context.target_in("int4")
        return cls(source, Draws.of(context), kv=few_bits, **options)

    @classmethod
    def _chosen(cls, kv: str, target: NativeDecoder) -> str:
        if kv not in ("auto", *_BITS):
            raise ParameterError(f"{cls.name}:kv={kv} is unknown: it must be auto, {', '.join(_BITS)}")
        fast = target.level > isa.PORTABLE
        if kv in ("int8", "int4") and not fast:
            raise MethodError(
                f"method {cls.name!r} reads keys and values in {kv} with integer dot products, which this CPU does not "
                "offer; choose kv=bf16"
            )
        return kv if kv != "auto" else "int8" if fast else "bf16"

    def explain(self) -> list[str]:
        if self.store is None:
            return [f"{self.name} drafts over the target's own keys and values"]
        store = self.store
        return [
            f"{self.name} drafts over {store.pages_held} pages in {store.bits} bits "
            f"({store.bytes_used / 2**20:.0f} MiB, at most {store.bytes_total / 2**20:.0f})"
        ]
