"""What becomes of each field of a request: of OpenAI's API, vLLM's, llama.cpp's and others'. One table.

honoured  it is a field of the body's model and does what it says
harmless  it changes nothing here, or has a value at which it changes nothing: it is taken, and the response names it in
          `outpace.ignored`
refused   it would change the answer, or the client waits for something that does not come: status 400 with the reason

A field that stands in no table is refused as unknown. Null is everywhere the same as no field.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic_core import PydanticCustomError

_ABSENT: tuple[Any, ...] = (False, [], {})  # a refused field may say that it is not wanted


@dataclass(frozen=True, slots=True)
class Honoured:
    """`what` it means, where its name does not say it."""

    what: str = ""


@dataclass(frozen=True, slots=True)
class Harmless:
    """`values`: the only ones that are taken (None: any)."""

    why: str
    values: tuple[Any, ...] | None = None


@dataclass(frozen=True, slots=True)
class Refused:
    why: str


Rule = Honoured | Harmless | Refused


def sift(value: Mapping[str, Any], rules: Mapping[str, Rule]) -> tuple[dict[str, Any], list[str]]:
    """The fields that are left for the model, and the names of those that were taken without effect. Raises an error of
    type `unsupported`, with the `field` in its context, for one that is refused."""
    left: dict[str, Any] = {}
    ignored: list[str] = []
    for name, item in value.items():
        rule = rules.get(name, _HONOURED)
        if isinstance(rule, Honoured):
            left[name] = item
        elif item is None:
            continue
        elif _taken(rule, item):
            ignored.append(name)
        elif isinstance(rule, Harmless):
            allowed = ", ".join(map(_shown, rule.values or ()))
            raise _unsupported(name, f"{name}={_shown(item)} is not supported, only {allowed}: {rule.why}")
        else:
            raise _unsupported(name, f"{name} is not supported: {rule.why}")
    return left, ignored


_HONOURED = Honoured()


def _taken(rule: Harmless | Refused, item: Any) -> bool:
    values = _ABSENT if isinstance(rule, Refused) else rule.values
    return values is None or any(item == value and (item is value or type(item) is not bool) for value in values)


def _unsupported(field: str, message: str) -> PydanticCustomError:
    return PydanticCustomError("unsupported", "{message}", {"message": message, "field": field})


def _shown(value: Any) -> str:
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


_SPEED = "it is about speed alone"
_NO_BEAMS = "there is no beam search here, which alone looks at it"
_OFF = "there is no such sampler here; this value turns it off"
_PENALTY = "the penalties here look at all of the prompt and the output: repetition_penalty is the field for that"
_TEXT_ONLY = "text only"
_ALL_STANDARD = "what it asks for is what happens here"

REQUEST: dict[str, Rule] = {
    # OpenAI's
    **dict.fromkeys(
        (
            *("model", "messages", "prompt", "max_tokens", "max_completion_tokens", "temperature", "top_p", "n"),
            *("seed", "stop", "stream", "stream_options", "presence_penalty", "frequency_penalty", "logit_bias"),
            *("logprobs", "top_logprobs", "response_format", "tools", "tool_choice", "parallel_tool_calls"),
            *("prediction", "user"),
        ),
        Honoured(),
    ),
    "echo": Honoured("of text completions: the prompt comes before the output"),
    "suffix": Honoured("of text completions: what follows the output"),
    "best_of": Honoured("only the value of n: choices are not ranked"),
    "reasoning_effort": Honoured("a value of the chat template; without effect where that has none of this name"),
    "metadata": Harmless("nothing is stored"),
    "store": Harmless("chat completions are not stored", (False,)),
    "service_tier": Harmless("there is one tier", ("auto", "default")),
    "safety_identifier": Harmless("nobody is reported"),
    "prompt_cache_key": Harmless(_SPEED),
    "prompt_cache_retention": Harmless(_SPEED),
    "modalities": Harmless(_TEXT_ONLY, (["text"],)),
    "functions": Refused("use tools"),
    "function_call": Refused("use tool_choice"),
    "audio": Refused(_TEXT_ONLY),
    "web_search_options": Refused("the server searches nothing"),
    "verbosity": Refused("the models served here have no such setting; say it in a message"),
    # beyond OpenAI's: our own and vLLM's
    **dict.fromkeys(
        ("top_k", "min_p", "repetition_penalty", "stop_token_ids", "ignore_eos", "regex", "grammar", "outpace"),
        Honoured(),
    ),
    "min_tokens": Honoured("the tokens that end an output cannot come before so many others"),
    "guided_json": Honoured("as response_format of type json_schema"),
    "guided_regex": Honoured("as regex"),
    "guided_grammar": Honoured("as grammar"),
    "guided_choice": Honoured("the output is one of these texts"),
    "structured_outputs": Honoured("json, regex, choice, grammar or json_object: as the guided fields"),
    "chat_template_kwargs": Honoured("values for the chat template"),
    "enable_thinking": Honoured("the value of this name for the chat template"),
    "add_generation_prompt": Honoured("false: the model is not told that its turn has come"),
    "continue_final_message": Honoured("the output goes on with the last message, which is the assistant's"),
    "truncate_prompt_tokens": Honoured("the prompt's last so many tokens alone are read"),
    "priority": Honoured("as outpace.priority"),
    "add_special_tokens": Harmless("a prompt gets the model's beginning token", (True,)),
    "guided_decoding_backend": Harmless("there is one"),
    "length_penalty": Harmless(_NO_BEAMS),
    "early_stopping": Harmless(_NO_BEAMS),
    "use_beam_search": Refused("there is no beam search here"),
    "request_id": Harmless("the header x-request-id has the server's own"),
    "skip_special_tokens": Harmless("control tokens never are text here", (True,)),
    "spaces_between_special_tokens": Harmless("control tokens never are text here"),
    "include_stop_str_in_output": Harmless("the text ends before the stop string", (False,)),
    "detokenize": Harmless(_ALL_STANDARD, (True,)),
    "include_reasoning": Harmless("reasoning is not parted from the text"),
    "reasoning_format": Harmless("reasoning is not parted from the text", ("none",)),
    "guided_whitespace_pattern": Refused("give a grammar with the white space that you want"),
    "structural_tag": Refused("give a grammar"),
    "allowed_token_ids": Refused("give a grammar or a regex"),
    "bad_words": Refused("logit_bias of -100 forbids tokens"),
    "logits_processors": Refused("no code of clients is run"),
    "chat_template": Refused("the model's own is used"),
    "documents": Refused("put them into a message"),
    "mm_processor_kwargs": Refused(_TEXT_ONLY),
    "cache_salt": Refused("user parts whose cached prefixes are shared: use it"),
    "prompt_logprobs": Refused("log-probabilities of a prompt come with echo of /v1/completions"),
    "return_token_ids": Refused("use outpace.trace in a stream, or logprobs"),
    "return_tokens_as_token_ids": Refused("use outpace.trace in a stream"),
    "kv_transfer_params": Refused("there is one server"),
    "vllm_xargs": Refused("this is not vLLM"),
    # llama.cpp's
    "n_predict": Honoured("as max_tokens; -1: not given"),
    "json_schema": Honoured("as response_format of type json_schema"),
    **dict.fromkeys(("cache_prompt", "id_slot", "slot_id", "n_cache_reuse", "n_keep", "n_discard"), Harmless(_SPEED)),
    "speculative": Harmless(_SPEED),
    **dict.fromkeys((f"speculative.{name}" for name in ("n_max", "n_min", "p_min")), Harmless(_SPEED)),
    "parse_tool_calls": Harmless(_ALL_STANDARD, (True,)),
    "min_keep": Harmless(_OFF, (0, 1)),
    "repeat_penalty": Harmless(_PENALTY, (1,)),
    "repeat_last_n": Harmless(_PENALTY, (-1,)),
    "penalize_nl": Harmless(_OFF, (False,)),
    "mirostat": Harmless(_OFF, (0,)),
    **dict.fromkeys(("mirostat_tau", "mirostat_eta"), Harmless("mirostat alone looks at it")),
    **dict.fromkeys(("typical_p", "tfs_z"), Harmless(_OFF, (1,))),
    **dict.fromkeys(("xtc_probability", "dynatemp_range", "dry_multiplier", "top_a"), Harmless(_OFF, (0,))),
    **dict.fromkeys(("xtc_threshold", "dynatemp_exponent"), Harmless("a sampler alone looks at it that is not here")),
    **dict.fromkeys(
        ("dry_base", "dry_allowed_length", "dry_penalty_last_n", "dry_sequence_breakers"),
        Harmless("dry_multiplier alone gives it an effect"),
    ),
    "top_n_sigma": Harmless(_OFF, (-1, 0)),
    "samplers": Refused("the order is temperature, top_k, top_p, min_p"),
    "n_probs": Refused("use logprobs"),
    "post_sampling_probs": Refused("log-probabilities are those before temperature and filters"),
    "return_tokens": Refused("use outpace.trace in a stream"),
    "return_progress": Refused("a stream says nothing of the prompt"),
    "timings_per_token": Refused("use outpace.trace in a stream"),
    "response_fields": Refused("a response has all its fields"),
    "t_max_predict_ms": Refused("use max_tokens; a client that leaves ends its request"),
    "lora": Refused("adapters are not loaded"),
    "thinking_forced_open": Refused("put the beginning into an assistant message, with continue_final_message"),
    # others'
    "keep_alive": Harmless("the model stays loaded"),
    "do_sample": Refused("temperature 0 takes the likeliest token, any other samples"),
    "watermark": Refused("no watermark is written"),
    "thinking": Harmless("the models served here have no such setting", ({"type": "disabled"},)),
}

MESSAGE: dict[str, Rule] = {
    **dict.fromkeys(("role", "content", "tool_calls", "tool_call_id", "name", "refusal"), Honoured()),
    "reasoning_content": Honoured("for chat templates that read it"),
    "prefix": Honoured("true, in the last message: as continue_final_message"),
    "reasoning": Harmless("what the assistant thought in earlier turns is not read again"),
    "reasoning_details": Harmless("what the assistant thought in earlier turns is not read again"),
    "annotations": Harmless("they say where the content came from"),
    "cache_control": Harmless("prefixes are always cached"),
    "parsed": Harmless("the content has it"),
    "id": Harmless("messages have no name here"),
    "provider_specific_fields": Harmless("another server's"),
    "images": Refused(_TEXT_ONLY),
    "audio": Refused(_TEXT_ONLY),
    "function_call": Refused("use tool_calls"),
}

PART: dict[str, Rule] = {
    "type": Honoured(),
    "text": Honoured(),
    "cache_control": MESSAGE["cache_control"],
    "annotations": MESSAGE["annotations"],
    "citations": MESSAGE["annotations"],
}

TOOL_CALL: dict[str, Rule] = {
    **dict.fromkeys(("id", "type", "function"), Honoured()),
    "index": Harmless("calls stand in their order"),
    "cache_control": MESSAGE["cache_control"],
    "provider_specific_fields": MESSAGE["provider_specific_fields"],
    "extra_content": MESSAGE["provider_specific_fields"],
}

CALLED_FUNCTION: dict[str, Rule] = {
    **dict.fromkeys(("name", "arguments"), Honoured()),
    "parsed_arguments": Harmless("the arguments have it"),
    "provider_specific_fields": MESSAGE["provider_specific_fields"],
}

TOOL: dict[str, Rule] = {
    **dict.fromkeys(("type", "function"), Honoured()),
    "cache_control": MESSAGE["cache_control"],
}

SCHEMA: dict[str, Rule] = {
    "description": Harmless("the model does not see it: say it in a message"),
}

FUNCTION: dict[str, Rule] = {
    **dict.fromkeys(("name", "description", "parameters"), Honoured()),
    "strict": Honoured("forced calls always keep to the schema, whatever stands here"),
    "cache_control": MESSAGE["cache_control"],
}

STREAM_OPTIONS: dict[str, Rule] = {
    "include_usage": Honoured(),
    "include_obfuscation": Harmless("nothing is padded", (False,)),
    "continuous_usage_stats": Refused("include_usage tells it at the end"),
}
