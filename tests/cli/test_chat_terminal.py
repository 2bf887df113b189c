"""`outpace chat` on a real terminal: Ctrl-C, several lines, pasting, history, Ctrl-D."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import stat
import struct
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("toy_command.py")
CTRL_C, CTRL_D, UP, ENTER = "\x03", "\x04", "\x1b[A", "\r"
WAIT_S = 60.0  # a loaded machine is slow to start
_CODES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b\][^\x07]*\x07|\x1b[=>()][A-Z0-9]?|\r")


class Terminal:
    """A process with a terminal of its own."""

    def __init__(self, *args: str, **environment: str) -> None:
        self.pid, self._fd = pty.fork()
        if self.pid == 0:
            os.environ |= environment | {"TERM": "xterm", "COLUMNS": "100", "LINES": "40", "PROMPT_TOOLKIT_NO_CPR": "1"}
            os.execv(sys.executable, [sys.executable, str(SCRIPT), *args, "--method", "suffix"])
        fcntl.ioctl(self._fd, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
        self.seen = ""

    def until(self, text: str) -> str:
        """Read until `text` has come; returns what came, without control codes, up to its end."""
        deadline = time.monotonic() + WAIT_S
        while text not in self.seen:
            if not self._read(deadline - time.monotonic()):
                raise AssertionError(f"{text!r} did not come; there was: {self.seen[-2000:]!r}")
        at = self.seen.index(text) + len(text)
        came, self.seen = self.seen[:at], self.seen[at:]
        return came

    def quiet(self, seconds: float) -> str:
        """What comes within some time."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0 and self._read(left):
            pass
        came, self.seen = self.seen, ""
        return came

    def type(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def ended(self) -> int:
        """Exit code."""
        deadline = time.monotonic() + WAIT_S
        while time.monotonic() < deadline:
            self._read(0.05)
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.pid = 0
                return os.waitstatus_to_exitcode(status)
        raise AssertionError("it did not end")

    def close(self) -> None:
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self._fd)

    def _read(self, timeout: float) -> bool:
        if timeout <= 0 or not select.select([self._fd], [], [], timeout)[0]:
            return False
        try:
            data = os.read(self._fd, 65536)
        except OSError:  # the other side is closed
            return False
        self.seen = _CODES.sub("", self.seen + data.decode("utf-8", "replace"))
        return bool(data)


@pytest.fixture
def terminals() -> Iterator[list[Terminal]]:
    opened: list[Terminal] = []
    yield opened
    for one in opened:
        one.close()


def test_an_evening_at_the_terminal(terminals: list[Terminal], tmp_path: Path) -> None:
    first = Terminal("chat", "--temperature", "0", "--seed", "1", TOY_STEP_S="0.02")
    terminals.append(first)
    assert "Ctrl-D leaves" in first.until("Ctrl-D leaves")
    first.until(">")

    first.type("hello" + ENTER)  # an answer goes on until the context is full, which is never awaited here
    first.until("hello")
    time.sleep(1.0)
    first.type(CTRL_C)
    first.until("(stopped)\n")
    after = first.quiet(1.5)
    assert ">" in after and not after.replace(">", "").strip(" \n\x08"), f"there was more after (stopped): {after!r}"

    first.type("/set max_tokens 5" + ENTER)
    first.until("(max_tokens: 5)")
    first.type('"""one' + ENTER)
    first.until("\n.")
    first.type('two"""' + ENTER)
    first.until("(cut after 5 tokens; /set max_tokens 10 allows more)")
    first.until(">")
    first.type("three \\" + ENTER)
    first.until("\n.")
    first.type("four" + ENTER)
    first.until("cut after 5 tokens")
    first.until(">")
    first.type("\x1b[200~five\nsix\x1b[201~" + ENTER)  # pasted
    first.until("cut after 5 tokens")
    first.until(">")
    saved = tmp_path / "talk.json"
    first.type(f"/save {saved}" + ENTER)
    first.until("(saved to")
    text = saved.read_text()
    assert '"one\\ntwo"' in text and '"three \\nfour"' in text and '"five\\nsix"' in text
    first.type("/clr" + ENTER)
    first.until("no command /clr; did you mean '/clear'?")
    first.type(CTRL_C)  # while the editor is being set up: not lost, and nothing of Python's is shown
    assert "Error" not in first.until("Ctrl-D or /exit leaves") + first.until(">")
    assert "Error" not in first.quiet(0.5)
    first.type(CTRL_D)
    assert first.ended() == 0

    state = tmp_path / "state" / "outpace"
    for name in ("chat-history", "last-conversation.json"):
        assert stat.S_IMODE((state / name).stat().st_mode) == 0o600
    assert stat.S_IMODE(state.stat().st_mode) == 0o700

    second = Terminal("chat", "--continue", "-n", "3")
    terminals.append(second)
    second.until("Going on with a conversation of 4 questions.")
    second.until(">")
    second.type(UP * 2)  # over sessions: the last but one line that was typed
    second.until(f"/save {saved}")
    second.type(CTRL_C)
    second.until("leaves)")
    second.type("/exit" + ENTER)
    assert second.ended() == 0


def test_nothing_is_kept_where_that_is_not_wanted(terminals: list[Terminal], tmp_path: Path) -> None:
    one = Terminal("chat", "--no-history", "-n", "3")
    terminals.append(one)
    one.until(">")
    one.type("hello" + ENTER)
    one.until("cut after 3 tokens")
    one.until(">")
    one.type(CTRL_D)
    assert one.ended() == 0
    assert not (tmp_path / "state").exists()
