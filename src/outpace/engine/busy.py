"""Whether something else kept the machine busy while something was timed: such times are not worth keeping.

What tells most is how long our own threads were ready to run and had no core (Linux counts it for each thread, in
`/proc/self/task/*/schedstat`). Where that is not counted, it is what others used of the cores (`/proc/stat`). A machine
that says neither is taken to be idle.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

MOST_WAITING = 0.1  # share of the time that our threads may wait for a core on an idle machine
SPARE_CORES = 0.25  # that others may use of those that we run on
_TASKS, _STAT = Path("/proc/self/task"), Path("/proc/stat")


@dataclass(slots=True)
class Load:
    """`waited`: share of the time that one of our threads was ready and had no core, all threads together. `others`:
    cores that other processes used, on average, of `cores`. None: not known."""

    cores: int
    threads: int
    waited: float | None = None
    others: float | None = None

    @property
    def busy(self) -> bool:
        if self.waited is not None:
            return self.waited > MOST_WAITING * self.threads
        return self.others is not None and self.others > max(self.cores - self.threads, 0) + SPARE_CORES

    def __str__(self) -> str:
        """Why it is called busy."""
        told = []
        if self.others is not None:
            told.append(f"others used {self.others:.1f} of {self.cores} cores")
        if self.waited is not None:
            told.append(f"waited {self.waited:.1f} s for a core in each second")
        return ", ".join(told)


@contextmanager
def watched(threads: int) -> Iterator[Load]:
    """What is filled in when the block ends. `threads`: how many compute."""
    load = Load(os.cpu_count() or 1, max(threads, 1))
    began, waited, used, own = perf_counter(), _waited_s(), _used_s(), _own_s()
    try:
        yield load
    finally:
        seconds = max(perf_counter() - began, 1e-6)
        if waited is not None and (now := _waited_s()) is not None:
            load.waited = max(now - waited, 0.0) / seconds
        if used is not None and (now := _used_s()) is not None:
            load.others = max(now - used - (_own_s() - own), 0.0) / seconds


def _own_s() -> float:
    times = os.times()
    return times.user + times.system


def _waited_s() -> float | None:
    """Seconds that our threads were ready to run and had no core, so far."""
    total, known = 0, False
    try:
        for task in _TASKS.iterdir():
            try:
                total += int((task / "schedstat").read_text().split()[1])
                known = True
            except FileNotFoundError:
                continue  # the thread has ended, or the system does not count
    except (OSError, ValueError, IndexError):
        return None
    return total / 1e9 if known else None


def _used_s() -> float | None:
    """Core seconds that everybody used so far, and that a host took away."""
    try:
        user, nice, system, _idle, _iowait, irq, softirq, steal = map(
            int, _STAT.read_text().split("\n")[0].split()[1:9]
        )
        return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError):
        return None
