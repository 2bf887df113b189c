"""Settings for all tests; puts this folder on the path, so that tests can import `toy`."""

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parent))

IN_CI = os.environ.get("CI", "").lower() in ("1", "true", "yes")
#: Beginnings of the reasons for which a test may be skipped in CI too: what the machine is, not what it lacks.
MAY_SKIP = (
    "no CUDA device",
    "this CPU has one level",
    "this system uses huge pages everywhere",
    "weights in one file need no index",
    "another engine is not installed",
    "platform:",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--soak-minutes", type=float, default=4.0, help="how long test_memory.py loads a server (default: 4)"
    )


# a first example may compile a kernel, and machines differ in speed
settings.register_profile("outpace", deadline=None)
settings.load_profile("outpace")


@pytest.fixture(autouse=True, scope="session")
def interrupts_arrive() -> Iterator[None]:
    """Shells let what they start in the background ignore Ctrl-C; tests that send it must not depend on that."""
    before = signal.getsignal(signal.SIGINT)
    if before == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True, scope="session")
def own_state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests read no settings of the person who runs them, and write no last conversation of theirs."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("XDG_CONFIG_HOME", "XDG_STATE_HOME"):
            patch.setenv(name, str(tmp_path_factory.mktemp(name.lower())))
        yield


@pytest.fixture(autouse=True)
def step_times_of_hash_decoders(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of one costs nothing worth measuring, and it refuses places that nobody wrote."""
    if "outpace.engine.llm" not in sys.modules and "hashing" not in sys.modules:
        return
    import hashing
    import numpy as np

    from outpace.decoding.planners.costs import StepCosts
    from outpace.engine import llm

    measured = llm.step_costs

    def step_costs(decoder, name, progress=None):
        if not isinstance(decoder, hashing.HashDecoder):
            return measured(decoder, name, progress)
        return StepCosts((1, 8, 32), (64,), np.array([[1e-3], [1.1e-3], [1.4e-3]], dtype=np.float32))

    monkeypatch.setattr(llm, "step_costs", step_costs)


def _forbid_skips(report: Any) -> None:
    """In CI a skip is a failure, unless its reason is in MAY_SKIP: else a missing package or model hides tests."""
    if not (IN_CI and report.outcome == "skipped") or hasattr(report, "wasxfail"):
        return
    reason = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr).removeprefix(
        "Skipped: "
    )
    if not reason.startswith(MAY_SKIP):
        report.outcome = "failed"
        report.longrepr = f"skipped, which CI does not allow (see MAY_SKIP in tests/conftest.py): {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    report = yield
    _forbid_skips(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Any:
    report = yield
    _forbid_skips(report)
    return report
