"""Everything that is kept on this machine and can be checked: what `outpace models --verify` goes through."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ..errors import CorruptModel
from ..paths import cache_dir
from . import fetch
from .catalog import CATALOG
from .prepared import PreparedFolder, folder_of, forget, is_sound, prepared_folders, texts_of


@dataclass(frozen=True, slots=True)
class Kept:
    """`check` reads it all and raises CorruptModel saying what is wrong; `remove` deletes it: what is gone is made or
    fetched anew at its next use."""

    name: str
    path: Path
    size: int  # bytes
    check: Callable[[], object]
    remove: Callable[[], object]


def everything() -> Iterator[Kept]:
    """Model files of the catalog, what is prepared of each model, and compiled kernels. What an earlier version left is
    not among them: nothing reads it."""
    for model in CATALOG.values():
        path = fetch.model_path(model)
        if path.is_file():
            size = path.stat().st_size
            yield Kept(f"{model.name}, model", path, size, partial(fetch.verify, model), partial(fetch.remove, model))
    for entry in prepared_folders():
        yield from _prepared(entry)
    root = cache_dir() / "kernels"
    for folder in sorted(f for f in root.iterdir() if f.is_dir()) if root.is_dir() else ():
        yield from _kernels(folder)


def _prepared(entry: PreparedFolder) -> Iterator[Kept]:
    from . import packed, packed_file

    folder, name = folder_of(entry), entry.model or entry.key
    if texts := texts_of(folder):
        size = sum(f.stat().st_size for f in texts)
        check, remove = partial(_check_texts, folder), partial(forget, folder)
        yield Kept(f"{name}, configuration and tokenizer", folder, size, check, remove)
    for precision in packed.DEPTH_UNIT:
        path = folder / packed_file.file_name(precision)
        if path.is_file():
            size, verify, delete = (
                path.stat().st_size,
                partial(packed_file.verify, path),
                partial(path.unlink, missing_ok=True),
            )
            yield Kept(f"{name}, {precision} weights", path, size, verify, delete)


def _check_texts(folder: Path) -> None:
    if not is_sound(folder):
        raise CorruptModel(f"{folder}: the configuration or the tokenizer is not what was written")


def _kernels(folder: Path) -> Iterator[Kept]:
    from ..ops.cpu import kept

    for base in kept.bases(folder):
        size = sum(f.stat().st_size for f in kept.files(base))
        name = f"kernel {base.name.split('-')[0]}"
        yield Kept(name, base, size, partial(_check_kernel, base), partial(kept.remove, base))


def _check_kernel(base: Path) -> None:
    from ..ops.cpu import kept

    if (name := kept.damaged(base)) is not None:
        raise CorruptModel(f"{base.parent / name}: compiled code that is not what was written")
