"""What Prometheus reads: the engine's own numbers at that moment, and what the server measured of its requests."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from time import perf_counter

from prometheus_client import (
    CollectorRegistry,
    Counter,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import GaugeMetricFamily, Metric

from ..engine.request import StepEvent
from ..types import Result
from .numbers import Figures

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_GAPS = (0.002, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56)


class Metrics:
    """One registry for one server."""

    def __init__(self, build: Mapping[str, str] | None = None) -> None:
        self.registry = CollectorRegistry()
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=self.registry)
        about = GaugeMetricFamily("outpace_build_info", "What runs: always 1", labels=list(build or {}))
        about.add_metric(list((build or {}).values()), 1)
        self.registry.register(_Constant(about))  # type: ignore[arg-type]

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, text, buckets=buckets, registry=self.registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, labels, registry=self.registry)

        self._responses = counter("outpace_responses", "Responses by route and status", "route", "status")
        self._ended = counter("outpace_requests", "Choices that are over, by reason", "reason")
        self._tokens = counter("outpace_tokens", "Output tokens by who drafted them; target: nobody", "source")
        self._drafted = counter("outpace_drafted_tokens", "Drafted tokens by drafter", "source")
        self._prompt = counter("outpace_prompt_tokens", "Prompt tokens of choices that ended")
        self._cached = counter("outpace_cached_prompt_tokens", "Those of them found in the prefix cache")
        self._steps = counter("outpace_decoding_steps", "Target steps that choices which ended took part in")
        self._embedded = counter("outpace_embedded_tokens", "Tokens of texts that were embedded")
        self._first = histogram("outpace_time_to_first_token_seconds", "From a request to its first token", _SECONDS)
        self._gap = histogram("outpace_time_between_events_seconds", "Between two steps' tokens of a choice", _GAPS)
        self._whole = histogram("outpace_request_seconds", "From a request to its end", _SECONDS)
        self._queue = histogram("outpace_queue_seconds", "Before the prompt was begun", _SECONDS)

    def response(self, route: str, status: int) -> None:
        self._responses.labels(route, str(status)).inc()

    def embedded(self, tokens: int) -> None:
        self._embedded.inc(tokens)

    def follow(self, arrived: float) -> Follower:
        return Follower(self, arrived)

    def ended(self, result: Result, arrived: float | None) -> None:
        """Count a choice. `arrived`: None if it did not come to its end, which takes no time that says anything."""
        stats = result.stats
        self._ended.labels(result.finish_reason).inc()
        self._prompt.inc(stats.prompt_tokens)
        self._cached.inc(stats.cached_tokens)
        self._steps.inc(stats.steps)
        if arrived is not None:
            self._queue.observe(stats.queue_s)
            self._whole.observe(perf_counter() - arrived)
        accepted = stats.accepted_by_source
        for source, n in accepted.items():
            self._tokens.labels(source).inc(n)
        self._tokens.labels("target").inc(max(stats.tokens - sum(accepted.values()), 0))
        for source, n in stats.drafted_by_source.items():
            self._drafted.labels(source).inc(n)

    def text(self, figures: Figures) -> bytes:
        """In the exposition format, with numbers of this moment."""
        own = CollectorRegistry()
        own.register(figures)  # type: ignore[arg-type]
        return generate_latest(own) + generate_latest(self.registry)


@dataclass(frozen=True, slots=True, eq=False)  # a registry keys by it
class _Constant:
    """A collector of what never changes."""

    family: Metric

    def collect(self) -> Iterator[Metric]:
        yield self.family


class Follower:
    """Times the events of one call."""

    def __init__(self, metrics: Metrics, arrived: float) -> None:
        self._metrics, self._arrived = metrics, arrived
        self._last: dict[int, float] = {}
        self.first_s: float | None = None
        self.tokens = 0  # of all choices

    def __call__(self, batch: list[tuple[int, StepEvent]]) -> None:
        now = perf_counter()
        for index, event in batch:
            self.tokens += len(event.token_ids)
            before = self._last.get(index)
            self._last[index] = now
            if before is not None:
                self._metrics._gap.observe(now - before)
            else:
                self._metrics._first.observe(now - self._arrived)
                if self.first_s is None:
                    self.first_s = now - self._arrived
            if event.result is not None:
                self._metrics.ended(event.result, self._arrived)
