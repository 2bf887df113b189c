"""Measurements that are kept beside the models: JSON with a digest. What is damaged is found and said in one line; the
caller measures anew."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

MOST_BYTES = 1 << 20


def read_kept(path: Path, what: str) -> dict[str, Any] | None:
    """What `write_kept` wrote; None if there is nothing, or nothing whole, which is said on stderr."""
    try:
        with path.open("rb") as file:
            raw = file.read(MOST_BYTES + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        say_damaged(what, error.strerror or str(error))
        return None
    try:
        if len(raw) > MOST_BYTES:
            raise ValueError("too large")
        stored = json.loads(raw, parse_constant=_refused)
        if not isinstance(stored, dict) or not isinstance(stored.get("kept"), dict):
            raise ValueError("not what was written there")
        if stored.get("digest") != _digest(stored["kept"]):
            raise ValueError("its digest is another")
    except (ValueError, RecursionError) as error:
        say_damaged(what, "it is nested too deeply" if isinstance(error, RecursionError) else str(error))
        return None
    kept: dict[str, Any] = stored["kept"]
    return kept


def write_kept(path: Path, value: dict[str, Any]) -> None:
    """Whole or not at all. A cache that cannot be written is no error: the next start measures again."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}.part")
        part.write_text(json.dumps({"digest": _digest(value), "kept": value}), "utf-8")
        part.replace(path)
    except OSError:
        pass


def say_damaged(what: str, why: str) -> None:
    print(f"the {what} that were kept are damaged ({why}): measured anew", file=sys.stderr)


def _refused(name: str) -> float:
    raise ValueError(f"{name} is no time")


def _digest(value: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]
