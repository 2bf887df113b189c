"""Writes small GGUF files with random weights, as the converters of the field write them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_letters() -> list[str]:
    """The 256 printable letters that byte-level BPE writes bytes as, in order of the bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(hidden)) for b in range(256)]


def bpe_vocabulary(writer: gguf.GGUFWriter, pre: str = "smollm") -> int:
    """Three control tokens, the bytes, two merges; returns the number of tokens."""
    control = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokens = [*control, *byte_letters(), "th", "the", "Ġthe", "[PAD0]"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (len(tokens) - 4) + [5])
    writer.add_token_merges(["t h", "th e", "Ġ the"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHATML)
    return len(tokens)


def spm_vocabulary(writer: gguf.GGUFWriter, space_prefix: bool = False) -> int:
    pieces = [("<pad>", 0.0, 3), ("<eos>", 0.0, 3), ("<bos>", 0.0, 3), ("<unk>", 0.0, 2)]
    pieces += [("  ", -1000.0, 4), ("   ", -1000.0, 4), ("\n\n", -1000.0, 4), ("<end_of_turn>", -1000.0, 3)]
    pieces += [(f"<0x{b:02X}>", 0.0, 6) for b in range(256)]
    pieces += [("▁the", -1.0, 1), ("the", -2.0, 1), ("he", -3.0, 1), ("▁t", -4.0, 1), ("th", -5.0, 1)]
    pieces += [(c, -100.0, 1) for c in "▁abcdefghijklmnopqrstuvwxyz\n"]
    writer.add_tokenizer_model("llama")
    writer.add_token_list([p[0] for p in pieces])
    writer.add_token_scores([p[1] for p in pieces])
    writer.add_token_types([p[2] for p in pieces])
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(1)
    writer.add_unk_token_id(3)
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(space_prefix)
    return len(pieces)


def shapes(arch: str, vocab: int, width: int, layers: int, heads: int, kv_heads: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes in a GGUF file; the MLP is as wide as the model, heads share the width evenly."""
    kv = width // heads * kv_heads
    block: dict[str, tuple[int, ...]] = {"attn_norm.weight": (width,), "ffn_norm.weight": (width,)}
    block |= {f"{n}.weight": (width, width) for n in ("attn_q", "attn_output", "ffn_gate", "ffn_up", "ffn_down")}
    block |= {"attn_k.weight": (kv, width), "attn_v.weight": (kv, width)}
    if arch == "qwen2":
        block |= {"attn_q.bias": (width,), "attn_k.bias": (kv,), "attn_v.bias": (kv,)}
    if arch in ("qwen3", "gemma3"):
        block |= {"attn_q_norm.weight": (width // heads,), "attn_k_norm.weight": (width // heads,)}
    if arch == "gemma3":
        block |= {"post_attention_norm.weight": (width,), "post_ffw_norm.weight": (width,)}
    top = {"token_embd.weight": (vocab, width), "output_norm.weight": (width,)}
    return top | {f"blk.{i}.{n}": s for i in range(layers) for n, s in block.items()}


def write(
    path: Path,
    arch: str = "llama",
    *,
    width: int = 32,
    layers: int = 1,
    heads: int = 4,
    kv_heads: int = 2,
    tensors: Mapping[str, NDArray[Any] | None] = {},
    raw_types: Mapping[str, gguf.GGMLQuantizationType] = {},
    metadata: Mapping[str, Any] = {},
    keys: Mapping[str, Any] = {},
    spm: bool = False,
    space_prefix: bool = False,
    pre: str = "smollm",
    theta: float = 10_000.0,
    seed: int = 0,
) -> dict[str, NDArray[Any]]:
    """Write the file; returns its tensors. `tensors` replaces some (None: left out), `raw_types` says which of
    them are already quantised bytes, `metadata` adds `arch.KEY` entries, `keys` entries of any name; both replace what
    is there (None: left out).
    """
    writer = gguf.GGUFWriter(path, arch)
    vocab = spm_vocabulary(writer, space_prefix) if spm else bpe_vocabulary(writer, pre)
    writer.add_block_count(layers)
    writer.add_context_length(128)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(width)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(theta)
    for key, value in ({f"{arch}.{k}": v for k, v in metadata.items()} | dict(keys)).items():
        writer.kv_data[0].pop(key, None)
        add = {
            str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32,
            list: writer.add_array,
        }  # fmt: skip
        if value is not None:
            add[type(value)](key, value)
    rng = np.random.default_rng(seed)
    contents: dict[str, Any] = {
        name: rng.standard_normal(shape).astype(np.float32)
        for name, shape in shapes(arch, vocab, width, layers, heads, kv_heads).items()
    }
    contents |= tensors
    kept = {name: values for name, values in contents.items() if values is not None}
    for name, values in kept.items():
        writer.add_tensor(name, values, raw_dtype=raw_types.get(name))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return kept
