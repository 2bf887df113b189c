"""Tests of llama.cpp's server that cannot pass here by design, each with the reason. First match counts."""

from __future__ import annotations

import re

_ROWS = [
    (r"test_router\.py", "one server serves one model; there is no router that loads and unloads models"),
    (r"test_mcp_servers\.py|test_tools_builtin\.py", "the server runs no tools of its own"),
    (r"test_proxy\.py", "the server fetches nothing for others"),
    (r"test_sleep\.py", "the model stays loaded; there is no sleeping"),
    (r"test_slot_save\.py", "no slots: a prefix tree shares what requests have in common, nothing is saved by number"),
    (r"test_kv_keep_only_active\.py", "no slots: the prefix tree keeps what fits and drops the oldest"),
    (r"test_lora\.py", "no adapters"),
    (r"test_rerank\.py", "no reranking models"),
    (r"test_vision_api\.py|vision|image|mtmd|mtm_", "text only"),
    (r"test_compat_gcp\.py", "no Vertex AI route"),
    (r"test_infill\.py", "llama.cpp's own route; here `suffix` of /v1/completions"),
    (r"test_template\.py|chat_template|template_file", "templates are the model's own; no --chat-template"),
    (r"ctx_shift|slot_ctx_not_exceeded", "no context shift: a text that does not fit is refused or ends"),
    (r"server_props|server_slots|parallel_slots|cancel_request|slots_idle", "no /props and /slots; see /metrics"),
    (r"load_split_model", "fetches a model of llama.cpp's test collection"),
    (r"no_ui|static_assets", "no web interface of llama.cpp; the playground is opt-in"),
    (r"aliases_and_tags", "no tags of models"),
    (r"multiple_addresses", "one address; put a proxy before it"),
    (r"test_metrics\.py", "metrics have our own names (outpace_...), see docs/serving.md"),
    (r"telemetry|timings_per_token|return_progress|verbose_debug", "llama.cpp's own fields of progress and timing"),
    (r"response_fields|ignore_eos_|post_sampling|post_backend|n_probs", "llama.cpp's native form of answers"),
    (r"synth|draft_min_draft_max", "switches of llama.cpp's drafting; here --method and outpace.max_draft"),
    (r"real_model|test_weather|test_calc|test_thoughts|test_hello|reasoning_model|_slow\[", "fetches other models"),
    (r"test_stream\.py", "streams are not stored by the server to be taken up again by their id"),
    (r"completion_unified", "llama.cpp's pool of slots, where requests abort each other; here they queue"),
    (r"pooling_none", "one vector for each text: mean or last token"),
    (r"thinking", "no thinking blocks: the models served here have none"),
    (
        r"test_invalid_chat_completion_req\[messages7\]",
        "the template decides on two answers in a row",
    ),
    (r"test_chat_completion_stream\[|test_logprobs_stream", "the first chunk has text beside the role"),
    (r"context_size_exceeded", "errors have OpenAI's type and code (context_length_exceeded), not llama.cpp's"),
    (r"anthropic_empty_messages", "an empty list of messages is refused, as Anthropic's API does"),
    (r"test_completion\[Write a joke", "`return_tokens` is llama.cpp's own"),
    (r"test_completion_stream\[", "llama.cpp's native form of streams (generation_settings, token ids)"),
    (r"nocache_long_input", "counts tokens of llama.cpp's tiny model: the prompt fits into ours"),
    (
        r"completion_with_tokens_input|mixed_input\[(input[035789]|input10|-False)|content_text_same",
        "prompts are text, token ids, or a list of either: no mixtures, no objects, nothing empty",
    ),
    (r"test_completion\.py::test_logit_bias\[False", "logit_bias names token ids, not texts"),
    (r"embedding_usage|with_bos", "counts tokens of another vocabulary"),
    (r"embedding_error_prompt_too_long", "another wording of the same refusal"),
    (
        r"cors_options|cors_origins_localhost|cors_origins_defaults",
        "origins are named whole (--cors-origin), and `*` is answered with `*`, without credentials",
    ),
    (r"cors_proxy", "the server fetches nothing for others"),
    (r"with_and_without_draft|multi_requests_parallel", "fetches a draft model of llama.cpp's test collection"),
    (r"without_tool_call_fast\[.*-tools1-None", "a real model may call a tool where the tests' own makes no sense"),
    (r"token_count", "llama.cpp's own route; here /tokenize and /v1/messages/count_tokens"),
]
BY_DESIGN = [(re.compile(pattern), reason) for pattern, reason in _ROWS]


def reason_of(test: str) -> str | None:
    """Why a test (its pytest id) is not expected to pass; None if it is."""
    return next((reason for pattern, reason in BY_DESIGN if pattern.search(test)), None)
