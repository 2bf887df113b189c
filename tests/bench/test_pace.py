"""A shared machine that is slow now and then: what is left of it in the figures of a comparison."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
import pytest

from outpace.bench.compare.pace import paces
from outpace.bench.compare.plan import PLAIN, Cell
from outpace.bench.compare.summary import summarise

STEP = {1: 0.005, 2: 0.0052, 4: 0.006, 8: 0.008}  # seconds of a forward by rows
TOKENS = 60
CELL = Cell("code", 1, 0.0)
#: rows and tokens of a step, share of drafting, own slowness of its forwards
METHODS = {
    PLAIN: (1, 1.0, 0.0, 1.0),
    "small": (4, 2.0, 0.05, 1.0),
    "dear": (8, 3.0, 0.5, 1.0),
    "cold": (4, 2.0, 0.0, 1.3),
}


def measured(rounds: int, noise: float, seed: int = 0, told: bool = True) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    lines: list[dict[str, Any]] = [
        {"kind": "model", "model": "toy", "cells": [asdict(CELL)], "methods": list(METHODS), "peers": []}
    ]
    for number in range(rounds):
        for place, (method, (rows, tokens, share, own)) in enumerate(METHODS.items()):
            steps = int(TOKENS / tokens)
            slow = np.exp(rng.normal(0, noise))
            few = steps // 4  # of the steps have one row: nothing was drafted
            single, several = slow * own * few * STEP[1], slow * own * (steps - few) * STEP[rows]
            verify = single + several
            line = dict(
                kind="measurement", model="toy", workload="code", batch=1, temperature=0.0, round=number,
                unit=number % 2, heat=0, place=place, heat_size=len(METHODS), method=method, error=None,
                decode_tokens=int(steps * tokens), decode_s=verify / (1 - share), total_s=verify, tokens=TOKENS,
                first_s=0.1, prompts=["p"], digests=["d"], exactness="identical", notes=[], context=100.0, right=[],
                all_turns=steps, turns=steps, drafted=0, accepted=0, kv_bytes=None, memory_bytes=None, draft_s=None,
                forwards=[[1, few, single], [rows, steps - few, several]],
            )  # fmt: skip
            if rows == 1:
                line["forwards"] = [[1, steps, verify]]
            if not told:
                del line["forwards"]
            lines.append(line)
    return lines


def ratios(lines: list[dict[str, Any]]) -> dict[str, float]:
    wanted = [("toy", CELL, method) for method in METHODS]
    return {row.method: row.ratio.value for row in summarise(lines, wanted, {}) if row.ratio is not None}


def expected(method: str) -> float:
    rows, tokens, share, own = METHODS[method]
    steps = int(TOKENS / tokens)
    few = steps // 4 if rows > 1 else 0
    seconds = own * ((steps - few) * STEP[rows] + few * STEP[1]) / (1 - share)
    return int(steps * tokens) / seconds / (TOKENS / (TOKENS * STEP[1]))


def test_the_pace_of_each_run_is_found() -> None:
    lines = [x for x in measured(30, 0.0) if x["kind"] == "measurement"]
    assert paces(lines)[:3] == pytest.approx([1.0] * 3, rel=0.02)
    slowed = lines[5]
    slowed["forwards"] = [[rows, count, 1.5 * seconds] for rows, count, seconds in slowed["forwards"]]
    assert paces(lines)[5] == pytest.approx(1.5, rel=0.03)


def test_comparisons_on_a_restless_machine_agree_better_for_it() -> None:
    def errors(told: bool) -> list[float]:
        found = [ratios(measured(12, 0.15, seed, told)) for seed in range(8)]
        return [abs(one[m] / expected(m) - 1) for one in found for m in ("small", "dear")]

    steady, raw = errors(True), errors(False)
    assert max(steady) < 0.08 < max(raw)
    assert np.mean(steady) < 0.6 * np.mean(raw)


def test_what_a_method_slows_down_itself_stays() -> None:
    found = ratios(measured(60, 0.05))
    assert expected("cold") == pytest.approx(found["cold"], rel=0.06)
    assert found["cold"] < 0.87 * found["small"]


def test_engines_that_tell_nothing_are_left_as_they_are() -> None:
    lines = measured(4, 0.2, told=False)
    assert paces([x for x in lines if x["kind"] == "measurement"]) == [None] * 16
    mixed = measured(4, 0.2)
    peer = [{**x, "method": "peer", "place": 4} for x in mixed if x.get("method") == "small"]
    for line in peer:
        del line["forwards"]
    rows = summarise([*mixed, *peer], [("toy", CELL, "peer")], {})
    raw = summarise([*lines, *({**x, "method": "peer"} for x in lines if x.get("method") == "small")],
                    [("toy", CELL, "peer")], {})  # fmt: skip
    assert rows[0].ratio is not None and raw[0].ratio is not None
    assert rows[0].ratio.value == pytest.approx(raw[0].ratio.value)
