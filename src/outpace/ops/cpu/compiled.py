"""Compile once per machine, not once per process.

numba's own cache looks only at the file that holds a function; the step is inlined from several. So the compiled code
is kept in a folder named by a digest of this package's sources, in outpace's cache; where OUTPACE_ISA names
instructions, by these besides.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numba
from numba import int64, njit, void
from numba.core import config as _numba_config
from numba.core.ccallback import CFunc

from ...paths import cache_dir
from .isa import NAMED, NAMES
from .kept import guard, is_private

_KEPT_VERSIONS = 3
_SUFFIX = "" if NAMED is None else f"-{NAMES[NAMED]}"


def sources_digest(sources: Path) -> str:
    """Names what the files of a folder compile to with this numba."""
    digest = hashlib.sha256(numba.__version__.encode())
    for source in sorted(sources.glob("*.py")):
        digest.update(f"\0{source.name}\0".encode() + source.read_bytes())
    return digest.hexdigest()[:16]


@cache
def _folder() -> Path | None:
    """None when there is nowhere to write: the code is then compiled in each process."""
    folder = cache_dir() / "kernels" / f"{sources_digest(Path(__file__).parent)}{_SUFFIX}"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        if not is_private((folder.parent, folder)):
            return None
        os.utime(folder)
        _drop_old(folder.parent)
    except OSError:
        return None
    return folder if os.access(folder, os.W_OK) else None


def _drop_old(root: Path) -> None:
    import shutil

    found = (f for f in root.iterdir() if f.is_dir() and f.name.partition("-")[2] == _SUFFIX[1:])
    folders = sorted(found, key=lambda f: f.stat().st_mtime)
    for old in folders[:-_KEPT_VERSIONS]:
        shutil.rmtree(old, ignore_errors=True)


def is_cached(function: Any) -> bool:
    """Whether some process has compiled this function on this machine and kept the code."""
    folder = _folder()
    name = f"{Path(function.__code__.co_filename).stem}.{function.__name__}"
    return folder is not None and any(folder.glob(f"*/{name}-*.nbc"))


def compiled(function: Callable[..., Any]) -> Any:
    """`njit(nogil=True)`, kept on disk."""
    folder = _folder()
    if folder is None:
        return njit(nogil=True)(function)
    config: Any = _numba_config
    before = config.CACHE_DIR
    config.CACHE_DIR = str(folder)  # read when the decorator runs
    try:
        made = njit(nogil=True, cache=True)(function)
    finally:
        config.CACHE_DIR = before
    guard(made)
    return made


@cache
def address_of(function: Callable[[int, int], None]) -> int:
    """Compile a function of two int64 by itself, kept on disk as `compiled` does; where its code lies.

    What calls it by this address (simd.call_at) does not contain it, so it is compiled once, and only where it is used.
    """
    folder = _folder()
    made = CFunc(function, ((int64, int64), void), {}, {})
    if folder is not None:
        config: Any = _numba_config
        before = config.CACHE_DIR
        config.CACHE_DIR = str(folder)
        try:
            made.enable_caching()
        finally:
            config.CACHE_DIR = before
        guard(made)
    made.compile()
    _held.append(made)
    address: Any = made.address
    return int(address)


def made_for(name: str, part: bool = False) -> Callable[[Callable[..., Any]], Any]:
    """njit for functions that a factory makes: `name` keeps those of one call apart from those of another. Symbols of
    code that different processes compiled must differ, and numba tells closures apart by a running number only.

    `part`: compiled as a part of what calls it. numba optimises a function again with each that calls it, so what is
    large should stand behind few others.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        function.__qualname__ = f"{name}_{function.__name__}"
        return njit(function, inline="always" if part else "never")

    return decorate


_held: list[Any] = []  # code goes when its object goes
