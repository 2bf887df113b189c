"""Which fields of a `config.json` are read, which say nothing about the arithmetic, and which must be off.

A field that is in none of these tables, and neither null, false nor empty, is refused: nobody here knows what it
changes. Fields with a leading underscore are the library's own notes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import UnsupportedModel
from .architecture import ARCHITECTURES
from .key_tables import names, shown

_READ = names(
    "model_type vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
    "head_dim max_position_embeddings rms_norm_eps rope_theta rope_scaling rope_parameters layer_types "
    "tie_word_embeddings bos_token_id eos_token_id"
)
#: Of training, of how generation is asked for, of labels and versions
_FREE = names(
    "architectures auto_map torch_dtype dtype transformers_version tokenizer_class use_cache return_dict "
    "output_hidden_states output_attentions output_scores return_dict_in_generate torchscript use_bfloat16 "
    "tf_legacy_loss initializer_range attention_dropout hidden_dropout embd_pdrop resid_pdrop attn_pdrop "
    "pretraining_tp pad_token_id sep_token_id unk_token_id id2label label2id num_labels problem_type finetuning_task "
    "task_specific_params max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty "
    "temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size "
    "encoder_no_repeat_ngram_size num_return_sequences chunk_size_feed_forward is_decoder is_llama_config "
    "model_max_length max_sequence_length router_aux_loss_coef unsloth_fixed unsloth_version "
    "cache_implementation attn_implementation name"
)
#: Features that change the arithmetic and are not built: field -> values that leave them off
_MUST_BE_OFF: dict[str, tuple[Any, ...]] = {
    "attention_bias": (None, False),
    "mlp_bias": (None, False),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "use_bidirectional_attention": (None, False),
    "num_local_experts": (None, 0, 1),
    "num_experts": (None, 0, 1),
    "partial_rotary_factor": (None, 1, 1.0),
    "quantization_config": (None, {}),
    "rope_interleaved": (None, False),
    "use_mrope": (None, False),
    "is_encoder_decoder": (None, False),
    "add_cross_attention": (None, False),
    "tie_encoder_decoder": (None, False),
    "pruned_heads": (None, {}),
    "bad_words_ids": (None, []),
    "suppress_tokens": (None, []),
    "begin_suppress_tokens": (None, []),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
}
_ROPE_READ = names(
    "rope_type type rope_theta factor low_freq_factor high_freq_factor original_max_position_embeddings "
    "partial_rotary_factor"
)


def check_fields(values: Mapping[str, Any], architecture: str, source: str, supported: str) -> None:
    """Raises UnsupportedModel, naming the field and the file, for what changes the arithmetic and is not built, or
    might. `supported` names the models."""
    for name, off in _MUST_BE_OFF.items():
        if values.get(name) not in off:
            raise UnsupportedModel(
                f"{source}: {name}={values.get(name)!r} is not supported; supported: {' or '.join(map(repr, off))} "
                f"(models of {supported})"
            )
    own = ARCHITECTURES[architecture]
    known = _READ | own.fields | _FREE | own.without_effect | _MUST_BE_OFF.keys()
    _refuse_unknown(values, known, architecture, source, "")


def check_rope_fields(values: Mapping[str, Any], architecture: str, source: str) -> None:
    """The same for one set of rotary parameters."""
    _refuse_unknown(values, _ROPE_READ, architecture, source, "of the rotary embedding ")


def _refuse_unknown(values: Mapping[str, Any], known: Any, architecture: str, source: str, of: str) -> None:
    for name, value in values.items():
        if name not in known and not name.startswith("_") and value not in (None, False, "", [], {}):
            raise UnsupportedModel(
                f"{source}: the field {name}={shown(value)} {of}is not known here: it "
                f"may change the arithmetic of a {architecture} model; if it does not, take it out of the file"
            )
