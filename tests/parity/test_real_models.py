"""A real model, through the product's own loader, gives the same greedy tokens as `transformers` in float32."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
import transformers
from toy import Rig
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from outpace.models.prepared import OpenModel, open_model
from outpace.ops.masks import CAUSAL

PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):\n",
    "Once upon a time, in a village by the sea,",
    "Water boils at a lower temperature on a mountain because",
    "1, 1, 2, 3, 5, 8, 13,",
    "Dear Sir or Madam,\nI am writing to",
    "SELECT name, age FROM people WHERE",
    "The three most important ideas of thermodynamics are",
    "Q: Why do leaves change colour in autumn?\nA:",
    "for i in range(10):\n    if i % 2 == 0:\n",
]
NEW = 64


@cache
def theirs(name: str) -> tuple[OpenModel, list[list[int]], list[list[int]]]:
    """The model, the prompts as tokens and what `transformers` says, which reads the same file by itself."""
    opened = open_model(name)
    path = opened.source.path
    prompts = [opened.tokenizer.prompt(text) for text in PROMPTS]
    config = transformers.AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    tensors = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)["tensors"]
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    model.generation_config.eos_token_id = None
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.generate(ids, max_new_tokens=NEW, do_sample=False, pad_token_id=0)
        answers.append(out[0, len(prompt) :].tolist())
    return opened, prompts, answers


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smollm2-135m", "qwen2.5-coder-0.5b"])
def test_ten_prompts_give_the_same_64_tokens(load, name):
    opened, prompts, answers = theirs(name)
    rig = Rig(load(opened.checkpoint()), pages=128)
    seqs = [rig.cache.new() for _ in prompts]
    steps = prompts
    ours: list[list[int]] = [[] for _ in prompts]
    for _ in range(NEW):
        rows = rig.step(*((seq, tokens, CAUSAL) for seq, tokens in zip(seqs, steps, strict=True)))
        for seq, tokens, logits, out in zip(seqs, steps, rows, ours, strict=True):
            rig.cache.commit(seq, range(len(tokens)))
            out.append(int(np.argmax(logits[-1])))
        steps = [[out[-1]] for out in ours]
    assert ours == answers
