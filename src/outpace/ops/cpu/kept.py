"""Guards the compiled code that numba keeps on disk: it is unpickled and run, so it is read only if it is what was
written, from a folder that nobody else can write to.

Beside a function's files lies NAME.digests.json with their digests. Files that differ, are missing or stand in no such
list are deleted before numba looks, and the function is compiled anew.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

_LIST = ".digests.json"
_said: set[str] = set()


def say_once(text: str) -> None:
    """One line on stderr in a process's life."""
    if text not in _said:
        _said.add(text)
        print(text, file=sys.stderr, flush=True)


def is_private(folders: Iterable[Path]) -> bool:
    """Whether the folders are this user's alone to write to; takes the right from others where it can."""
    if not hasattr(os, "getuid"):
        return True
    for folder in folders:
        stat = folder.stat()
        if stat.st_uid != os.getuid():
            say_once(
                f"{folder} belongs to another user: compiled kernels are neither read from it nor kept; set "
                "OUTPACE_CACHE to a folder of your own"
            )
            return False
        if stat.st_mode & 0o022:
            folder.chmod(stat.st_mode & 0o755)
    return True


def guard(dispatcher: Any) -> None:
    """Check a function's files now, and note the digests of what numba writes from here on."""
    from filelock import FileLock

    cache = dispatcher._cache
    base = Path(cache.cache_path) / cache._impl.filename_base
    if damaged(base) is not None:
        with FileLock(base.parent / "lock"):  # another process may just be writing
            _drop(base)
    save = cache.save_overload

    def save_overload(signature: Any, data: Any) -> None:
        base.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(base.parent / "lock"):
            save(signature, data)
            _note(base)

    cache.save_overload = save_overload


def damaged(base: Path) -> str | None:
    """The name of a file of a function that is not as it was written; None: all are. `base`: path without endings."""
    found, listed = _digests(base), _listed(base)
    return next((name for name in sorted(found.keys() | listed.keys()) if found.get(name) != listed.get(name)), None)


def bases(folder: Path) -> list[Path]:
    """Of all functions that are kept below a folder."""
    return sorted(f.with_name(f.name.removesuffix(_LIST)) for f in folder.glob(f"*/*{_LIST}"))


def remove(base: Path) -> None:
    """Delete a function's files."""
    for file in (*files(base), base.with_name(base.name + _LIST)):
        with suppress(OSError):
            file.unlink()


def _drop(base: Path) -> None:
    if (name := damaged(base)) is not None:
        if _listed(base):  # else a process was killed between writing and noting
            say_once(f"{base.parent}: {name} is damaged; the CPU kernels are compiled anew")
        remove(base)


def files(base: Path) -> list[Path]:
    """What numba has written of a function."""
    return sorted(base.parent.glob(f"{glob.escape(base.name)}.*nb[ic]"))


def _digests(base: Path) -> dict[str, str]:
    found = {}
    for file in files(base):
        try:
            found[file.name] = hashlib.blake2b(file.read_bytes(), digest_size=16).hexdigest()
        except OSError:
            found[file.name] = "unreadable"
    return found


def _listed(base: Path) -> dict[str, str]:
    try:
        value = json.loads(base.with_name(base.name + _LIST).read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _note(base: Path) -> None:
    target = base.with_name(base.name + _LIST)
    partial = target.with_name(f"{target.name}.{os.getpid()}")
    with suppress(OSError):  # without it the files are made anew next time
        partial.write_text(json.dumps(_digests(base)), "utf-8")
        os.replace(partial, target)
