"""ModelConfig.from_hf: configurations as they stand in real repositories, old and new, and damaged ones."""

from __future__ import annotations

import numpy as np
import pytest
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from outpace.errors import CorruptModel, UnsupportedModel
from outpace.models.config import ModelConfig, RopeScaling, rope_inv_freq

SMOLLM2 = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "attention_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "vocab_size": 49152,
}
GEMMA3_OLD = {
    "model_type": "gemma3",
    "eos_token_id": [1, 106],
    "text_config": {
        "model_type": "gemma3_text",
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 12,
        "sliding_window": 1024,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    },
    "vision_config": {"hidden_size": 1152},
}


def read(raw, **changes):
    return ModelConfig.from_hf(raw | changes, source="config.json")


def test_smollm2():
    c = read(SMOLLM2)
    assert (c.architecture, c.head_dim, c.num_kv_heads, c.max_position) == ("llama", 64, 3, 8192)
    assert (c.rope_theta, c.rope_scaling, c.rms_norm_eps) == (100000.0, None, 1e-5)
    assert c.layer_types == ("full",) * 30 and c.sliding_window is None
    assert c.tie_embeddings and not c.qkv_bias and not c.qk_norm
    assert (c.bos_id, c.eos_ids, c.attention_scale) == (1, (2,), 0.125)


def test_nested_gemma3_with_old_rope_fields_and_defaults():
    c = read(GEMMA3_OLD)
    assert (c.architecture, c.vocab_size, c.num_heads, c.num_kv_heads, c.head_dim) == ("gemma3", 262208, 8, 4, 256)
    assert c.layer_types == (("sliding",) * 5 + ("full",)) * 2 and c.sliding_window == 1024
    assert (c.rope_theta, c.rope_local_theta, c.rope_scaling) == (1e6, 1e4, RopeScaling("linear", 8.0))
    assert c.norm_plus_one and c.post_norms and c.qk_norm and c.tie_embeddings
    assert (c.activation, c.embedding_scale, c.attention_scale) == ("gelu_tanh", 2560**0.5, 1 / 16)
    assert (c.bos_id, c.eos_ids) == (2, (1, 106))
    np.testing.assert_allclose(rope_inv_freq(c, "full"), 1e6 ** (-np.arange(128) / 128) / 8)
    np.testing.assert_allclose(rope_inv_freq(c, "sliding"), 1e4 ** (-np.arange(128) / 128))


def test_qwen2_slides_only_when_told_to():
    raw = SMOLLM2 | {"model_type": "qwen2", "sliding_window": 64, "max_window_layers": 20}
    assert read(raw, use_sliding_window=False).layer_types == ("full",) * 30
    c = read(raw, use_sliding_window=True)
    assert c.layer_types == ("full",) * 20 + ("sliding",) * 10 and c.sliding_window == 64 and c.qkv_bias


def test_mistral_window_null_and_given():
    raw = SMOLLM2 | {"model_type": "mistral"}
    assert read(raw, sliding_window=None).layer_types == ("full",) * 30
    assert read(raw, sliding_window=4096).layer_types == ("sliding",) * 30


CLASSES = ["LlamaConfig", "MistralConfig", "Qwen2Config", "Qwen3Config", "Gemma3TextConfig"]
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize("name", CLASSES)
def test_what_transformers_writes_is_read_back(name):
    theirs = getattr(transformers, name)()
    ours = read(theirs.to_dict())
    assert ours.num_layers == theirs.num_hidden_layers and ours.vocab_size == theirs.vocab_size
    assert ours.rms_norm_eps == theirs.rms_norm_eps and ours.max_position == theirs.max_position_embeddings
    if getattr(theirs, "layer_types", None):
        assert ours.layer_types == tuple(t.removesuffix("_attention") for t in theirs.layer_types)


@pytest.mark.parametrize("style", ["old", "new"])
@pytest.mark.parametrize("scaling", [{"rope_type": "linear", "factor": 4.0}, LLAMA3])
def test_rope_scaling_of_both_styles_equals_transformers(style, scaling):
    theirs = transformers.LlamaConfig(rope_parameters=scaling | {"rope_theta": 5e5}, max_position_embeddings=131072)
    raw = theirs.to_dict()
    if style == "old":
        del raw["rope_parameters"]
        raw |= {"rope_theta": 5e5, "rope_scaling": {**scaling, "type": scaling["rope_type"]}}
    expected, _ = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](theirs, "cpu")
    np.testing.assert_allclose(rope_inv_freq(read(raw), "full"), expected.numpy(), rtol=2e-6)


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"model_type": "mamba"}, ["mamba", "llama", "gemma3"]),
        ({"model_type": "mixtral"}, ["mixtral", "qwen3"]),
        ({"model_type": None, "architectures": ["FooForCausalLM"]}, ["FooForCausalLM", "supported"]),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, ["yarn", "linear", "llama3"]),
        ({"rope_parameters": {"rope_type": "longrope"}}, ["longrope", "llama3"]),
        ({"mlp_bias": True}, ["mlp_bias"]),
        ({"attention_bias": True}, ["attention_bias"]),
        ({"num_local_experts": 8}, ["num_local_experts"]),
        ({"attn_logit_softcapping": 50.0}, ["attn_logit_softcapping"]),
        ({"quantization_config": {"quant_method": "gptq"}}, ["quantization_config"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor"]),
        ({"hidden_act": "relu"}, ["hidden_act", "silu"]),
        ({"layer_types": ["chunked_attention"] * 30}, ["layer_types", "sliding_attention"]),
    ],
)
def test_unsupported_features_are_named_with_what_is_supported(changes, names):
    with pytest.raises(UnsupportedModel) as error:
        read(SMOLLM2, **changes)
    assert all(name in str(error.value) for name in ["config.json", *names])


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"hidden_size": -1}, "hidden_size"),
        ({"hidden_size": "big"}, "hidden_size"),
        ({"hidden_size": 577}, "hidden_size"),
        ({"vocab_size": None}, "vocab_size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"num_key_value_heads": 4}, "num_key_value_heads"),
        ({"head_dim": 63}, "head_dim"),
        ({"rms_norm_eps": 0}, "rms_norm_eps"),
        ({"rope_theta": True}, "rope_theta"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
        ({"rope_scaling": [1]}, "rope_scaling"),
        ({"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}}, "high_freq_factor"),
        ({"layer_types": ["full_attention"] * 29}, "layer_types"),
        ({"layer_types": ["sliding_attention"] * 30}, "sliding_window"),
        ({"eos_token_id": ["</s>"]}, "eos_token_id"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
    ],
)
def test_damaged_fields_are_named(changes, field):
    with pytest.raises(CorruptModel, match=field):
        read(SMOLLM2, **changes)


def test_a_configuration_that_is_no_object():
    with pytest.raises(CorruptModel, match="JSON object"):
        ModelConfig.from_hf([1], source="config.json")


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"brand_new": 3}, "brand_new"),
        ({"brand_new": "x" * 500}, "brand_new"),
        ({"query_pre_attn_scalar": 64}, "query_pre_attn_scalar"),  # of gemma3 alone
        ({"rope_interleaved": True}, "rope_interleaved"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder"),
        ({"suppress_tokens": [1]}, "suppress_tokens"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads"),
        ({"rope_scaling": {"rope_type": "default", "mrope_section": [16, 24, 24]}}, "mrope_section"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "attention_factor": 1.2}}, "attention_factor"),
        ({"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"type": "linear", "factor": 2.0}}, "only one"),
    ],
)
def test_fields_that_may_change_the_arithmetic_are_refused(changes, name):
    with pytest.raises(UnsupportedModel, match=name) as error:
        read(SMOLLM2, **changes)
    assert "config.json" in str(error.value) and len(str(error.value)) < 600


def test_fields_without_effect_change_nothing():
    free = {
        "torch_dtype": "bfloat16", "transformers_version": "4.40.0", "_name_or_path": "x", "use_cache": True,
        "is_llama_config": True, "temperature": 0.6, "brand_new": None, "brand_new_flag": False, "brand_new_list": [],
        "suppress_tokens": [], "sliding_window": 64, "attention_dropout": 0.1,
    }  # fmt: skip
    assert read(SMOLLM2, **free) == read(SMOLLM2)
