"""Narrow precisions stay near float32."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from toy import ARCHITECTURES, Rig, hf_logits, random_tokens, toy_checkpoint, toy_model

from outpace.errors import ParameterError
from outpace.models.torch_decoder import TorchDecoder


def error(ours, exact):
    return float(np.abs(ours - exact).mean())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_bfloat16_errs_at_most_twice_as_much_as_transformers(load, architecture):
    checkpoint, model = toy_checkpoint(architecture)
    tokens = random_tokens(40, 20)
    exact = hf_logits(model, tokens)
    theirs = hf_logits(toy_model(architecture).to(torch.bfloat16), tokens)
    rig = Rig(load(checkpoint, "bfloat16"))
    assert error(rig.feed(rig.cache.new(), tokens), exact) <= 2 * error(theirs, exact)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_int8_is_near_float32(architecture):
    checkpoint, model = toy_checkpoint(architecture)
    tokens = random_tokens(40, 21)
    exact = hf_logits(model, tokens)
    rig = Rig(TorchDecoder.from_checkpoint(checkpoint, "int8"))
    ours = rig.feed(rig.cache.new(), tokens)
    assert 0 < error(ours, exact) < 0.1 * exact.std()


def test_int4_is_refused_by_name():
    with pytest.raises(ParameterError, match=r"int4.*float32, bfloat16 or int8"):
        TorchDecoder.from_checkpoint(toy_checkpoint("llama")[0], "int4")


def test_weight_bytes_count_what_a_step_reads():
    checkpoint, _ = toy_checkpoint("qwen2")
    c = checkpoint.config
    rows = (c.num_heads + 2 * c.num_kv_heads) * c.head_dim
    per_layer = c.hidden_size * (rows + c.num_heads * c.head_dim + 3 * c.intermediate_size) + rows  # bias
    values = c.num_layers * per_layer + c.vocab_size * c.hidden_size
    assert TorchDecoder.from_checkpoint(checkpoint).weight_bytes == 4 * values
    assert TorchDecoder.from_checkpoint(checkpoint, "bfloat16").weight_bytes == 2 * values
