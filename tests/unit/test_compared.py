"""What is said of a comparison as a whole: means over kinds of text, the planner, agreement of two runs, the page."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("compared")


def row(method: str, x: float | None, **changes: Any) -> dict[str, Any]:
    usual = {
        "model": "m", "workload": "code", "batch": 1, "temperature": 0.0, "method": method, "state": "ok",
        "reason": None, "x_plain": x, "low": None, "high": None, "tokens_per_s": 10.0 * (x or 1.0), "rounds": 4,
        "tokens_per_step": 1.5, "alpha": 0.5, "draft_share": 0.1, "whole_answers": False, "declared": "identical",
        "compared": 4, "differing": 0,
    }  # fmt: skip
    return usual | changes


def test_means_are_over_all_kinds_of_text_but_random(compared: ModuleType) -> None:
    rows = [row("plain", None), row("plain", None, workload="chat"), row("a", 2.0), row("a", 0.5, workload="chat")]
    rows += [row("a", 0.1, workload="random"), row("b", 3.0)]  # b has no figure for chat
    found = compared.overall(rows)
    assert set(found) == {"plain", "a"} and found["plain"]["x_plain"] == 1.0
    assert found["a"]["x_plain"] == pytest.approx(1.0)
    assert found["a"]["tokens_per_s"] == pytest.approx(2 / (1 / 20 + 1 / 5))
    assert found["a"]["x_plain_full"] is None and found["plain"]["x_plain_full"] == 1.0
    assert found["a"]["tokens_per_step"] == pytest.approx(1.5) and found["a"]["compared"] == 8


def test_random_text_stands_with_every_temperature_that_was_asked_for(compared: ModuleType) -> None:
    noise = row("a", 1.0, workload="random", temperature=1.2)
    rows = [row("a", 1.0), row("a", 1.0, temperature=0.8), noise, row("a", 1.0, batch=8)]
    found = compared.groups(rows)
    assert set(found) == {("m", 0.0, 1), ("m", 0.8, 1), ("m", 0.0, 8)}
    assert [noise in members for members in found.values()] == [True, True, False]


def test_auto_is_held_against_the_fastest_lossless_method(compared: ModuleType) -> None:
    rows = [row("plain", None), row("auto", 1.5), row("a", 2.0), row("b", 9.0, declared="approximate")]
    rows += [row("llama.cpp", 8.0, declared=None), row("a/rejection", 7.0, declared="distribution")]
    rows[1]["x_plain_full"] = 1.7
    (found,) = compared.against_best(rows)
    assert found["x_plain_full"] == 1.7
    assert (found["best"], found["of_best"], found["x_plain"]) == ("a", 0.75, 1.5)
    (slow,) = compared.against_best([row("plain", None), row("auto", 0.9), row("a", 0.5)])
    assert (slow["best"], slow["of_best"]) == ("plain", 0.9)
    assert compared.against_best([row("plain", None), row("a", 2.0)]) == []


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"x_plain": 1.2}, ""), ({"x_plain": 0.8, "draft_share": 0.6}, "drafting takes 60% of the time for 0.5"),
        ({"x_plain": 0.8, "tokens_per_step": 1.1}, "hardly any draft is accepted (1.10"),
        ({"x_plain": 0.8}, "its rows cost more time than 0.5 extra tokens"),
        ({"x_plain": 0.8, "tokens_per_step": None}, ""),
    ],
)  # fmt: skip
def test_a_method_that_loses_has_a_reason(compared: ModuleType, changes: dict[str, Any], says: str) -> None:
    assert compared.why_slower(row("a", 1.0) | changes).startswith(says)
    assert bool(compared.why_slower(row("a", 1.0) | changes)) == bool(says)


def test_two_runs_agree_within_the_limit(compared: ModuleType) -> None:
    first = [row("plain", None), row("a", 1.0), row("b", 2.0), row("c", 1.0), row("gone", None)]
    second = [row("plain", None), row("a", 1.05), row("b", 1.6), row("c", 1.0), row("gone", 1.0)]
    found = compared.agreement(first, second)
    assert (found["ratios"], found["beyond_limit"]) == (3, 1) and found["largest"] == pytest.approx(0.25)
    assert found["median"] == pytest.approx(0.05) and found["furthest"][0]["method"] == "b"


def test_the_page_shows_failures_peers_and_the_planner(compared: ModuleType, tmp_path: Path) -> None:
    rows = [row("plain", None), row("auto", 1.5), row("suffix", 0.9), row("a/rejection", 1.1, differing=1)]
    rows += [row("swift", None, state="failed", reason="out of ideas", compared=0)]
    rows += [row("llama.cpp", 2.0, declared=None, draft_share=None, whole_answers=True, differing=4)]
    results = {
        "seconds": [1.0], "models": {"m": {"skipped": [["draft", "needs a draft model"]]}}, "broken": 0, "runs": [rows],
        "peers": {"llama.cpp": {"version": "1.2.3"}},
    }  # fmt: skip
    page = compared.body("compare-x", results)
    lines = {line.split("|")[1].strip(): line for line in page.splitlines() if line.startswith("| `")}
    assert "out of ideas" in lines["`swift`"] and "failed" in lines["`swift`"]
    assert "whole answers" in lines["`llama.cpp`"] and "4 of 4" in lines["`llama.cpp`"]
    assert "10.0 tokens/s" in lines["`plain`"] and "1 of 4" in lines["`a/rejection`"]
    assert "up to 5.3x" in lines["`suffix`"] and "its rows cost more" in lines["`suffix`"]
    assert "version: 1.2.3" in page and "needs a draft model" in page and "## The planner" in page
    target = tmp_path / "x.svg"
    compared.plot(results, target)
    assert b"<svg" in target.read_bytes() and b"Date" not in target.read_bytes()


def test_result_files_hold_what_the_page_needs(compared: ModuleType) -> None:
    files = sorted((ROOT / "benchmarks" / "results").glob("compare-*.json"))
    assert files
    for path in files:
        record = json.loads(path.read_text("utf-8"))
        page = path.with_suffix(".md").read_text("utf-8")
        assert compared.body(record["name"], record["results"]) in page, path.name
        assert record["results"]["broken"] == 0
