"""Folders with safetensors weights, one file or several with an index, as checkpoints.

Names and layout are already those of `transformers`. Tensors are read one at a time; nothing is unpickled.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import CorruptModel, ModelNotFound, UnsupportedModel
from .checkpoint import Checkpoint, TokenizerFiles
from .config import ModelConfig
from .layout import check_layout

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_DTYPES = {"F32", "F16", "BF16"}
_PART = re.compile(
    r"[A-Za-z0-9_][A-Za-z0-9_.+=@ -]{0,200}\.safetensors"
)  # no folder, nothing that systems read otherwise
_IGNORED = re.compile(r".*\.rotary_emb\.inv_freq")


def weight_files(folder: Path) -> list[Path]:
    """The files that the folder's weights should be in. Raises ModelNotFound, UnsupportedModel or CorruptModel."""
    index = folder / _INDEX
    if (folder / _SINGLE).exists():
        return [folder / _SINGLE]
    if index.exists():
        places = read_json(index).get("weight_map")
        if not isinstance(places, dict) or not places or not all(isinstance(f, str) for f in places.values()):
            raise CorruptModel(f"{index}: there is no weight_map from tensors to files in it")
        if bad := [f for f in places.values() if not _PART.fullmatch(f)]:
            raise CorruptModel(f"{index}: {bad[0][:100]!r} is not a file of this folder that holds safetensors")
        return [folder / name for name in sorted(set(places.values()))]
    if found := sorted(folder.glob("*.safetensors")):
        if len(found) == 1:
            return found
        raise ModelNotFound(f"{folder}: {len(found)} safetensors files and no {_INDEX} that says which belong together")
    if pickles := sorted([*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")]):
        raise UnsupportedModel(
            f"{pickles[0]}: pickled weights can run code when they are read and are refused; convert them with "
            "transformers: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(other_folder)"
        )
    raise ModelNotFound(f"{folder}: no safetensors file in this folder")


def read_json(path: Path) -> dict[str, Any]:
    """Raises ModelNotFound or CorruptModel, naming the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelNotFound(f"{path.parent}: there is no {path.name} in this folder") from None
    except (OSError, ValueError, RecursionError) as e:
        raise CorruptModel(f"{path}: cannot be read: {e}") from e
    if not isinstance(value, dict):
        raise CorruptModel(f"{path}: a JSON object is needed")
    return value


class SafetensorsCheckpoint(Checkpoint):
    """Raises ModelNotFound, CorruptModel or UnsupportedModel, naming the file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        raw = read_json(folder / "config.json")
        if (folder / "generation_config.json").exists():  # stops there are those that the model was tuned for
            stops = read_json(folder / "generation_config.json").get("eos_token_id")
            raw |= {"eos_token_id": stops} if stops is not None else {}
        self.config = ModelConfig.from_hf(raw, source=str(folder / "config.json"))
        self._files: dict[str, Any] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for path in weight_files(folder):
            for name, shape in self._open(path).items():
                if name in shapes:
                    raise CorruptModel(f"{path}: tensor {name!r} is in another file too")
                shapes[name] = shape
        if self.config.tie_embeddings:
            shapes.pop("lm_head.weight", None)  # a copy of the embedding
        shapes = {name: shape for name, shape in shapes.items() if not _IGNORED.fullmatch(name)}
        check_layout(str(folder), self.config, shapes)
        self._names = set(shapes)

    def names(self) -> set[str]:
        return set(self._names)

    def tensor(self, name: str) -> NDArray[np.float32]:
        return self._part(name, slice(None))

    def rows(self, name: str, first: int, last: int) -> NDArray[np.float32]:
        return self._part(name, slice(first, last))

    def _part(self, name: str, rows: slice) -> NDArray[np.float32]:
        if name not in self._names:
            raise CorruptModel(f"{self.folder}: there is no tensor {name!r}")
        from safetensors import SafetensorError

        try:
            values: NDArray[np.float32] = self._files[name].get_slice(name)[rows].float().numpy()
        except (SafetensorError, OSError) as e:
            raise CorruptModel(f"{self.folder}: tensor {name!r} cannot be read: {e}") from e
        if not (np.isfinite(values.min()) and np.isfinite(values.max())):
            raise CorruptModel(f"{self.folder}: tensor {name!r} holds values that are not numbers")
        return values

    def tokenizer_files(self) -> TokenizerFiles:
        path = self.folder / "tokenizer.json"
        if not path.exists():
            raise ModelNotFound(
                f"{self.folder}: there is no tokenizer.json in this folder; write one with transformers: "
                "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
            )
        try:
            text = path.read_text(encoding="utf-8")
            template = self.folder / "chat_template.jinja"
            chat = {"chat_template": template.read_text(encoding="utf-8")} if template.exists() else {}
        except (OSError, ValueError) as e:
            raise CorruptModel(f"{self.folder}: the tokenizer cannot be read: {e}") from e
        tokenizer_config = self.folder / "tokenizer_config.json"
        return TokenizerFiles(text, (read_json(tokenizer_config) if tokenizer_config.exists() else {}) | chat)

    def _open(self, path: Path) -> dict[str, tuple[int, ...]]:
        """Shapes of the file's tensors, whose header the library has checked."""
        from safetensors import SafetensorError, safe_open

        if not path.exists():
            raise CorruptModel(f"{path}: this part of the weights is missing; fetch the model again")
        try:
            file = safe_open(path, framework="pt")
            shapes = {}
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                piece = file.get_slice(name)
                if piece.get_dtype() not in _DTYPES:
                    supported = ", ".join(sorted(_DTYPES))
                    raise UnsupportedModel(
                        f"{path}: tensor {name!r} is of type {piece.get_dtype()}; supported: {supported}"
                    )
                shapes[name] = tuple(piece.get_shape())
                self._files[name] = file
        except (SafetensorError, OSError) as e:
            raise CorruptModel(f"{path}: damaged or truncated: {e}; fetch or copy the file again") from e
        return shapes
