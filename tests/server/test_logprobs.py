"""Log-probabilities of an answer: its tokens and no others, each alternative by itself, and of which distribution."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from fake import FakeEngine, byte_tokenizer, lines
from hashing import toy_loaded
from hypothesis import given, settings
from hypothesis import strategies as st
from live import Live

from outpace.engine.llm import LLM
from outpace.engine.text import TextStream
from outpace.server.logprobs import ScoredToken, Shown
from outpace.types import DecodingStats, Result, SamplingParams

TOKENIZER = byte_tokenizer(None)
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello"}]}


class Table:
    """A vocabulary of these tokens."""

    def __init__(self, tokens: dict[int, bytes]) -> None:
        self.tokens, self.control = tokens, dict[int, str]()

    def text(self, ids: list[int]) -> bytes:
        return b"".join(self.tokens[i] for i in ids)


def result_of(ids: list[int], text: str, finish: Any) -> Result:
    tops = [[(i, -0.5)] for i in ids]
    return Result(text, ids, finish, "plain", "identical", DecodingStats(), [], [-0.25] * len(ids), tops)


def chunked(ids: list[int], text: TextStream, rng: random.Random) -> list[tuple[list[int], str]]:
    """As an engine gives them out: tokens in steps of a few, with the text that became certain."""
    steps, at = [], 0
    while at < len(ids) and not text.stopped:
        step = ids[at : at + rng.randrange(1, 4)]
        shown, used = text.push(step)
        steps.append((step[:used], shown))
        at += used
    last, shown = steps[-1]
    steps[-1] = last, shown + text.flush()
    return steps


@settings(max_examples=300, deadline=None)
@given(
    text=st.text(st.sampled_from("abé你 "), min_size=1, max_size=20),
    stops=st.lists(st.text(st.sampled_from("abé你 "), min_size=1, max_size=3), max_size=3),
    seed=st.integers(0, 1000),
)
def test_the_list_has_the_tokens_of_the_text_and_no_others(text: str, stops: list[str], seed: int) -> None:
    """One token for each byte; however the tokens come, the list is the same and makes the text."""
    ids = TOKENIZER.encode(text)
    params = SamplingParams(stop=tuple(stops), logprobs=1)
    stream = TextStream(TOKENIZER.detokenizer(), params.stop)
    steps = chunked(ids, stream, random.Random(seed))
    kept = [id for step, _ in steps for id in step]
    result = result_of(kept, stream.text, "stop" if stream.stopped else "length")
    whole = Shown(TOKENIZER, params).whole(result)
    assert b"".join(TOKENIZER.vocabulary.text([id]) for id, _, _ in whole).decode() == stream.text
    shown, streamed, written = Shown(TOKENIZER, params), [], ""
    for i, (step, new) in enumerate(steps):
        scored: list[ScoredToken] = [(id, -0.25, [(id, -0.5)]) for id in step]
        streamed += shown.certain(scored, new, result if i == len(steps) - 1 else None)
        written += new
        data = b"".join(TOKENIZER.vocabulary.text([id]) for id, _, _ in streamed)
        assert not stops or i == len(steps) - 1 or written.encode().startswith(data), "none before its text"
    assert streamed == whole


def test_a_token_that_holds_the_end_of_the_text_stays() -> None:
    """And what a stop string cut off goes, whether or not the first token's space is shown."""
    vocabulary = Table({1: b" ab", 2: b"cX", 3: b"X"})
    for ids, text, kept in [([1, 2], " abc", [1, 2]), ([1, 3], "ab", [1]), ([1, 2], "abc", [1, 2]), ([3], "", [])]:
        shown: Any = Shown(TOKENIZER, SamplingParams(stop=("X",), logprobs=1))
        shown._vocabulary = vocabulary
        assert [id for id, _, _ in shown.whole(result_of(ids, text, "stop"))] == kept, (ids, text)


@pytest.mark.parametrize("stream", [False, True])
def test_a_cut_stop_string_leaves_the_list(stream: bool, serve: Callable[..., Live]) -> None:
    live = serve(FakeEngine(lambda asked: "One two three four"))
    asked = {"stop": [" three"], "logprobs": True, "top_logprobs": 1, "stream": stream}
    answer = httpx.post(live.url + CHAT, json=HELLO | asked, timeout=60)
    if stream:
        chunks = [one["choices"][0] for one in lines(answer.content)[:-1]]
        text = "".join(c["delta"].get("content") or "" for c in chunks)
        found = [entry for c in chunks if c["logprobs"] for entry in c["logprobs"]["content"]]
    else:
        choice = answer.json()["choices"][0]
        text, found = choice["message"]["content"], choice["logprobs"]["content"]
    assert text == "One two" and "".join(entry["token"] for entry in found) == text
    asked = {"prompt": "x", "stop": [" three"], "logprobs": 1}
    legacy = httpx.post(live.url + COMPLETIONS, json=asked, timeout=60).json()["choices"][0]
    assert "".join(legacy["logprobs"]["tokens"]) == legacy["text"] == "One two"
    assert len(legacy["logprobs"]["top_logprobs"]) == len(legacy["logprobs"]["token_logprobs"]) == len("One two")


def test_alternatives_that_are_parts_of_characters_stay_apart() -> None:
    """Two tokens whose bytes are no characters, and two that write the same."""
    table = {1: b"\xe4", 2: b"\xbd", 3: b"a", 4: b"a", 5: "\N{REPLACEMENT CHARACTER}".encode(), 6: b"\xa0"}
    shown: Any = Shown(TOKENIZER, SamplingParams(logprobs=5))
    shown._vocabulary = Table(table)
    top = [(1, -0.1), (2, -0.2), (3, -0.3), (4, -0.4), (5, -0.5)]
    found = shown.legacy([(1, -0.1, top), (2, -0.1, []), (6, -0.1, []), (3, -0.1, [])])
    assert found["top_logprobs"][0] == {
        "bytes:\\xe4": -0.1, "bytes:\\xbd": -0.2, "a": -0.3, "token_id:4": -0.4, "\N{REPLACEMENT CHARACTER}": -0.5
    }  # fmt: skip
    assert found["tokens"] == ["bytes:\\xe4", "bytes:\\xbd", "bytes:\\xa0", "a"]
    assert found["bytes"] == [[0xE4], [0xBD], [0xA0], [0x61]]
    assert found["text_offset"] == [0, 0, 0, 1], "three tokens make one character"
    entry = shown.chat([(1, -0.1, top)])[0]
    assert [one["bytes"] for one in entry["top_logprobs"]][:2] == [[0xE4], [0xBD]]
    json.dumps(found)


@pytest.mark.parametrize("verifier", ["coupled", "rejection", "block", "typical"])
def test_raw_ones_are_those_of_the_model_alone(verifier: str) -> None:
    prompt = [5, 6, 7]
    with LLM(toy_loaded(), method="suffix", verifier=verifier, planner="fixed", max_batch=1, prefix_cache=False) as llm:

        def first(**more: Any) -> tuple[int, float, list[tuple[int, float]]]:
            result = llm.generate(prompt, SamplingParams(max_tokens=12, logprobs=4, **more))[0]
            assert result.logprobs is not None and result.top_logprobs is not None
            assert len(result.logprobs) == len(result.token_ids)
            return result.token_ids[0], result.logprobs[0], result.top_logprobs[0]

        token, _, plain = first(ignore_eos=True)
        other = next(id for id, _ in plain if id != token)
        biased: dict[str, Any] = {"logit_bias": {other: 60.0}, "ignore_eos": True}
        chosen, processed, _ = first(**biased)
        assert chosen == other and processed > -1e-6
        chosen, raw, top = first(**biased, raw_logprobs=True)
        assert chosen == other and top == plain and raw == pytest.approx(dict(plain)[other])


def test_the_response_says_which_they_are(serve: Callable[..., Live]) -> None:
    engine = FakeEngine()
    live = serve(engine)

    def own(body: dict[str, Any]) -> dict[str, Any]:
        answer = httpx.post(live.url + CHAT, json=HELLO | body, timeout=60)
        found = lines(answer.content)[-2] if body.get("stream") else answer.json()
        return dict(found["outpace"])

    assert "logprobs" not in own({})
    assert own({"logprobs": True})["logprobs"] == "processed" and not engine.asked[-1].params.raw_logprobs
    assert own({"logprobs": True, "outpace": {"logprobs": "raw"}})["logprobs"] == "raw"
    assert engine.asked[-1].params.raw_logprobs
    assert own({"logprobs": True, "stream": True, "outpace": {"logprobs": "raw"}})["logprobs"] == "raw"
    wrong = httpx.post(live.url + CHAT, json=HELLO | {"outpace": {"logprobs": "raw"}}, timeout=60)
    assert wrong.status_code == 400 and "ask for logprobs" in wrong.json()["error"]["message"]
