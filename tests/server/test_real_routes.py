"""Responses, Messages, embeddings and scored prompts of the default model, against what the model says when it is read
plainly."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch
from live import Live

from outpace import LLM
from outpace.cache.pages import PagedKVCache
from outpace.models.batch import Span, pack
from outpace.models.decoder import Taps
from outpace.server.keys import Keys

MODEL = "smollm2-135m"
TEXT = "The capital of France is Paris, and the capital of Italy is Rome. Das ist schön: 日本."
COUNT = "Count from one to five in words."


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(MODEL, threads=1, max_batch=4, kv_tokens=4096, prefix_cache=True) as made:
        yield made


@pytest.fixture(scope="module")
def live(llm: LLM) -> Iterator[Live]:
    with Live(llm, keys=Keys(share=False)) as made:
        yield made


@pytest.fixture(scope="module")
def client(live: Live) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0, timeout=300)


def plain_read(llm: LLM, ids: list[int]) -> tuple[torch.Tensor, np.ndarray]:
    """Log-probabilities [T, V] and final hidden states [T, D] of one forward over all tokens."""
    cache = PagedKVCache(llm.decoder.new_storage(64))
    seq = cache.new()
    cache.reserve(seq, len(ids))
    last = llm.config.num_layers - 1
    out = llm.decoder.forward(pack([Span(ids, 0)], cache.page_tables([seq])), cache.storage, Taps(hidden=(last,)))
    return torch.log_softmax(out.logits.double(), dim=1), llm.decoder.final_norm(out.hidden[last])


def test_scored_prompts_are_those_of_a_plain_read(client: openai.OpenAI, llm: LLM) -> None:
    ids = llm.tokenizer.prompt(TEXT)
    rows, _ = plain_read(llm, ids)
    for most in (0, 1):
        got = client.completions.create(model=MODEL, prompt=TEXT, echo=True, logprobs=3, max_tokens=most, temperature=0)
        (choice,) = got.choices
        told = choice.logprobs
        assert told is not None and told.token_logprobs is not None and told.tokens is not None
        assert len(told.tokens) == len(ids) + most and choice.text.startswith(TEXT)
        expected = rows[torch.arange(len(ids) - 1), torch.tensor(ids[1:])].tolist()
        np.testing.assert_allclose(told.token_logprobs[1 : len(ids)], expected, atol=1e-4)  # type: ignore[arg-type]
        assert told.top_logprobs is not None
        for row, top in zip(rows[:-1], told.top_logprobs[1 : len(ids)], strict=True):
            best = torch.topk(row, 3).values.tolist()
            np.testing.assert_allclose(list(top.values()), best, atol=1e-4)
        assert told.text_offset is not None and told.text_offset[0] == 0
        for token, at in zip(told.tokens, told.text_offset, strict=True):
            assert token.startswith("bytes:") or choice.text[at : at + len(token)] == token


def test_scoring_says_which_continuation_is_likelier(client: openai.OpenAI) -> None:
    def score(end: str) -> float:
        got = client.completions.create(
            model=MODEL, prompt="The capital of France is" + end, echo=True, logprobs=1, max_tokens=1
        )
        assert got.choices[0].logprobs is not None
        return sum(p or 0 for p in (got.choices[0].logprobs.token_logprobs or [])[:-1])

    assert score(" Paris") > score(" Berlin") + 1


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_vectors_are_those_of_a_plain_read(pooling: str, client: openai.OpenAI, llm: LLM) -> None:
    texts = [TEXT, "A cat sat on the mat.", "x"]
    got = client.embeddings.create(model=MODEL, input=texts, extra_body={"pooling": pooling})
    for text, found in zip(texts, got.data, strict=True):
        _, hidden = plain_read(llm, llm.tokenizer.prompt(text))
        vector = hidden.mean(axis=0, dtype=np.float64) if pooling == "mean" else hidden[-1].astype(np.float64)
        np.testing.assert_allclose(found.embedding, vector / np.linalg.norm(vector), atol=1e-4)
        assert abs(np.linalg.norm(found.embedding) - 1) < 1e-5


def test_vectors_do_not_depend_on_company_and_disturb_nobody(client: openai.OpenAI) -> None:
    made: dict[str, Any] = dict(
        model=MODEL, messages=[{"role": "user", "content": COUNT}], max_tokens=24, temperature=0
    )
    alone = client.chat.completions.create(**made).choices[0].message.content
    one = client.embeddings.create(model=MODEL, input=TEXT).data[0].embedding
    text = ""
    for i, chunk in enumerate(client.chat.completions.create(**made, stream=True)):
        text += chunk.choices[0].delta.content or ""
        if i == 2:
            many = client.embeddings.create(model=MODEL, input=[TEXT * 4, TEXT, TEXT])
            assert many.data[1].embedding == many.data[2].embedding == one
    assert text == alone


def test_what_is_embedded_or_scored_is_in_nobodys_prefix_cache(client: openai.OpenAI) -> None:
    text = "Nobody else has ever written this sentence about a purple lighthouse keeper. " * 3
    client.embeddings.create(model=MODEL, input=text, user="ann")
    for user, cached in (("ann", 0), ("bob", 0)):
        got = client.completions.create(model=MODEL, prompt=text, max_tokens=1, user=user)
        assert got.usage is not None and got.usage.prompt_tokens_details is not None
        assert got.usage.prompt_tokens_details.cached_tokens == cached


def test_the_same_answer_by_every_api(client: openai.OpenAI, live: Live) -> None:
    said: Any = [{"role": "user", "content": COUNT}]
    text = (
        client.chat.completions.create(model=MODEL, messages=said, max_tokens=24, temperature=0)
        .choices[0]
        .message.content
    )
    assert client.responses.create(model=MODEL, input=COUNT, max_output_tokens=24, temperature=0).output_text == text
    events: Any = client.responses.create(model=MODEL, input=COUNT, max_output_tokens=24, temperature=0, stream=True)
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == text
    body = {"messages": said, "max_tokens": 24, "temperature": 0}
    whole = httpx.post(f"{live.url}/v1/messages", json=body, timeout=300).json()
    assert whole["content"][0]["text"] == text
    stream = httpx.post(f"{live.url}/v1/messages", json={**body, "stream": True}, timeout=300).text
    data = [json.loads(line.removeprefix("data: ")) for line in stream.splitlines() if line.startswith("data: ")]
    assert "".join(d["delta"].get("text", "") for d in data if d["type"] == "content_block_delta") == text


def test_a_conversation_that_is_kept_goes_on_from_the_prefix_cache(client: openai.OpenAI) -> None:
    first = client.responses.create(model=MODEL, input=COUNT + " Then stop. " * 20, max_output_tokens=8, temperature=0)
    second = client.responses.create(
        model=MODEL, input="Again.", previous_response_id=first.id, max_output_tokens=8, temperature=0
    )
    assert second.usage is not None and first.usage is not None
    assert second.usage.input_tokens_details.cached_tokens >= first.usage.input_tokens - 16


def test_tokens_are_those_of_the_model(live: Live, llm: LLM) -> None:
    got = httpx.post(f"{live.url}/tokenize", json={"prompt": TEXT}).json()
    assert got["tokens"] == llm.tokenizer.prompt(TEXT)
    assert httpx.post(f"{live.url}/detokenize", json={"tokens": got["tokens"]}).json()["content"] == TEXT
