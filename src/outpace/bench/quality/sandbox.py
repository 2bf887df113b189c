"""Runs a Python program that a model wrote, in a process of its own, with limits.

What it holds back: time (wall clock and CPU), memory (address space), the size of files, the number of open files, core
dumps; environment and stdin are empty. Where Linux has the means (`confine`), the program also starts no process and no
other program, sends no signal, opens no socket, writes, makes and removes no file, and reads none but those of Python
and the system's libraries. `Verdict.open` names what could not be shut off.

It is a fence against accidents, not against an enemy of the kernel: for programs that are not trusted use a virtual
machine around the whole command. And the tests run in the program's own process, so one that is written to cheat can
pretend to have passed them.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ...errors import ParameterError

_INSIDE = Path(__file__).with_name("confine.py")


@dataclass(frozen=True, slots=True)
class Limits:
    """Of one program. Raises ParameterError for a limit below 1."""

    seconds: float = 10.0
    memory_mb: int = 1024
    file_mb: int = 8
    open_files: int = 32

    def __post_init__(self) -> None:
        for name in ("seconds", "memory_mb", "file_mb", "open_files"):
            if getattr(self, name) < 1:
                raise ParameterError(f"{name}={getattr(self, name)} is out of range: it must be at least 1")


@dataclass(frozen=True, slots=True)
class Verdict:
    """`passed`: the program came to its end. `why`: what happened otherwise. `open`: what this system could not shut
    off, of "processes", "network" and "files"."""

    passed: bool
    why: str
    open: tuple[str, ...]


@cache
def possible() -> bool:
    """Whether this system has the limits."""
    return os.name == "posix" and sys.platform != "darwin"


def run_program(source: str, limits: Limits | None = None) -> Verdict:
    """Run a program to its end or to a limit. Raises ParameterError on systems without the limits."""
    if not possible():
        raise ParameterError(
            "code is run with limits that only Linux has; run this audit there, or leave HumanEval out"
        )
    limits, done = limits or Limits(), secrets.token_hex(16)
    numbers = (int(limits.seconds) + 1, limits.memory_mb << 20, limits.open_files, limits.file_mb << 20)
    with tempfile.TemporaryDirectory(prefix="outpace-", ignore_cleanup_errors=True) as folder:
        path, out = Path(folder) / "program.py", Path(folder) / "output"
        path.write_text(source, "utf-8", errors="replace")
        with out.open("wb") as sink:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(_INSIDE), *map(str, numbers), str(path), done],
                cwd=folder,
                env={"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"},
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            code: int | None = process.wait(limits.seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        said = out.read_bytes() if out.is_file() else b""
    head, _, rest = said.partition(b"] ")
    if not head.startswith(b"["):
        return Verdict(False, f"it did not begin: {said.decode(errors='replace').strip()[-300:]}", ())
    left = tuple(head[1:].decode().split())
    if code is None:
        return Verdict(False, f"it took more than {limits.seconds:g} s", left)
    if code == 0:
        whole = rest.endswith(done.encode())
        return Verdict(whole, "" if whole else "it ended before its tests were through", left)
    lines = rest.decode(errors="replace").strip().splitlines()
    killed = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
    return Verdict(False, lines[-1][:300] if lines else killed, left)
