"""What a decoder needs to know of a model, from any source, in one frozen dataclass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

LayerType = Literal["full", "sliding"]


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """`linear`, or `llama3` (factor, low/high frequency factors, original context)."""

    kind: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192


@dataclass(frozen=True, slots=True)
class ModelConfig:
    architecture: Literal["llama", "mistral", "qwen2", "qwen3", "gemma3"]
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int
    rms_norm_eps: float
    rope_theta: float
    layer_types: tuple[LayerType, ...]
    rope_local_theta: float | None = None  # of sliding layers (gemma3); None: rope_theta
    rope_scaling: RopeScaling | None = None  # of full-attention layers
    sliding_window: int | None = None  # a sliding layer's row at p sees positions > p - sliding_window
    tie_embeddings: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False  # RMS norm over each query and key head
    norm_plus_one: bool = False  # norm weights are stored as w - 1 (gemma)
    post_norms: bool = False  # norms after attention and after the MLP, before the residual (gemma)
    activation: Literal["silu", "gelu_tanh"] = "silu"
    embedding_scale: float = 1.0
    attention_scale: float = 0.0  # always set by the loaders
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
