"""Metadata keys of GGUF files: honoured, without effect, or refused by name. Nothing is dropped in silence."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toy_gguf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from outpace.errors import CorruptModel, UnsupportedModel
from outpace.models import gguf_keys
from outpace.models.architecture import ARCHITECTURES as ALL
from outpace.models.architecture import GGUF_ARCHITECTURES as ARCHITECTURES
from outpace.models.config import ModelConfig, RopeScaling
from outpace.models.gguf import GGUFCheckpoint

GEMMA = {"attention.sliding_window": 16, "attention.key_length": 8, "attention.value_length": 8}


def config(tmp_path: Path, arch: str = "llama", **change: Any) -> ModelConfig:
    """Of a toy with heads of 8 (width 32, 4 heads)."""
    if arch == "gemma3":
        change = {"spm": True} | change | {"metadata": GEMMA | change.get("metadata", {})}
    toy_gguf.write(tmp_path / "m.gguf", arch, **change)
    return GGUFCheckpoint(tmp_path / "m.gguf").config


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("rope.dimension_count", 4, "part of each head.*supported: 8"),
        ("attention.value_length", 4, "values of another width"),
        ("attention.key_length_swa", 4, "sliding layers"),
        ("attention.causal", False, "looks ahead"),
        ("attention.causal", 0, "looks ahead"),
        ("attention.clamp_kqv", 8.0, "clamped"),
        ("attention.scale", 0.5, "scale of its own"),
        ("attn_logit_softcapping", 50.0, "capped attention"),
        ("final_logit_softcapping", 30.0, "capped logits"),
        ("logit_scale", 0.0625, "scaled logits"),
        ("residual_scale", 0.22, "scaled residuals"),
        ("use_parallel_residual", True, "side by side"),
        ("expert_count", 8, "mixture of experts"),
        ("pooling_type", 1, "embedding model"),
        ("rope.scaling.attn_factor", 1.5, "YaRN"),
        ("rope.scaling.type", "yarn", "yarn.*supported: none, linear"),
        ("rope.dimension_sections", [8, 12, 12], "sections"),
        ("tensor_data_layout", "transposed", "order of the tensors"),
        ("attention.brand_new", 1, "not known here"),
        ("brand_new", "x" * 500, "not known here"),
    ],
)
def test_what_changes_the_arithmetic_is_refused_with_the_reason(
    tmp_path: Path, arch: str, key: str, value: object, reason: str
) -> None:
    with pytest.raises(UnsupportedModel, match=reason) as error:
        config(tmp_path, arch, metadata={key: value})
    text = str(error.value)
    assert "m.gguf" in text and key in text and len(text) < 600


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_keys_that_say_what_is_so_anyway_change_nothing(tmp_path: Path, arch: str) -> None:
    plain = config(tmp_path, arch)
    same = {
        "vocab_size": 263, "rope.dimension_count": 8, "attention.key_length": 8, "attention.value_length": 8,
        "attention.causal": True, "attention.clamp_kqv": 0.0, "logit_scale": 1.0, "expert_count": 0, "pooling_type": 0,
        "final_logit_softcapping": 0.0, "use_parallel_residual": False, "rope.scaling.finetuned": False,
        "rope.scaling.type": "none", "rope.scaling.factor": 4.0, "tensor_data_layout": "Meta AI original pth",
    }  # fmt: skip
    assert config(tmp_path, arch, metadata=same) == plain


@pytest.mark.parametrize(
    ("metadata", "scaling"),
    [
        ({"rope.scaling.factor": 4.0}, RopeScaling("linear", 4.0)),  # without a type: linear
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, RopeScaling("linear", 4.0)),
        ({"rope.scale_linear": 2.0}, RopeScaling("linear", 2.0)),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 1.0}, None),
        ({"rope.scaling.factor": 0.0}, None),
        ({"rope.scaling.type": "none", "rope.scale_linear": 2.0}, None),
    ],
)
def test_linear_rotary_scaling(tmp_path: Path, metadata: dict[str, Any], scaling: RopeScaling | None) -> None:
    assert config(tmp_path, metadata=metadata).rope_scaling == scaling


def test_rotary_factors_of_every_kind(tmp_path: Path) -> None:
    from outpace.ops.rope import inverse_frequencies, scale_llama3

    plain = inverse_frequencies(8, 500_000.0)
    factors = (plain / scale_llama3(plain, 32.0, 1.0, 4.0, 8192)).astype(np.float32)

    def scaling(values: Any, **metadata: Any) -> RopeScaling | None:
        return config(tmp_path, tensors={"rope_freqs.weight": values}, metadata=metadata, theta=500_000.0).rope_scaling

    assert scaling(factors) == scaling(factors.astype(np.float16)) == RopeScaling("llama3", 32.0, 1.0, 4.0, 8192)
    assert scaling(plain.astype(np.float32)) is None  # an old file's frequencies
    with pytest.raises(UnsupportedModel, match=r"rope_freqs.*linear"):
        scaling(factors, **{"rope.scaling.factor": 2.0})
    with pytest.raises(UnsupportedModel, match="not those of llama 3"):
        scaling(np.full(4, 0.5, np.float32))
    with pytest.raises(UnsupportedModel, match="not those of llama 3"):
        scaling(np.full(4, np.nan, np.float32))
    wide = inverse_frequencies(16, 500_000.0)
    with pytest.raises(CorruptModel, match="8 rotary factors for heads of 8"):
        scaling((wide / scale_llama3(wide, 32.0, 1.0, 4.0, 8192)).astype(np.float32))


@pytest.mark.parametrize(
    ("arch", "missing"),
    [
        ("llama", "context_length"),
        ("llama", "attention.layer_norm_rms_epsilon"),
        ("qwen2", "block_count"),
        ("gemma3", "attention.sliding_window"),
    ],
)
def test_nothing_is_filled_in_from_another_models_defaults(tmp_path: Path, arch: str, missing: str) -> None:
    with pytest.raises(CorruptModel, match="do not say"):
        config(tmp_path, arch, metadata={missing: None})


def test_the_writers_defaults(tmp_path: Path) -> None:
    for arch in ("llama", "qwen3"):
        c = config(tmp_path, arch, metadata={"rope.freq_base": None})
        assert (c.head_dim, c.attention_scale, c.rope_theta) == (8, 8**-0.5, 10_000.0)
    c = config(tmp_path, "gemma3", metadata={"attention.key_length": None, "attention.value_length": None})
    assert (c.head_dim, c.attention_scale) == (8, 8**-0.5)
    with pytest.raises(CorruptModel, match="rope_theta"):
        config(tmp_path, metadata={"rope.freq_base": 0.0})


def test_a_window_is_of_the_architectures_that_have_one(tmp_path: Path) -> None:
    assert config(tmp_path, metadata={"attention.sliding_window": 16}).layer_types == ("sliding",)
    for arch in ("qwen2", "qwen3"):
        with pytest.raises(UnsupportedModel, match="sliding"):
            config(tmp_path, arch, metadata={"attention.sliding_window": 16})
        assert config(tmp_path, arch, metadata={"attention.sliding_window": 0}).sliding_window is None


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"general.type": "adapter"}, "general.type='adapter'"),
        ({"general.quantization_version": 1}, "older layout"),
        ({"split.count": 3}, "llama-gguf-split --merge"),
        ({"adapter.lora.alpha": 16.0}, r"adapter\.lora\.alpha"),
        ({"clip.has_vision_encoder": True}, "no whole model"),
        ({"tokenizer.ggml.add_sep_token": True}, "separator"),
        ({"tokenizer.ggml.remove_extra_whitespaces": True}, "spaces"),
        ({"tokenizer.ggml.precompiled_charsmap": [1, 2]}, "characters"),
        ({"tokenizer.ggml.add_space_prefix": True}, "space before every text"),
        ({"tokenizer.ggml.pre": "brand-new"}, "text splitting 'brand-new'"),
        ({"tokenizer.ggml.brand_new": 1}, "not known here"),
        ({"tokenizer.brand_new": 1}, "not known here"),
    ],
)
def test_what_changes_the_tokens_is_refused(tmp_path: Path, keys: dict[str, Any], reason: str) -> None:
    toy_gguf.write(tmp_path / "m.gguf", keys=keys)
    with pytest.raises(UnsupportedModel, match=reason):
        GGUFCheckpoint(tmp_path / "m.gguf").tokenizer_files()


def test_switches_are_true_or_false(tmp_path: Path) -> None:
    for flag in ("add_bos_token", "add_eos_token", "add_space_prefix"):
        with pytest.raises(CorruptModel, match=f"{flag}=1; it must be true or false"):
            config(tmp_path, keys={f"tokenizer.ggml.{flag}": 1})


def test_notes_of_other_programs_are_no_obstacle(tmp_path: Path) -> None:
    notes = {
        "general.sampling.temp": 0.7, "general.brand_new": "x", "quantize.imatrix.file": "x", "qwen2.rope.factor": 3.0,
        "mradermacher.quantized_by": "x", "tokenizer.chat_template.tool_use": "{{ x }}",
        "tokenizer.ggml.fim_pre_token_id": 3, "tokenizer.huggingface.json": "{}", "split.count": 1,
    }  # fmt: skip
    assert config(tmp_path, keys=notes) == config(tmp_path)


def test_every_end_of_an_answer_is_read(tmp_path: Path) -> None:
    keys = {"tokenizer.ggml.eot_token_id": 5, "tokenizer.ggml.eom_token_id": 6, "tokenizer.ggml.eos_token_ids": [7, 2]}
    assert config(tmp_path, keys=keys).eos_ids == (2, 5, 6, 7)
    with pytest.raises(CorruptModel, match="eos_token_ids"):
        config(tmp_path, keys={"tokenizer.ggml.eos_token_ids": 7})


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_no_key_stands_in_two_tables(arch: str) -> None:
    read = gguf_keys._READ | ALL[arch].gguf_keys
    assert not read & gguf_keys._FREE and not gguf_keys._READ & gguf_keys._OFF.keys()
    assert not gguf_keys._HEAD_WIDTHS.keys() & gguf_keys._OFF.keys()
    assert not gguf_keys._TOKENIZER_READ & (gguf_keys._TOKENIZER_FREE | gguf_keys._TOKENIZER_OFF.keys())


VALUES = st.one_of(
    st.booleans(),
    st.integers(0, 2**32 - 1),
    st.floats(width=32),
    st.text(min_size=1, max_size=20),
    st.lists(st.integers(0, 300), min_size=1, max_size=4),
)
KNOWN = sorted(
    gguf_keys._READ | gguf_keys._FREE | gguf_keys._OFF.keys() | gguf_keys._HEAD_WIDTHS.keys()
    | ALL["gemma3"].gguf_keys
)  # fmt: skip


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(arch=st.sampled_from(ARCHITECTURES), key=st.sampled_from(KNOWN), value=VALUES)
def test_any_value_of_a_known_key_is_honoured_or_refused_by_name(
    tmp_path: Path, arch: str, key: str, value: object
) -> None:
    """Whatever loads and is another model than without the key differs in what the key says."""
    try:
        got = config(tmp_path, arch, metadata={key: value})
    except (UnsupportedModel, CorruptModel) as error:
        assert "m.gguf" in str(error)
        return
    if key in gguf_keys._OFF and key not in ALL[arch].gguf_keys:
        assert got == config(tmp_path, arch)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(arch=st.sampled_from(ARCHITECTURES), key=st.text(string.ascii_lowercase + "._", min_size=1), value=VALUES)
def test_any_unknown_key_of_the_architecture_is_refused(tmp_path: Path, arch: str, key: str, value: object) -> None:
    if key in KNOWN:
        return
    with pytest.raises(UnsupportedModel, match="not known here"):
        config(tmp_path, arch, metadata={key: value})
