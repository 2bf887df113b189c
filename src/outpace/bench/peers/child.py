"""A child process that answers one line with one line, in a session of its own, so that all of it can be ended."""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from time import monotonic, sleep

LONGEST = 64 << 20  # bytes of a line; more is no answer
_TAIL = 8192  # bytes of what it says beside its answers, kept for the message when it dies
_GRACE_S = 2.0  # to end by itself when its input closes


class Fault(Exception):
    """The child did not answer: it died, was too slow, or wrote something that is no line."""


class Child:
    """Raises Fault when the program cannot be run. `exchange` and `end` are for one thread."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        if not hasattr(os, "killpg"):
            raise Fault("cannot be run here: other engines need the process groups of Linux or macOS")
        try:
            self._process = subprocess.Popen(
                command,
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=dict(environment),
                start_new_session=True,
            )
        except OSError as e:
            raise Fault(f"cannot be run by {command[0]}: {e.strerror}") from e
        assert self._process.stdin and self._process.stdout and self._process.stderr
        self._in, self._out, self._err = (
            pipe.fileno() for pipe in (self._process.stdin, self._process.stdout, self._process.stderr)
        )
        for pipe in (self._in, self._out, self._err):
            os.set_blocking(pipe, False)
        self._read = b""
        self._said = b""
        self._finalizer = weakref.finalize(self, _end, self._process)  # at the latest when the interpreter ends

    @property
    def pid(self) -> int:
        return self._process.pid

    def exchange(self, line: bytes, timeout_s: float) -> bytes:
        """Write a line, read a line. Raises Fault; then the child can only be ended."""
        if self._read:
            raise Fault(f"wrote more than was requested: {_shown(self._read)}")
        deadline = monotonic() + timeout_s
        unsent = memoryview(line + b"\n")
        with selectors.DefaultSelector() as pipes:
            pipes.register(self._in, selectors.EVENT_WRITE)
            pipes.register(self._out, selectors.EVENT_READ)
            pipes.register(self._err, selectors.EVENT_READ)
            while True:
                left = deadline - monotonic()
                if left <= 0:
                    raise Fault(f"gave no answer within {timeout_s:g} s")
                ready = [key.fd for key, _ in pipes.select(min(left, 0.2))]
                if self._err in ready and not self._listen():
                    pipes.unregister(self._err)
                if self._in in ready:
                    unsent = self._send(unsent)
                    if not unsent:
                        pipes.unregister(self._in)
                if self._out in ready:
                    if (answer := self._receive()) is not None:
                        return answer
                elif not ready and self._exited():
                    raise Fault(self._death())

    def _send(self, unsent: memoryview) -> memoryview:
        try:
            return unsent[os.write(self._in, unsent) :]
        except BlockingIOError:
            return unsent
        except BrokenPipeError:
            return unsent[len(unsent) :]  # it no longer listens; whether it lives is seen at its output

    def _receive(self) -> bytes | None:
        """The line, when it is whole."""
        data = os.read(self._out, 1 << 16)
        if not data:
            raise Fault(self._death())
        self._read += data
        if b"\n" in data:
            answer, _, self._read = self._read.partition(b"\n")
            return answer
        if len(self._read) > LONGEST:
            raise Fault(f"wrote {len(self._read)} bytes without an end of line: {_shown(self._read)}")
        return None

    def _listen(self) -> bytes:
        """Keep the end of what it says beside its answers. Empty: nothing more now, or for ever."""
        data = b""
        with suppress(BlockingIOError):
            data = os.read(self._err, 1 << 16)
            self._said = (self._said + data)[-_TAIL:]
        return data

    def _exited(self) -> bool:
        return _exited(self._process)

    def _death(self) -> str:
        """How it ended, as far as it has. Ends what is left of it."""
        until = monotonic() + _GRACE_S
        while not (exited := self._exited()) and monotonic() < until:
            self._listen()
            sleep(0.02)
        while self._listen():
            pass
        said = [line.strip() for line in self._said.decode("utf-8", "replace").splitlines() if line.strip()]
        last = f"; its last words: {said[-1][:300]}" if said else ""
        code = self.end()
        if not exited:
            return f"closed its output without an answer{last}"
        how = f"exit code {code}" if code is None or code >= 0 else f"signal {signal.Signals(-code).name}"
        return f"ended with {how}{last}"

    def end(self) -> int | None:
        """End it and all that it started. Its exit code; negative: the signal that ended it."""
        self._finalizer()
        return self._process.returncode

    def memory_bytes(self) -> int | None:
        """The most that it has held so far."""
        with suppress(OSError, ValueError, IndexError):
            for line in Path(f"/proc/{self.pid}/status").read_text("ascii", "replace").splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
        return None


def _exited(process: subprocess.Popen[bytes]) -> bool:
    """Without reaping, where the system can: as long as it is not reaped, its process group is nobody else's."""
    if not hasattr(os, "waitid"):  # macOS, before Python 3.13
        return process.poll() is not None
    with suppress(ChildProcessError):
        return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    return True


def _end(process: subprocess.Popen[bytes]) -> None:
    """Close its input, wait a moment, kill the group, reap."""
    if process.returncode is not None:
        return
    assert process.stdin and process.stdout and process.stderr
    process.stdin.close()
    until = monotonic() + _GRACE_S
    try:
        while monotonic() < until and not _exited(process):
            sleep(0.01)
    finally:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        process.stderr.close()


def _shown(data: bytes) -> str:
    return repr(data[:80].decode("utf-8", "replace"))
