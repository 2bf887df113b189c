"""The architectures: one entry says what sets one apart from the others, in arithmetic and in files.

Which tensors follow is said in models.block. Only models.gguf asks for some by name, where the writers of such files
treat them in a way of their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .key_tables import names


@dataclass(frozen=True, slots=True)
class Architecture:
    """`fields` decide how models.hf_config reads a configuration: one that has `sliding_window_pattern`, for example,
    gets its sliding layers by it."""

    defaults: dict[str, Any]  # of a `config.json`, as `transformers` has them
    fields: frozenset[str]  # of a `config.json`, that are read beside those of all
    without_effect: frozenset[str] = frozenset()  # more fields, which the class in `transformers` does not read
    aliases: tuple[str, ...] = ()  # other values of `model_type`
    gguf_keys: frozenset[str] = frozenset()  # metadata of a GGUF file, read beside those of all
    in_gguf: bool = True  # else such files have it under another's name
    gguf_in_pairs: bool = False  # the rows of rotary heads are there in pairs (2i, 2i + 1)
    qkv_bias: bool = False  # this one and the next three: as in ModelConfig
    qk_norm: bool = False
    norm_plus_one: bool = False
    post_norms: bool = False
    scaled_embedding: bool = False  # by the root of the width


_COMMON: dict[str, Any] = {"rms_norm_eps": 1e-6, "rope_theta": 10_000.0, "tie_word_embeddings": False}
_QWEN = names("hidden_act sliding_window use_sliding_window max_window_layers")

ARCHITECTURES = {
    "llama": Architecture(
        defaults=_COMMON | {"max_position_embeddings": 2048},
        fields=names("hidden_act"),
        without_effect=names("sliding_window use_sliding_window max_window_layers"),
        gguf_keys=names("attention.sliding_window"),  # of a mistral
        gguf_in_pairs=True,
    ),
    "mistral": Architecture(
        defaults=_COMMON | {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
        fields=names("hidden_act sliding_window"),
        in_gguf=False,
    ),
    "qwen2": Architecture(
        defaults=_COMMON | {"max_position_embeddings": 32768, "max_window_layers": 28},
        fields=_QWEN,
        qkv_bias=True,
    ),
    "qwen3": Architecture(
        defaults=_COMMON | {"max_position_embeddings": 32768, "max_window_layers": 28, "head_dim": 128},
        fields=_QWEN,
        qk_norm=True,
    ),
    "gemma3": Architecture(
        defaults={
            "vocab_size": 262_208,
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "num_hidden_layers": 26,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1_000_000.0,
            "rope_local_base_freq": 10_000.0,
            "sliding_window": 4096,
            "sliding_window_pattern": 6,
            "query_pre_attn_scalar": 256,
            "hidden_activation": "gelu_pytorch_tanh",
            "tie_word_embeddings": True,
            "bos_token_id": 2,
            "eos_token_id": 1,
        },
        fields=names(
            "hidden_activation rope_local_base_freq sliding_window sliding_window_pattern query_pre_attn_scalar"
        ),
        without_effect=names("hidden_act"),
        aliases=("gemma3_text",),
        gguf_keys=names("attention.sliding_window attention.sliding_window_pattern rope.freq_base_swa"),
        qk_norm=True,
        norm_plus_one=True,
        post_norms=True,
        scaled_embedding=True,
    ),
}

GGUF_ARCHITECTURES = tuple(name for name, a in ARCHITECTURES.items() if a.in_gguf)
