"""`outpace serve` as a person starts it, with the default model, asked by the `openai` client."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import openai
import pytest

MODEL = "smollm2-135m"
COUNT: Any = [{"role": "user", "content": "Count from one to ten in words, one number in a line."}]


class Child:
    """The server in a process of its own."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "outpace", "serve", "-m", MODEL, "--port", "0", "--methods", "suffix"]
        sizes = ["--max-batch", "4", "--kv-tokens", "4096", "--threads", "1"]
        self.process = subprocess.Popen([*command, *sizes], stderr=subprocess.PIPE, text=True)
        self.said = ""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.said += line
            if "Ctrl-C stops it" in line:
                break
        found = re.search(r"base_url=\"(\S+)\"", self.said)
        assert found is not None, self.said
        self.url = found[1]


@pytest.fixture(scope="module")
def child() -> Iterator[Child]:
    made = Child()
    try:
        yield made
    finally:
        made.process.kill()
        made.process.communicate()


@pytest.fixture(scope="module")
def client(child: Child) -> openai.OpenAI:
    return openai.OpenAI(base_url=child.url, api_key="none", max_retries=0, timeout=300)


def test_it_says_how_to_call_it(child: Child) -> None:
    assert f"curl {child.url}/chat/completions" in child.said and MODEL in child.said


def test_methods_streams_and_batches_say_the_same(client: openai.OpenAI) -> None:
    made: dict[str, Any] = dict(model=MODEL, messages=COUNT, max_tokens=24, temperature=0)
    whole = client.chat.completions.create(**made)
    text = whole.choices[0].message.content
    assert text and whole.model_extra["outpace"]["exactness"] == "identical"
    for method in ("plain", "suffix", "auto"):
        stream = client.chat.completions.create(**made, stream=True, extra_body={"outpace": {"method": method}})
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == text, method
    many = client.chat.completions.create(**made, n=3)
    assert [c.message.content for c in many.choices] == [text] * 3


def test_a_seed_repeats_what_was_sampled(client: openai.OpenAI) -> None:
    made: dict[str, Any] = dict(model=MODEL, messages=COUNT, max_tokens=16)
    first = client.chat.completions.create(**made)
    again = client.chat.completions.create(**made, seed=first.model_extra["outpace"]["seed"])
    assert again.choices[0].message.content == first.choices[0].message.content
    assert client.chat.completions.create(**made).choices[0].message.content != first.choices[0].message.content


def test_a_second_turn_finds_the_first_cached_and_another_user_does_not(client: openai.OpenAI) -> None:
    long: Any = [{"role": "user", "content": "Remember these words: " + "apple river stone cloud " * 20}]

    def cached(user: str) -> int:
        answer = client.chat.completions.create(model=MODEL, messages=long, max_tokens=4, user=user)
        assert answer.usage is not None and answer.usage.prompt_tokens_details is not None
        return answer.usage.prompt_tokens_details.cached_tokens or 0

    assert [cached("a"), cached("a") > 80, cached("b")] == [0, True, 0]


def test_output_keeps_to_a_schema(client: openai.OpenAI) -> None:
    schema = {"type": "object", "properties": {"colour": {"enum": ["red", "blue"]}}, "required": ["colour"],
              "additionalProperties": False}  # fmt: skip
    answer = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Which colour is the sky?"}],
        max_tokens=60,
        response_format={"type": "json_schema", "json_schema": {"name": "sky", "schema": schema}},
    )
    if answer.choices[0].finish_reason == "stop":
        assert json.loads(answer.choices[0].message.content or "")["colour"] in ("red", "blue")
    else:
        assert (answer.choices[0].message.content or "").startswith("{")


def test_logprobs_of_a_stream_are_those_of_the_whole(client: openai.OpenAI) -> None:
    made: dict[str, Any] = dict(
        model=MODEL, messages=COUNT, max_tokens=12, temperature=0, logprobs=True, top_logprobs=2
    )
    whole = client.chat.completions.create(**made).choices[0].logprobs
    chunks = [chunk.choices[0].logprobs for chunk in client.chat.completions.create(**made, stream=True)]
    assert whole is not None and whole.content
    assert [entry for chunk in chunks if chunk for entry in chunk.content or []] == whole.content
    assert all(entry.top_logprobs[0].token == entry.token for entry in whole.content), "greedy takes the likeliest"


def test_refusals_of_the_engine_are_told(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="not offered here"):
        client.chat.completions.create(model=MODEL, messages=COUNT, extra_body={"outpace": {"method": "draft"}})
    with pytest.raises(openai.BadRequestError, match="context is 8192 tokens"):
        client.chat.completions.create(model=MODEL, messages=COUNT, max_tokens=100_000)
    with pytest.raises(openai.BadRequestError, match="no place for them"):
        tool: Any = {"type": "function", "function": {"name": "f"}}
        client.chat.completions.create(model=MODEL, messages=COUNT, tools=[tool])


@pytest.mark.skipif(os.name == "nt", reason="platform: signals")
def test_it_stops_without_a_word_too_many(child: Child, client: openai.OpenAI) -> None:
    """The last test here: it ends the server."""
    child.process.send_signal(signal.SIGTERM)
    _, said = child.process.communicate(timeout=60)
    assert child.process.returncode == 0
    lines = [json.loads(line) for line in said.splitlines() if line]
    assert lines and all(line["status"] in (200, 400) for line in lines), lines
