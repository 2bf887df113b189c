"""Runs a Python program that a model wrote, in a process of its own, with limits.

What it holds back (Linux): time (CPU and wall clock; the whole process group is killed), memory (address space), the
size of files, the number of open files, core dumps; environment and stdin are empty, the working folder is a temporary
one that is deleted; where the system allows it, the process has a network namespace without any interface.

What it does NOT protect from: the program runs as the same user on the same file system, so it can read, change and
delete whatever that user can. Where no namespace can be made (`Verdict.network` says so) it can use the network. A
process that starts a session of its own outlives the kill of its group until its CPU time is spent. For programs that
are not trusted use a container or a virtual machine around the whole command.
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

# Runs the program, in its process. Its first word tells whether the network is shut off, its last one that the program
# came to its end: an exit code of 0 alone may be the program's own.
_AROUND = """
import ctypes, os, resource, sys
cpu, memory, files, size = (int(x) for x in sys.argv[1:5])
path, done = sys.argv[5:7]
NEW_USER, NEW_NET = 0x10000000, 0x40000000
libc = ctypes.CDLL(None)
shut = not libc.unshare(NEW_USER | NEW_NET) or not libc.unshare(NEW_NET)
def limit(what, value):
    most = resource.getrlimit(what)[1]
    value = value if most == resource.RLIM_INFINITY else min(value, most)
    resource.setrlimit(what, (value, value))
limit(resource.RLIMIT_CPU, cpu)
limit(resource.RLIMIT_AS, memory)
limit(resource.RLIMIT_NOFILE, files)
limit(resource.RLIMIT_FSIZE, size)
limit(resource.RLIMIT_NPROC, 0)
limit(resource.RLIMIT_CORE, 0)
os.write(1, b"shut " if shut else b"open ")
sys.argv = [path]
with open(path, encoding="utf-8") as file:
    source = file.read()
exec(compile(source, "program.py", "exec"), {"__name__": "__main__"})
sys.stdout.flush()
os.write(1, done.encode())
"""


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
    """`passed`: the program came to its end. `why`: what happened otherwise; `network`: whether it
    could have used the network."""

    passed: bool
    why: str
    network: bool


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
                [sys.executable, "-I", "-S", "-c", _AROUND, *map(str, numbers), str(path), done],
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
    network = not said.startswith(b"shut ")
    if code is None:
        return Verdict(False, f"it took more than {limits.seconds:g} s", network)
    if code == 0:
        whole = said.endswith(done.encode())
        return Verdict(whole, "" if whole else "it ended before its tests were through", network)
    lines = said[5:].decode(errors="replace").strip().splitlines()
    killed = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
    return Verdict(False, lines[-1][:300] if lines else killed, network)
