"""Responses that are kept for later: in SQLite, in memory or in a file, each for its owner alone."""

from __future__ import annotations

import json
import logging
import os
import sqlite3
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import CapacityError, ParameterError

log = logging.getLogger("outpace.server")
_VERSION = 2
_SCHEMA = """
CREATE TABLE IF NOT EXISTS responses (
    id TEXT PRIMARY KEY, account TEXT NOT NULL, owner TEXT NOT NULL, created REAL NOT NULL, bytes INTEGER NOT NULL,
    previous TEXT, input TEXT NOT NULL, response TEXT NOT NULL
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS by_owner ON responses (account, owner, created, bytes);
CREATE INDEX IF NOT EXISTS by_age ON responses (created);
"""
LONGEST_CONVERSATION = 1000  # responses that one leads back to


@dataclass(frozen=True, slots=True)
class StoreLimits:
    """What is kept at most. Beyond it the oldest responses of the key, and of its users, that has most go."""

    entries: int = 100_000
    bytes: int = 256 << 20  # of input and output as JSON
    age_s: float = 30 * 86400.0
    conversation_bytes: int = 8 << 20  # of all responses that one leads back to, itself included


@dataclass(frozen=True, slots=True)
class Kept:
    """A response with the input items that it answered."""

    input: list[dict[str, Any]]
    response: dict[str, Any]


class ResponseStore:
    """Safe to use from several threads. Raises ParameterError if the file cannot be used."""

    def __init__(
        self, file: Path | None = None, limits: StoreLimits | None = None, clock: Callable[[], float] = time.time
    ) -> None:
        self.limits, self._clock = limits or StoreLimits(), clock
        self._lock = threading.Lock()
        try:
            if file is not None:  # what users wrote is for nobody else on this machine
                os.close(os.open(file, os.O_CREAT | os.O_RDWR, 0o600))
                os.chmod(file, 0o600)  # of one that was there, too; its log gets the same
            self._db = sqlite3.connect(file or ":memory:", timeout=1, check_same_thread=False, isolation_level=None)
            self._open()
        except (OSError, sqlite3.Error) as error:
            locked = "locked" in str(error)
            hint = "another server uses it: name another file" if locked else "name another file, or remove this one"
            raise ParameterError(f"--responses-file {str(file)!r} cannot be used: {error}; {hint}") from None

    def _open(self) -> None:
        self._db.execute("PRAGMA locking_mode = EXCLUSIVE")  # one server writes it, which counts what is there
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        if version not in (0, _VERSION):
            raise sqlite3.DatabaseError(f"it is of format {version}, and this version of Outpace writes {_VERSION}")
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = NORMAL")
        self._db.executescript(_SCHEMA)
        self._db.execute(f"PRAGMA user_version = {_VERSION}")
        (self._entries, self._bytes) = self._db.execute("SELECT COUNT(*), TOTAL(bytes) FROM responses").fetchone()

    def __len__(self) -> int:
        """Responses that are not too old."""
        with self._lock:
            return int(
                self._db.execute("SELECT COUNT(*) FROM responses WHERE created >= ?", (self._oldest,)).fetchone()[0]
            )

    def put(self, owner: str, kept: Kept, account: str = "") -> bool:
        """Keep a response under its own id. False if it alone is larger than what may be kept, or if the file cannot
        take it, which the log says. `account`: the same for all owners with one key."""
        given, response = json.dumps(kept.input), json.dumps(kept.response)
        size = len(given) + len(response)
        if size > self.limits.bytes or self.limits.entries < 1:
            return False
        values = (kept.response["id"], account, owner, self._clock(), size, kept.response["previous_response_id"])
        with self._lock:
            try:
                self._expire()
                while self._bytes + size > self.limits.bytes or self._entries + 1 > self.limits.entries:
                    self._evict()
                self._db.execute("INSERT INTO responses VALUES (?, ?, ?, ?, ?, ?, ?, ?)", (*values, given, response))
            except sqlite3.Error as error:  # a disk that is full, for one: the answer itself is none the worse
                log.error("a response could not be kept: %s", error)
                return False
            self._entries += 1
            self._bytes += size
        return True

    def get(self, owner: str, id: str) -> Kept | None:
        with self._lock:
            row = self._db.execute(
                "SELECT input, response FROM responses WHERE id = ? AND owner = ? AND created >= ?",
                (id, owner, self._oldest),
            ).fetchone()
        return None if row is None else Kept(*map(json.loads, row))

    def delete(self, owner: str, id: str) -> bool:
        """Whether there was one."""
        with self._lock:
            return self._remove("id = ? AND owner = ? AND created >= ?", (id, owner, self._oldest))

    def conversation(self, owner: str, id: str) -> list[Kept] | None:
        """The response and those before it, the first one first. None if one of them is gone, or they are too many.
        Raises CapacityError if they have too many bytes, before any of them is read."""
        found: list[str] = []
        at, size = id, 0
        while at is not None:
            with self._lock:
                row = self._db.execute(
                    "SELECT previous, bytes FROM responses WHERE id = ? AND owner = ?", (at, owner)
                ).fetchone()
            if row is None or len(found) == LONGEST_CONVERSATION:
                return None
            found.append(at)
            at, size = row[0], size + row[1]
            if size > self.limits.conversation_bytes:
                raise CapacityError(
                    f"previous_response_id: the conversation has more than {self.limits.conversation_bytes} bytes, "
                    "which is the limit: send what matters of it as input"
                )
        kept = [self.get(owner, id) for id in reversed(found)]
        return None if None in kept else [one for one in kept if one is not None]

    def close(self) -> None:
        with self._lock:
            self._db.close()

    @property
    def _oldest(self) -> float:
        """When what is not too old may have been kept."""
        return self._clock() - self.limits.age_s

    def _expire(self) -> None:
        self._remove("created < ?", (self._oldest,))

    def _evict(self) -> None:
        """The oldest response of the owner who has most bytes, among those of the account that has most: nobody loses
        theirs to another's many, whatever number of owners one key names."""
        account = "SELECT account FROM responses GROUP BY account ORDER BY SUM(bytes) DESC LIMIT 1"
        found = self._db.execute(
            f"SELECT account, owner FROM responses WHERE account = ({account}) "
            "GROUP BY owner ORDER BY SUM(bytes) DESC LIMIT 1"
        ).fetchone()
        oldest = "SELECT id FROM responses WHERE account = ? AND owner = ? ORDER BY created, id LIMIT 1"
        self._remove(f"id = ({oldest})", found)

    def _remove(self, where: str, values: tuple[Any, ...]) -> bool:
        rows = self._db.execute(f"DELETE FROM responses WHERE {where} RETURNING bytes", values).fetchall()
        self._entries -= len(rows)
        self._bytes -= sum(size for (size,) in rows)
        return bool(rows)
