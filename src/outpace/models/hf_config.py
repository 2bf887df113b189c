"""Reads a `transformers` configuration (a `config.json`), of old and new style, into a ModelConfig.

Defaults are those of the architecture in `transformers`, because a `config.json` may leave them out. Whatever
would change the arithmetic and is not supported is refused by name, never ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from ..errors import CorruptModel, UnsupportedModel
from .architecture import ARCHITECTURES
from .config import LayerType, ModelConfig, RopeScaling
from .hf_keys import check_fields, check_rope_fields

MODEL_TYPES = {kind: name for name, a in ARCHITECTURES.items() for kind in (name, *a.aliases)}
SUPPORTED = f"{', '.join(ARCHITECTURES)} (smollm is llama)"

_ACTIVATIONS: dict[str, Any] = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
_LAYER_TYPES: dict[str, LayerType] = {"full_attention": "full", "sliding_attention": "sliding"}


class _Reader:
    """Typed access to the fields of one configuration; every complaint names the field and the file."""

    def __init__(self, values: Mapping[str, Any], source: str) -> None:
        self.values, self.source = values, source

    def corrupt(self, name: str, allowed: str) -> NoReturn:
        value = self.values.get(name)
        raise CorruptModel(f"{self.source}: {name}={value!r} in the configuration; it must be {allowed}")

    def unsupported(self, name: str, allowed: str) -> NoReturn:
        value = self.values.get(name)
        raise UnsupportedModel(f"{self.source}: {name}={value!r} is not supported; supported: {allowed}")

    def integer(self, name: str, default: int | None = None, low: int = 1, high: int = 2**31 - 1) -> int:
        value = self.values.get(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            self.corrupt(name, f"a whole number from {low} to {high}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self.values.get(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e12:
            self.corrupt(name, "a number above 0")
        return float(value)

    def flag(self, name: str) -> bool:
        value = self.values.get(name, False)
        if not isinstance(value, bool):
            self.corrupt(name, "true or false")
        return value

    def section(self, name: str) -> dict[str, Any]:
        value = self.values.get(name)
        if value is not None and not isinstance(value, dict):
            self.corrupt(name, "an object")
        return dict(value or {})


def parse(raw: Mapping[str, Any], source: str) -> ModelConfig:
    """See ModelConfig.from_hf."""
    if not isinstance(raw, Mapping):
        raise CorruptModel(f"{source}: the configuration must be a JSON object, not {type(raw).__name__}")
    given = _text_section(_Reader(raw, source))
    name = _architecture(given)
    architecture = ARCHITECTURES[name]
    values = architecture.defaults | {k: v for k, v in given.values.items() if v is not None}
    if "sliding_window" in given.values:  # null turns it off, unlike the fields where null asks for the default
        values["sliding_window"] = given.values["sliding_window"]
    r = _Reader(values, source)
    check_fields(given.values, name, source, SUPPORTED)

    num_layers = r.integer("num_hidden_layers", high=1024)
    num_heads = r.integer("num_attention_heads", high=4096)
    num_kv_heads = r.integer("num_key_value_heads", num_heads)
    hidden_size = r.integer("hidden_size")
    if num_heads % num_kv_heads:
        r.corrupt("num_key_value_heads", f"a divisor of num_attention_heads={num_heads}")
    if "head_dim" not in values and hidden_size % num_heads:
        r.corrupt("hidden_size", f"a multiple of num_attention_heads={num_heads} when head_dim is not given")
    head_dim = r.integer("head_dim", hidden_size // num_heads, high=65536)
    if head_dim % 2:
        r.corrupt("head_dim", "even")
    layer_types, window = _layers(r, architecture.fields, num_layers)
    theta, local_theta, scaling = _rope(r, name)
    act = "hidden_act" if "hidden_act" in architecture.fields else "hidden_activation"
    activation = values.get(act, "silu")
    if not isinstance(activation, str) or activation not in _ACTIVATIONS:
        r.unsupported(act, ", ".join(_ACTIVATIONS))
    return ModelConfig(
        architecture=name,
        vocab_size=r.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=r.integer("intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_position=r.integer("max_position_embeddings"),
        rms_norm_eps=r.number("rms_norm_eps"),
        rope_theta=theta,
        layer_types=layer_types,
        rope_local_theta=local_theta,
        rope_scaling=scaling,
        sliding_window=window,
        tie_embeddings=r.flag("tie_word_embeddings"),
        qkv_bias=architecture.qkv_bias,
        qk_norm=architecture.qk_norm,
        norm_plus_one=architecture.norm_plus_one,
        post_norms=architecture.post_norms,
        activation=_ACTIVATIONS[activation],
        embedding_scale=hidden_size**0.5 if architecture.scaled_embedding else 1.0,
        attention_scale=r.number("query_pre_attn_scalar", head_dim) ** -0.5,
        bos_id=r.integer("bos_token_id", low=0) if values.get("bos_token_id") is not None else None,
        eos_ids=_eos_ids(r),
    )


def _text_section(r: _Reader) -> _Reader:
    """The language model's part of a configuration that nests it; token ids may stand outside."""
    inner = r.section("text_config")
    if not inner:
        return r
    outer = {k: r.values[k] for k in ("bos_token_id", "eos_token_id", "quantization_config") if k in r.values}
    merged = outer | inner
    merged.setdefault("model_type", r.values.get("model_type"))
    return _Reader(merged, r.source)


def _architecture(r: _Reader) -> str:
    name = r.values.get("model_type")
    if not isinstance(name, str) or name not in MODEL_TYPES:
        classes = r.values.get("architectures") or []
        of = f" (architectures={classes!r})" if classes else ""
        raise UnsupportedModel(f"{r.source}: unknown model_type {name!r}{of}; supported: {SUPPORTED}")
    return MODEL_TYPES[name]


def _layers(r: _Reader, fields: frozenset[str], n: int) -> tuple[tuple[LayerType, ...], int | None]:
    """Which layers slide, and their window."""
    window = r.integer("sliding_window") if r.values.get("sliding_window") is not None else None
    if "sliding_window" not in fields or ("use_sliding_window" in fields and not r.flag("use_sliding_window")):
        window = None
    types: list[LayerType]
    names = r.values.get("layer_types")
    if names is not None:
        if not isinstance(names, list | tuple) or len(names) != n:
            r.corrupt("layer_types", f"a list of num_hidden_layers={n} names")
        if any(not isinstance(name, str) or name not in _LAYER_TYPES for name in names):
            r.unsupported("layer_types", "full_attention and sliding_attention")
        types = [_LAYER_TYPES[name] for name in names]
    elif window is None:
        types = ["full"] * n
    elif "sliding_window_pattern" in fields:
        every = r.integer("sliding_window_pattern")
        types = ["sliding" if (i + 1) % every else "full" for i in range(n)]
    elif "max_window_layers" in fields:
        first = r.integer("max_window_layers", low=0)
        types = ["sliding" if i >= first else "full" for i in range(n)]
    else:
        types = ["sliding"] * n
    if "sliding" not in types:
        return tuple(types), None
    if window is None:
        r.corrupt("sliding_window", "a whole number, because layer_types has sliding layers")
    return tuple(types), window


def _rope(r: _Reader, architecture: str) -> tuple[float, float | None, RopeScaling | None]:
    """theta, that of sliding layers if the architecture has two, scaling; from `rope_parameters` or older fields."""
    two = "rope_local_base_freq" in ARCHITECTURES[architecture].fields
    new = r.section("rope_parameters")
    if set(new) & set(_LAYER_TYPES):  # one set per layer type
        each = _Reader(new, r.source)
        full = _Reader(each.section("full_attention"), r.source)
        local = _Reader(each.section("sliding_attention"), r.source)
        if not two:
            r.unsupported("rope_parameters", "one set for all layers (per layer type with gemma3 only)")
        check_rope_fields(local.values, architecture, r.source)
        if local.values.get("rope_type", "default") != "default":
            local.unsupported("rope_type", "default for sliding layers")
    else:
        old = r.section("rope_scaling")
        if new and any(new.get("rope_type" if k == "type" else k, v) != v for k, v in old.items()):
            r.unsupported("rope_scaling", f"what rope_parameters say, {new!r}, or only one of the two")
        full = _Reader(new or old, r.source)
        local = _Reader({}, r.source)
    if full.values.get("partial_rotary_factor", 1.0) not in (None, 1):
        full.unsupported("partial_rotary_factor", "1.0")
    theta = full.number("rope_theta", r.number("rope_theta"))
    if not two:
        return theta, None, _scaling(full, r)
    return theta, local.number("rope_theta", r.number("rope_local_base_freq")), _scaling(full, r)


def _scaling(rope: _Reader, r: _Reader) -> RopeScaling | None:
    key = "rope_type" if "rope_type" in rope.values else "type"
    kind = rope.values.get(key, "default")
    if kind in ("default", "linear", "llama3"):
        check_rope_fields(rope.values, r.values["model_type"], r.source)
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling("linear", rope.number("factor"))
    if kind != "llama3":
        rope.unsupported(key, "default, linear and llama3")
    low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
    if high <= low:
        rope.corrupt("high_freq_factor", f"above low_freq_factor={low}")
    original = rope.integer("original_max_position_embeddings", r.integer("max_position_embeddings"))
    return RopeScaling("llama3", rope.number("factor"), low, high, original)


def _eos_ids(r: _Reader) -> tuple[int, ...]:
    value = r.values.get("eos_token_id")
    ids = [] if value is None else list(value) if isinstance(value, list | tuple) else [value]
    if any(isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < 2**31 for i in ids):
        r.corrupt("eos_token_id", "a token id or a list of them")
    return tuple(ids)
