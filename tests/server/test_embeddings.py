"""/v1/embeddings, /tokenize and /detokenize."""

from __future__ import annotations

import base64
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from fake import TEMPLATE, TOOL_TEMPLATE, FakeEngine
from live import Live

from outpace.server.keys import Keys
from outpace.server.routes.embeddings import MOST_INPUTS, PORTION
from outpace.server.submissions import Limits


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    with Live(FakeEngine()) as live:
        yield live


def client_of(live: Live, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{live.url}/v1", api_key=key, max_retries=0)


def post(live: Live, path: str, body: Any) -> httpx.Response:
    return httpx.post(live.url + path, json=body)


def test_vectors_in_the_order_of_the_texts(server: Live) -> None:
    texts = ["x" * n for n in range(1, 2 * PORTION + 4)]
    got = client_of(server).embeddings.create(model="fake", input=texts)
    assert [d.index for d in got.data] == list(range(len(texts)))
    assert [d.embedding for d in got.data] == [[n, 0, 0, n / 8] for n in range(1, len(texts) + 1)]
    assert got.usage.prompt_tokens == got.usage.total_tokens == sum(map(len, texts))
    own = got.model_extra["outpace"]
    assert own["pooling"] == "mean" and own["normalised"] is True and "hidden states" in own["of"]


@pytest.mark.parametrize("given", [[[[]]], [[1, [2]]], [1, "a"], [[1], "a"], [True], [[True]], [1.5], {}, 7])
def test_what_is_no_text_is_refused(given: Any, server: Live) -> None:
    for path, field in (("/v1/embeddings", "input"), ("/v1/completions", "prompt")):
        answer = post(server, path, {field: given})
        assert answer.status_code == 400 and answer.json()["error"]["param"] == field, answer.text


@pytest.mark.parametrize("given", ["abc", ["abc"], [68, 69, 70], [[68, 69, 70]]])
def test_every_form_of_input(given: Any, server: Live) -> None:
    (one,) = client_of(server).embeddings.create(model="fake", input=given).data
    assert one.embedding[0] == 3
    asked = server.engine.asked[-1]
    assert asked.options.pooling == "mean" and asked.options.method == "plain" and asked.params.max_tokens == 1


def test_encodings_say_the_same(server: Live) -> None:
    shown = post(server, "/v1/embeddings", {"input": "abc"}).json()["data"][0]["embedding"]
    coded = post(server, "/v1/embeddings", {"input": "abc", "encoding_format": "base64"}).json()["data"][0]["embedding"]
    assert np.frombuffer(base64.b64decode(coded), "<f4").tolist() == shown == [3, 0, 0, 0.375]


def test_how_it_is_pooled_and_for_whom(server: Live) -> None:
    got = post(server, "/v1/embeddings", {"input": "abc", "pooling": "last", "user": "ann", "priority": 4})
    options = server.engine.asked[-1].options
    assert (options.pooling, options.priority) == ("last", 4) and options.owner
    assert got.json()["outpace"]["pooling"] == "last"


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ({}, "input is missing"),
        ({"input": []}, "input has 0 texts"),
        ({"input": ["a", ""]}, "input[1] is empty"),
        ({"input": ["a"] * (MOST_INPUTS + 1)}, "it must be from 1 to 2048"),
        ({"input": [1, "a"]}, "input"),
        ({"input": [[999]]}, "outside the model's vocabulary"),
        ({"input": "a" * 5000}, "tokens"),
        ({"input": "a", "dimensions": 3}, "dimensions=3 is not supported"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format"),
        ({"input": "a", "pooling": "max"}, "pooling"),
        ({"input": "a", "normalize": False}, "normalize=false is not supported"),
        ({"input": "a", "n": 1}, "unknown field 'n'"),
    ],
)
def test_what_does_not_work_is_refused_by_name(body: Any, told: str, server: Live) -> None:
    got = post(server, "/v1/embeddings", body)
    assert got.status_code == 400 and told in got.json()["error"]["message"], got.text


def test_the_models_width_is_no_other_number_of_dimensions(server: Live) -> None:
    got = post(server, "/v1/embeddings", {"input": "a", "dimensions": 4, "normalize": True})
    assert got.status_code == 200 and got.json()["outpace"]["ignored"] == ["normalize"]


def test_many_texts_are_queued_in_portions(serve: Callable[..., Live]) -> None:
    engine = FakeEngine(max_running=4, max_queue=PORTION)
    live = serve(engine)
    got = client_of(live).embeddings.create(model="fake", input=["abc"] * 100)
    assert len(got.data) == 100, "the queue is never full of one request's texts"


def test_whoever_leaves_is_not_embedded_on(serve: Callable[..., Live]) -> None:
    engine = FakeEngine()
    live = serve(engine)
    engine.hold.set()

    with pytest.raises(httpx.TimeoutException):
        httpx.post(f"{live.url}/v1/embeddings", json={"input": ["abc"] * 100}, timeout=0.5)
    while len(engine.cancelled) < PORTION:
        time.sleep(0.01)
    engine.hold.clear()
    assert httpx.get(f"{live.url}/health").json()["open_calls"] == 0
    assert len(engine.asked) == PORTION == len(engine.cancelled)
    assert "outpace_requests_total{" not in httpx.get(f"{live.url}/metrics").text  # they are no choices


def test_embedded_tokens_are_counted_and_nothing_else_is(serve: Callable[..., Live]) -> None:
    live = serve(FakeEngine())
    client_of(live).embeddings.create(model="fake", input=["abc", "de"])
    told = httpx.get(f"{live.url}/metrics").text
    assert "outpace_embedded_tokens_total 5.0" in told
    assert 'outpace_responses_total{route="/v1/embeddings",status="200"} 1.0' in told


def test_keys_are_needed(serve: Callable[..., Live]) -> None:
    live = serve(FakeEngine(), keys=Keys(["a-long-key"]))
    for path, body in (("/v1/embeddings", {"input": "a"}), ("/tokenize", {"content": "a"}), ("/detokenize", {})):
        assert post(live, path, body).status_code == 401
    assert httpx.get(f"{live.url}/tokenizer_info").status_code == 401


# -- tokens ----------------------------------------------------------------------------------------------------------


def test_text_to_tokens_as_vllm_and_as_llama_cpp_ask(server: Live) -> None:
    ids = server.engine.tokenizer.encode("hé")
    assert post(server, "/tokenize", {"prompt": "hé"}).json() == {"count": 3, "max_model_len": 4096, "tokens": ids}
    got = post(server, "/tokenize", {"prompt": "hi", "return_token_strs": True, "model": "fake"}).json()
    assert got["token_strs"] == ["h", "i"]
    got = post(server, "/tokenize", {"content": "hé", "with_pieces": True}).json()
    assert [t["piece"] for t in got["tokens"]] == ["h", [0xC3], [0xA9]] and [t["id"] for t in got["tokens"]] == ids


def test_control_tokens_are_read_as_such_unless_letters_are_asked_for(server: Live) -> None:
    special = post(server, "/tokenize", {"content": "</s>", "add_special": True}).json()["tokens"]
    plain = post(server, "/tokenize", {"content": "</s>", "parse_special": False}).json()["tokens"]
    assert len(plain) == 4 and special == [257]
    assert post(server, "/detokenize", {"tokens": special}).json() == {"content": "</s>", "prompt": "</s>"}


def test_what_the_tokenizer_names(server: Live) -> None:
    told = httpx.get(f"{server.url}/tokenizer_info").json()
    assert told == {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": None,
        "pad_token": None,
        "chat_template": TEMPLATE,
        "model_max_length": 4096,
    }


def test_a_conversation_as_tokens(serve: Callable[..., Live]) -> None:
    live = serve(FakeEngine(template=TOOL_TEMPLATE))
    tool = {"type": "function", "function": {"name": "weather"}}
    got = post(live, "/tokenize", {"messages": [{"role": "user", "content": "Hi"}], "tools": [tool]}).json()
    text = post(live, "/detokenize", {"tokens": got["tokens"]}).json()["content"]
    assert text.endswith("user: Hi\n") and '"name": "weather"' in text and not live.engine.asked


@pytest.mark.parametrize(
    ("path", "body", "told"),
    [
        ("/tokenize", {}, "give one of prompt, content and messages, not none"),
        ("/tokenize", {"prompt": "a", "content": "a"}, "not prompt and content"),
        ("/tokenize", {"prompt": "a", "tools": []}, "tools goes with messages"),
        ("/tokenize", {"messages": [{"role": "user", "content": "a"}], "add_special": True}, "add_special goes with"),
        ("/tokenize", {"prompt": "a", "add_special": True, "add_special_tokens": False}, "differ"),
        ("/tokenize", {"text": "a"}, "unknown field 'text'"),
        ("/detokenize", {}, "tokens is missing"),
        ("/detokenize", {"tokens": [258]}, "id 258 is outside the vocabulary"),
        ("/detokenize", {"tokens": [-1]}, "id -1 is outside the vocabulary"),
        ("/detokenize", {"tokens": ["a"]}, "tokens"),
    ],
)
def test_what_is_no_text_or_no_token_is_refused(path: str, body: Any, told: str, server: Live) -> None:
    got = post(server, path, body)
    assert got.status_code == 400 and told in got.json()["error"]["message"], got.text


def test_a_text_that_no_prompt_could_hold_is_not_tokenized(serve: Callable[..., Live]) -> None:
    live = serve(FakeEngine(), limits=Limits(prompt_tokens=10))
    for path, name in (("/tokenize", "content"), ("/v1/embeddings", "input")):
        got = post(live, path, {name: "a" * 10_000})
        assert got.status_code == 400, got.text


def test_a_conversation_drops_nothing_in_silence(serve: Callable[..., Live]) -> None:
    tool = {"type": "function", "function": {"name": "weather"}}
    turn = {"role": "user", "content": [{"type": "text", "text": "Hi", "cache_control": {}}], "name": "bob"}
    plain = serve(FakeEngine())
    refused = post(plain, "/tokenize", {"messages": [turn], "tools": [tool]})
    assert refused.status_code == 400 and "no place for them" in refused.json()["error"]["message"]
    got = post(plain, "/tokenize", {"messages": [turn]}).json()
    assert got["outpace"] == {"ignored": ["messages.content.cache_control", "messages.name"]}
    begun = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes", "prefix": True}]
    text = post(plain, "/detokenize", {"tokens": post(plain, "/tokenize", {"messages": begun}).json()["tokens"]})
    assert text.json()["content"].endswith("Yes")
