"""From what a person writes after `--model` to a file or folder on this machine."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..errors import ModelNotFound, UnsupportedModel, did_you_mean
from ..paths import models_dir
from .catalog import CATALOG, HUB_NAMES, KnownModel, short_name
from .checkpoint import Checkpoint
from .fetch import Progress, fetch
from .hub import HubName, fetch_hub, parse_hub

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
    """A known name, a `.gguf` file, a folder with safetensors, or a name of the hub; fetched if need be.

    Raises ModelNotFound naming what there is, DownloadError, CorruptModel, UnsupportedModel.
    """
    there = find(name)
    if isinstance(there, KnownModel):
        return ModelSource(there.name, fetch(there, progress), "gguf", f"{there.name}-{there.sha256[:16]}")
    if isinstance(there, Path):
        return _folder(name, there) if there.is_dir() else _file(name, there)
    path = fetch_hub(there)
    if path.is_dir():
        return ModelSource(there.repo, path, "safetensors", _key(there.repo, _weights(path)))
    called = there.called or path.stem
    return ModelSource(called, path, "gguf", _key(called, [path]))


def find(name: str) -> KnownModel | Path | HubName:
    """What a name stands for: a model of the catalog, a file or folder that is there, or something of the hub. Reads
    and fetches nothing. Raises ModelNotFound for a name that can be nothing."""
    hub = parse_hub(name)
    if hub is not None and hub.explicit:
        return hub
    if known := CATALOG.get(name):
        return known
    path = Path(name).expanduser()
    if path.exists():
        return path
    if "/" not in name and (own := models_dir() / f"{name}.gguf").is_file():  # put there by hand
        return own
    if short := short_name(name):
        return CATALOG[short] if short in CATALOG else HubName(HUB_NAMES[short], called=short)
    if hub is not None and not looks_like_path(name):
        return hub
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
    hint = did_you_mean(name, [*CATALOG, *HUB_NAMES])
    others = (
        f"a .gguf file, a folder with safetensors, or a name of the hub such as owner/repo or {next(iter(HUB_NAMES))}"
    )
    return f"no model {name!r}; {hint}known names: {known}; or give {others} (`outpace models` lists all)"
