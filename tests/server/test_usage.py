"""What a response says that it has cost: a prompt counts once, cached tokens too, whatever the number of choices."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from hashing import toy_loaded

from outpace import LLM

TEXTS = ["a" * 50, "b" * 70]  # a token for each letter, no start token


def usage_of(url: str, body: dict[str, Any]) -> dict[str, Any]:
    if not body["stream"]:
        answer = httpx.post(f"{url}/v1/completions", json=body, timeout=30)
        assert answer.status_code == 200, answer.text
        return answer.json()["usage"]
    body = {**body, "stream_options": {"include_usage": True}}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=30) as answer:
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line.startswith("data: {")]
    return json.loads(lines[-1])["usage"]


@pytest.mark.parametrize("stream", [False, True])
def test_cached_tokens_are_of_prompts_not_of_choices(serve: Callable[..., Any], stream: bool) -> None:
    url = serve(LLM(toy_loaded(), method="plain", kv_tokens=4096)).url
    body = {"prompt": TEXTS, "n": 3, "max_tokens": 4, "temperature": 0, "stream": stream}
    first = usage_of(url, body)
    # the other choices found what the first one had read, which no prompt had been spared
    assert first["prompt_tokens"] == 120 and first["prompt_tokens_details"]["cached_tokens"] == 0
    assert first["completion_tokens"] == 24 and first["total_tokens"] == 144
    again = usage_of(url, body)
    assert again["prompt_tokens_details"]["cached_tokens"] == 49 + 69  # all but the last token of each
