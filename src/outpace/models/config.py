"""What a decoder needs to know of a model, from any source, in one frozen dataclass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

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
    architecture: str  # of models.architecture
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
    rope_scaling: RopeScaling | None = None  # of all layers but those with a local theta
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

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any], *, source: str) -> ModelConfig:
        """Read a `transformers` configuration of old or new style; a nested `text_config` is found.

        `source` names the file in messages. Raises UnsupportedModel for an unknown architecture, rope type or
        feature, CorruptModel for a field that is missing or out of range.
        """
        from .hf_config import parse

        return parse(raw, source)


def rope_inv_freq(config: ModelConfig, layer_type: LayerType) -> NDArray[np.float64]:
    """Rotary inverse frequencies of the layers of one type, scaling applied: radians per position. [C/2]"""
    from ..ops.rope import inverse_frequencies, scale_llama3

    if layer_type == "sliding" and config.rope_local_theta is not None:
        return inverse_frequencies(config.head_dim, config.rope_local_theta)
    inv_freq = inverse_frequencies(config.head_dim, config.rope_theta)
    scaling = config.rope_scaling
    if scaling is None:
        return inv_freq
    if scaling.kind == "linear":
        return inv_freq / scaling.factor
    return scale_llama3(
        inv_freq,
        scaling.factor,
        scaling.low_freq_factor,
        scaling.high_freq_factor,
        scaling.original_max_position,
    )
