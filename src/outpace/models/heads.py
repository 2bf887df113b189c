"""Files of trained heads: a small decoder over the target's hidden states, and what stands around it.

One safetensors file. Matrices are kept in int8 with a scale for each row; the embedding and the output rows are not in
it, since they are the target's. The metadata say which target a head is of, and how often it was right on a text that
is kept with it, so that a head of another model, or one that is wired wrongly, is found before it drafts in vain.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import CorruptModel, ModelNotFound
from .checkpoint import Checkpoint, TokenizerFiles
from .config import LayerType, ModelConfig
from .decoder import Decoder

FORMAT = "outpace-head-1"
MOST_BYTES = 1 << 30
_LAYER = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
    "norm1": "input_layernorm",
    "norm2": "post_attention_layernorm",
}


@dataclass(frozen=True)
class Check:
    """A text of the target's and how often each slot was right on it, behind each token from `prompt` on."""

    tokens: tuple[int, ...]
    prompt: int
    hits: tuple[float, ...]


@dataclass(frozen=True)
class HeadConfig:
    """What a file says of its head. `taps`: layers of the target after which its residual stream is read; `block`:
    slots of a pass; `rank`: of the edge between tokens that follow each other; `target`: its name and shape."""

    kind: str
    taps: tuple[int, ...]
    layers: int
    block: int
    rank: int
    target: Mapping[str, Any]
    trained: Mapping[str, Any]
    check: Check


@dataclass(frozen=True)
class Head:
    """A head as it was read. `arrays` by the names that the networks of `training` give them; `hot` i64[V]: the tokens
    that it can propose, ascending."""

    path: Path
    config: HeadConfig
    hot: NDArray[np.int64]
    arrays: Mapping[str, NDArray[np.float32]]


def target_of(name: str, config: ModelConfig) -> dict[str, Any]:
    """How a file names its target."""
    sizes = {"vocab_size": config.vocab_size, "hidden_size": config.hidden_size, "num_layers": config.num_layers}
    return {"name": name, **sizes}


def write(path: Path, config: HeadConfig, hot: NDArray[np.int64], arrays: Mapping[str, NDArray[np.float32]]) -> None:
    """Whole or not at all. Matrices in int8, vectors as they are."""
    from safetensors.numpy import save_file

    tensors: dict[str, NDArray[Any]] = {"hot": hot.astype(np.int32)}
    for name, array in arrays.items():
        if array.ndim == 2:
            scale = np.maximum(np.abs(array).max(axis=1), 1e-12).astype(np.float32) / 127
            tensors[name] = np.rint(array / scale[:, None]).astype(np.int8)
            tensors[f"{name}.scale"] = scale
        else:
            tensors[name] = array.astype(np.float32)
    new = path.with_suffix(".new")
    save_file(tensors, new, {"format": FORMAT, "config": json.dumps(asdict(config))})
    new.replace(path)


def read(path: Path) -> Head:
    """Raises ModelNotFound, or CorruptModel for a file that is no head, is cut short, or does not fit together."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise ModelNotFound(f"{path}: there is no such head; `outpace train-head` makes one")
    if path.stat().st_size > MOST_BYTES:
        raise CorruptModel(f"{path}: larger than any head ({MOST_BYTES >> 20} MB)")
    try:
        with safe_open(path, "np") as file:
            about = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as e:
        raise CorruptModel(f"{path}: not a whole safetensors file ({e})") from None
    if about.get("format") != FORMAT:
        raise CorruptModel(f"{path}: no head of `outpace train-head` (format {about.get('format')!r}, not {FORMAT!r})")
    config = _config(path, about.get("config", ""))
    return _head(path, config, tensors)


def _config(path: Path, text: str) -> HeadConfig:
    try:
        raw = json.loads(text)
        check = Check(tuple(map(int, raw["check"]["tokens"])), int(raw["check"]["prompt"]), tuple(raw["check"]["hits"]))
        sizes = {name: int(raw[name]) for name in ("layers", "block", "rank")}
        taps = tuple(map(int, raw["taps"]))
        config = HeadConfig(str(raw["kind"]), taps, **sizes, target=raw["target"], trained=raw["trained"], check=check)
    except (ValueError, TypeError, KeyError) as e:
        raise CorruptModel(f"{path}: its configuration cannot be read ({type(e).__name__}: {e})") from None
    small = {"layers": 8, "block": 64, "rank": 4096}
    if any(not 1 <= sizes[name] <= most for name, most in small.items()) or not taps:
        raise CorruptModel(f"{path}: layers, block and rank are from 1 to {small}, and it has taps")
    return config


def _head(path: Path, config: HeadConfig, tensors: dict[str, NDArray[Any]]) -> Head:
    d, total = int(config.target.get("hidden_size", 0)), int(config.target.get("vocab_size", 0))
    hot = tensors.pop("hot", np.empty(0, np.int32)).astype(np.int64)
    if len(hot) < 2 or hot[0] < 0 or hot[-1] >= total or (np.diff(hot) <= 0).any():
        raise CorruptModel(f"{path}: its tokens are not ascending ids of a vocabulary of {total}")
    arrays = {}
    for name, array in tensors.items():
        if name.endswith(".scale"):
            continue
        if array.dtype == np.int8:
            scale = tensors.get(f"{name}.scale")
            if scale is None or scale.shape != array.shape[:1]:
                raise CorruptModel(f"{path}: {name} has no scale for each row")
            array = array.astype(np.float32) * scale.astype(np.float32)[:, None]
        arrays[name] = array.astype(np.float32)
        if not np.isfinite(arrays[name]).all():
            raise CorruptModel(f"{path}: {name} has numbers that are not finite")
    shapes = {"fuse": (d, len(config.taps) * d), "token": (d, d), "slots": (config.block, d), "norm": (d,)}
    shapes |= {"prev": (config.rank, d), "gate": (config.rank, d), "edge": (len(hot), config.rank)}
    for name, shape in shapes.items():
        if name not in arrays or arrays[name].shape != shape:
            raise CorruptModel(f"{path}: {name} is not of shape {shape}")
    return Head(path, config, hot, arrays)


class HeadCheckpoint(Checkpoint):
    """The layers of a head with the target's hot rows around them, for the decoder that runs them."""

    def __init__(self, head: Head, target: ModelConfig, rows: NDArray[np.float32]) -> None:
        """`rows` f32[V, D]: the target's output rows of `head.hot`."""
        n = head.config.layers
        full: LayerType = "full"
        self.config = replace(
            target,
            vocab_size=len(head.hot),
            num_layers=n,
            layer_types=(full,) * n,
            tie_embeddings=True,
            sliding_window=None,
            rope_local_theta=None,
            qkv_bias=False,
            qk_norm=False,
            norm_plus_one=False,
            post_norms=False,
            activation="silu",
            embedding_scale=1.0,
            attention_scale=target.head_dim**-0.5,
        )
        self._tensors = {"model.embed_tokens.weight": rows, "model.norm.weight": head.arrays["norm"]}
        for i in range(n):
            for short, name in _LAYER.items():
                key = f"layers.{i}.{short}"
                if key not in head.arrays:
                    raise CorruptModel(f"{head.path}: {key} is missing")
                self._tensors[f"model.layers.{i}.{name}.weight"] = head.arrays[key]
        from .layout import check_layout

        check_layout(str(head.path), self.config, {name: array.shape for name, array in self._tensors.items()})

    def names(self) -> set[str]:
        return set(self._tensors)

    def tensor(self, name: str) -> NDArray[np.float32]:
        return self._tensors[name]

    def tokenizer_files(self) -> TokenizerFiles:
        raise NotImplementedError("a head has no tokenizer")


def fits(head: Head, target: ModelConfig) -> str:
    """Why a head cannot be of this target; "" if it may be."""
    wanted, has = head.config.target, target_of("", target)
    for name, value in has.items():
        if name != "name" and wanted.get(name) != value:
            return f"it was trained for {wanted.get('name')} with {name} {wanted.get(name)}, and this model has {value}"
    if max(head.config.taps) >= target.num_layers:
        return f"it reads layer {max(head.config.taps)} of a model of {target.num_layers} layers"
    return ""


def output_rows(target: Decoder, hot: NDArray[np.int64]) -> NDArray[np.float32]:
    """The target's output rows of some tokens, where they are its embedding's. f32[V, D]"""
    return np.ascontiguousarray(target.embedding(hot), dtype=np.float32)
