"""What this machine could do at most, measured, and how far a run stays below.

A step of the target reads every weight once, and every sequence's keys and values; it multiplies every weight once for
each row. So the memory's bandwidth limits steps a second, and the arithmetic limits rows a second. A step is as slow
as the slower of both at least; drafts use the arithmetic that plain decoding leaves idle.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Any

from ...cache.storage import PAGE_SIZE
from ..machine import read_bandwidth

if TYPE_CHECKING:
    from ...engine.llm import LLM
    from ...models.config import ModelConfig
    from ...models.decoder import Decoder

SIZE = 2048  # rows and columns of the matrices that are multiplied
BATCH_ROWS = 512  # of a prompt that the engine reads at once
_SHORT_S = 10.0  # a limit below which less memory is read


@dataclass(frozen=True, slots=True)
class Ceilings:
    """`bandwidth` in bytes a second, `arithmetic` in operations a second (a multiplication and an addition are two);
    `arithmetic_by`: what reached that. None: could not be measured. The rest is of the model."""

    weight_bytes: int
    kv_bytes_per_token: int
    operations_per_row: int
    bandwidth: float | None = None
    arithmetic: float | None = None
    arithmetic_by: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def memory_share(self, steps: float, turns: float, context: float, seconds: float) -> float | None:
        """Of the bandwidth that `steps` of the target used, in which sequences with `context` tokens had `turns`."""
        if not self.bandwidth or not self.weight_bytes or not seconds:
            return None
        return (steps * self.weight_bytes + turns * context * self.kv_bytes_per_token) / seconds / self.bandwidth

    def arithmetic_share(self, rows: float, seconds: float) -> float | None:
        """Of the arithmetic that `rows` of the target used; that of attention is left out."""
        if not self.arithmetic or not self.operations_per_row or not seconds:
            return None
        return rows * self.operations_per_row / seconds / self.arithmetic

    def plain_limit(self, batch: int, context: float) -> float | None:
        """Tokens a second of plain decoding if the memory alone counted."""
        size = self.weight_bytes + batch * context * self.kv_bytes_per_token
        return batch * self.bandwidth / size if self.bandwidth and self.weight_bytes else None


def measure(llm: LLM, limit_s: float = float("inf"), clock: Callable[[], float] = perf_counter) -> Ceilings:
    """Takes some seconds; what would begin after `limit_s` is left out."""
    decoder, began = llm.decoder, clock()
    threads = int(getattr(decoder, "threads", 0)) or 1
    sizes = (decoder.weight_bytes, decoder.new_storage(1).bytes_per_page // PAGE_SIZE, operations(decoder.config))
    if not decoder.weight_bytes:  # a decoder that reads none has no such ceiling
        return Ceilings(*sizes)
    bandwidth = max(read_bandwidth(threads, decoder.device, size=1 << 28 if limit_s < _SHORT_S else 1 << 29, repeats=3))
    probes: dict[str, Callable[[], float | None]] = {
        f"a prompt of {BATCH_ROWS} rows": lambda: prompt_rate(decoder),
        "torch's matrix product": lambda: product_rate(str(decoder.device), decoder.precision, threads),
    }
    known: dict[str, float] = {}
    for what, probe in probes.items():
        if clock() - began < limit_s and (rate := probe()) is not None:
            known[what] = rate
    best = max(known, key=lambda what: known[what], default="")
    return Ceilings(*sizes, bandwidth, known.get(best), best)


def operations(config: ModelConfig) -> int:
    """Of one row of a step: two for each weight of a matrix, attention to other rows left out."""
    width, heads = config.hidden_size, config.head_dim * (2 * config.num_heads + 2 * config.num_kv_heads)
    layer = width * heads + 3 * width * config.intermediate_size
    return 2 * (config.num_layers * layer + width * config.vocab_size)


def product_rate(device: str, precision: str, threads: int, repeats: int = 4) -> float | None:
    """Operations a second of one large matrix product in the model's arithmetic; None where torch has none."""
    import torch

    before = torch.get_num_threads()
    try:
        if device == "cpu":
            torch.set_num_threads(threads)
        if precision in ("int8", "int4", "file"):
            a = torch.randint(-100, 100, (SIZE, SIZE), dtype=torch.int8, device=device)
            return _rate(lambda: torch._int_mm(a, a), device, repeats)
        kind = torch.bfloat16 if precision == "bfloat16" else torch.float32
        b = torch.ones(SIZE, SIZE, dtype=kind, device=device)
        return _rate(lambda: b @ b, device, repeats)
    except (RuntimeError, NotImplementedError):
        return None
    finally:
        torch.set_num_threads(before)


def _rate(multiply: Callable[[], Any], device: str, repeats: int) -> float:
    import torch

    best = float("inf")
    for _ in range(repeats + 1):
        began = perf_counter()
        multiply()
        if device != "cpu":
            torch.cuda.synchronize(device)
        best = min(best, perf_counter() - began)
    return 2 * SIZE**3 / best


def prompt_rate(decoder: Decoder, repeats: int = 2) -> float | None:
    """Operations a second when the engine itself reads a prompt, the best that it reaches; the output head is run for
    one row alone."""
    import numpy as np

    from ...models.batch import Span, pack

    config = decoder.config
    rows = min(BATCH_ROWS, config.max_position)
    pages = -(-rows // PAGE_SIZE)
    storage, table = decoder.new_storage(pages), np.arange(pages, dtype=np.int32)[None]
    batch = pack([Span(np.arange(rows) % config.vocab_size, 0, logits="last")], table)
    best = float("inf")
    for _ in range(repeats + 1):
        began = perf_counter()
        decoder.forward(batch, storage).logits[-1, 0].item()  # waits for the device
        best = min(best, perf_counter() - began)
    body = operations(config) - 2 * config.hidden_size * config.vocab_size
    return rows * body / best
