"""What is kept of a model after its first use, so that later starts read neither the GGUF header nor transformers.

    CACHE/prepared/<key>/config.json             ModelConfig
                         tokenizer.json          of the `tokenizers` library
                         tokenizer_config.json   chat template, special tokens
                         manifest.json           format version and digests of the above, written last
                         weights-*.bin           packed weights, written by the decoders

Each file is replaced as a whole and the manifest comes last: a folder is right if its digests are, whoever was
interrupted. Anything else is made anew from the checkpoint.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import ModelError, ParameterError
from ..paths import prepared_dir
from .checkpoint import Checkpoint, TokenizerFiles
from .config import ModelConfig, RopeScaling
from .fetch import Progress
from .source import ModelSource, resolve
from .tokenizer import Tokenizer

#: Raise it when ModelConfig, the tokenizers built here, or these files change.
VERSION = 2
_MANIFEST = "manifest.json"
_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json")


@dataclass(slots=True, eq=False)
class OpenModel:
    """A model that can be run; its weights are opened, and its tokenizer is built, only when asked for."""

    source: ModelSource
    config: ModelConfig
    prepared_dir: Path
    _texts: Mapping[str, str] = field(repr=False)
    _tokenizer: Tokenizer | None = field(default=None, repr=False)
    _checkpoint: Checkpoint | None = field(default=None, repr=False)

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def tokenizer(self) -> Tokenizer:
        """Built at the first call, which takes most of a second with a large vocabulary. Raises CorruptModel."""
        if self._tokenizer is None:
            self._tokenizer = _tokenizer(self._texts, self.config, self.source)
        return self._tokenizer

    def checkpoint(self) -> Checkpoint:
        """Raises CorruptModel or UnsupportedModel."""
        if self._checkpoint is None:
            self._checkpoint = self.source.checkpoint()
        return self._checkpoint


def open_model(name: str, progress: Progress | None = None) -> OpenModel:
    """`name`: a known name, a `.gguf` file, a folder with safetensors, or a hub id. Fetches and prepares it if need be.

    `progress(what, done, total)` is told of a download; without it a bar or lines on stderr.
    Raises ModelError of every kind, and ParameterError if the cache cannot be written.
    """
    source = resolve(name, progress)
    folder = prepared_dir() / source.key
    checkpoint = tokenizer = None
    if (texts := _load(folder)) is None:
        checkpoint = source.checkpoint()
        texts = _texts(checkpoint)
        # first of all that the tokenizer can be read: nothing damaged is ever kept
        tokenizer = _tokenizer(texts, checkpoint.config, source)
        _store(folder, texts, source)
    config = config_from_json(texts["config.json"])
    return OpenModel(source, config, folder, texts, tokenizer, checkpoint)


@dataclass(frozen=True, slots=True)
class PreparedFolder:
    """What is kept of one model; `model` and `path` are empty if the folder does not say."""

    key: str
    model: str
    path: str
    size: int  # bytes, packed weights included


def prepared_folders() -> list[PreparedFolder]:
    """All of them, by key."""
    base = prepared_dir()
    folders = sorted(f for f in base.iterdir() if f.is_dir()) if base.is_dir() else []
    found = []
    for folder in folders:
        try:
            manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
            model, path = str(manifest["model"]), str(manifest["path"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            model = path = ""
        size = sum(f.stat().st_size for f in folder.iterdir() if f.is_file())
        found.append(PreparedFolder(folder.name, model, path, size))
    return found


def folder_of(entry: PreparedFolder) -> Path:
    return prepared_dir() / entry.key


def remove_prepared(entry: PreparedFolder) -> None:
    """Raises ModelError if the system refuses."""
    try:
        shutil.rmtree(folder_of(entry))
    except OSError as e:
        raise ModelError(f"{folder_of(entry)} cannot be removed: {e.strerror or e}") from e


def is_sound(folder: Path) -> bool:
    """Whether configuration and tokenizer are what was written, by whatever version."""
    return _contents(folder) is not None


def texts_of(folder: Path) -> list[Path]:
    """The files of configuration and tokenizer that are there."""
    return [folder / name for name in (_MANIFEST, *_FILES) if (folder / name).is_file()]


def forget(folder: Path) -> None:
    """Delete configuration and tokenizer; packed weights stay."""
    for file in texts_of(folder):
        file.unlink(missing_ok=True)


def config_to_json(config: ModelConfig) -> str:
    return json.dumps(dataclasses.asdict(config), indent=1)


def config_from_json(text: str) -> ModelConfig:
    """Raises ValueError, TypeError or KeyError for anything but what `config_to_json` wrote."""
    raw: dict[str, Any] = json.loads(text)
    scaling = raw.pop("rope_scaling")
    raw |= {"layer_types": tuple(raw["layer_types"]), "eos_ids": tuple(raw["eos_ids"])}
    return ModelConfig(**raw, rope_scaling=RopeScaling(**scaling) if scaling else None)


def _texts(checkpoint: Checkpoint) -> dict[str, str]:
    files = checkpoint.tokenizer_files()
    contents = (config_to_json(checkpoint.config), files.tokenizer_json, json.dumps(files.tokenizer_config))
    return dict(zip(_FILES, contents, strict=True))


def _tokenizer(texts: Mapping[str, str], config: ModelConfig, source: ModelSource) -> Tokenizer:
    files = TokenizerFiles(texts["tokenizer.json"], json.loads(texts["tokenizer_config.json"]))
    return Tokenizer(files, config.eos_ids, str(source.path))


def _load(folder: Path) -> dict[str, str] | None:
    """The prepared texts, or None if they are not there, of another version, or damaged."""
    found = _contents(folder)
    return found[1] if found and found[0] == VERSION else None


def _contents(folder: Path) -> tuple[object, dict[str, str]] | None:
    """Version and texts of a folder; None if they are not there or not what was written."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        contents = {name: (folder / name).read_bytes() for name in _FILES}
        if manifest["digests"] != _digests(contents):
            return None
        return manifest["version"], {name: data.decode("utf-8") for name, data in contents.items()}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _store(folder: Path, texts: Mapping[str, str], source: ModelSource) -> None:
    contents = {name: text.encode("utf-8") for name, text in texts.items()}
    manifest = {
        "version": VERSION,
        "model": source.name,
        "path": str(source.path.resolve()),
        "digests": _digests(contents),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in {**contents, _MANIFEST: json.dumps(manifest, indent=1).encode()}.items():
            _replace(folder / name, data)
    except OSError as e:
        raise ParameterError(
            f"the cache {folder} cannot be written: {e.strerror or e}; set OUTPACE_CACHE to a folder that can"
        ) from e


def _replace(path: Path, data: bytes) -> None:
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".partial")
    try:
        with os.fdopen(handle, "wb") as f:
            f.write(data)
        os.replace(partial, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(partial)
        raise


def _digests(contents: Mapping[str, bytes]) -> dict[str, str]:
    return {name: hashlib.blake2b(data, digest_size=16).hexdigest() for name, data in contents.items()}
