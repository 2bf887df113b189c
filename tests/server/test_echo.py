"""`echo`, log-probabilities of prompts, and `suffix` of /v1/completions."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from fake import TEMPLATE, FakeEngine, byte_tokenizer
from live import Live
from tokenizers import Tokenizer as RustTokenizer

from outpace.errors import ParameterError
from outpace.models.checkpoint import TokenizerFiles
from outpace.models.tokenizer import Tokenizer
from outpace.server.infill import infill
from outpace.server.logprobs import Shown
from outpace.server.submissions import Limits
from outpace.types import PromptReading, SamplingParams


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    with Live(FakeEngine()) as live:
        yield live


@pytest.fixture(scope="module")
def client(server: Live) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def test_a_prompt_comes_before_the_output(client: openai.OpenAI, server: Live) -> None:
    got = client.completions.create(model="fake", prompt="abc ", echo=True, seed=1, max_tokens=6)
    assert got.choices[0].text == "abc Seed 1" and got.choices[0].logprobs is None
    assert server.engine.asked[-1].params.prompt_logprobs is None, "nothing is scored that nobody asked for"


@pytest.mark.parametrize("id", [-3216, 2**31 - 1, 2**40])
def test_ids_outside_the_vocabulary_are_refused_before_they_become_text(client: openai.OpenAI, id: int) -> None:
    with pytest.raises(openai.BadRequestError, match=r"outside the vocabulary|must be"):
        client.completions.create(model="fake", prompt=[5, id], echo=True, max_tokens=2)


def test_log_probabilities_of_prompt_and_output_in_one_list(client: openai.OpenAI, server: Live) -> None:
    got = client.completions.create(model="fake", prompt=["abc", "d€"], echo=True, logprobs=2, max_tokens=2, n=2)
    assert [c.text for c in got.choices] == ["abcSe"] * 2 + ["d€Se"] * 2
    first, _, second, _ = (c.logprobs for c in got.choices)
    assert first is not None and second is not None
    assert first.tokens == ["a", "b", "c", "S", "e"] and first.text_offset == [0, 1, 2, 3, 4]
    assert first.token_logprobs == [None, -0.125, -0.25, -0.25, -0.25]
    assert first.top_logprobs is not None and first.top_logprobs[0] is None and len(first.top_logprobs) == 5
    assert len(first.top_logprobs[1]) == len(first.top_logprobs[4]) == 2
    assert second.text_offset == [0, 1, 1, 1, 2, 3], "three tokens make one character"
    assert second.tokens == ["d", "bytes:\\xe2", "bytes:\\x82", "bytes:\\xac", "S", "e"]
    assert server.engine.asked[-1].params.prompt_logprobs == 2


def test_nothing_need_be_written(client: openai.OpenAI) -> None:
    made: dict[str, Any] = dict(model="fake", prompt="abc", echo=True, logprobs=1, max_tokens=0)
    got = client.completions.create(**made)
    (choice,) = got.choices
    assert choice.text == "abc" and choice.finish_reason == "length" and choice.logprobs is not None
    assert choice.logprobs.tokens == ["a", "b", "c"] and got.usage is not None and got.usage.completion_tokens == 0
    chunks = list(client.completions.create(**made, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].text for c in chunks if c.choices) == "abc"
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 0
    with pytest.raises(openai.BadRequestError, match="it goes with echo"):
        client.completions.create(model="fake", prompt="abc", max_tokens=0)


def test_a_stream_begins_with_the_prompt(client: openai.OpenAI) -> None:
    made: dict[str, Any] = dict(model="fake", prompt=["abc", "d"], echo=True, logprobs=1, max_tokens=5, seed=3)
    whole = client.completions.create(**made)
    texts, tokens, offsets = ["", ""], [[], []], [[], []]  # type: ignore[var-annotated]
    for chunk in client.completions.create(**made, stream=True):
        (choice,) = chunk.choices
        texts[choice.index] += choice.text
        if choice.logprobs is not None:
            tokens[choice.index] += choice.logprobs.tokens or []
            offsets[choice.index] += choice.logprobs.text_offset or []
    for choice in whole.choices:
        assert choice.logprobs is not None and texts[choice.index] == choice.text
        assert tokens[choice.index] == choice.logprobs.tokens and offsets[choice.index] == choice.logprobs.text_offset


def test_token_ids_are_shown_as_their_text(client: openai.OpenAI, server: Live) -> None:
    ids = [256, *server.engine.tokenizer.encode("ab")]
    got = client.completions.create(model="fake", prompt=ids, echo=True, logprobs=0, max_tokens=1)
    (choice,) = got.choices
    assert choice.text == "abS" and choice.logprobs is not None
    assert choice.logprobs.tokens == ["<s>", "a", "b", "S"] and choice.logprobs.text_offset == [0, 0, 1, 2]


def test_the_token_that_ends_the_output_is_listed_as_whoever_counts_tokens_expects() -> None:
    with Live(FakeEngine(lambda asked: "")) as live:
        client = openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0)
        got = client.completions.create(model="fake", prompt="abc", echo=True, logprobs=1, max_tokens=1)
    assert got.choices[0].text == "abc" and got.choices[0].finish_reason == "stop"
    assert got.choices[0].logprobs is not None and got.choices[0].logprobs.tokens == ["a", "b", "c", "</s>"]


def test_a_prompt_has_too_many_log_probabilities_to_be_sent() -> None:
    with Live(FakeEngine(), limits=Limits(echoed=100)) as live:
        client = openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0)
        made: dict[str, Any] = dict(model="fake", prompt="x" * 50, echo=True, max_tokens=1)
        client.completions.create(**made, logprobs=1)
        client.completions.create(**made)
        with pytest.raises(
            openai.BadRequestError, match="150 log-probabilities of prompts in one response, at most 100"
        ):
            client.completions.create(**made, logprobs=2)


def test_no_token_begins_behind_the_text(server: Live) -> None:
    """Some vocabularies write a space before a text, which is no part of it."""
    tokenizer = server.engine.tokenizer
    ids = tokenizer.encode(" ab")
    reading = PromptReading([-1.0, -2.0], [[], []], None)
    assert Shown(tokenizer, SamplingParams()).prompt(ids, reading, len("a"))["text_offset"] == [0, 1, 1]


def test_only_text_completions_echo(server: Live) -> None:
    body = {"messages": [{"role": "user", "content": "x"}], "echo": True}
    got = httpx.post(f"{server.url}/v1/chat/completions", json=body)
    assert got.status_code == 400 and "echo" in got.json()["error"]["message"]


# -- fill in the middle ----------------------------------------------------------------------------------------------


def tokenizer_with(*tokens: str) -> Tokenizer:
    rust = RustTokenizer.from_str(byte_tokenizer(TEMPLATE).to_json())
    rust.add_special_tokens(list(tokens))
    return Tokenizer(TokenizerFiles(rust.to_str(), {}))


FORMS = [
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|fim_pad|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>", "<fim_pad>"),
    ("<\uff5cfim\u2581begin\uff5c>", "<\uff5cfim\u2581hole\uff5c>", "<\uff5cfim\u2581end\uff5c>"),
]


@pytest.mark.parametrize("tokens", FORMS)
def test_a_gap_in_the_models_own_control_tokens(tokens: tuple[str, ...]) -> None:
    tokenizer = tokenizer_with(*tokens)
    ids, ends = infill(tokenizer, "a<s>", f"b{tokens[2]}")
    assert tokenizer.decode(ids, skip_special=False) == f"{tokens[0]}a<s>{tokens[1]}b{tokens[2]}{tokens[2]}"
    control = [i for i in ids if tokenizer.is_special(i)]
    assert control == [tokenizer.token_id(t) for t in tokens[:3]], "what a user writes is never a control token"
    assert set(ends) == {tokenizer.token_id(t) for t in tokens}


def test_a_suffix_is_refused_without_them(server: Live, client: openai.OpenAI) -> None:
    with pytest.raises(ParameterError, match="no control tokens to fill in the middle"):
        infill(tokenizer_with("<|fim_prefix|>", "<|fim_middle|>"), "a", "b")
    with pytest.raises(openai.BadRequestError, match="no control tokens to fill in the middle") as refused:
        client.completions.create(model="fake", prompt="a", suffix="b")
    assert refused.value.param == "suffix"


def test_a_suffix_is_sent_to_the_engine() -> None:
    engine = FakeEngine()
    engine.tokenizer = tokenizer_with(*FORMS[0])
    with Live(engine) as live:
        client = openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0)
        with pytest.raises(openai.BadRequestError, match="vocabulary"):  # the fake has no such tokens
            client.completions.create(model="fake", prompt="a", suffix="b")
        for more, told in (({"echo": True}, "echo"), ({"prompt": [1, 2]}, "text")):
            with pytest.raises(openai.BadRequestError, match=told):
                client.completions.create(**{"model": "fake", "prompt": "a", "suffix": "b", **more})  # type: ignore[call-overload]


def test_no_probability_is_minus_infinity(client: openai.OpenAI) -> None:
    got = client.completions.create(model="fake", prompt="abc", echo=True, logprobs=1, max_tokens=1)
    assert got.choices[0].logprobs is not None
    assert all(p is None or math.isfinite(p) for p in got.choices[0].logprobs.token_logprobs or [])
