"""The files of packed weights that lie beside models on this machine: how large, how old, and which can go."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from . import packed_file
from .digests import forget_checked, last_used
from .prepared import PreparedFolder, folder_of, prepared_folders

UNUSED_DAYS = 30


@dataclass(frozen=True, slots=True)
class Copy:
    """`used`: when it was last read or written, in seconds since the epoch; `reason`: why it can go, or ""."""

    model: str
    precision: str
    path: Path
    size: int
    used: float
    reason: str

    @property
    def days(self) -> int:
        """Since it was last used."""
        return int(max(0.0, time.time() - self.used) // 86400)


def copies() -> list[Copy]:
    """All of them, by model and precision."""
    return [copy for folder in prepared_folders() for copy in _of(folder)]


def prune() -> list[Copy]:
    """Remove those that can go, and say which they were."""
    gone = []
    for copy in copies():
        if copy.reason:
            with suppress(OSError):
                copy.path.unlink()
                gone.append(copy)
            forget_checked(copy.path)
    return gone


def _of(entry: PreparedFolder) -> Iterator[Copy]:
    folder, old = folder_of(entry), set(packed_file.old_files(folder_of(entry)))
    model_is_gone = bool(entry.path) and not Path(entry.path).exists()
    for path in sorted([*folder.glob("weights-*.bin"), *folder.glob("weights-*.partial")]):
        try:
            size, used = path.stat().st_size, last_used(path)
        except OSError:  # just removed
            continue
        if path.suffix == ".partial" and packed_file.is_being_written(path):
            continue
        found = re.match(r"weights-(\w+)-v\d+\.", path.name)
        copy = Copy(entry.model or entry.key, found[1] if found else "?", path, size, used, "")
        reasons = {
            "its writer was stopped": path.suffix == ".partial",
            "of an earlier version": path in old,
            "its model is gone": model_is_gone,
            f"not used for {copy.days} days": copy.days > UNUSED_DAYS,
        }
        yield replace(copy, reason=next((reason for reason, holds in reasons.items() if holds), ""))
