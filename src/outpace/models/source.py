"""From what a person writes after `--model` to a file or folder on this machine."""

from __future__ import annotations

import difflib
import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..errors import ModelNotFound, UnsupportedModel
from .catalog import CATALOG
from .checkpoint import Checkpoint
from .fetch import Progress, fetch
from .hub import HUB_ID, fetch_hub

Kind = Literal["gguf", "safetensors"]


@dataclass(frozen=True, slots=True)
class ModelSource:
    """`key` names the model's content: it changes when the file does, and is fit for a folder's name."""

    name: str
    path: Path
    kind: Kind
    key: str

    def checkpoint(self) -> Checkpoint:
        """Open the weights. Raises CorruptModel or UnsupportedModel."""
        if self.kind == "gguf":
            from .gguf import GGUFCheckpoint

            return GGUFCheckpoint(self.path)
        from .safetensors import SafetensorsCheckpoint

        return SafetensorsCheckpoint(self.path)


def resolve(name: str, progress: Progress | None = None) -> ModelSource:
    """A known name, a `.gguf` file, a folder with safetensors, or a hub id; fetched if need be.

    Raises ModelNotFound naming what there is, DownloadError, CorruptModel, UnsupportedModel.
    """
    if known := CATALOG.get(name):
        return ModelSource(name, fetch(known, progress), "gguf", f"{name}-{known.sha256[:16]}")
    path = Path(name).expanduser()
    if path.is_dir():
        return _folder(name, path)
    if path.exists():
        return _file(name, path)
    if not looks_like_path(name) and HUB_ID.fullmatch(name):
        folder = fetch_hub(name)
        return ModelSource(name, folder, "safetensors", _key(name, _weights(folder)))
    raise ModelNotFound(_not_found(name))


def looks_like_path(name: str) -> bool:
    return name.startswith(("/", "./", "../", "~")) or name.endswith((".gguf", ".safetensors"))


def _file(name: str, path: Path) -> ModelSource:
    if path.suffix == ".safetensors":
        raise UnsupportedModel(f"{path}: give the folder that holds this file and its config.json instead")
    if path.suffix != ".gguf" and not _begins_as_gguf(path):
        raise UnsupportedModel(f"{path}: not a model; supported: GGUF files and folders with safetensors")
    return ModelSource(path.stem, path, "gguf", _key(path.stem, [path]))


def _begins_as_gguf(path: Path) -> bool:
    try:
        with path.open("rb") as f:
            return f.read(4) == b"GGUF"
    except OSError:
        return False


def _folder(name: str, path: Path) -> ModelSource:
    if not (path / "config.json").exists():
        inside = sorted(path.glob("*.gguf"))
        hint = f"; it holds {inside[0].name}: give that file" if inside else ""
        raise ModelNotFound(f"{path}: a model's folder holds config.json and safetensors{hint}")
    stem = path.resolve().name
    return ModelSource(stem, path, "safetensors", _key(stem, _weights(path)))


def _weights(folder: Path) -> list[Path]:
    from .safetensors import weight_files

    return [*weight_files(folder), *sorted(folder.glob("*.json")), *sorted(folder.glob("*.jinja"))]


def _key(name: str, files: list[Path]) -> str:
    """From the files' places, sizes and times: reading gigabytes at each start would cost seconds."""
    sha = hashlib.sha256()
    for file in files:
        real = file.resolve()
        stat = real.stat() if real.exists() else None  # a missing part is the checkpoint's to report
        sha.update(f"{real}\0{stat and stat.st_size}\0{stat and stat.st_mtime_ns}\n".encode())
    return f"{re.sub(r'[^A-Za-z0-9._-]+', '-', name)[:60].strip('.-') or 'model'}-{sha.hexdigest()[:16]}"


def _not_found(name: str) -> str:
    known = ", ".join(CATALOG)
    if looks_like_path(name):
        return f"there is no file or folder {name!r}; a model is a .gguf file, a folder with safetensors, or: {known}"
    near = difflib.get_close_matches(name.lower(), CATALOG, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}? " if near else ""
    others = "a .gguf file, a folder with safetensors, or a hub id owner/name"
    return f"no model {name!r}; {hint}Known: {known}; or give {others}"
