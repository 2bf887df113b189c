"""What `/metrics` says: every number of the engine described, choices that ended in any way, and the dashboard."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fake import FakeEngine
from hashing import toy_loaded
from live import Live
from prometheus_client.parser import text_string_to_metric_families
from test_service import until

from outpace import __version__
from outpace.engine.llm import LLM
from outpace.server.numbers import ENGINE, SERVER

DASHBOARD = Path(__file__).parents[2] / "docs" / "grafana.json"
CHAT = "/v1/chat/completions"
HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello"}]}


def scrape(live: Live) -> dict[str, Any]:
    """Families by name."""
    text = httpx.get(live.url + "/metrics", timeout=60).text
    return {family.name: family for family in text_string_to_metric_families(text)}


def value(families: dict[str, Any], sample: str, **labels: str) -> float:
    found = [s for f in families.values() for s in f.samples if s.name == sample and labels.items() <= s.labels.items()]
    return sum(s.value for s in found)


@pytest.fixture(scope="module")
def real() -> Iterator[Live]:
    """A server over an engine with a model, after one request."""
    with Live(LLM(toy_loaded(), method="suffix", max_batch=2, kv_tokens=256)) as live:
        answer = httpx.post(live.url + CHAT, json=HELLO | {"max_tokens": 20}, timeout=60)
        assert answer.status_code == 200
        yield live


def test_every_number_of_the_engine_is_described_and_exported(real: Live) -> None:
    families = scrape(real)
    assert set(real.engine.metrics()) == set(ENGINE)
    for prefix, numbers in (("outpace_engine_", ENGINE), ("outpace_", SERVER)):
        for number in numbers.values():
            family = families[prefix + number.name]
            assert family.type == ("counter" if number.counts else "gauge"), number
            assert family.documentation == number.help and len(number.help.split()) >= 3
            assert not number.name.endswith(("_s", "_total")), "units in full, and _total is not a part of the name"
    assert value(families, "outpace_engine_generated_tokens_total") >= 1
    assert value(families, "outpace_engine_forward_seconds_total") > 0


def test_names_have_units_and_counters_have_total(real: Live) -> None:
    for family in scrape(real).values():
        names = {sample.name.removesuffix("_created") for sample in family.samples}
        if family.type == "counter" and family.name.startswith("outpace_"):
            assert names <= {family.name, family.name + "_total"}
            assert family.name + "_total" in names or not names, "one by drafter has no sample until one has drafted"
        assert not re.search(r"_(s|ms|time|secs)$", family.name), family.name
        assert family.documentation.strip()


def test_what_runs_and_its_process(real: Live) -> None:
    families = scrape(real)
    (build,) = families["outpace_build_info"].samples
    assert build.value == 1 and build.labels["version"] == __version__
    assert build.labels["model"] == real.engine.name and build.labels["precision"] == real.engine.precision
    assert value(families, "process_resident_memory_bytes") > 10**7 and value(families, "process_cpu_seconds_total") > 0


def test_cancelled_and_failed_choices_are_counted_with_their_tokens(serve: Callable[..., Live]) -> None:
    engine = FakeEngine(lambda asked: "x" * 3000, step_s=0.002)
    live = serve(engine)
    with httpx.stream("POST", live.url + CHAT, json=HELLO | {"stream": True, "n": 2}, timeout=60) as answer:
        lines = answer.iter_lines()
        for _ in range(20):
            next(lines)
    until(lambda: value(scrape(live), "outpace_requests_total", reason="cancelled") == 2)
    families = scrape(live)
    written = value(families, "outpace_tokens_total")
    assert written >= 8 and value(families, "outpace_prompt_tokens_total") == 2 * 12
    engine.fail = RuntimeError("a fault")
    assert httpx.post(live.url + CHAT, json=HELLO, timeout=60).status_code == 500
    until(lambda: value(scrape(live), "outpace_requests_total", reason="error") == 1)
    assert value(scrape(live), "outpace_request_seconds_count") == 0


def test_the_log_has_the_tokens_of_a_stream_that_was_left(
    serve: Callable[..., Live], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "outpace.server.requests")
    live = serve(FakeEngine(lambda asked: "x" * 3000, step_s=0.002))
    with httpx.stream("POST", live.url + CHAT, json=HELLO | {"stream": True}, timeout=60) as answer:
        lines = answer.iter_lines()
        for _ in range(10):
            next(lines)
    told: list[dict[str, Any]] = []

    def logged() -> bool:
        told[:] = [json.loads(r.message) for r in caplog.records if r.name == "outpace.server.requests"]
        return bool(told)

    until(logged)
    assert told[0]["finish"] == "left" and told[0]["completion_tokens"] >= 4


def test_the_dashboard_asks_for_nothing_that_is_not_there(real: Live) -> None:
    board = json.loads(DASHBOARD.read_text())
    there = {sample.name for family in scrape(real).values() for sample in family.samples}
    there |= {"outpace_drafted_tokens_total"}  # of requests with drafts
    labels = {sample.name: sample.labels.keys() for f in scrape(real).values() for sample in f.samples}
    asked = [target["expr"] for panel in board["panels"] for target in panel.get("targets", [])]
    asked += [one["query"] for one in board["templating"]["list"] if one["type"] == "query"]
    assert len(asked) > 30
    for query in asked:
        names = re.findall(r"\b(?:outpace|process|python)_[a-z_]+", query)
        assert names and set(names) <= there, query
        for name, matchers in re.findall(r"\b((?:outpace|process)_[a-z_]+)\{([^}]*)\}", query):
            wanted = set(re.findall(r"(\w+)[=!]", matchers)) - {"job"}
            assert wanted <= set(labels.get(name, wanted)), query
    places = [panel["gridPos"] for panel in board["panels"]]
    assert len({(p["x"], p["y"]) for p in places}) == len(places) and all(p["x"] + p["w"] <= 24 for p in places)
