"""What each number of an engine means, and whether it counts from the start or is of this moment."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric


@dataclass(frozen=True, slots=True)
class Number:
    """`name` as Prometheus has it: with its unit, and without the `_total` that a counter gets."""

    name: str
    help: str
    counts: bool = True


def _now(name: str, help: str) -> Number:
    return Number(name, help, counts=False)


#: Of `LLM.metrics`; a name that is not here is not exported, and a test says so
ENGINE = {
    "waiting": _now("waiting_requests", "Requests in the queue"),
    "running": _now("running_requests", "Requests that read their prompt or decode"),
    "started": Number("started_requests", "Requests that left the queue for the first time"),
    "finished": Number("finished_requests", "Requests that are over, cancelled ones included"),
    "refused": Number("refused_requests", "Requests refused because the queue was full"),
    "swapped": Number("swapped_requests", "Times that a request made way and was kept outside the cache"),
    "recomputed": Number("recomputed_requests", "Times that a request made way and was read again"),
    "mispredicted": Number("mispredicted_requests", "Outputs that were longer than predicted"),
    "read_tokens": Number("read_tokens", "Tokens of prompts that were read, those read again included"),
    "reread_tokens": Number("reread_tokens", "Of these, by requests that had made way for others"),
    "generated_tokens": Number("generated_tokens", "Tokens of outputs"),
    "queue_s": Number("queue_seconds", "Seconds in the queue, summed over the started requests"),
    "longest_queue_s": _now("longest_queue_seconds", "The longest time that a request has been in the queue"),
    "kv_pages": _now("kv_pages", "Pages of the KV cache"),
    "kv_pages_used": _now("kv_pages_used", "Pages that requests hold"),
    "kv_pages_cached": _now("kv_pages_cached", "Pages that the prefix cache alone holds"),
    "kv_bytes": _now("kv_bytes", "Bytes of the pages that hold something"),
    "prefix_tokens_asked": Number("prefix_asked_tokens", "Tokens of prompts that were looked up in the prefix cache"),
    "prefix_tokens_hit": Number("prefix_hit_tokens", "Of these, those that were found there"),
    "steps": Number("steps", "Forward passes of the target model"),
    "rows": Number("rows", "Rows of those passes, of prompts and drafts included"),
    "draft_seconds": Number("draft_seconds", "Seconds in which drafts were made"),
    "forward_seconds": Number("forward_seconds", "Seconds in the target model"),
    "sample_seconds": Number("sample_seconds", "Seconds in sampling and verification"),
}
#: Of the server itself
SERVER = {
    "open_calls": _now("open_calls", "Calls that are being answered"),
    "failed_steps": Number("failed_steps", "Steps of the engine that failed"),
    "open_connections": _now("open_connections", "Connections that are open"),
    "closed_connections": Number("closed_connections", "Connections that the server closed, by reason"),
    "large_body_bytes": _now("large_body_bytes", "Bytes of the large bodies that are being read or tokenized"),
}


@dataclass(frozen=True, slots=True, eq=False)  # a registry keys by it
class Figures:
    """A collector of numbers read once: of the engine, and of the server, where a mapping is by reason."""

    engine: Mapping[str, Any]
    server: Mapping[str, float | Mapping[str, float]] = field(default_factory=dict)

    def collect(self) -> Iterator[Metric]:
        for name, value in self.engine.items():
            if name in ENGINE:
                yield _family("outpace_engine_", ENGINE[name], {"": value}, ())
        for name, found in self.server.items():
            if isinstance(found, Mapping):
                yield _family("outpace_", SERVER[name], found, ("reason",))
            else:
                yield _family("outpace_", SERVER[name], {"": found}, ())


def _family(prefix: str, number: Number, values: Mapping[str, float], labels: Sequence[str]) -> Metric:
    kind = CounterMetricFamily if number.counts else GaugeMetricFamily
    family = kind(prefix + number.name, number.help, labels=labels)
    for label, value in values.items():
        family.add_metric([label] if labels else [], value)
    return family
