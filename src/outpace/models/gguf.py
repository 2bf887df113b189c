"""GGUF files as checkpoints: metadata becomes a configuration, tensors regain their `transformers` layout.

What the writers of GGUF changed is undone here: the rows of llama's query and key projections (interleaved rotary
pairs), gemma's norm weights (stored as w + 1), and llama 3's rotary factors (stored as a tensor).
The data stay in the file (memory-mapped): a tensor is dequantised, or handed out as it lies there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import CorruptModel, UnsupportedModel
from .architecture import ARCHITECTURES, GGUF_ARCHITECTURES
from .block import describe
from .checkpoint import Checkpoint, Raw, TokenizerFiles
from .config import ModelConfig
from .formats import FORMATS
from .gguf_header import Header, TensorInfo, read_header
from .gguf_keys import check_head_widths, check_keys
from .layout import check_layout

SUPPORTED_TYPES = tuple(FORMATS)
_IGNORED = re.compile(r"rope_freqs\.weight|blk\.\d+\.(rope_freqs\.weight|attn_rot_embd|attn\.rotary_emb\.inv_freq)")
_GEMMA_27B_LAYERS = 62  # the one gemma 3 whose attention scale is not the head width's


class GGUFCheckpoint(Checkpoint):
    """Raises CorruptModel or UnsupportedModel, naming the file, for anything that cannot be read as promised."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: NDArray[np.uint8] | None = None
        self._header = read_header(path)
        name = self._header.metadata.get("general.architecture")
        if name not in GGUF_ARCHITECTURES:
            raise UnsupportedModel(
                f"{path}: architecture {name!r}; supported in GGUF files: {', '.join(GGUF_ARCHITECTURES)}"
                " (mistral and smollm files say llama)"
            )
        check_keys(str(path), self._header.metadata, name)
        rope_factors = self._rope_factors()
        self.config = ModelConfig.from_hf(hf_config(path, self._header, rope_factors), source=str(path))
        model = describe(self.config)
        names = {tensor.gguf: tensor.name for tensor in model.tensors()}
        in_pairs = [p for p in model.projections() if p.rotary and ARCHITECTURES[name].gguf_in_pairs]
        self._in_pairs = {f"{projection.source}.weight": projection.outputs.heads for projection in in_pairs}
        self._infos = {names[n]: info for n, info in self._header.tensors.items() if n in names}
        for info in self._infos.values():
            if info.type_name not in SUPPORTED_TYPES:
                raise UnsupportedModel(
                    f"{path}: tensor {info.name!r} is quantised as {info.type_name}, which has no kernels here; take "
                    f"a file of this model in Q4_K_M (small), Q6_K or Q8_0 (accurate), or convert it from the "
                    f"original weights; supported: {', '.join(SUPPORTED_TYPES)}"
                )
        if rope_factors is not None and self.config.rope_scaling and 2 * rope_factors.size != self.config.head_dim:
            raise CorruptModel(f"{path}: {rope_factors.size} rotary factors for heads of {self.config.head_dim}")
        check_head_widths(str(path), self._header.metadata, name, self.config.head_dim)
        unknown = [n for n in self._header.tensors if n not in names and not _IGNORED.fullmatch(n)]
        check_layout(str(path), self.config, {n: i.shape for n, i in self._infos.items()}, unknown)

    def names(self) -> set[str]:
        return set(self._infos)

    def tensor(self, name: str) -> NDArray[np.float32]:
        if name not in self._infos:
            raise CorruptModel(f"{self.path}: there is no tensor {name!r}")
        values = self._read(self._infos[name])
        if heads := self._in_pairs.get(name):
            values = unpermute(values, heads)
        if self.config.norm_plus_one and name.endswith("norm.weight"):
            values = values - np.float32(1)
        # min and max carry any NaN along and allocate nothing
        if not (np.isfinite(values.min()) and np.isfinite(values.max())):
            raise CorruptModel(f"{self.path}: tensor {name!r} holds values that are not numbers")
        return np.ascontiguousarray(values)

    def rows(self, name: str, first: int, last: int) -> NDArray[np.float32]:
        raw = self.raw(name)
        if raw is None:
            return self.tensor(name)[first:last]
        values = _floats(raw.data[slice(first, last) if raw.rows is None else raw.rows[first:last]], raw.form.name)
        if not (np.isfinite(values.min()) and np.isfinite(values.max())):
            raise CorruptModel(f"{raw.label} holds values that are not numbers")
        return values

    def raw(self, name: str) -> Raw | None:
        info = self._infos.get(name)
        if info is None or len(info.shape) != 2:
            return None
        heads = self._in_pairs.get(name)
        rows = unpermute(np.arange(info.shape[0]), heads) if heads else None
        label = f"{self.path}: tensor {info.name!r}"
        return Raw(self._bytes(info).reshape(info.shape[0], -1), FORMATS[info.type_name], rows, label)

    def tokenizer_files(self) -> TokenizerFiles:
        from .gguf_tokenizer import build

        return build(str(self.path), self._header.metadata, self.config)

    def _read(self, info: TensorInfo) -> NDArray[np.float32]:
        return _floats(self._bytes(info).reshape(*info.shape[:-1], -1), info.type_name).reshape(info.shape)

    def _bytes(self, info: TensorInfo) -> NDArray[np.uint8]:
        """A tensor's part of the file, mapped."""
        if self._file is None:
            try:
                self._file = np.asarray(np.memmap(self.path, dtype=np.uint8, mode="r"))
            except (OSError, ValueError) as e:
                raise CorruptModel(f"{self.path}: cannot be read: {e}") from e
        if len(self._file) < info.start + info.nbytes:
            raise CorruptModel(f"{self.path}: tensor {info.name!r} is cut off: the file has become shorter")
        return self._file[info.start : info.start + info.nbytes]

    def _rope_factors(self) -> NDArray[np.float32] | None:
        """Divisors of the rotary frequencies, where the file has some."""
        info = self._header.tensors.get("rope_freqs.weight")
        if info is None:
            return None
        if info.type_name not in SUPPORTED_TYPES:
            raise UnsupportedModel(f"{self.path}: tensor {info.name!r} is quantised as {info.type_name}")
        return self._read(info)


def _floats(data: NDArray[np.uint8], kind: str) -> NDArray[np.float32]:
    """u8[..., bytes per row] -> f32[..., K]; damaged scales are the caller's to refuse"""
    from ..ops.cpu.dequantise import dequantise_rows

    form = FORMATS[kind]
    if form.is_quantised:
        return dequantise_rows(data, kind, data.shape[-1] // form.block_bytes * form.block)
    if kind == "BF16":
        return (data.view("<u2").astype(np.uint32) << 16).view(np.float32)
    return data.view("<f4" if kind == "F32" else "<f2").astype(np.float32)


def unpermute(values: NDArray[Any], heads: int) -> NDArray[Any]:
    """Rows of each head from interleaved rotary pairs (2i, 2i + 1) to halves (i, i + C/2)."""
    split = values.reshape(heads, values.shape[0] // heads // 2, 2, *values.shape[1:])
    return split.swapaxes(1, 2).reshape(values.shape)


def hf_config(path: Path, header: Header, rope_factors: NDArray[np.float32] | None) -> dict[str, Any]:
    """The metadata in the words of a `transformers` configuration. Raises CorruptModel, UnsupportedModel."""
    meta, architecture = header.metadata, header.metadata["general.architecture"]
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise CorruptModel(f"{path}: there is no token embedding (token_embd.weight)")

    def get(key: str) -> Any:
        value = meta.get(f"{architecture}.{key}")
        return _short(value) if isinstance(value, float) else value

    def given(key: str, default: Any) -> Any:
        value = get(key)
        return default if value is None else value

    window = get("attention.sliding_window") or None
    heads, width = get("attention.head_count"), get("embedding_length")
    config: dict[str, Any] = {
        "model_type": "mistral" if architecture == "llama" and window else architecture,
        "vocab_size": embedding.shape[0],
        "hidden_size": width,
        "intermediate_size": get("feed_forward_length"),
        "num_hidden_layers": get("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": given("attention.head_count_kv", heads),
        "max_position_embeddings": get("context_length"),
        "rms_norm_eps": get("attention.layer_norm_rms_epsilon"),
        "rope_theta": given("rope.freq_base", 10_000.0),
        "rope_scaling": _rope_scaling(path, get, rope_factors),
        "sliding_window": window,
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "bos_token_id": meta.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": _stops(path, meta),
        "head_dim": get("attention.key_length"),
    }
    wanted = ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
    wanted += ["max_position_embeddings", *(("sliding_window",) if architecture == "gemma3" else ())]
    for field in wanted:
        if not isinstance(config[field], int):
            raise CorruptModel(f"{path}: the metadata do not say {field} (or not as one number)")
    if config["rms_norm_eps"] is None:
        raise CorruptModel(f"{path}: the metadata do not say {architecture}.attention.layer_norm_rms_epsilon")
    if config["head_dim"] is None and heads > 0 and width % heads == 0:
        config["head_dim"] = width // heads  # the writers' default, whatever the architecture's own
    if architecture == "gemma3":
        _gemma(config, get)
    return {k: v for k, v in config.items() if v is not None}


def _gemma(config: dict[str, Any], get: Any) -> None:
    heads, layers = config["num_attention_heads"], config["num_hidden_layers"]
    config["query_pre_attn_scalar"] = (
        config["hidden_size"] // max(heads, 1) if layers == _GEMMA_27B_LAYERS else config["head_dim"]
    )
    local = get("rope.freq_base_swa")
    config["rope_local_base_freq"] = 10_000.0 if local is None else local
    pattern = get("attention.sliding_window_pattern")
    if isinstance(pattern, list):
        config["layer_types"] = ["sliding_attention" if slides else "full_attention" for slides in pattern]
    elif pattern is not None:
        config["sliding_window_pattern"] = pattern


def _stops(path: Path, meta: Mapping[str, Any]) -> list[int] | None:
    more = meta.get("tokenizer.ggml.eos_token_ids") or []
    if not isinstance(more, list):
        raise CorruptModel(f"{path}: tokenizer.ggml.eos_token_ids must be a list of token ids")
    ids = [*(meta.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot", "eom")), *more]
    return list(dict.fromkeys(i for i in ids if i is not None)) or None


def _short(value: float) -> float:
    """1e-05 for the float32 9.999999747378752e-06: what the original configuration said."""
    return float(str(np.float32(value))) if np.float32(value) == value else value


def _rope_scaling(path: Path, get: Any, factors: NDArray[np.float32] | None) -> dict[str, Any] | None:
    """A factor without a type is linear, as it is to the program that these files are written for."""
    kind, factor = get("rope.scaling.type"), get("rope.scaling.factor")
    if kind not in (None, "none", "linear"):
        raise UnsupportedModel(
            f"{path}: rope.scaling.type={kind!r} is not supported; supported: none, linear, and the factors of llama 3 "
            "(rope_freqs.weight)"
        )
    if factor in (None, 0):
        factor = get("rope.scale_linear")  # of files from before 2023-09
    linear = None
    if kind != "none" and factor not in (None, 0, 1):
        linear = {"rope_type": "linear", "factor": factor}
    elif kind == "linear" and factor in (None, 0):
        raise CorruptModel(f"{path}: rope.scaling.type='linear' without rope.scaling.factor")
    if factors is None or (factors == 1).all() or _are_frequencies(get, factors):
        return linear
    if linear:
        raise UnsupportedModel(f"{path}: rotary factors (rope_freqs.weight) and a linear rope.scaling.factor as well")
    return _llama3_scaling(path, get, factors)


def _are_frequencies(get: Any, factors: NDArray[np.float32]) -> bool:
    """Old files have the plain inverse frequencies there, which nothing reads."""
    from ..ops.rope import inverse_frequencies

    return np.allclose(inverse_frequencies(2 * factors.size, _theta(get)), factors.ravel(), rtol=1e-2)


def _theta(get: Any) -> float:
    theta = get("rope.freq_base")
    return theta if isinstance(theta, float) and theta > 0 else 10_000.0


def _llama3_scaling(path: Path, get: Any, factors: NDArray[np.float32]) -> dict[str, Any]:
    """Which llama 3 parameters the stored per-frequency divisors come from; they must be reproduced."""
    from ..ops.rope import inverse_frequencies, scale_llama3

    plain = inverse_frequencies(2 * factors.size, _theta(get))
    factor = round(float(factors.max()), 3) if np.isfinite(factors).all() else 0.0
    if factor <= 1 or not np.allclose(plain / scale_llama3(plain, factor, 1.0, 4.0, 8192), factors.ravel(), rtol=1e-3):
        raise UnsupportedModel(f"{path}: rotary factors (rope_freqs.weight) that are not those of llama 3")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
