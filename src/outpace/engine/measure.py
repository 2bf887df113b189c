"""Step times of a decoder on this machine, measured at first use and kept beside the models."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

import numpy as np

from ..decoding.planners.costs import StepCosts
from ..models.batch import PAGE_SIZE, Span, pack
from ..models.decoder import Decoder
from ..paths import cache_dir

# kernels take rows in blocks: the row after a full one is dear
ROWS = (1, 2, 4, 5, 8, 9, 12, 13, 16, 17, 20, 24, 25, 32)
CONTEXTS = (64, 1024)
_FORMAT = 4
_MOST_ROUNDS, _LEAST_ROUNDS, _ENOUGH_S = 12, 3, 2.0

Told = Callable[[int, int], None]


def measure(decoder: Decoder, told: Told | None = None) -> StepCosts:
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
    began = perf_counter()
    for done in range(_MOST_ROUNDS):
        for cell in cells if done else reversed(cells):
            start = perf_counter()
            decoder.forward(batches[cell], storage).rows[-1, 0].item()  # waits for the device
            if done:  # the first round warms up
                seconds[cell] = min(seconds[cell], perf_counter() - start)
        if told is not None:
            told(done + 1, _MOST_ROUNDS)
        if done >= _LEAST_ROUNDS and perf_counter() - began > _ENOUGH_S:
            break
    return StepCosts(ROWS, tuple(contexts), seconds)


def step_costs(decoder: Decoder, name: str, told: Told | None = None, again: bool = False) -> StepCosts:
    """The table of this machine, model, precision and number of threads; measured if it is not there yet, or `again`
    whatever is there."""
    path = _path(decoder, name)
    try:
        if not again:
            return _read(path)
    except (OSError, ValueError, KeyError, TypeError, AssertionError):
        pass
    costs = measure(decoder, told)
    _write(path, costs)
    return costs


def machine_digest(decoder: Decoder, name: str, *more: object) -> str:
    """Names what was measured on this machine with this model, precision and number of threads."""
    threads = getattr(decoder, "threads", 0)
    what = (*more, _machine(), name, decoder.config.num_layers, decoder.config.hidden_size, decoder.config.vocab_size,
            decoder.precision, decoder.device.type, threads)  # fmt: skip
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


def _read(path: Path) -> StepCosts:
    stored = json.loads(path.read_text())
    return StepCosts(
        tuple(int(n) for n in stored["rows"]),
        tuple(int(n) for n in stored["contexts"]),
        np.array(stored["seconds"], dtype=np.float32),
    )


def _write(path: Path, costs: StepCosts) -> None:
    """Whole or not at all. A cache that cannot be written is no error: the next start measures again."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}.part")
        text = json.dumps({"rows": costs.rows, "contexts": costs.contexts, "seconds": costs.seconds.tolist()})
        part.write_text(text)
        part.replace(path)
    except OSError:
        pass
