"""Step times are measured once, kept, and measured anew when what is kept is of no use."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hashing import HashDecoder

from outpace.engine import busy, measure
from outpace.engine.kept import write_kept
from outpace.engine.measure import step_costs


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OUTPACE_CACHE", str(tmp_path))
    monkeypatch.setattr(measure, "ROWS", (1, 2, 3))
    monkeypatch.setattr(measure, "CONTEXTS", (4, 20))
    decode = HashDecoder.logits
    monkeypatch.setattr(busy, "_waited_s", lambda: None)  # this machine may be busy with other tests
    monkeypatch.setattr(busy, "_used_s", lambda: None)
    # Places that were never written are fine here: nothing is read from them.
    monkeypatch.setattr(HashDecoder, "logits", lambda self, seen: decode(self, np.array([[1, 0]])))
    return tmp_path


def test_a_table_is_measured_once(cache: Path) -> None:
    decoder, told = HashDecoder(), []
    costs = step_costs(decoder, "toy", lambda done, total: told.append((done, total)))
    assert (costs.rows, costs.contexts) == ((1, 2, 3), (4, 20)) and np.isfinite(costs.seconds).all()
    assert told and told[0][0] == 1
    forwards = len(decoder.forwards)
    again = step_costs(decoder, "toy")
    assert len(decoder.forwards) == forwards
    assert np.allclose(again.seconds, costs.seconds)


DAMAGED: dict[str, Callable[[str], str]] = {
    "empty": lambda text: "",
    "cut": lambda text: text[:-5],
    "zeros": lambda text: "\0" * len(text),
    "not a table": lambda text: "[]",
    "infinity": lambda text: text.replace('"rows": [1', '"rows": [Infinity'),
    "nan": lambda text: text.replace('"rows": [1', '"rows": [NaN'),
    "deep": lambda text: '{"kept": ' + "[" * 100_000,
    "huge": lambda text: text + " " * (2 << 20),
    "one digit": lambda text: text.replace('"contexts": [4, 20]', '"contexts": [4, 21]'),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_table_is_measured_anew(cache: Path, damage: str, capsys: pytest.CaptureFixture[str]) -> None:
    decoder = HashDecoder()
    step_costs(decoder, "toy")
    (path,) = cache.glob("step-times/*.json")
    whole = path.read_text()
    path.write_text(DAMAGED[damage](whole))
    assert path.read_text() != whole
    forwards = len(decoder.forwards)
    assert (step_costs(decoder, "toy").seconds > 0).all() and len(decoder.forwards) > forwards
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "step times of toy that were kept are damaged" in said and "measured anew" in said
    forwards = len(decoder.forwards)
    step_costs(decoder, "toy")
    assert len(decoder.forwards) == forwards and capsys.readouterr().err == ""


TABLE = {"rows": [1, 2], "contexts": [4], "seconds": [[1.0], [2.0]]}


@pytest.mark.parametrize(
    "change",
    [
        {"seconds": [[1.0], [-1.0]]}, {"seconds": [[1.0], [0]]}, {"seconds": [[1.0], [float("inf")]]},
        {"seconds": [[1.0], [float("nan")]]}, {"seconds": [[1.0], ["2"]]}, {"seconds": [[1.0], [True]]},
        {"seconds": [[1.0], [1e9]]}, {"seconds": [[1.0]]}, {"seconds": [[1.0], []]}, {"seconds": None},
        {"rows": [2, 1]}, {"rows": [1, 1]}, {"rows": [1]}, {"rows": [0, 1]}, {"rows": [1, 2.0]}, {"rows": "12"},
        {"contexts": []}, {"contexts": [-4]}, {"rows": [1, 10**30]}, {"more": 1},
    ],
)  # fmt: skip
def test_a_table_of_other_values_is_refused(cache: Path, change: dict[str, Any]) -> None:
    """Also one whose digest is right: another version may have written it."""
    assert measure.costs_of(TABLE).step(1, 4) == 1.0
    with pytest.raises(ValueError):
        measure.costs_of(TABLE | change)
    step_costs(HashDecoder(), "toy")
    (path,) = cache.glob("step-times/*.json")
    write_kept(path, TABLE | change)
    assert step_costs(HashDecoder(), "toy").rows == (1, 2, 3)


def test_what_a_busy_machine_gives_serves_this_process_alone(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(measure, "_of_this_process", {})
    waited = iter(range(0, 10**6, 1000))
    monkeypatch.setattr(busy, "_waited_s", lambda: float(next(waited)))
    decoder = HashDecoder()
    costs = step_costs(decoder, "toy")
    assert "not kept for later" in capsys.readouterr().err and not list(cache.glob("step-times/*.json"))
    forwards = len(decoder.forwards)
    assert step_costs(decoder, "toy") is costs and len(decoder.forwards) == forwards and capsys.readouterr().err == ""
    monkeypatch.setattr(busy, "_waited_s", lambda: 0.0)
    step_costs(decoder, "toy", again=True)
    assert len(decoder.forwards) > forwards and len(list(cache.glob("step-times/*.json"))) == 1
    assert step_costs(decoder, "toy") is not costs


@pytest.mark.parametrize(
    ("cores", "threads", "waited", "others", "is_busy"),
    [
        (2, 2, 0.05, 1.9, False), (2, 2, 0.3, 0.0, True), (2, 1, 0.15, 1.0, True), (64, 2, 0.0, 60.0, False),
        (2, 2, None, 0.1, False), (2, 2, None, 0.5, True), (8, 2, None, 5.9, False), (8, 2, None, 6.5, True),
        (2, 2, None, None, False),
    ],
)  # fmt: skip
def test_what_counts_as_busy(
    cores: int, threads: int, waited: float | None, others: float | None, is_busy: bool
) -> None:
    assert busy.Load(cores, threads, waited, others).busy == is_busy


@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="platform: reads /proc")
def test_waiting_for_a_core_is_seen() -> None:
    """Two threads of one process on one core: each of them waits about half of the time."""
    code = (
        "import os, threading, time, hashlib\n"
        "os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[0]})\n"
        "from outpace.engine.busy import watched\n"
        "block = b'x' * (1 << 22)\n"
        "def spin(until):\n"
        "    while time.monotonic() < until: hashlib.sha256(block)\n"
        "with watched(2) as load:\n"
        "    threads = [threading.Thread(target=spin, args=(time.monotonic() + 1,)) for _ in range(2)]\n"
        "    [t.start() for t in threads]; [t.join(0.7) for t in threads]\n"
        "print(load.busy, load.waited > 0.2, load)\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.startswith("True True "), out


def test_models_and_precisions_have_tables_of_their_own(cache: Path) -> None:
    step_costs(HashDecoder(), "toy")
    step_costs(HashDecoder(), "other")
    assert len(list(cache.glob("step-times/*.json"))) == 2


def test_a_cache_that_cannot_be_written_is_no_error(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (cache / "step-times").write_text("a file where a folder should be")
    assert (step_costs(HashDecoder(), "toy").seconds > 0).all()


def test_a_short_context_is_measured_as_far_as_it_goes(cache: Path) -> None:
    assert step_costs(HashDecoder(max_position=10), "toy").contexts == (4,)
