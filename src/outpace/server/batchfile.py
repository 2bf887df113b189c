"""Batch files in OpenAI's format, and a journal of answers that survives a kill at any moment. No model, no HTTP.

A line of the output carries in its `id` the digest of the whole input, a digest of each setting that answers depend
on, and the number of its line in the input. So the output alone says what is done, and an answer is never taken for
that of another file or of other settings. A line is written by one call and counts from its newline on; what a kill
left of a line is cut off at the next start.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from array import array
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ParameterError

URLS = ("/v1/chat/completions", "/v1/completions")
LINE_BYTES = 8 << 20  # the longest line that is read, as the longest body that the server takes
CUSTOM_ID_CHARACTERS = 512
SYNC_S = 1.0  # what is older than that is safe from a power cut too; a kill loses nothing that was written
_SETTING_BYTES = 2  # of the digest of one setting
_ID = re.compile(r"batch_req_([0-9a-f]{16})((?:[0-9a-f]{4})+)_([1-9][0-9]*)")
_FIELDS = {"custom_id", "method", "url", "body"}


class BatchFileError(ParameterError):
    """A batch cannot begin or go on: the files do not belong together, or cannot be read or written."""


class BadLine(Exception):
    """A line of the input that is no request."""

    def __init__(self, code: str, message: str, custom_id: str | None = None) -> None:
        super().__init__(message)
        self.code, self.custom_id = code, custom_id


@dataclass(frozen=True, slots=True, eq=False)
class BatchLine:
    """A request of the input. `number`: its line, from 1. The body is not checked yet."""

    number: int
    custom_id: str
    url: str
    body: dict[str, Any]


class BatchInput:
    """The requests of a file, read again from disk when they are wanted: a million lines take 24 MB here.

    Blank lines are no requests. Raises BatchFileError if the file cannot be read or has no request.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file: IO[bytes] = path.open("rb")
        except OSError as error:
            raise BatchFileError(f"the input {str(path)!r} cannot be read: {error.strerror}") from None
        self._starts = array("q")  # where each request begins
        self._numbers = array("q")  # its line
        self._first_of: dict[int, int] = {}  # a request whose custom_id came before -> the number of that line
        self._place_of: dict[int, int] | None = None
        try:
            self.digest = self._scan()
        except OSError as error:
            raise BatchFileError(f"the input {str(path)!r} cannot be read: {error.strerror}") from None
        if not len(self):
            raise BatchFileError(
                f"the input {str(path)!r} has no lines; one request is a line such as "
                '{"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": [...]}}'
            )

    def __len__(self) -> int:
        return len(self._starts)

    def number(self, place: int) -> int:
        """The line of a request; `place` counts requests from 0."""
        return self._numbers[place]

    def place(self, number: int) -> int | None:
        """The request in a line; None if there is none."""
        at = int(np.searchsorted(np.frombuffer(self._numbers, dtype=np.int64), number))
        return at if at < len(self) and self._numbers[at] == number else None

    def read(self, place: int) -> BatchLine:
        """Raises BadLine with the reason."""
        self._file.seek(self._starts[place])
        raw = self._file.readline(LINE_BYTES + 1)
        line = parse_line(raw, self._numbers[place])
        if place in self._first_of:
            first = self._first_of[place]
            message = f"custom_id {_short(line.custom_id)} was used by line {first} already: give every line its own"
            raise BadLine("duplicate_custom_id", message, line.custom_id)
        return line

    def close(self) -> None:
        self._file.close()

    def _scan(self) -> str:
        """Find the lines and the custom_ids that come twice; returns the digest of the whole file."""
        digest = hashlib.blake2b(digest_size=8)
        keys = bytearray()  # 16 bytes of each request, all zero for what has no custom_id
        for number, start, raw in self._lines(digest):
            if len(raw) <= LINE_BYTES and not raw.strip():
                continue
            self._starts.append(start)
            self._numbers.append(number)
            try:
                name = parse_line(raw, number).custom_id
                keys += hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=15).digest() + b"\1"
            except BadLine:
                keys += bytes(16)
        named = np.frombuffer(bytes(keys), dtype="S16")
        _, first, which = np.unique(named, return_index=True, return_inverse=True)
        again = np.flatnonzero((first[which] != np.arange(len(named))) & (named != b""))
        self._first_of = {int(i): self._numbers[int(first[which[i]])] for i in again}
        return digest.hexdigest()

    def _lines(self, digest: Any) -> Iterator[tuple[int, int, bytes]]:
        """(number, where it starts, at most LINE_BYTES + 1 bytes of it) of every line."""
        number, start = 0, 0
        while raw := self._file.readline(LINE_BYTES + 1):
            number += 1
            digest.update(raw)
            size, rest = len(raw), raw
            while len(rest) > LINE_BYTES and not rest.endswith(b"\n"):  # too long: read over what is left
                rest = self._file.readline(LINE_BYTES + 1)
                digest.update(rest)
                size += len(rest)
            yield number, start, raw
            start += size


def parse_line(raw: bytes, number: int) -> BatchLine:
    """Raises BadLine for anything but a request in the batch format."""
    if len(raw) > LINE_BYTES:
        raise BadLine("line_too_long", f"line {number} is longer than {LINE_BYTES >> 20} MiB")
    try:
        found = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise BadLine("invalid_json", f"line {number} is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise BadLine("invalid_json", f"line {number} is not a JSON object")
    custom_id = found.get("custom_id")
    if not isinstance(custom_id, str) or not 1 <= len(custom_id) <= CUSTOM_ID_CHARACTERS:
        raise BadLine(
            "missing_custom_id", f"line {number}: custom_id must be text of 1 to {CUSTOM_ID_CHARACTERS} characters"
        )
    if unknown := sorted(found.keys() - _FIELDS):
        allowed = ", ".join(sorted(_FIELDS))
        raise BadLine("unknown_field", f"line {number}: unknown field {unknown[0]!r}; there are {allowed}", custom_id)
    if found.get("method") != "POST":
        raise BadLine("invalid_method", f"line {number}: method must be POST", custom_id)
    if found.get("url") not in URLS:
        raise BadLine(
            "invalid_url", f"line {number}: url {_short(found.get('url'))} must be {' or '.join(URLS)}", custom_id
        )
    if not isinstance(found.get("body"), dict):
        raise BadLine("invalid_body", f"line {number}: body must be a JSON object", custom_id)
    return BatchLine(number, custom_id, found["url"], found["body"])


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


class Journal:
    """The output file: what is in it already, and lines to come. One process at a time.

    Opening it reads what an earlier run left, cuts off a line that was torn, and says what is done. Raises
    BatchFileError if the file belongs to another input, to other settings, or to nobody, if another process writes it,
    or if it cannot be written.
    """

    def __init__(self, path: Path, source: BatchInput) -> None:
        self.path, self._source = path, source
        if path.exists() and path.samefile(source.path):
            raise BatchFileError("input and output are the same file: name another output")
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
        except OSError as error:
            raise BatchFileError(f"the output {str(path)!r} cannot be written: {error.strerror}") from None
        self.done: NDArray[np.bool_] = np.zeros(len(source), dtype=np.bool_)
        self.failed = 0
        self.cut = 0  # bytes of a torn line
        self._starts = array("q", bytes(8 * len(source)))  # where each answer begins
        self._settings: str | None = None  # digests of what answers are made with
        self._found: str | None = None  # the same of those that are in the file
        self._end, self._synced = 0, time.monotonic()
        try:
            self._lock()
            self._recover()
        except BaseException:
            os.close(self._fd)
            raise

    @property
    def found(self) -> int:
        """Requests that are done."""
        return int(self.done.sum())

    def settle(self, settings: Mapping[str, object]) -> None:
        """Say what answers are made with, everything that changes one, by name and always in the same order: answers of
        two settings never get into one file, and a file that is complete with others is not taken for complete."""
        self._settings = "".join(
            hashlib.blake2b(repr(value).encode(), digest_size=_SETTING_BYTES).hexdigest() for value in settings.values()
        )
        if self._found in (None, self._settings):
            return
        where = f"the output {str(self.path)!r} was begun with"
        if len(self._found) != len(self._settings):
            raise BatchFileError(f"{where} another version of Outpace, whose answers may differ: name another output")
        size = 2 * _SETTING_BYTES
        changed = [
            f"{name} (now {_short(value)})"
            for i, (name, value) in enumerate(settings.items())
            if self._found[i * size : (i + 1) * size] != self._settings[i * size : (i + 1) * size]
        ]
        raise BatchFileError(
            f"{where} another {', another '.join(changed)}: go on with what it was begun with, or name another output"
        )

    def id(self, place: int) -> str:
        assert self._settings is not None, "settle first"
        return f"batch_req_{self._source.digest}{self._settings}_{self._source.number(place)}"

    def answer(self, place: int, custom_id: str, status: int, body: dict[str, Any]) -> None:
        """Append the answer to a request; one that is an error has its reason in `error` too."""
        id = self.id(place)
        response = {"status_code": status, "request_id": id.removeprefix("batch_"), "body": body}
        told = body.get("error") if status != 200 else None
        error = None if told is None else {"code": told.get("code") or str(status), "message": told["message"]}
        self._append(place, {"id": id, "custom_id": custom_id, "response": response, "error": error})

    def refuse(self, place: int, bad: BadLine) -> None:
        """Append that a line is no request."""
        error = {"code": bad.code, "message": str(bad), "line": self._source.number(place)}
        self._append(place, {"id": self.id(place), "custom_id": bad.custom_id, "response": None, "error": error})

    def sync(self) -> None:
        os.fsync(self._fd)
        self._synced = time.monotonic()

    def close(self) -> None:
        """Safe to call twice."""
        if self._fd >= 0:
            with suppress(OSError):
                os.fsync(self._fd)
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def sort(self) -> None:
        """Put the answers into the order of the input: written beside the file, then in its place."""
        assert self.done.all()
        if all(a < b for a, b in zip(self._starts, self._starts[1:], strict=False)):
            return
        beside = self.path.with_name(self.path.name + ".sorted")
        try:
            with os.fdopen(os.dup(self._fd), "rb") as source, beside.open("wb") as target:
                for start in self._starts:
                    source.seek(start)
                    target.write(source.readline())
                target.flush()
                os.fsync(target.fileno())
            os.replace(beside, self.path)
        except OSError as error:
            with suppress(OSError):
                beside.unlink()
            raise BatchFileError(
                f"{str(self.path)!r} is complete but cannot be sorted: {error.strerror}; "
                "the same command tries it again"
            ) from None

    # -- inside ------------------------------------------------------------------------------------------------

    def _append(self, place: int, record: dict[str, Any]) -> None:
        assert not self.done[place], "a request was answered twice"
        data = _dumped(record) + b"\n"
        try:
            left = memoryview(data)
            while left:  # one call, but for a disk that is full or a signal
                left = left[os.pwrite(self._fd, left, self._end + len(data) - len(left)) :]
            if time.monotonic() - self._synced > SYNC_S:
                self.sync()
        except OSError as error:
            raise BatchFileError(
                f"the output {str(self.path)!r} cannot be written: {error.strerror}; "
                "nothing that is in it is lost: the same command goes on from there"
            ) from None
        self._starts[place] = self._end
        self._end += len(data)
        self.done[place] = True
        self.failed += record["error"] is not None

    def _lock(self) -> None:
        try:
            import fcntl
        except ImportError:  # no such locks on this system
            return
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BatchFileError(f"another process writes the output {str(self.path)!r}: wait for it to end") from None

    def _recover(self) -> None:
        with os.fdopen(os.dup(self._fd), "rb") as file:
            file.seek(0)
            size = os.fstat(self._fd).st_size
            for number, raw in enumerate(iter(file.readline, b""), 1):
                last = self._end + len(raw) == size
                record = _parsed(raw) if raw.endswith(b"\n") else None
                if record is None and last and (number > 1 or self._begins_as_ours(raw)):
                    break
                self._take(number, record)
                self._end += len(raw)
        self.cut = size - self._end
        if self.cut:
            os.ftruncate(self._fd, self._end)

    def _begins_as_ours(self, raw: bytes) -> bool:
        """Whether a lone line without end can be what a kill left of our first one: another's file is never cut."""
        start = f'{{"id":"batch_req_{self._source.digest}'.encode()
        return raw.startswith(start[: len(raw)])

    def _take(self, number: int, record: Any) -> None:
        """Note a line of the file as done."""
        where = f"the output {str(self.path)!r}"
        match = _ID.fullmatch(str(record.get("id"))) if isinstance(record, dict) else None
        if match is None or "error" not in record:
            raise BatchFileError(f"{where} has something else than answers of a batch in line {number}: name another")
        if match[1] != self._source.digest:
            raise BatchFileError(
                f"{where} has answers to another input than {str(self._source.path)!r} is now: bring back the input as "
                "it was, or name another output"
            )
        place = self._source.place(int(match[3]))
        if self._found not in (None, match[2]) or place is None or self.done[place]:
            raise BatchFileError(f"{where} was changed: its line {number} cannot stand beside the others; name another")
        self._found = match[2]
        self.done[place] = True
        self._starts[place] = self._end
        self.failed += record["error"] is not None


def _parsed(raw: bytes) -> Any:
    try:
        return json.loads(raw)
    except (ValueError, RecursionError):
        return None


def _dumped(value: Any) -> bytes:
    """JSON in UTF-8, in one line. Half characters, which a custom_id may name, are written as escapes."""
    try:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError:
        return json.dumps(value, separators=(",", ":")).encode()
