"""Settings for all tests; puts this folder on the path, so that tests can import `toy`."""

import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parent))

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

    def step_costs(decoder, name, told=None):
        if not isinstance(decoder, hashing.HashDecoder):
            return measured(decoder, name, told)
        return StepCosts((1, 8, 32), (64,), np.array([[1e-3], [1.1e-3], [1.4e-3]], dtype=np.float32))

    monkeypatch.setattr(llm, "step_costs", step_costs)
