"""Toy-size models with random weights, for tests: as a checkpoint in memory and as the `transformers` model.

Weights, norms and biases are drawn wide enough that every part of a layer shows in the logits.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from outpace.cache.pages import PagedKVCache
from outpace.models.batch import Span, pack
from outpace.models.checkpoint import Checkpoint, TokenizerFiles
from outpace.models.config import ModelConfig
from outpace.models.decoder import NO_TAPS, Decoder, Taps
from outpace.ops.masks import CAUSAL, Mask

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "gemma3")
VOCAB, BOS, EOS, WINDOW = 272, 256, 257, 8

_CLASSES: dict[str, tuple[str, str]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM"),
    "mistral": ("MistralConfig", "MistralForCausalLM"),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM"),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM"),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM"),
}
_SIZES: dict[str, Any] = dict(
    vocab_size=VOCAB,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=512,
    bos_token_id=BOS,
    eos_token_id=EOS,
    pad_token_id=None,
)
_OWN: dict[str, dict[str, Any]] = {
    "llama": dict(hidden_size=96, num_key_value_heads=1, num_attention_heads=3, head_dim=32),
    "mistral": dict(sliding_window=WINDOW),
    "qwen2": dict(tie_word_embeddings=True),
    "qwen3": dict(head_dim=32),
    "gemma3": dict(
        head_dim=32,
        num_hidden_layers=4,
        num_key_value_heads=1,
        sliding_window=WINDOW,
        query_pre_attn_scalar=24,
        layer_types=["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
    ),
}


class MemoryCheckpoint(Checkpoint):
    """Tensors in a dictionary."""

    def __init__(self, config: ModelConfig, tensors: dict[str, NDArray[np.float32]]) -> None:
        self.config, self.tensors = config, tensors

    def names(self) -> set[str]:
        return set(self.tensors)

    def tensor(self, name: str) -> NDArray[np.float32]:
        return self.tensors[name]

    def tokenizer_files(self) -> TokenizerFiles:
        """One token per byte."""
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        vocab = {c: i for i, c in enumerate([*alphabet, "<s>", "</s>"])}
        tokenizer = Tokenizer(BPE(vocab, []))
        tokenizer.add_special_tokens(["<s>", "</s>"])
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
        return TokenizerFiles(json.dumps(json.loads(tokenizer.to_str())), config)


def toy_model(architecture: str, seed: int = 0, **overrides: Any) -> Any:
    """A `transformers` model of toy size in float32; `overrides` are fields of its configuration."""
    config_class, model_class = (getattr(transformers, name) for name in _CLASSES[architecture])
    config = config_class(**_SIZES | _OWN[architecture] | overrides)
    config._attn_implementation = "eager"
    model = model_class(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if "norm" in name:
                p.copy_(0.2 * noise + (0.0 if architecture == "gemma3" else 1.0))
            elif p.ndim == 1:
                p.copy_(0.3 * noise)
            elif "embed" in name:
                p.copy_(noise * (0.15 if architecture == "gemma3" else 0.5))
            else:
                p.copy_(noise * 1.2 / p.shape[1] ** 0.5)
    return model


@cache
def _toy(architecture: str, seed: int, overrides: str) -> tuple[MemoryCheckpoint, Any]:
    model = toy_model(architecture, seed, **json.loads(overrides))
    tensors = {name: t.detach().numpy().copy() for name, t in model.state_dict().items()}
    config = ModelConfig.from_hf(model.config.to_dict(), source=f"toy {architecture}")
    return MemoryCheckpoint(config, tensors), model


def toy_checkpoint(architecture: str, seed: int = 0, **overrides: Any) -> tuple[MemoryCheckpoint, Any]:
    """A toy checkpoint and the `transformers` model of the same weights; made once for all tests. Change neither."""
    return _toy(architecture, seed, json.dumps(overrides, sort_keys=True))


class Rig:
    """A decoder over a paged cache, one packed step at a time."""

    def __init__(self, decoder: Decoder, pages: int = 64) -> None:
        self.decoder = decoder
        self.cache = PagedKVCache(decoder.new_storage(pages))

    def step(
        self,
        *steps: tuple[int, Sequence[int] | NDArray[np.int64], Mask] | tuple[int, Sequence[int], Mask, int],
        taps: Taps = NO_TAPS,
    ) -> list[NDArray[np.float32]]:
        """Run (sequence, tokens, mask[, first offset]) of each sequence in one step, reserving what is needed.
        Logits of every row, per sequence [n, V]. Nothing is committed. Hidden states are left in `self.hidden`.
        """
        spans, seqs = [], []
        for seq, tokens, mask, *offset in steps:
            first = offset[0] if offset else 0
            self.cache.reserve(seq, first + len(tokens))
            spans.append(Span(np.asarray(tokens, dtype=np.int64), self.cache.length(seq), mask, first))
            seqs.append(seq)
        batch = pack(spans, self.cache.page_tables(seqs))
        self.output = out = self.decoder.forward(batch, self.cache.storage, taps)
        self.hidden = {
            layer: (h if isinstance(h, np.ndarray) else h.cpu().numpy()).copy() for layer, h in out.hidden.items()
        }
        logits = out.logits.cpu().numpy().copy()
        return [logits[a:b] for a, b in zip(batch.row_start, batch.row_start[1:], strict=False)]

    def feed(self, seq: int, tokens: Sequence[int] | NDArray[np.int64]) -> NDArray[np.float32]:
        """Append tokens causally and commit them. [n, V]"""
        (logits,) = self.step((seq, tokens, CAUSAL))
        self.cache.commit(seq, range(len(tokens)))
        return logits


def random_tokens(n: int, seed: int = 0) -> NDArray[np.int64]:
    return np.random.default_rng(seed).integers(0, 256, n)


@torch.inference_mode()
def hf_logits(
    model: Any,
    tokens: Sequence[int] | NDArray[np.int64],
    sees: Callable[[int, int], bool] | None = None,
) -> NDArray[np.float32]:
    """Logits of every place of one sequence by `transformers`, without a cache. [n, V]

    `sees(i, j)`: whether place i sees place j, for masks other than causal; windows are applied here by distance.
    """
    ids = torch.as_tensor(np.asarray(tokens))[None]
    if sees is None:
        return model(ids, use_cache=False).logits[0].float().numpy()
    n = ids.shape[1]
    config = model.config
    window = getattr(config, "sliding_window", None)
    full = torch.tensor([[sees(i, j) for j in range(n)] for i in range(n)])
    near = torch.tensor([[window is None or j > i - window for j in range(n)] for i in range(n)])
    additive = {
        name: torch.zeros(n, n, dtype=model.dtype).masked_fill(~m, torch.finfo(model.dtype).min)[None, None]
        for name, m in (("full_attention", full), ("sliding_attention", full & near))
    }
    mask: Any = additive
    if config.model_type != "gemma3_text":  # one mask for all layers
        mask = additive["full_attention" if window is None else "sliding_attention"]
    positions = torch.arange(n)[None]
    return model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits[0].float().numpy()
