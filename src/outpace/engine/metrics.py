"""Counters and gauges of an engine, as plain numbers."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .engine import Engine


def metrics(engine: Engine) -> dict[str, float]:
    """Names as in SchedulerStats, and: kv_pages, kv_pages_used (by requests), kv_pages_cached (by the prefix cache
    alone), kv_bytes (of the pages that hold something), prefix_tokens_asked, prefix_tokens_hit, steps, rows, and the
    seconds of those steps: draft_seconds, forward_seconds (of the target), sample_seconds (sampling and verifying). On
    CUDA a forward ends when its outputs are read."""
    cache, counts = engine.cache, asdict(engine.scheduler.stats)
    pages = cache.storage.num_pages
    counts["kv_pages"] = pages
    counts["kv_pages_used"] = pages - cache.available_pages
    counts["kv_pages_cached"] = cache.available_pages - cache.free_pages
    counts["kv_bytes"] = cache.bytes_used
    if engine.prefixes is not None:
        counts["prefix_tokens_asked"] = engine.prefixes.asked
        counts["prefix_tokens_hit"] = engine.prefixes.hit
    counts["steps"], counts["rows"] = engine.steps, engine.rows
    runner = engine._runner  # private to this package
    counts["draft_seconds"], counts["forward_seconds"] = runner.draft_s, runner.forward_s
    counts["sample_seconds"] = runner.sample_s
    return counts
