"""The text of one output as it comes, cut before stop strings. Pure Python."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol


class Detokenizer(Protocol):
    """Text from tokens, piece by piece; holds back characters whose bytes are incomplete."""

    def add(self, ids: Iterable[int]) -> str:
        """The text that has become certain with these tokens."""

    def finish(self) -> str:
        """What was held back."""


class TextStream:
    """Text that could still become a stop string is held back. The text, and the token that completes a stop
    string, are the same however the tokens are cut into steps. In the first `min_tokens` tokens none is looked for.
    """

    def __init__(self, detokenizer: Detokenizer, stops: tuple[str, ...] = (), min_tokens: int = 0) -> None:
        self._detokenizer, self._stops, self._before = detokenizer, stops, min_tokens
        self._held = ""
        self._parts: list[str] = []
        self.stopped = False
        self.stopped_by: str | None = None  # the stop string that did

    @property
    def text(self) -> str:
        """All text given out so far."""
        return "".join(self._parts)

    def push(self, tokens: Sequence[int]) -> tuple[str, int]:
        """Add tokens. Returns the text that is safe to show, and how many of the tokens were used.

        Fewer than all are used when a stop string completes; then `stopped` is set.
        """
        if not self._stops:
            return self._emit(self._detokenizer.add(tokens)), len(tokens)
        shown = []
        for used, token in enumerate(tokens, 1):  # one by one: a step's length must not decide where it ends
            new = self._detokenizer.add((token,))
            self._before -= 1
            shown.append(self._emit(new) if self._before >= 0 else self._search(new))
            if self.stopped:
                return "".join(shown), used
        return "".join(shown), len(tokens)

    def flush(self) -> str:
        """The output is over: give out what was held back."""
        if self.stopped:
            return ""
        text, self._held = self._held + self._detokenizer.finish(), ""
        cut = self._first_stop(text)
        self.stopped = cut is not None
        return self._emit(text[:cut])

    def _search(self, new: str) -> str:
        text = self._held + new
        cut = self._first_stop(text)
        if cut is not None:
            self.stopped, self._held = True, ""
            return self._emit(text[:cut])
        safe = len(text) - self._could_begin_stop(text)
        self._held = text[safe:]
        return self._emit(text[:safe])

    def _first_stop(self, text: str) -> int | None:
        found = [(at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if not found:
            return None
        at, self.stopped_by = min(found)
        return at

    def _could_begin_stop(self, text: str) -> int:
        """Length of the longest end of `text` that begins some stop string."""
        longest = 0
        for stop in self._stops:
            for size in range(min(len(stop) - 1, len(text)), longest, -1):
                if text.endswith(stop[:size]):
                    longest = size
                    break
        return longest

    def _emit(self, text: str) -> str:
        if text:
            self._parts.append(text)
        return text
