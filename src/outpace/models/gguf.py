"""GGUF files as checkpoints: metadata becomes a configuration, tensors regain their `transformers` layout.

What the writers of GGUF changed is undone here: the rows of llama's query and key projections (interleaved rotary
pairs), gemma's norm weights (stored as w + 1), and llama 3's rotary factors (stored as a tensor).
The data stay in the file (memory-mapped); one tensor at a time is dequantised.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import CorruptModel, UnsupportedModel
from .checkpoint import Checkpoint, TokenizerFiles
from .config import ModelConfig
from .gguf_header import Header, TensorInfo, read_header
from .layout import check_layout

SUPPORTED_TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K")
ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma3")

_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GEMMA_BLOCK = _BLOCK | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_IGNORED = re.compile(r"rope_freqs\.weight|blk\.\d+\.(rope_freqs\.weight|attn_rot_embd|attn\.rotary_emb\.inv_freq)")
_BLOCK_NAME = re.compile(r"blk\.(0|[1-9]\d{0,3})\.([a-z_]+)\.(weight|bias)")
_GEMMA_27B_LAYERS = 62  # the one gemma 3 whose attention scale is not the head width's


class GGUFCheckpoint(Checkpoint):
    """Raises CorruptModel or UnsupportedModel, naming the file, for anything that cannot be read as promised."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._header = read_header(path)
        architecture = self._header.metadata.get("general.architecture")
        if architecture not in ARCHITECTURES:
            raise UnsupportedModel(
                f"{path}: architecture {architecture!r}; supported in GGUF files: {', '.join(ARCHITECTURES)}"
                " (mistral and smollm files say llama)"
            )
        self._architecture: str = architecture
        self._infos, unknown = _canonical(self._header, architecture)
        for info in self._infos.values():
            if info.type_name not in SUPPORTED_TYPES:
                raise UnsupportedModel(
                    f"{path}: tensor {info.name!r} is quantised as {info.type_name}; "
                    f"supported: {', '.join(SUPPORTED_TYPES)}"
                )
        rope_factors = self._rope_factors()
        self.config = ModelConfig.from_hf(hf_config(path, self._header, self._infos, rope_factors), source=str(path))
        check_layout(str(path), self.config, {n: i.shape for n, i in self._infos.items()}, unknown)

    def names(self) -> set[str]:
        return set(self._infos)

    def tensor(self, name: str) -> NDArray[np.float32]:
        if name not in self._infos:
            raise CorruptModel(f"{self.path}: there is no tensor {name!r}")
        values = self._read(self._infos[name])
        if self._architecture == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = self.config.num_heads if "q_proj" in name else self.config.num_kv_heads
            values = unpermute(values, heads)
        if self.config.norm_plus_one and name.endswith("norm.weight"):
            values = values - np.float32(1)
        # min and max carry any NaN along and allocate nothing
        if not (np.isfinite(values.min()) and np.isfinite(values.max())):
            raise CorruptModel(f"{self.path}: tensor {name!r} holds values that are not numbers")
        return np.ascontiguousarray(values)

    def tokenizer_files(self) -> TokenizerFiles:
        from .gguf_tokenizer import build

        return build(str(self.path), self._header.metadata, self.config)

    def _read(self, info: TensorInfo) -> NDArray[np.float32]:
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        try:
            raw = np.memmap(self.path, dtype=np.uint8, mode="r", offset=info.start, shape=(info.nbytes,))
            kind = GGMLQuantizationType(info.type_id)
            if info.type_name in ("F32", "F16"):
                values = raw.view("<f4" if info.type_name == "F32" else "<f2").astype(np.float32)
            else:
                with np.errstate(all="ignore"):  # damaged scales: refused by the caller
                    values = dequantize(np.asarray(raw).reshape(*info.shape[:-1], -1), kind)
            return np.asarray(values, dtype=np.float32).reshape(info.shape)
        except (OSError, ValueError) as e:
            raise CorruptModel(f"{self.path}: tensor {info.name!r} cannot be read: {e}") from e

    def _rope_factors(self) -> NDArray[np.float32] | None:
        info = self._header.tensors.get("rope_freqs.weight")
        return self._read(info) if info is not None and info.type_name == "F32" else None


def unpermute(values: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Rows of each head from interleaved rotary pairs (2i, 2i + 1) to halves (i, i + C/2)."""
    split = values.reshape(heads, values.shape[0] // heads // 2, 2, *values.shape[1:])
    return split.swapaxes(1, 2).reshape(values.shape)


def _canonical(header: Header, architecture: str) -> tuple[dict[str, TensorInfo], list[str]]:
    """Tensors by canonical name, and the names that mean nothing to us."""
    block = _GEMMA_BLOCK if architecture == "gemma3" else _BLOCK
    known: dict[str, TensorInfo] = {}
    unknown: list[str] = []
    for name, info in header.tensors.items():
        m = _BLOCK_NAME.fullmatch(name)
        if name in _TOP:
            known[_TOP[name]] = info
        elif m and m[2] in block:
            known[f"model.layers.{m[1]}.{block[m[2]]}.{m[3]}"] = info
        elif not _IGNORED.fullmatch(name):
            unknown.append(name)
    return known, unknown


def hf_config(
    path: Path, header: Header, infos: dict[str, TensorInfo], rope_factors: NDArray[np.float32] | None
) -> dict[str, Any]:
    """The metadata in the words of a `transformers` configuration. Raises CorruptModel, UnsupportedModel."""
    meta, architecture = header.metadata, header.metadata["general.architecture"]
    tokenizer = {k.removeprefix("tokenizer.ggml."): v for k, v in meta.items() if k.startswith("tokenizer.ggml.")}
    embedding = infos.get("model.embed_tokens.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise CorruptModel(f"{path}: there is no token embedding (token_embd.weight)")

    def get(key: str) -> Any:
        value = meta.get(f"{architecture}.{key}")
        return _short(value) if isinstance(value, float) else value

    if get("expert_count"):
        raise UnsupportedModel(f"{path}: a mixture of experts; supported: dense models")
    window = get("attention.sliding_window")
    config: dict[str, Any] = {
        "model_type": "mistral" if architecture == "llama" and window else architecture,
        "vocab_size": embedding.shape[0],
        "hidden_size": get("embedding_length"),
        "intermediate_size": get("feed_forward_length"),
        "num_hidden_layers": get("block_count"),
        "num_attention_heads": get("attention.head_count"),
        "num_key_value_heads": get("attention.head_count_kv") or get("attention.head_count"),
        "max_position_embeddings": get("context_length"),
        "rms_norm_eps": get("attention.layer_norm_rms_epsilon"),
        "rope_theta": get("rope.freq_base") or 10_000.0,
        "rope_scaling": _rope_scaling(path, get, rope_factors),
        "sliding_window": window,
        "tie_word_embeddings": "lm_head.weight" not in infos,
        "bos_token_id": tokenizer.get("bos_token_id"),
        "eos_token_id": _stops(tokenizer),
        "attn_logit_softcapping": get("attn_logit_softcapping"),
        "final_logit_softcapping": get("final_logit_softcapping"),
    }
    for field in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
        if not isinstance(config[field], int):
            raise CorruptModel(f"{path}: the metadata do not say {field} (or not as one number)")
    if (head_dim := get("attention.key_length")) is not None:
        config["head_dim"] = head_dim
        if get("attention.value_length") not in (None, head_dim):
            raise UnsupportedModel(f"{path}: keys and values of different width")
    if architecture == "gemma3":
        _gemma(config, get)
    return {k: v for k, v in config.items() if v is not None}


def _gemma(config: dict[str, Any], get: Any) -> None:
    heads, layers = config["num_attention_heads"], config["num_hidden_layers"]
    config["query_pre_attn_scalar"] = (
        config["hidden_size"] // max(heads, 1) if layers == _GEMMA_27B_LAYERS else config.get("head_dim", 256)
    )
    config["rope_local_base_freq"] = get("rope.freq_base_swa") or 10_000.0
    pattern = get("attention.sliding_window_pattern")
    if isinstance(pattern, list):
        config["layer_types"] = ["sliding_attention" if slides else "full_attention" for slides in pattern]
    elif pattern is not None:
        config["sliding_window_pattern"] = pattern


def _stops(tokenizer: dict[str, Any]) -> list[int] | None:
    ids = [tokenizer.get(k) for k in ("eos_token_id", "eot_token_id")]
    return list(dict.fromkeys(i for i in ids if i is not None)) or None


def _short(value: float) -> float:
    """1e-05 for the float32 9.999999747378752e-06: what the original configuration said."""
    return float(str(np.float32(value))) if np.float32(value) == value else value


def _rope_scaling(path: Path, get: Any, factors: NDArray[np.float32] | None) -> dict[str, Any] | None:
    kind = get("rope.scaling.type")
    if kind in (None, "none"):
        linear = get("rope.scale_linear")  # of files from before 2023-09
        if linear not in (None, 1, 1.0):
            return {"rope_type": "linear", "factor": linear}
    else:
        return {
            "rope_type": kind,
            "factor": get("rope.scaling.factor"),
            "original_max_position_embeddings": get("rope.scaling.original_context_length"),
        }
    if factors is None or not np.isfinite(factors).all() or factors.max() <= 1:
        return None  # none, all ones, or the unused inverse frequencies of old files
    return _llama3_scaling(path, get, factors)


def _llama3_scaling(path: Path, get: Any, factors: NDArray[np.float32]) -> dict[str, Any]:
    """Which llama 3 parameters the stored per-frequency divisors come from; they must be reproduced."""
    from ..ops.rope import inverse_frequencies, scale_llama3

    plain = inverse_frequencies(2 * factors.size, get("rope.freq_base") or 10_000.0)
    factor = round(float(factors.max()), 3)
    scaled = scale_llama3(plain, factor, 1.0, 4.0, 8192)
    if not np.allclose(plain / scaled, factors.ravel(), rtol=1e-3):
        raise UnsupportedModel(f"{path}: rotary factors (rope_freqs.weight) that are not those of llama 3")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
