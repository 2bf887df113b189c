"""Measuring the machine."""

from __future__ import annotations

import os

import numpy as np
import pytest

from outpace.bench import machine


@pytest.mark.parametrize("threads", [1, 2, 64])
def test_bandwidth_of_any_number_of_threads(threads: int) -> None:
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    found = machine.read_bandwidth(threads, size=1 << 22, repeats=3)
    assert len(found) == 3 and all(1e7 < rate < 1e13 for rate in found)
    if cores is not None:
        assert os.sched_getaffinity(0) == cores  # only the threads that read were tied to cores


def test_the_probe_reads_everything() -> None:
    values = np.arange(1000, dtype=np.int64)
    assert machine._reader()(values) == values.sum()
