"""Step times of a decoder on this machine, measured at first use and kept beside the models, if nothing else kept the
machine busy meanwhile."""

from __future__ import annotations

import hashlib
import os
import platform
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from ..decoding.planners.costs import StepCosts
from ..models.batch import PAGE_SIZE, Span, pack
from ..models.decoder import Decoder
from ..paths import cache_dir
from .busy import watched
from .kept import read_kept, say_damaged, write_kept

# kernels take rows in blocks: the row after a full one costs much
ROWS = (1, 2, 4, 5, 8, 9, 12, 13, 16, 17, 20, 24, 25, 32)
CONTEXTS = (64, 1024)
_FORMAT = 5
_LARGEST, _LONGEST_S = 1 << 24, 1000.0  # of what a table may hold
_MOST_ROUNDS, _LEAST_ROUNDS, _ENOUGH_S = 11, 2, 2.0

Progress = Callable[[int, int], None]


def measure(decoder: Decoder, progress: Progress | None = None) -> StepCosts:
    """Time steps of `ROWS` rows behind `CONTEXTS` tokens, round after round, and keep the quickest of each: what
    disturbs a step only ever adds to it. Takes seconds with a large model."""
    contexts = [c for c in CONTEXTS if c + ROWS[-1] <= decoder.config.max_position] or [1]
    pages = -(-(contexts[-1] + ROWS[-1]) // PAGE_SIZE)
    storage = decoder.new_storage(pages)
    table = np.arange(pages, dtype=np.int32)[None]
    cells = [(i, j) for j in range(len(contexts)) for i in range(len(ROWS))]
    batches = {
        (i, j): pack([Span(np.arange(ROWS[i]) % decoder.config.vocab_size, contexts[j])], table) for i, j in cells
    }
    seconds = np.full((len(ROWS), len(contexts)), np.inf, dtype=np.float32)

    def timed(cell: tuple[int, int]) -> float:
        start = perf_counter()
        decoder.forward(batches[cell], storage).rows[-1, 0].item()  # waits for the device
        return perf_counter() - start

    for j in range(len(contexts)):  # warms up, and buffers grow to their size
        timed((len(ROWS) - 1, j))
        timed((0, j))
    began = perf_counter()
    for done in range(1, _MOST_ROUNDS + 1):
        for cell in cells:
            seconds[cell] = min(seconds[cell], timed(cell))
        if progress is not None:
            progress(done, _MOST_ROUNDS)
        if done >= _LEAST_ROUNDS and perf_counter() - began > _ENOUGH_S:
            break
    return StepCosts(ROWS, tuple(contexts), seconds)


def step_costs(decoder: Decoder, name: str, progress: Progress | None = None, again: bool = False) -> StepCosts:
    """The table of this machine, model, precision and number of threads; measured if it is not there yet, or `again`
    whatever is there. What was measured while the machine was busy serves this process alone, which is said on
    stderr."""
    path = _path(decoder, name)
    if not again:
        if (known := _of_this_process.get(path)) is not None:
            return known
        if (stored := read_kept(path, f"step times of {name}")) is not None:
            try:
                return costs_of(stored)
            except ValueError as error:
                say_damaged(f"step times of {name}", str(error))
    with watched(int(getattr(decoder, "threads", 1))) as load:
        costs = measure(decoder, progress)
    _of_this_process.pop(path, None)
    if load.busy:
        _of_this_process[path] = costs
        print(f"step times were measured on a busy machine ({load}): used now, not kept for later", file=sys.stderr)
    else:
        write_kept(path, costs_to_json(costs))
    return costs


_of_this_process: dict[Path, StepCosts] = {}  # measured while the machine was busy


def costs_to_json(costs: StepCosts) -> dict[str, Any]:
    """Times to six digits."""
    seconds = [[float(f"{x:.6g}") for x in row] for row in costs.seconds.tolist()]
    return {"rows": list(costs.rows), "contexts": list(costs.contexts), "seconds": seconds}


def costs_of(stored: Any) -> StepCosts:
    """Raises ValueError, with the reason, for anything but `costs_to_json`."""
    if not isinstance(stored, dict) or stored.keys() != {"rows", "contexts", "seconds"}:
        raise ValueError("a table has rows, contexts and seconds")
    rows, contexts, seconds = stored["rows"], stored["contexts"], stored["seconds"]
    for axis, least in ((rows, 2), (contexts, 1)):
        whole = isinstance(axis, list) and all(type(n) is int and 0 < n <= _LARGEST for n in axis)
        if not whole or len(axis) < least or axis != sorted(set(axis)):
            raise ValueError("rows and contexts are numbers that ascend")
    if not isinstance(seconds, list) or len(seconds) != len(rows):
        raise ValueError("there is a line of seconds for each number of rows")
    for line in seconds:
        if not isinstance(line, list) or len(line) != len(contexts):
            raise ValueError("there is a time for each context")
        if not all(type(x) in (int, float) and 0 < x <= _LONGEST_S for x in line):  # NaN and infinity are neither
            raise ValueError(f"a time is a number of seconds, above 0 and at most {_LONGEST_S:g}")
    return StepCosts(tuple(rows), tuple(contexts), np.array(seconds, dtype=np.float32))


def machine_digest(decoder: Decoder, name: str, *more: object) -> str:
    """Names what was measured on this machine with this model, precision and number of threads."""
    threads = getattr(decoder, "threads", 0)
    formats = sorted(Counter(form.name for form in getattr(decoder, "formats", {}).values()).items())
    what = (*more, _machine(), name, decoder.config.num_layers, decoder.config.hidden_size, decoder.config.vocab_size,
            decoder.precision, *formats, decoder.device.type, threads)  # fmt: skip
    return hashlib.sha256(repr(what).encode()).hexdigest()[:20]


def _path(decoder: Decoder, name: str) -> Path:
    return cache_dir() / "step-times" / f"{machine_digest(decoder, name, _FORMAT)}.json"


def _machine() -> tuple[str, int | None]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor()
    return model, os.cpu_count()
