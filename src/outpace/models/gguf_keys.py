"""Which metadata keys of a GGUF file are read, which say nothing about tokens or arithmetic, and which are refused.

A key of the file's architecture that is in none of these tables is refused: nobody here knows what it changes. So is
one of the tokenizer. Keys of `general.` describe the file, but for those below; keys of any other name are notes of the
program that wrote the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import CorruptModel, UnsupportedModel
from .architecture import ARCHITECTURES
from .key_tables import names, shown

#: Read by models.gguf, which raises for values that it cannot honour
_READ = names(
    "context_length embedding_length block_count feed_forward_length attention.head_count attention.head_count_kv "
    "attention.key_length attention.value_length attention.layer_norm_rms_epsilon rope.freq_base rope.dimension_count "
    "rope.scaling.type rope.scaling.factor rope.scale_linear rope.scaling.original_context_length"
)
#: No effect: the rows of the embedding are the vocabulary; whether a model was tuned at its scaling changes nothing
_FREE = frozenset({"vocab_size", "rope.scaling.finetuned"})

_EXPERTS = "a mixture of experts; supported: dense models"
_YARN = "a parameter of YaRN, which is not supported"
#: Features that are not built: key -> values that leave them off, and what the key is
_OFF: dict[str, tuple[tuple[Any, ...], str]] = {
    "attention.causal": ((True,), "attention that also looks ahead, as embedding models have it"),
    "attention.max_alibi_bias": ((0,), "ALiBi positions"),
    "attention.clamp_kqv": ((0,), "clamped queries, keys and values"),
    "attention.scale": ((0,), "an attention scale of its own"),
    "attention.temperature_scale": ((0,), "attention scaled by position"),
    "attention.temperature_length": ((0,), "attention scaled by position"),
    "attention.shared_kv_layers": ((0,), "layers that share keys and values"),
    "attention.sliding_window": ((0,), "sliding windows in layers that the file does not name"),
    "attn_logit_softcapping": ((0,), "capped attention scores"),
    "final_logit_softcapping": ((0,), "capped logits"),
    "router_logit_softcapping": ((0,), _EXPERTS),
    "logit_scale": ((0, 1), "scaled logits"),
    "embedding_scale": ((0, 1), "scaled embeddings"),
    "residual_scale": ((0, 1), "scaled residuals"),
    "use_parallel_residual": ((False,), "attention and MLP side by side"),
    "pooling_type": ((0,), "an embedding model"),
    "decoder_block_count": ((0,), "an encoder with a decoder"),
    "leading_dense_block_count": ((0,), _EXPERTS),
    "nextn_predict_layers": ((0,), "layers that predict further tokens"),
    "interleave_moe_layer_step": ((0,), _EXPERTS),
    "moe_every_n_layers": ((0,), _EXPERTS),
    "rope.dimension_sections": (([], [0], [0, 0], [0, 0, 0], [0, 0, 0, 0]), "rotary embedding in sections"),
    "rope.scaling.attn_factor": ((0, 1), _YARN),
    "rope.scaling.yarn_log_multiplier": ((0,), _YARN),
    "rope.scaling.yarn_ext_factor": ((-1, 0), _YARN),
    "rope.scaling.alpha": ((0,), "rotary scaling by alpha"),
    "tensor_data_layout": (("", "reference", "Meta AI original pth"), "another order of the tensors' rows"),
} | {
    f"expert_{name}": ((0, False), _EXPERTS)
    for name in names(
        "count used_count feed_forward_length shared_count shared_feed_forward_length weights_scale weights_norm "
        "gating_func group_count group_used_count group_scale"
    )
}  # fmt: skip
#: Widths that must be those of the keys: key -> what it would mean otherwise
_HEAD_WIDTHS = {
    "attention.value_length": "values of another width than the keys",
    "rope.dimension_count": "rotary embedding of a part of each head",
    "attention.key_length_swa": "heads of another width in sliding layers",
    "attention.value_length_swa": "heads of another width in sliding layers",
    "rope.dimension_count_swa": "heads of another width in sliding layers",
}

_TOKENIZER_READ = names(
    "model pre tokens token_type scores merges bos_token_id eos_token_id eos_token_ids eot_token_id eom_token_id "
    "unknown_token_id padding_token_id add_bos_token add_eos_token add_space_prefix"
)
#: Ids that other programs look up, and sizes that the lists have anyway
_TOKENIZER_FREE = names(
    "separator_token_id seperator_token_id cls_token_id mask_token_id prefix_token_id suffix_token_id middle_token_id "
    "fim_pre_token_id fim_suf_token_id fim_mid_token_id fim_pad_token_id fim_rep_token_id fim_sep_token_id "
    "token_type_count"
)
_TOKENIZER_OFF: dict[str, tuple[tuple[Any, ...], str]] = {
    "add_sep_token": ((False,), "a separator behind every text"),
    "remove_extra_whitespaces": ((False,), "spaces that are merged before the text is cut"),
    "precompiled_charsmap": (([], ""), "a table of characters that replaces others first"),
    "escape_whitespaces": ((True,), "spaces that are not escaped"),
    "normalizer.lowercase": ((False,), "text in lower case"),
    "normalizer.strip_accents": ((False,), "text without accents"),
    "suppress_tokens": (([],), "tokens that are never to be chosen"),
}
_GENERAL_OFF: dict[str, tuple[tuple[Any, ...], str]] = {
    "general.type": (("model",), "no whole model (an adapter, a projector or a vocabulary alone)"),
    "general.quantization_version": ((2,), "blocks of an older layout"),
    "split.count": ((0, 1), "one part of a model; join the parts with llama-gguf-split --merge"),
}
_FLAGS = ("add_bos_token", "add_eos_token", "add_space_prefix")
_NOT_A_MODEL = ("adapter.", "clip.")


def check_keys(source: str, metadata: Mapping[str, Any], architecture: str) -> None:
    """Raises UnsupportedModel for a key that changes tokens or arithmetic in a way that is not built, or might;
    CorruptModel for a switch that is neither true nor false. `source` names the file in messages."""
    _refuse_unless_off(source, metadata, "", _GENERAL_OFF)
    prefix = f"{architecture}."
    read = _READ | ARCHITECTURES[architecture].gguf_keys
    off = {key: entry for key, entry in _OFF.items() if key not in read}
    for key in metadata:
        if key.startswith(_NOT_A_MODEL):
            raise UnsupportedModel(f"{source}: {key} says that the file is no whole model (an adapter or a projector)")
        if key.startswith(prefix):
            known = key.removeprefix(prefix) in read | _FREE | off.keys() | _HEAD_WIDTHS.keys()
        elif key.startswith("tokenizer."):
            name = key.removeprefix("tokenizer.ggml.")
            known = name in _TOKENIZER_READ | _TOKENIZER_FREE | _TOKENIZER_OFF.keys() or _describes_tokenizer(key)
        else:
            known = True
        if not known:
            raise UnsupportedModel(
                f"{source}: the metadata key {key} (={shown(metadata[key])}) is not known here: it may change the "
                f"tokens or the arithmetic of a {architecture} model, so the file is refused; use a file without it"
            )
    _refuse_unless_off(source, metadata, prefix, off)
    _refuse_unless_off(source, metadata, "tokenizer.ggml.", _TOKENIZER_OFF)
    for flag in _FLAGS:
        value = metadata.get(f"tokenizer.ggml.{flag}", False)
        if not isinstance(value, bool):
            raise CorruptModel(f"{source}: tokenizer.ggml.{flag}={shown(value)}; it must be true or false")
    if metadata.get("tokenizer.ggml.model") == "gpt2" and metadata.get("tokenizer.ggml.add_space_prefix"):
        raise UnsupportedModel(
            f"{source}: tokenizer.ggml.add_space_prefix=True, a space before every text, is supported with the "
            "tokenizer 'llama' only, not with 'gpt2'"
        )


def check_head_widths(source: str, metadata: Mapping[str, Any], architecture: str, head_dim: int) -> None:
    """Raises UnsupportedModel where a width of heads is not `head_dim`, the keys' own."""
    for key, meaning in _HEAD_WIDTHS.items():
        value = metadata.get(f"{architecture}.{key}", head_dim)
        if isinstance(value, bool) or value != head_dim:
            raise UnsupportedModel(
                f"{source}: {architecture}.{key}={shown(value)}: {meaning}; supported: {head_dim}, as the keys have"
            )


def _describes_tokenizer(key: str) -> bool:
    """The chat templates, of which the unnamed one is used, and other programs' copies of the vocabulary."""
    return key.startswith("tokenizer.chat_template") or key in ("tokenizer.huggingface.json", "tokenizer.rwkv.world")


def _refuse_unless_off(
    source: str, metadata: Mapping[str, Any], prefix: str, table: Mapping[str, tuple[tuple[Any, ...], str]]
) -> None:
    for key, (off, meaning) in table.items():
        value = metadata.get(prefix + key, off[0])
        if value not in off:
            allowed = " or ".join(map(repr, off))
            raise UnsupportedModel(
                f"{source}: {prefix}{key}={shown(value)}: {meaning}; supported: {allowed}, or a file without the key"
            )
