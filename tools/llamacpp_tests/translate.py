"""Between llama.cpp's native /completion and our /v1/completions: the same request and answer in other words.

Only names are changed. What has no counterpart (slots, sampler chains, probabilities after sampling) is sent on as it
is, so that the server's refusal is what a test sees.
"""

from __future__ import annotations

from typing import Any

#: Paths of llama.cpp, and ours. Others go through as they are.
PATHS = {
    "/completion": "/v1/completions",
    "/completions": "/v1/completions",
    "/chat/completions": "/v1/chat/completions",
    "/responses": "/v1/responses",
    "/embeddings": "/v1/embeddings",
    "/models": "/v1/models",
}
NATIVE = frozenset({"/completion", "/completions"})
_NAMES = {"n_predict": "max_tokens", "repeat_penalty": "repetition_penalty", "n_probs": "logprobs"}
DEFAULT_TOKENS = 64  # what the tests' servers are started with (--n-predict)


def request(body: dict[str, Any], temperature: float, seed: int) -> dict[str, Any]:
    """Of /completion; `temperature` and `seed` are the server's, which ours has per request only."""
    sent = {_NAMES.get(name, name): value for name, value in body.items()}
    if sent.get("max_tokens") in (None, -1):
        sent["max_tokens"] = DEFAULT_TOKENS
    sent.setdefault("temperature", temperature)
    sent.setdefault("seed", seed)
    if isinstance(sent.get("logit_bias"), list):
        sent["logit_bias"] = {str(token): bias for token, bias in sent["logit_bias"]}
    for name in ("return_tokens", "response_fields"):
        if not sent.get(name):
            sent.pop(name, None)
    return sent


def answer(body: dict[str, Any]) -> dict[str, Any] | list[dict[str, Any]]:
    """What /completion would have said; errors as they are."""
    if "choices" not in body:
        return body
    each = [_choice(body, choice) for choice in body["choices"]]
    return each[0] if len(each) == 1 else each


def chunk(body: dict[str, Any]) -> dict[str, Any]:
    """Of a stream."""
    if not body.get("choices"):
        return body
    found = _choice(body, body["choices"][0])
    found["stop"] = body["choices"][0].get("finish_reason") is not None
    return found


def _choice(body: dict[str, Any], choice: dict[str, Any]) -> dict[str, Any]:
    usage = body.get("usage") or {}
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
    text = choice.get("text", "")
    found = {
        "content": text,
        "tokens": [],
        "stop": True,
        "stop_type": {"length": "limit", "stop": "eos"}.get(choice.get("finish_reason"), "none"),
        "truncated": False,
        "has_new_line": "\n" in text,
        "timings": {
            "prompt_n": usage.get("prompt_tokens", 0) - cached,
            "cache_n": cached,
            "predicted_n": usage.get("completion_tokens", 0),
        },
    }
    if choice.get("logprobs"):
        found["completion_probabilities"] = choice["logprobs"]
    return found
