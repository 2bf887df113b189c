"""A program that a user built: which options it has, by its own help; its version; how it ended. Python alone.

Builds of llama.cpp and of what was made from it differ in their options, so nothing is passed that the help does not
list.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
from collections.abc import Iterable, Sequence
from typing import Any

from peer_loop import Refused

_OPTION = re.compile(r"(?<![\w-])--?[a-zA-Z][\w-]*")
_FOLDERS = re.compile(r"(?<![\w.])~?/(?:[^\s/'\"]+/)+")  # of a path that begins at the root or at home; no spaces
_HELP_S = 30.0  # to say its help or version; a large build on a slow disk needs some
_LINES, _LINE = 4, 160  # of what it said last, and characters of one of them

Own = tuple[tuple[str, ...], Any]  # the names of an option, and its value; None: it has none


class Program:
    """Raises Refused when it cannot be run, or shows no help."""

    def __init__(self, path: str, arguments: Sequence[str]) -> None:
        self.path, self.arguments = path, list(arguments)
        self.name = os.path.basename(path)
        self._paths = [path]  # whose folders are the user's own business
        self.help = self._said("--help")
        self.options = frozenset(_OPTION.findall(self.help))

    def has(self, *names: str) -> bool:
        """Whether its help lists one of an option's names."""
        return not self.options.isdisjoint(names)

    def offers(self, option: str, *values: str) -> str | None:
        """The first of these values that the help names behind an option."""
        _, _, after = self.help.partition(option)
        named = re.findall(r"[\w-]+", after[:1000])
        return next((value for value in values if value in named), None)

    def command(self, own: Iterable[Own]) -> list[str]:
        """With our options as far as it has them and the user did not write them; then those of the user."""
        words = [self.path]
        for names, value in own:
            known = [name for name in names if name in self.options]
            if known and not self.given(*names):
                words += [known[0]] if value is None else [known[0], str(value)]
        words += self.arguments
        self._paths += [path for word in words if os.path.isabs(path := word.rpartition("=")[2])]
        return words

    def given(self, *names: str) -> bool:
        """Whether the user wrote an option himself."""
        return any(word.partition("=")[0] in names for word in self.arguments)

    def shown(self, command: Sequence[str]) -> str:
        """A command's arguments, files by their names alone."""
        return shlex.join(
            head + equals + (os.path.basename(last) if last.startswith(("/", "~")) else last)
            for head, equals, last in (word.rpartition("=") for word in command[1:])
        )

    def version(self) -> str | None:
        """The line that says it, where there is one."""
        if not self.has("--version"):
            return None
        lines = self._said("--version").splitlines()
        return next((line.strip()[:_LINE] for line in lines if "version" in line.lower()), None)

    def _said(self, option: str) -> str:
        try:
            done = subprocess.run(
                [self.path, option],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=_HELP_S,
            )
        except subprocess.TimeoutExpired:
            raise Refused(f"{self.name} {option} did not end within {_HELP_S:g} s: is it a llama-server?") from None
        except OSError as error:
            raise Refused(f"{self.name} cannot be run: {error.strerror}") from None
        text = done.stdout.decode("utf-8", "replace")
        if done.returncode < 0 or done.returncode > 125:  # a signal; or it was not found, or its libraries were not
            raise Refused(f"{self.name} {option} {self.ended(done.returncode, text.splitlines())}")
        return text

    def ended(self, code: int, said: Iterable[str]) -> str:
        """How it ended and what it said last, in one line; of paths only the last part."""
        how = f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"
        last = [self._public(line)[:_LINE] for line in said if line.strip()][-_LINES:]
        return f"ended with {how}" + (f"; its last words: {' / '.join(last)}" if last else "")

    def _public(self, line: str) -> str:
        for path in sorted(self._paths, key=len, reverse=True):
            line = line.replace(path, os.path.basename(path))
        return " ".join(_FOLDERS.sub("", line).split())
