"""Digests of packed weights, and when they are checked.

Each tensor has one, over its name, type, shape and bytes. They are checked when a file is first used after the machine
has started, with a stamp beside the file that says so, and whenever somebody asks (`outpace models --verify`). A stamp
is of one start of the machine and of one file: what has come to the memory or the disk since is looked for again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_THREADS = 4  # hashing lets others run; more would only wait for the memory


def new_digest(name: str, tensor: NDArray[Any]) -> Any:
    """A hash that a tensor's bytes are still to be added to."""
    return hashlib.blake2b(f"{name} {tensor.dtype.str} {tensor.shape}\0".encode(), digest_size=16)


def digest(name: str, tensor: NDArray[Any]) -> str:
    """1.4 GB/s on one core."""
    h = new_digest(name, tensor)
    h.update(memoryview(np.ascontiguousarray(tensor)).cast("B") if tensor.size else b"")
    return h.hexdigest()


def digests(tensors: Mapping[str, NDArray[Any]]) -> dict[str, str]:
    """Of all tensors, on several cores; the largest first, so that no core is left with it at the end."""
    by_size = sorted(tensors, key=lambda name: -tensors[name].nbytes)
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
        return dict(zip(by_size, pool.map(lambda name: digest(name, tensors[name]), by_size), strict=True))


def damaged(tensors: Mapping[str, NDArray[Any]], recorded: Mapping[str, str]) -> list[str]:
    """Names of tensors that are not what was recorded, in order."""
    found = digests(tensors)
    return sorted(name for name in found.keys() | recorded.keys() if found.get(name) != recorded.get(name))


def is_checked(path: Path) -> bool:
    """Whether this very file has been checked since the machine started."""
    facts = _facts(path)
    try:
        return facts is not None and json.loads(_stamp(path).read_text("utf-8")) == facts
    except (OSError, ValueError, RecursionError):
        return False


def note_checked(path: Path) -> None:
    """Where the folder cannot be written, or the system does not say when it started: checked again next time."""
    facts, stamp = _facts(path), _stamp(path)
    if facts is None:
        return
    partial = stamp.with_name(f"{stamp.name}.{os.getpid()}.partial")
    with suppress(OSError):
        partial.write_text(json.dumps(facts), "utf-8")
        os.replace(partial, stamp)


def note_used(path: Path) -> None:
    """For `last_used`: the stamp's own time."""
    with suppress(OSError):
        os.utime(_stamp(path))


def last_used(path: Path) -> float:
    """When a file was last read or written, as far as is known. Raises OSError."""
    written = path.stat().st_mtime
    try:
        return max(written, _stamp(path).stat().st_mtime)
    except OSError:
        return written


def forget_checked(path: Path) -> None:
    with suppress(OSError):
        _stamp(path).unlink()


@cache
def _boot() -> str | None:
    """What is another after each start of the machine; None where the system does not say."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text("utf-8").strip() or None
    except (OSError, ValueError):
        return None


def _facts(path: Path) -> dict[str, Any] | None:
    boot = _boot()
    try:
        stat = path.stat()
    except OSError:
        return None
    identity = {"device": stat.st_dev, "inode": stat.st_ino, "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
    return identity | {"boot": boot} if boot else None


def _stamp(path: Path) -> Path:
    return path.with_name(f"{path.name}.checked")
