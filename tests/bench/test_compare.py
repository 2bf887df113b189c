"""The parts of a comparison: order, workloads, resuming, figures, contestants that fail, budget. On a fake clock."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hashing import toy_loaded

from outpace.bench.compare import ceilings, contestant, sets, store, summary
from outpace.bench.compare.advice import advice
from outpace.bench.compare.contestant import digest, run_of_answers
from outpace.bench.compare.findings import Report, headline, overall
from outpace.bench.compare.plan import (
    PLAIN,
    Cell,
    CompareConfig,
    Plan,
    by_standing,
    cells,
    cells_of_a_pass,
    fit,
    heats,
    names_of,
    peer_names,
    rounds_in_a_pass,
    units_that_fit,
)
from outpace.bench.compare.run import CUT, OVERTIME, OVERTIME_S, Comparison
from outpace.bench.compare.sets import Unit, Workload, load_workloads
from outpace.bench.compare.store import Store, read, whole_lines
from outpace.bench.peers.peer import Peer, PeerAnswer, PeerError
from outpace.engine.llm import LLM
from outpace.errors import ParameterError

TICK = 0.001


class Clock:
    """Every look at it takes a millisecond."""

    def __init__(self, tick: float = TICK) -> None:
        self.now, self.tick = 0.0, tick

    def __call__(self) -> float:
        self.now += self.tick
        return self.now


class FakePeer(Peer):
    """Answers with ones; `fails` says what goes wrong at which call (None: at the start)."""

    def __init__(
        self,
        clock: Clock,
        fails: Callable[[int], str | None] = lambda call: None,
        starts: bool = True,
        starting_s: float = 0.0,
    ) -> None:
        self.name, self.clock, self.fails, self.starts, self.starting_s = "fake", clock, fails, starts, starting_s
        self.calls = self.started = self.closed = 0

    def start(self) -> None:
        if not self.starts:
            raise PeerError("fake is not installed: pip install fake")
        self.started += 1
        self.clock.now += self.starting_s

    def close(self) -> None:
        self.closed += 1

    def about(self) -> dict[str, Any]:
        return {"version": "1.2.3", "threads": 2}

    def generate(self, prompts, max_tokens, temperature, seed, timeout_s):  # type: ignore[no-untyped-def]
        self.calls += 1
        if error := self.fails(self.calls):
            self.clock.now += timeout_s
            return [PeerAnswer(error=error)] * len(prompts)
        self.clock.now += 0.05
        return [PeerAnswer("x", (1,) * max_tokens, max_tokens, 0.01, 0.05) for _ in prompts]


@pytest.fixture(autouse=True)
def no_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "read_bandwidth", lambda *a, **k: [1e10])


def config(**changes: Any) -> CompareConfig:
    usual: dict[str, Any] = dict(
        models=("toy",), methods=("ngram", "suffix"), workloads=("code",), batch_sizes=(1, 2), max_tokens=4, prompts=2,
        rounds=2, budget_s=60.0,
    )  # fmt: skip
    return CompareConfig(**usual | changes)


def run(
    out: Path,
    config: CompareConfig,
    peers: dict[str, FakePeer] | None = None,
    clock: Clock | None = None,
    loading_s: float = 0.0,
) -> list:
    made = Store(out, {"identity": config.identity(), "environment": {}, "command": "outpace compare --out x"})
    clock = clock or Clock()

    def open_model(name: str, batch: int) -> LLM:
        clock.now += loading_s
        return LLM(toy_loaded(name), max_batch=batch, kv_tokens=256, prefix_cache=False)

    try:
        Comparison(config, made, open_model, lambda spec, *_: (peers or {})[spec], clock).run()
    finally:
        made.close()
    return made.lines


def keys(lines: Sequence[dict[str, Any]]) -> list[tuple[Any, ...]]:
    names = ("model", "workload", "batch", "temperature", "round", "unit", "heat", "place", "method", "error", "tokens")
    return [tuple(str(x.get(n)) for n in (*names, "digests")) for x in lines if x["kind"] == "measurement"]


# -- order -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 3, 4, 5, 14])
def test_every_heat_has_plain_once_and_everybody_runs_once_a_round(count: int) -> None:
    names = [f"m{i}" for i in range(count)]
    first: dict[str, int] = {}
    for turn in range(40):
        made = heats(names, turn)
        assert all(heat.count(PLAIN) == 1 and len(heat) <= 5 for heat in made)
        assert sorted(n for heat in made for n in heat if n != PLAIN) == sorted(names)
        for heat in made:
            first[heat[0]] = first.get(heat[0], 0) + 1
    assert set(first) == {PLAIN, *names}  # everybody goes first at times
    assert max(first.values()) <= 12 * max(min(first.values()), 1)


def test_cells_come_once_and_random_text_keeps_its_temperature() -> None:
    found = cells(config(temperatures=(0.0, 0.8)), {"code": None, "random": 1.2})
    assert len(found) == len(set(found)) == 6
    assert {c.temperature for c in found if c.workload == "random"} == {1.2}


def test_short_cells_have_more_rounds_in_a_pass() -> None:
    a, b, c = (Cell("code", batch, 0.0) for batch in (1, 8, 32))
    assert rounds_in_a_pass({a: 1.0, b: 4.0, c: 100.0}) == {a: 4, b: 4, c: 1}  # 10 and 5, cut
    assert rounds_in_a_pass({a: 10.0, b: 35.0}) == {a: 2, b: 1}
    assert rounds_in_a_pass({a: 0.0, b: 0.0}) == {a: 1, b: 1} and rounds_in_a_pass({}) == {}
    order = cells_of_a_pass({a: 3, b: 1, c: 2})
    assert sorted(order, key=lambda cell: cell.batch) == [a, a, a, b, c, c]
    assert all(x != y for x, y in itertools.pairwise(order))  # they lie apart


def test_models_are_called_by_their_files_names() -> None:
    assert names_of(["a", "/x/m.gguf"]) == {"a": "a", "/x/m.gguf": "m.gguf"}
    assert names_of(["/x/m.gguf", "/y/m.gguf"]) == {"/x/m.gguf": "/x/m.gguf", "/y/m.gguf": "/y/m.gguf"}


def test_servers_are_called_by_their_own_names() -> None:
    specs = ["a=http://h:1", "b=https://h:2/v1", "http://h:3", "llama.cpp,kv=f16"]
    assert list(peer_names(specs).values()) == ["a", "b", "http://h:3", "llama.cpp,kv=f16"]
    assert list(peer_names(["a=http://h:1", "a=http://h:2", "a"]).values()) == ["a=http://h:1", "a=http://h:2", "a"]
    assert peer_names(["plain=http://h:1"], taken=[PLAIN]) == {"plain=http://h:1": "plain=http://h:1"}


def test_units_leave_room_for_two_sweeps() -> None:
    assert [units_that_fit(3, 10.0, budget) for budget in (5, 39, 40, 60, 600)] == [1, 1, 2, 3, 3]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"workloads": ()}, "workloads is empty"), ({"methods": ()}, "methods is empty"), ({"rounds": 0}, "at least 1"),
        ({"batch_sizes": (0,)}, "batch_sizes=0"), ({"max_tokens": 1}, "at least 2"), ({"budget_s": 0.0}, "above 0"),
        ({"temperatures": (-1.0,)}, "out of range"),
    ],
)  # fmt: skip
def test_what_cannot_be_compared_is_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ParameterError, match=says):
        config(**changes)


# -- workloads ---------------------------------------------------------------------------------------------------


def test_files_become_workloads_by_category(tmp_path: Path) -> None:
    rows = [{"question": f"How much is {i}?", "answer": "1"} for i in range(3)]
    (tmp_path / "math.jsonl").write_text("\n".join(map(json.dumps, rows)))
    bench = [{"question_id": i, "category": c, "turns": ["a", "b"]} for i, c in enumerate(("x", "y", "x"))]
    (tmp_path / "bench.jsonl").write_text("\n".join(map(json.dumps, bench)))
    solved = {"task_id": "T/0", "prompt": "def f(a):\n", "canonical_solution": "    return a\n"}
    (tmp_path / "solved.jsonl").write_text(json.dumps(solved))
    paths = [str(tmp_path / name) for name in ("math.jsonl", "bench.jsonl")]
    found = load_workloads([*paths, f"code-edits:{tmp_path / 'solved.jsonl'}", "writing", "random"])
    assert [(w.name, len(w.prompts), w.error) for w in found] == [
        ("math", 3, None), ("x", 2, None), ("y", 1, None), ("code-edit", 1, None), ("writing", 10, None),
        ("random", 0, None),
    ]  # fmt: skip
    assert "return a" in sets.code_in(found[3].prompts[0])
    (only,) = load_workloads([paths[1]], ["y"])
    assert only.name == "y" and "it has: x, y" in str(load_workloads([paths[1]], ["z"])[0].error)
    twice = load_workloads([paths[1], paths[1]], ["y"])
    assert [w.name for w in twice] == ["y", "y (bench.jsonl)"]


def test_bad_workloads_stay_with_their_reason(tmp_path: Path) -> None:
    texts = {"a.jsonl": "", "b.jsonl": '{"x": 1}', "c.jsonl": "[", "d.txt": "\n", "e.jsonl": "[1]"}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "f.txt").write_bytes(b"\xff\xfe")
    names = [str(tmp_path / name) for name in (*texts, "f.txt", "gone.parquet", "gone.jsonl")]
    found = load_workloads([*names, "poems", "nobody/has-this-set"])
    assert all(w.error and not w.prompts and str(tmp_path) not in w.error for w in found), found
    assert "not in the hub's cache" in str(found[-1].error)


def test_a_batch_that_a_workload_cannot_fill_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "two.txt"
    path.write_text("One.\nTwo.\n")
    lines = run(tmp_path / "out", config(workloads=(str(path),), batch_sizes=(1, 8)))
    report = Report.of(lines)
    assert {r.state for r in report.rows if r.cell.batch == 1} == {"ok"}
    assert {r.state for r in report.rows if r.cell.batch == 8} == {"failed"}
    assert "a batch of 8 needs as many prompts, and the workload has 2" in dict(report.lost)["toy, two, batch 8"]


# -- figures -----------------------------------------------------------------------------------------------------


def measurement(method: str, unit: int, round: int, seconds: float, **more: Any) -> dict[str, Any]:
    return {
        "kind": "measurement", "model": "m", "workload": "w", "batch": 1, "temperature": 0.0, "round": round,
        "unit": unit, "heat": 0, "heat_size": 2, "place": 0, "method": method, "prompts": [f"p{unit}"], "error": None,
        "tokens": 11, "total_s": seconds + 1, "first_s": 1.0, "decode_tokens": 10, "decode_s": seconds, "steps": 5,
        "turns": 5, "rows": 10, "draft_s": seconds / 10, "verify_s": seconds / 2, "sample_s": seconds / 10,
        "drafted": 20, "accepted": 5, "all_turns": 5, "tested": [4, 3], "right": [3, 2], "kv_bytes": 7,
        "memory_bytes": 9, "context": 10.0, "exactness": "identical", "notes": [], "digests": ["d"], **more,
    }  # fmt: skip


def test_ratios_are_medians_of_pairs_and_survive_a_drift_of_the_machine() -> None:
    lines = []
    for round in range(10):
        drift = 1.5**round  # slower and slower: means of speeds would say nothing
        unit = round % 2
        lines.append(measurement(PLAIN, unit, round, 2.0 * drift))
        lines.append(measurement("a", unit, round, (1.0 if unit == 0 else 0.5) * drift))
    lines.append(measurement(PLAIN, 0, 10, 2.0))
    lines.append(measurement("a", 0, 10, 200.0))  # one disturbed run
    wanted = [("m", Cell("w", 1, 0.0), "a")]
    (row,) = summary.summarise(lines, wanted, {"m": ceilings.Ceilings(50, 1, 100, 1000.0, 10_000.0)})
    assert row.ratio is not None and row.ratio.value == pytest.approx((2 * 4) ** 0.5)
    assert (row.ratio.least, row.ratio.most, row.ratio.rounds) == (pytest.approx(2), pytest.approx(4), 11)
    assert row.ratio.low is not None and row.ratio.low <= row.ratio.value <= row.ratio.high
    assert row.tau == 2 and row.alpha == 0.25 and row.depth == [0.6, 0.4]
    shares = [part / sum(row.per_token_ms.values()) for part in row.per_token_ms.values()]
    assert shares == pytest.approx([0.1, 0.5, 0.1, 0.3])


def test_what_is_won_while_all_answers_run_is_told_apart() -> None:
    lines = [
        measurement(PLAIN, 0, 0, 2.0, batch=2, full_tokens=10, full_s=2.0),
        measurement(
            "a", 0, 0, 2.5, batch=2, full_tokens=6, full_s=0.6
        ),  # one answer soon ended, the other one crept on
        measurement("b", 0, 0, 2.5, batch=2, full_tokens=0, full_s=0.0),  # nobody knows
    ]
    a, b = summary.summarise(lines, [("m", Cell("w", 2, 0.0), name) for name in "ab"], {})
    assert a.ratio is not None and a.ratio.value == pytest.approx(0.8)
    assert a.full is not None and a.full.value == pytest.approx(2.0) and b.full is None and b.ratio is not None
    assert overall([a, b]) == {"a": pytest.approx(0.8), "b": pytest.approx(0.8)}
    assert overall([a, b], full=True) == {"a": pytest.approx(2.0)}


def test_a_batch_is_full_until_the_first_answer_ends(tmp_path: Path) -> None:
    lines = run(tmp_path, config(rounds=1, batch_sizes=(1, 2), methods=("suffix",)))
    for x in (x for x in lines if x["kind"] == "measurement"):
        assert 0 < x["full_tokens"] <= x["decode_tokens"] and 0 < x["full_s"] <= x["decode_s"]
        if x["batch"] == 1 or x["method"] == PLAIN:
            assert x["full_tokens"] == x["decode_tokens"]
    answers = [PeerAnswer("", (1,) * 9, 9, first_token_s=1.0, total_s=end) for end in (5.0, 9.0)]
    found = run_of_answers(answers, Unit(("a", "b"), ((1,), (1,)), ("", ""), (0, 1)), None)
    assert (found.full_s, found.full_tokens) == (4.0, pytest.approx(8 + 4)) and found.decode_tokens == 16


def test_one_round_has_no_interval_and_a_lost_plain_run_no_ratio() -> None:
    lines = [measurement(PLAIN, 0, 0, 2.0), measurement("a", 0, 0, 1.0), measurement("b", 0, 1, 1.0)]
    a, b = summary.summarise(lines, [("m", Cell("w", 1, 0.0), name) for name in "ab"], {})
    assert a.ratio is not None and a.ratio.low is None and a.ratio.value == 2
    assert b.ratio is None and b.speed is not None and b.state == "ok"


def ratio_of(*ratios: float, units: int = 1) -> summary.Figure:
    lines = []
    for round, ratio in enumerate(ratios):
        lines += [measurement(PLAIN, round % units, round, ratio), measurement("a", round % units, round, 1.0)]
    (row,) = summary.summarise(lines, [("m", Cell("w", 1, 0.0), "a")], {})
    assert row.ratio is not None
    return row.ratio


def test_few_pairs_have_students_interval_and_fewer_none() -> None:
    assert ratio_of(1.0).low is None and ratio_of(1.0, 1.1).high is None
    assert ratio_of(1.0, 1.1, 1.2, units=3).low is None  # a pair of each unit: nothing shows the noise
    three = ratio_of(1.0, math.exp(0.1), math.exp(0.2))
    half = 4.303 * 0.1 / math.sqrt(3)
    assert three.low is not None and three.high is not None
    assert math.log(three.low) == pytest.approx(0.1 - half) and math.log(three.high) == pytest.approx(0.1 + half)
    two_units = ratio_of(1.0, 2.0, 1.1, 2.2, units=2)  # the units differ, and that is no noise
    half = 4.303 * math.log(1.1) / math.sqrt(2) / 2 * math.sqrt(2 / 2)
    assert two_units.high is not None and math.log(two_units.high / two_units.value) == pytest.approx(half, rel=1e-3)


def report_of(**ratios: Sequence[float]) -> Report:
    """One workload; the ratios of methods to plain, round by round."""
    cell = {"workload": "w", "batch": 1, "temperature": 0.0}
    model = {"kind": "model", "model": "m", "cells": [cell], "methods": [PLAIN, *ratios], "peers": [], "skipped": [],
             "ceilings": ceilings.Ceilings(0, 0, 0).to_json(), "left_out": [], "budget_s": 60.0}  # fmt: skip
    head = {"kind": "comparison", "identity": {"options": {"precision": "int8", "threads": 1}},
            "command": "outpace compare --budget 60s --threads 1 --fresh"}  # fmt: skip
    lines: list[dict[str, Any]] = [head, model]
    for round in range(max(map(len, ratios.values()))):
        lines.append(measurement(PLAIN, 0, round, 1.0))
        lines += [measurement(name, 0, round, 1 / own[round]) for name, own in ratios.items() if round < len(own)]
    return Report.of(lines)


@pytest.mark.parametrize(
    ("ratios", "says", "text", "command"),
    [
        ({"auto": [2.0], "a": [0.9]}, "not enough pairs for a conclusion (1 of", "cannot be said yet",
         "outpace compare --threads 1 --budget 300s --fresh"),
        ({"auto": [0.8, 0.8]}, "not enough pairs for a conclusion (2 of", "cannot be said yet", "--budget 300s"),
        ({"auto": [2.0, 2.1, 2.0]}, "auto is the fastest", "Use the default method", "--threads 1 'Name"),
        ({"auto": [1.5, 1.5, 1.5], "a": [2.0, 2.0, 2.0]}, "a is the fastest, 2.00", "Use a: 2.00", "--method a"),
        ({"auto": [1.9, 2.1, 2.0], "a": [2.0, 2.2, 1.9]}, "is the fastest", "Use the default method", "-m m"),
        ({"auto": [0.9, 1.2, 1.0]}, "nothing is surely faster", "No method is surely faster", "outpace run -m m"),
        ({"a": [0.8, 0.8, 0.81]}, "nothing is faster", "No method is surely faster", "--method plain"),
    ],
)  # fmt: skip
def test_the_finding_and_the_advice_follow_from_the_pairs(
    ratios: dict[str, list[float]], says: str, text: str, command: str
) -> None:
    report = report_of(**ratios)
    (sentence,), (found,) = headline(report), advice(report)
    assert says in sentence and text in found.text and command in found.command
    if "not enough" in says:
        assert "faster" not in sentence and "fastest" not in sentence


def test_nobody_is_advised_to_use_what_gives_another_text() -> None:
    report = report_of(a=[3.0, 3.0, 3.0], b=[2.0, 2.0, 2.0])
    lines = [{**x, "exactness": "approximate"} if x.get("method") == "a" else x for x in report.lines]
    assert advice(Report.of(lines))[0].text.startswith("Use b:")


def test_ceilings_are_shares_of_what_was_measured() -> None:
    c = ceilings.Ceilings(
        weight_bytes=100, kv_bytes_per_token=2, operations_per_row=10, bandwidth=1000.0, arithmetic=400.0
    )
    assert c.memory_share(steps=5, turns=10, context=25, seconds=2.0) == pytest.approx((500 + 500) / 2 / 1000)
    assert c.arithmetic_share(rows=20, seconds=2.0) == pytest.approx(0.25)
    assert c.plain_limit(batch=2, context=25) == pytest.approx(2 * 1000 / 200)
    assert ceilings.Ceilings(0, 0, 0).memory_share(1, 1, 1, 1.0) is None


def test_identity_is_checked_against_plain_of_the_smallest_batch() -> None:
    lines = [
        measurement(PLAIN, 0, 0, 1.0), measurement(PLAIN, 0, 0, 1.0, batch=2, digests=["d", "e"], prompts=["p0", "p1"]),
        measurement("a", 0, 0, 1.0, batch=2, digests=["x", "e"], prompts=["p0", "p1"]),
        measurement("b", 0, 0, 1.0, batch=2, digests=["x", "e"], prompts=["p0", "p1"], exactness="approximate"),
    ]  # fmt: skip
    rows = summary.summarise(lines, [("m", Cell("w", 2, 0.0), name) for name in (PLAIN, "a", "b")], {})
    assert [(r.compared, r.differing, r.holds) for r in rows] == [(2, 0, True), (2, 1, False), (2, 1, True)]


@pytest.mark.parametrize("place", [0, 7, 8, 30, 31])
def test_a_digest_is_of_every_token(place: int) -> None:
    tokens = list(range(100, 132))
    changed = [*tokens[:place], 7, *tokens[place + 1 :]]
    assert len({digest(tokens), digest(changed), digest(tokens[:-1]), digest([*tokens, 7])}) == 4
    assert digest([1, 23]) != digest([12, 3]) and digest(tokens) == digest(tuple(tokens))


def test_an_answer_that_parts_late_is_no_equal_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last of twelve tokens differs, in one method alone."""
    result_of = contestant._Watch.run

    def run_of(self: Any, began: float, unit: Unit) -> Any:
        if self.llm.method == "suffix":
            for result in self.results.values():
                result.token_ids[-1] ^= 1
        return result_of(self, began, unit)

    monkeypatch.setattr(contestant._Watch, "run", run_of)
    lines = run(tmp_path, config(max_tokens=12, batch_sizes=(1,), rounds=1))
    rows = {r.method: r for r in Report.of(lines).rows}
    assert rows["suffix"].differing == rows["suffix"].compared > 0 and not rows["suffix"].holds
    assert rows["ngram"].differing == 0 and rows["ngram"].compared > 0


def test_crossings_in_words() -> None:
    assert summary.crossing({1: 2.0, 4: 0.5}) == "slower from a batch of about 2.0"
    assert summary.crossing({1: 0.5, 4: 2.0}) == "faster from a batch of about 2.0"
    assert summary.crossing({1: 2.0, 8: 1.1}) == "faster at every batch size that was run"


def test_a_peers_batch_is_timed_from_when_all_have_a_first_token() -> None:
    unit = Unit(("a", "b"), ((1, 2), (3, 4)), ("", ""), (0, 1))
    early, late = PeerAnswer("", None, 11, 1.0, 6.0), PeerAnswer("", None, 11, 2.0, 7.0)
    run = run_of_answers([early, late], unit, None)
    assert run.decode_s == 5.0 and run.decode_tokens == pytest.approx(10 * 4 / 5 + 10) and run.tokens == 22
    waited = replace(early, arrivals=(1.9, *(2.0 + i / 2 for i in range(1, 9)), 6.0))  # one token came meanwhile
    run = run_of_answers([waited, late], unit, None)
    assert run.decode_tokens == pytest.approx(9 + 10) and run.full_tokens == pytest.approx(9 + 10 * 4 / 5)
    untold = run_of_answers([early, PeerAnswer("", None, 11, None, 7.0)], unit, None)
    assert untold.decode_s == 0.0 and untold.total_s == 7.0


# -- the store ---------------------------------------------------------------------------------------------------


def test_cut_anywhere_the_same_command_ends_with_the_same_measurements(tmp_path: Path) -> None:
    """At every kind of place: between lines, within one, within a heat, in the first line."""
    asked = config(rounds=1, batch_sizes=(1,))
    whole = run(tmp_path / "whole", asked)
    raw = (tmp_path / "whole" / store.NAME).read_bytes()
    expected = keys(whole)
    assert len(expected) == 3 and {x["error"] for x in whole if x["kind"] == "measurement"} == {None}
    ends = [i + 1 for i, byte in enumerate(raw) if byte == ord("\n")]
    places = (0, 40, ends[0], ends[0] + 3, ends[1], ends[1] + 3, ends[2], ends[3] - 7, ends[-2], ends[-1] - 7, ends[-1])
    for place in places:
        out = tmp_path / f"cut-{place}"
        out.mkdir()
        (out / store.NAME).write_bytes(raw[:place])
        assert keys(run(out, asked)) == expected, place
        assert keys(read(out)) == expected


def test_who_goes_first_changes_from_round_to_round(tmp_path: Path) -> None:
    lines = run(tmp_path, config(rounds=4, batch_sizes=(1,)))
    first = [x["method"] for x in lines if x["kind"] == "measurement" and x["place"] == 0]
    assert len(first) == 4 and len(set(first)) > 1


def test_more_rounds_continue_a_comparison(tmp_path: Path) -> None:
    first = keys(run(tmp_path, config(rounds=1)))
    both = keys(run(tmp_path, config(rounds=2)))
    assert both[: len(first)] == first and len(both) == 2 * len(first)
    assert both == keys(run(tmp_path / "at-once", config(rounds=2)))


def test_passes_go_on_with_the_same_rounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "outpace.bench.compare.run.rounds_in_a_pass", lambda seconds: {c: 2 if c.batch == 1 else 1 for c in seconds}
    )
    asked = config(rounds=None, budget_s=2.0)
    lines = run(tmp_path / "whole", asked)
    (model,) = (x for x in lines if x["kind"] == "model")
    assert sorted(model["rounds_in_a_pass"].values()) == [1, 2]
    rounds = {b: {x["round"] for x in lines if x["kind"] == "measurement" and x["batch"] == b} for b in (1, 2)}
    assert all(found == set(range(len(found))) for found in rounds.values())
    assert 2 * len(rounds[2]) - 1 <= len(rounds[1]) <= 2 * len(rounds[2]) + 1 and len(rounds[2]) >= 2
    monkeypatch.setattr("outpace.bench.compare.run.rounds_in_a_pass", lambda seconds: {})  # as it is known already
    raw = (tmp_path / "whole" / store.NAME).read_bytes()
    cut = tmp_path / "cut"
    cut.mkdir()
    (cut / store.NAME).write_bytes(raw[: len(raw) // 2])
    again = keys(run(cut, asked))
    assert len(again) >= len(keys(lines)) * 0.8 and again[: len(keys(lines))] == keys(lines)[: len(again)]


def test_a_heat_that_is_not_whole_is_cut_off() -> None:
    lines = [{"kind": "comparison"}, *({"kind": "measurement", "place": p, "heat_size": 2} for p in (0, 1, 0))]
    raw = "".join(json.dumps(line) + "\n" for line in lines).encode()
    kept, length = whole_lines(raw)
    assert len(kept) == 3 and raw[:length].count(b"\n") == 3
    assert whole_lines(b'{"kind": "measurement"}\n') == ([], 0) and whole_lines(b"") == ([], 0)


def test_other_files_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / store.NAME).write_text('{"name": "someone else"}\n')
    with pytest.raises(ParameterError, match="not a results file"):
        Store(tmp_path, {"identity": {}})
    assert (tmp_path / store.NAME).read_text() == '{"name": "someone else"}\n'


# -- failures and budget -------------------------------------------------------------------------------------------


def test_a_peer_takes_part(tmp_path: Path) -> None:
    clock = Clock()
    lines = run(tmp_path, config(peers=("good",)), {"good": FakePeer(clock)}, clock)
    rows = [r for r in Report.of(lines).rows if r.method == "good"]
    assert len(rows) == 2 and all(r.state == "ok" and r.ratio is not None and r.declared is None for r in rows)
    assert next(x for x in lines if x["kind"] == "model")["peers_about"] == {"good": {"version": "1.2.3", "threads": 2}}


def test_a_peer_that_dies_hangs_or_is_not_there_is_reported_and_the_rest_goes_on(tmp_path: Path) -> None:
    clock = Clock()
    peers = {
        "absent": FakePeer(clock, starts=False),
        "dies": FakePeer(clock, lambda call: "died with signal 9" if call > 2 else None),
        "hangs": FakePeer(clock, lambda call: "no answer within its time"),
        "once": FakePeer(clock, lambda call: "stumbled" if call == 3 else None),
    }
    lines = run(tmp_path, config(peers=tuple(peers), budget_s=3600.0), peers, clock)
    rows = {(r.method, r.cell.batch): r for r in Report.of(lines).rows}
    for name, why in (("absent", "not installed"), ("dies", "signal 9"), ("hangs", "no answer within its time")):
        assert all(rows[name, b].state == "failed" and why in rows[name, b].reason for b in (1, 2)), name
        assert peers[name].closed
    assert peers["absent"].calls == 0 and peers["hangs"].calls == 2 and peers["dies"].calls == 4
    assert rows["once", 1].state == "failed" and rows["once", 2].state == "ok" and peers["once"].started == 2
    ours = [r for (name, _), r in rows.items() if name in (PLAIN, "ngram", "suffix")]
    assert len(ours) == 6 and all(r.state == "ok" and r.speed and r.speed.rounds >= 2 for r in ours)


def test_a_method_that_breaks_fails_in_its_cell_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from outpace.decoding.drafters.ngram import Ngram

    right = Ngram.propose

    def propose(self, sequences, budgets, market):  # type: ignore[no-untyped-def]
        if len(sequences) == 2 and sequences[0].owner != "warm-up":
            raise RuntimeError("out of ideas")
        return right(self, sequences, budgets, market)

    monkeypatch.setattr(Ngram, "propose", propose)
    rows = {(r.method, r.cell.batch): r for r in Report.of(run(tmp_path, config())).rows}
    assert rows["ngram", 1].state == "ok" and rows["ngram", 2].state == "failed"
    assert rows["ngram", 2].reason == "RuntimeError: out of ideas"
    assert rows["suffix", 2].state == "ok"


def test_what_the_budget_does_not_reach_is_said(tmp_path: Path) -> None:
    wide: dict[str, Any] = dict(workloads=("code", "writing", "chat"))
    all_of_it = [x for x in run(tmp_path / "all", config(**wide, rounds=1)) if x["kind"] == "measurement"]
    clock, half = Clock(), all_of_it[len(all_of_it) // 2]["t"]
    report = Report.of(run(tmp_path / "half", config(**wide, rounds=None, budget_s=half), clock=clock))
    states = {r.state for r in report.rows}
    assert states == {"ok", "not measured"} and clock.now < all_of_it[-1]["t"]
    assert ("toy", "less than requested: 2 answers at once (no time within the budget)") in report.lost


@pytest.mark.parametrize("tick", [0.002, 0.01, 0.04])
def test_a_budget_is_kept_on_a_machine_of_any_speed(tmp_path: Path, tick: float) -> None:
    """A slow one measures less, says what it left out, and nothing has failed."""
    clock = Clock(tick)
    asked = config(
        methods=("auto", "ngram", "suffix", "recycling", "lookahead", "jacobi"), workloads=("code", "writing", "chat"),
        batch_sizes=(1, 2, 8), max_tokens=64, rounds=None, budget_s=5.0,
    )  # fmt: skip
    report = Report.of(run(tmp_path, asked, clock=clock))
    ends = [line["t"] for line in report.lines if line["kind"] == "measurement"]
    assert ends[-1] < 5.0 + OVERTIME_S + OVERTIME * 5.0 + 5 * tick
    assert {r.state for r in report.rows} <= {"ok", "not measured"}
    assert not [line for line in report.lines if line["kind"] == "failure"]
    assert report.models[0]["left_out"] and any(r.state != "ok" for r in report.rows)
    if tick < 0.04:  # there the smallest plan does not fit
        assert {r.state for r in report.rows if r.method in (PLAIN, "auto") and r.cell.batch == 1} >= {"ok"}
        pairs = [r.ratio.rounds for r in report.rows if r.ratio is not None]
        assert min(pairs) >= summary.LEAST_PAIRS


def test_loading_is_said_and_takes_nothing_off_the_budget(tmp_path: Path) -> None:
    clock = Clock()
    asked = config(peers=("good",), batch_sizes=(1,), rounds=None, budget_s=3.0)
    peer = FakePeer(clock, starting_s=50.0)
    report = Report.of(run(tmp_path, asked, {"good": peer}, clock, loading_s=100.0))
    assert report.loading_s == pytest.approx(100.0, abs=0.1) and 152 < clock.now < 153.3
    assert {r.state for r in report.rows} == {"ok"} and not report.models[0]["left_out"]


def test_who_is_cut_off_by_the_end_of_the_budget_has_not_failed(tmp_path: Path) -> None:
    clock = Clock()
    hangs = FakePeer(clock, lambda call: "no answer within its time" if call > 1 else None)
    lines = run(tmp_path, config(peers=("hangs",), batch_sizes=(1,), budget_s=10.0), {"hangs": hangs}, clock)
    (row,) = (r for r in Report.of(lines).rows if r.method == "hangs")
    assert row.state == "not measured" and not any(line["kind"] == "failure" for line in lines)
    assert [x["error"] for x in lines if x.get("method") == "hangs"] == [CUT]
    assert clock.now < 10 + OVERTIME_S + OVERTIME * 10 + 0.5


def test_a_plan_shrinks_in_the_order_that_is_stated() -> None:
    """Contestants to one heat, shorter answers, smaller batches, contestants, kinds of text."""
    many = tuple(Cell(w, b, 0.0) for b in (1, 8) for w in ("code", "writing"))
    whole = Plan(tuple("abcdef"), many, 64)
    seen: list[Plan] = []
    assert fit(whole, lambda plan: seen.append(plan) or 2.0, 1.0) == seen[-1]  # type: ignore[func-returns-value]
    sizes = [(len(p.others), p.max_tokens, len(p.cells)) for p in seen]
    assert sizes == [
        (6, 64, 4), (5, 64, 4), (4, 64, 4), (4, 32, 4), (4, 16, 4), (4, 16, 2), (3, 16, 2), (2, 16, 2), (1, 16, 2),
        (1, 16, 1),
    ]  # fmt: skip
    assert seen[-1] == Plan(("a",), (Cell("code", 1, 0.0),), 16)
    assert (
        fit(whole, lambda plan: len(plan.others), 5.0).others == tuple("abcde") and fit(whole, lambda p: 0, 1) == whole
    )
    short = Plan(("a",), (many[0],), 20)
    assert fit(short, lambda plan: 2.0, 1.0) == short  # never shorter than SHORTEST


def test_who_stays_when_nobody_was_named() -> None:
    names = ["aded", "draft", "ngram", "suffix+recycling", "auto"]
    assert by_standing(names, ["llama.cpp"]) == ["auto", "llama.cpp", "suffix+recycling", "ngram", "draft", "aded"]


def test_a_plan_is_kept_when_a_comparison_goes_on(tmp_path: Path) -> None:
    asked = config(methods=("ngram", "suffix", "recycling"), max_tokens=64, rounds=None, budget_s=1.0)
    lines = run(tmp_path / "whole", asked, clock=Clock(0.004))
    (model,) = (x for x in lines if x["kind"] == "model")
    assert model["left_out"] and {x["tokens"] for x in lines if x["kind"] == "measurement"} == {
        model["plan"]["max_tokens"]
    }
    raw = (tmp_path / "whole" / store.NAME).read_bytes()
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / store.NAME).write_bytes(raw[: raw.index(b'"place": 1')])
    again = run(tmp_path / "cut", asked, clock=Clock(0.0001))  # quicker now: the plan stays
    assert [x["plan"] for x in again if x["kind"] == "model"] == [model["plan"]]
    shared = keys(lines)
    assert keys(again)[: len(shared)] == shared


def test_rounds_fill_the_budget_and_no_more(tmp_path: Path) -> None:
    lines = run(tmp_path, config(rounds=None, budget_s=3.0))
    times = [x["t"] for x in lines if x["kind"] == "measurement"]
    assert max(x["round"] for x in lines if x["kind"] == "measurement") >= 3
    assert 2.5 < times[-1] < 3.05 and times == sorted(times)  # estimates leave out looks at the clock
    assert keys(run(tmp_path, config(rounds=None, budget_s=3.0))) == keys(lines)


def test_a_workload_without_prompts_has_no_units() -> None:
    assert sets.units([], [], [], 2) == [] and Workload("x").prompts == []
    made = sets.units(["a", "b", "c"], [(1,), (2,), (3,)], ["", "", ""], 2)
    assert [u.ids for u in made] == [("a", "b")] and made[0].numbers == (0, 1)
