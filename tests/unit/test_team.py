"""Threads and cores: who runs where during a job, and what that leaves to threads that others start."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from outpace.ops.cpu import team as module
from outpace.ops.cpu import top
from outpace.ops.cpu.barrier import J_THREADS
from outpace.ops.cpu.ready import make_ready
from outpace.ops.cpu.search import TOP_SIZE
from outpace.ops.cpu.team import TOP, Team
from outpace.ops.select import row_topk

CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
several = pytest.mark.skipif(len(CORES) < 2, reason="needs two cores, and a system that ties threads to them")


@pytest.fixture
def team() -> Iterator[Team]:
    """As large as the machine. What a test replaces must not be compiled into what workers run."""
    make_ready()
    made = Team(len(CORES))
    yield made
    made._mailbox[module._STOP] = 1
    with made._wake:
        made._wake.notify_all()


def job() -> np.ndarray:
    """Looks for the largest logits of no rows."""
    control = np.zeros(TOP_SIZE, dtype=np.int64)
    control[J_THREADS] = len(CORES)
    return control


def during(monkeypatch: pytest.MonkeyPatch, look: Callable[[], object]) -> list[object]:
    """What `look` sees on the caller's thread in each job."""
    seen: list[object] = []
    work = module.work

    def watched(kind: int, control: int, me: int) -> None:
        seen.append(look())
        work(kind, control, me)

    monkeypatch.setattr(module, "work", watched)
    return seen


@several
def test_the_caller_is_moved_to_its_core_and_stays_free(team: Team, monkeypatch: pytest.MonkeyPatch) -> None:
    cores = during(monkeypatch, module._this_core)
    os.sched_setaffinity(0, CORES[-1:])  # go to another core
    os.sched_setaffinity(0, CORES)
    for _ in range(20):
        team.run(job(), TOP)
        assert os.sched_getaffinity(0) == set(CORES)
    assert cores.count(CORES[0]) > 10  # the system may move it again; another program may have been there


@several
def test_threads_that_the_caller_starts_may_run_anywhere(team: Team) -> None:
    found: list[set[int]] = []
    team.run(job(), TOP)
    started = threading.Thread(target=lambda: found.append(os.sched_getaffinity(0)))
    started.start()
    started.join()
    assert found == [set(CORES)]


@several
def test_whoever_has_chosen_a_core_stays_there(team: Team, monkeypatch: pytest.MonkeyPatch) -> None:
    cores = during(monkeypatch, module._this_core)
    os.sched_setaffinity(0, CORES[-1:])
    try:
        team.run(job(), TOP)
        assert os.sched_getaffinity(0) == set(CORES[-1:]) and cores == CORES[-1:]
    finally:
        os.sched_setaffinity(0, CORES)


@several
def test_a_caller_in_its_place_costs_no_system_call(team: Team, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_this_core", lambda: CORES[0])
    for name in ("sched_getaffinity", "sched_setaffinity"):
        monkeypatch.setattr(os, name, lambda *_: pytest.fail("asked the system"))
    team.run(job(), TOP)


@several
def test_where_the_system_does_not_say_the_core(team: Team, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_this_core", lambda: -1)
    team.run(job(), TOP)
    assert os.sched_getaffinity(0) == set(CORES)


def test_systems_that_tie_no_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("sched_getaffinity", "sched_setaffinity"):
        monkeypatch.delattr(os, name, raising=False)
    team = Team(3)
    monkeypatch.setattr(top, "team", lambda threads: team)
    data = np.random.default_rng(0).standard_normal((5, 300)).astype(np.float32)
    assert (row_topk(data, 1, 3)[1][:, 0] == data.argmax(axis=1)).all()
    monkeypatch.setattr(module.ctypes, "PyDLL", lambda _: object())
    assert module._find_core()() == -1


def test_several_callers_take_turns() -> None:
    data = np.random.default_rng(1).standard_normal((6, 500)).astype(np.float32)
    right: list[bool] = []

    def call() -> None:
        right.extend(bool((row_topk(data, 1, 2)[1][:, 0] == data.argmax(axis=1)).all()) for _ in range(200))

    callers = [threading.Thread(target=call) for _ in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(right) == 600 and all(right)
