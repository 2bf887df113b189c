"""`outpace tune`: what is measured is kept, and what is said follows from it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result

from outpace.bench import tune as bench
from outpace.decoding.planners.costs import StepCosts
from outpace.engine import busy

COSTS = StepCosts((1, 8, 32), (64,), np.array([[1e-3], [1.1e-3], [4e-3]], dtype=np.float32))


@pytest.fixture
def tuned(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """A cache of our own, and step times by hand. Returns what was measured."""
    measured: list[str] = []
    monkeypatch.setenv("OUTPACE_CACHE", str(tmp_path))

    def bandwidth(threads: int, device: object, size: int) -> list[float]:
        measured.append("bandwidth")
        return [9e9, 1e10]

    def costs(decoder: object, name: str, progress: object = None, again: bool = False) -> StepCosts:
        measured.append("steps again" if again else "steps")
        return COSTS

    monkeypatch.setattr(bench, "read_bandwidth", bandwidth)
    monkeypatch.setattr(bench, "step_costs", costs)
    monkeypatch.setattr(busy, "_waited_s", lambda: None)  # this machine may be busy with other tests
    monkeypatch.setattr(busy, "_used_s", lambda: None)
    return measured


ONCE = ["bandwidth", "steps again", "bandwidth"]  # memory is measured on both sides of the steps


ARGS = ("tune", "--n", "2", "--max-tokens", "12", "--method", "ngram", "--method", "recycling")


def test_a_short_readable_table(outpace: Callable[..., Result], tuned: list[str]) -> None:
    done = outpace(*ARGS)
    assert done.exit_code == 0, done.output
    for said in ("memory reads 10.0 GB/s", "a step of one row takes 1.00 ms", "pays from this acceptance", "recycling"):
        assert said in done.output
    assert "with method auto the planner" in done.output.lower() and "repay" in done.output
    assert max(map(len, done.stdout.splitlines())) <= 120


def test_what_was_measured_is_kept_until_again(outpace: Callable[..., Result], tuned: list[str]) -> None:
    first = outpace(*ARGS, "--json")
    assert first.exit_code == 0, first.output
    assert tuned == ONCE
    second = outpace(*ARGS, "--json")
    assert tuned == ONCE and json.loads(second.stdout) == json.loads(first.stdout)
    more = json.loads(outpace(*ARGS, "--method", "suffix", "--json").stdout)
    assert tuned == ONCE  # only the new drafter was measured
    assert [d["method"] for d in more["drafters"]] == ["ngram", "recycling", "suffix"]
    outpace(*ARGS, "--again")
    assert tuned == ONCE * 2


def test_json_says_what_follows(outpace: Callable[..., Result], tuned: list[str]) -> None:
    found: dict[str, Any] = json.loads(outpace(*ARGS, "--json").stdout)
    assert found["bandwidth"] == 1e10 and found["precision"] == "float32"
    drafter = next(d for d in found["drafters"] if d["method"] == "recycling")
    assert drafter["rows"] > 0 and 0 < drafter["draft_s"] < drafter["step_s"]
    assert found["repay"].keys() == {"ngram", "recycling"}
    assert found["break_even_acceptance"]["1"]["7"] == pytest.approx(0.1 / 1.1, abs=0.02)
    assert found["operations"] > 0 and found["prefill_s"] > 0


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:-9],
        lambda text: text.replace("10000000000.0", "Infinity"),
        lambda text: text.replace("10000000000.0", "-1.0"),
        lambda text: text.replace('"threads": ', '"threads": 1'),
        lambda text: "[" * 100_000,
        lambda text: "\0" * 50,
    ],
)
def test_a_damaged_file_is_measured_anew(
    outpace: Callable[..., Result], tuned: list[str], tmp_path: Path, damage: Callable[[str], str]
) -> None:
    outpace(*ARGS)
    (path,) = (tmp_path / "tuning").glob("*.json")
    whole = path.read_text()
    path.write_text(damage(whole))
    assert path.read_text() != whole
    done = outpace(*ARGS)
    assert done.exit_code == 0 and done.stderr.count("are damaged") == 1, done.stderr
    assert tuned == ONCE * 2 and path.read_text() != damage(whole)


@pytest.mark.parametrize(
    ("name", "value"),
    [("bandwidth", float("nan")), ("bandwidth", "1e10"), ("threads", True), ("plain_s", 0), ("prefill_s", None),
     ("costs", {}), ("drafters", [{"method": "ngram"}]), ("drafters", None), ("skipped", [["a"]]), ("more", 1)],
)  # fmt: skip
def test_a_tuning_of_other_types_is_refused(name: str, value: object) -> None:
    right = bench.Tuning("toy", "int8", 2, 1e10, 1000, 10, 2000, 512, 0.1, 1e-3, COSTS, (), ()).to_json()
    assert bench.of_json(right).to_json() == right
    with pytest.raises(ValueError):
        bench.of_json(right | {name: value})


def test_what_a_busy_machine_gives_is_marked_and_not_kept(
    outpace: Callable[..., Result], tuned: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited = iter(range(0, 10**6, 1000))  # seconds
    monkeypatch.setattr(busy, "_waited_s", lambda: float(next(waited)))
    done = outpace(*ARGS)
    assert done.exit_code == 0 and "ON A BUSY MACHINE" in done.stdout and "NOT KEPT" in done.stderr
    assert not list(tmp_path.glob("tuning/*.json"))
    assert "s for a core in each second" in json.loads(outpace(*ARGS, "--json").stdout)["busy"]
    assert tuned == ONCE * 2


def test_no_share_is_told_of_a_memory_that_is_slower_than_the_steps(
    outpace: Callable[..., Result], tuned: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """604 % of the memory's speed is no finding."""
    monkeypatch.setattr(bench, "read_bandwidth", lambda *a, **k: [1.0])
    done = outpace(*ARGS)
    assert done.exit_code == 0 and "faster than the memory was measured to be" in done.stdout
    steps = done.stdout[done.stdout.index("steps") : done.stdout.index("a draft for")]
    assert steps.count("not shown") == 6
    assert json.loads(outpace(*ARGS, "--json").stdout)["share_of_bandwidth"] is None


def test_mistakes_in_one_line(outpace: Callable[..., Result], tuned: list[str]) -> None:
    for args, says in (
        (("--method", "nothing"), "no decoding method 'nothing'"),
        (("--method", "draft"), "needs a draft model"),
        (("--model", "missing"), "no model 'missing'"),
    ):
        done = outpace("tune", *args)
        assert done.exit_code != 0 and says in done.output and "Traceback" not in done.output
    assert not tuned


def test_the_break_even_of_a_draft() -> None:
    flat = StepCosts((1, 64), (64,), np.array([[1e-3], [1e-3]], dtype=np.float32))
    steep = StepCosts((1, 2), (64,), np.array([[1e-3], [2e-3]], dtype=np.float32))
    assert bench.break_even(flat, 1, 7) == pytest.approx(0, abs=1e-6)  # rows are free
    assert bench.break_even(steep, 1, 7) == pytest.approx(1, abs=1e-3)  # a row costs a step
    assert bench.break_even(steep, 1, 7, draft_s=1e-3) is None
    least = bench.break_even(COSTS, 1, 3)
    assert least is not None
    assert bench.expected_tokens(least, 3) == pytest.approx(COSTS.step(4, 256) / COSTS.step(1, 256), rel=1e-3)
    assert bench.best_length(steep, 0.9, 1) == 0 and bench.best_length(flat, 0.5, 1) == 31
    assert bench.best_length(COSTS, 0.9, 8) < bench.best_length(COSTS, 0.9, 1)


def test_a_tuning_is_the_same_from_its_file() -> None:
    drafters = (bench.DrafterCost("ngram", 1e-4, 2e-3, 8.0, 1.5),)
    tuning = bench.Tuning("toy", "int8", 2, 1e10, 1000, 10, 2000, 512, 0.1, 1e-3, COSTS, drafters, (("draft", "no"),))
    again = bench.of_json(json.loads(json.dumps(tuning.to_json())))
    assert again.to_json() == tuning.to_json() and again.costs.step(8, 64) == COSTS.step(8, 64)
    assert drafters[0].speedup(1e-3) == pytest.approx(1.25)
    assert tuning.peak == 2000 * 512 / 0.1 and tuning.floor(100) == (1000 + 1000) / 1e10
    with pytest.raises(ValueError):
        bench.of_json({"costs": tuning.to_json()["costs"]})
