"""What is typed in `outpace chat`: a line editor with a history on a terminal, plain lines from a pipe."""

from __future__ import annotations

import os
import signal
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from ..paths import state_dir
from .conversation import private_folder

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import History

QUOTES = '"""'
MOST_HISTORY = 1 << 20  # bytes; the older half goes when there are more


class Interrupted(Exception):
    """Ctrl-C while typing: what was typed is dropped."""


class Lines(ABC):
    """Where lines come from. `read` raises EOFError at the end and Interrupted for Ctrl-C."""

    interactive = False

    @abstractmethod
    def read(self, prompt: str) -> str: ...

    @contextmanager
    def held(self) -> Iterator[None]:
        """For the length of a conversation: Ctrl-C that comes while nothing is read waits for the next `read`."""
        yield


class PipedLines(Lines):
    """Without a terminal: no prompt, no history."""

    def read(self, prompt: str) -> str:
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.removesuffix("\n")


class TerminalLines(Lines):
    """Editing, history over sessions (`history` says whether it is kept), completion of commands."""

    interactive = True

    def __init__(self, commands: Sequence[str], history: bool) -> None:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.completion import WordCompleter
        from prompt_toolkit.history import InMemoryHistory

        kept: History = _kept_history() if history else InMemoryHistory()
        completer = WordCompleter(list(commands), sentence=True)
        self._session: PromptSession[str] = PromptSession(
            history=kept, completer=completer, complete_while_typing=False
        )
        self._pressed = False  # Ctrl-C, before the editor listened to it

    def read(self, prompt: str) -> str:
        try:
            return self._session.prompt(prompt, pre_run=self._take_pressed)
        except KeyboardInterrupt:
            raise Interrupted from None

    @contextmanager
    def held(self) -> Iterator[None]:
        # an exception in the middle of the editor's set-up would leave half an event loop, which complains as it goes
        def handler(*_: object) -> None:
            self._pressed = True

        before = signal.signal(signal.SIGINT, handler)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _take_pressed(self) -> None:
        if self._pressed:
            self._pressed = False
            self._session.app.exit(exception=KeyboardInterrupt())


def lines_of_stdin(commands: Sequence[str], history: bool) -> Lines:
    if sys.stdin.isatty() and sys.stdout.isatty():
        return TerminalLines(commands, history)
    return PipedLines()


def read_message(lines: Lines, prompt: str = "> ", more: str = ". ") -> tuple[str, bool]:
    '''One message: a line, lines joined by a backslash at their ends, or all between """ and """; and whether it was
    quoted so, which no command is.

    Pasted lines are one message on a terminal. Raises EOFError and Interrupted as `Lines.read`.
    '''
    line = lines.read(prompt if lines.interactive else "")
    if line.lstrip().startswith(QUOTES):
        return _quoted(lines, line.lstrip()[len(QUOTES) :], more), True
    while line.endswith("\\"):
        try:
            line = line[:-1] + "\n" + lines.read(more)
        except EOFError:
            return line[:-1], False
    return line, False


def _quoted(lines: Lines, text: str, more: str) -> str:
    """What stands before the closing quotes; the end of a pipe closes them too."""
    while QUOTES not in text:
        try:
            text += "\n" + lines.read(more)
        except EOFError:
            if lines.interactive:
                raise
            break
    return text.partition(QUOTES)[0].strip("\n")


def _kept_history() -> History:
    from prompt_toolkit.history import FileHistory

    private_folder(state_dir())
    path = state_dir() / "chat-history"
    with suppress(OSError):  # a file that cannot be written keeps nothing
        os.close(os.open(path, os.O_CREAT | os.O_RDONLY, 0o600))
        os.chmod(path, 0o600)
        _shorten(path)
    return FileHistory(str(path))


def _shorten(path: Path) -> None:
    """Keep the younger half of a history that has grown too long, whole entries alone."""
    if path.stat().st_size <= MOST_HISTORY:
        return
    kept = path.read_bytes()[-MOST_HISTORY // 2 :]
    start = kept.find(b"\n\n# ")
    partial = path.with_suffix(".partial")
    with os.fdopen(os.open(partial, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600), "wb") as file:
        file.write(kept[max(start, 0) :])
    os.replace(partial, path)
