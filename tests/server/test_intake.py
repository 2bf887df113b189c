"""Bodies that are large, deep or many: refused before they cost much, and nobody else waits for them."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import httpx
import pytest
from fake import FakeEngine
from hypothesis import given, settings
from hypothesis import strategies as st
from live import Live
from test_service import until

from outpace.errors import ParameterError
from outpace.models.tokenizer import Tokenizer
from outpace.server import shape
from outpace.server.app import json_response
from outpace.server.intake import LIGHT, Intake, Lease
from outpace.server.service import ServiceError
from outpace.server.shape import Shape, check_shape, parse, shape_of
from outpace.server.submissions import Limits

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
JSON = {"content-type": "application/json"}
SHAPE = Shape(1000, 1000, 20)


def chat(content: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}]}


def post(live: Live, path: str, data: bytes) -> httpx.Response:
    return httpx.post(live.url + path, content=data, headers=JSON, timeout=60)


# ------------------------------------------------------------------------------------------------ what is in a body


def counted(value: Any) -> tuple[int, int, int]:
    """Strings, values and depth, by walking."""
    if isinstance(value, str):
        return 1, 0, 0
    if isinstance(value, dict):
        parts = [counted(item) for item in value.values()]
        strings = len(value)
    elif isinstance(value, list):
        parts, strings = [counted(item) for item in value], 0
    else:
        return 0, 0, 0
    depth = 1 + max((part[2] for part in parts), default=0)
    commas = max(len(value) - 1, 0)
    return strings + sum(p[0] for p in parts), 1 + commas + sum(p[1] for p in parts), depth


texts = st.text(st.sampled_from(list('ab"\\{}[],:é\n')), max_size=12)
values = st.recursive(
    st.one_of(st.none(), st.integers(), texts),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(texts, inner, max_size=4)),
    max_leaves=25,
)


@settings(max_examples=200, deadline=None)
@given(value=values, escaped=st.booleans(), size=st.integers(1, 40))
def test_the_shape_of_a_body_is_what_walking_it_finds(value: Any, escaped: bool, size: int) -> None:
    strings, inner, depth = counted(value)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shape, "_SLICE", size)
        assert shape_of(json.dumps(value, ensure_ascii=escaped).encode()) == Shape(strings, inner + 1, depth)


@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=60))
def test_any_bytes_have_a_shape_and_parse_or_do_not(data: bytes) -> None:
    shape_of(data)
    with suppress(json.JSONDecodeError):
        parse(data)


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b'{"a": 1, "a": 2}', "'a' is given twice"),
        (b'{"a": NaN}', "NaN is no number"),
        (b'{"a": -Infinity}', "-Infinity is no number"),
        ('{"a": 1}'.encode("utf-16"), "not UTF-8"),
        (b'{"a": ' + b"1" * 5000 + b"}", "a number has more than 4300 digits"),
        (b'{"a": ', "Expecting value"),
    ],
)
def test_what_json_does_not_have_is_refused(data: bytes, told: str) -> None:
    with pytest.raises(json.JSONDecodeError, match=told):
        parse(data)
    assert parse(b'\xef\xbb\xbf{"a": [1, null]}') == {"a": [1, None]}


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"[" * 21 + b"]" * 21, "21 levels of nesting: at most 20"),
        (json.dumps(["a"] * 1001 + ["b" * 8000]).encode(), "1002 texts, names of fields included,: at most 1000"),
        (b"[" + b"1," * 9999 + b"1]", "10001 values: at most 1000"),
    ],
)
def test_a_body_with_too_much_in_it_is_refused(data: bytes, told: str) -> None:
    with pytest.raises(ParameterError, match=told):
        check_shape(data, SHAPE)
    check_shape(json.dumps("[" * 100_000 + '"').encode(), SHAPE)  # it is a text, whatever is in it


# ------------------------------------------------------------------------------------------------ over HTTP


def test_a_text_that_cannot_fit_is_refused_without_the_tokenizer(
    serve: Callable[..., Live], monkeypatch: pytest.MonkeyPatch
) -> None:
    live = serve(FakeEngine(context=300), limits=Limits(body_bytes=1 << 20))
    longest = 4  # bytes: "</s>"
    assert post(live, COMPLETIONS, json.dumps({"prompt": "x"}).encode()).status_code == 200
    monkeypatch.setattr(Tokenizer, "_encode", lambda *_: pytest.fail("it was encoded"))
    for path, body in [
        (CHAT, chat("x" * 1201)),
        (CHAT, {"messages": [{"role": "user", "content": "x" * 100}] * 13}),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": "x" * 100}] * 13}]}),
        (COMPLETIONS, {"prompt": "x" * 1201}),
        (COMPLETIONS, {"prompt": ["x" * 1201]}),
        (COMPLETIONS, {"prompt": "x" * 900_000}),
        (COMPLETIONS, {"prompt": [1] * 301}),
    ]:
        answer = post(live, path, json.dumps(body).encode())
        error = answer.json()["error"]
        assert answer.status_code == 400 and error["code"] == "context_length_exceeded", error
        if "bytes" in error["message"]:
            assert f"300 tokens that fit hold at most {300 * longest} " in error["message"]
    answer = post(
        live,
        COMPLETIONS,
        json.dumps({"prompt": [1], "prediction": {"type": "content", "content": "x" * 1201}}).encode(),
    )
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "prediction"


@pytest.mark.parametrize(
    ("path", "data", "told"),
    [
        (CHAT, json.dumps({"messages": [{"role": "user", "content": ""}] * 100_000}).encode(), "texts"),
        (CHAT, json.dumps({"messages": [{}] * 100_000}).encode(), "messages.0.role"),
        (CHAT, b'{"messages":' + b"[" * 100_000, "levels of nesting"),
        (CHAT, b'{"messages":' + b"[" * 99, "no JSON"),
        (COMPLETIONS, b'{"prompt":[' + b"1," * 600_000 + b"1]}", "values"),
        (COMPLETIONS, b'{"prompt":[' + b"1," * 400_000 + b'"x"]}', "lists of token ids"),
        (COMPLETIONS, b'{"prompt":[' + b"[]," * 100_000 + b"[]]}", "more than 128 choices"),
        (COMPLETIONS, json.dumps({"prompt": "x", "logit_bias": {str(i): 1 for i in range(50_000)}}).encode(), "50000"),
        (COMPLETIONS, json.dumps({"prompt": "x", "stop_token_ids": [1] * 500_000}).encode(), "500000 entries"),
        (COMPLETIONS, json.dumps({"prompt": "x", "stop_token_ids": ["1"] * 50_000}).encode(), "list of token ids"),
        (COMPLETIONS, json.dumps({"prompt": "x", "stop": ["a"] * 50_000}).encode(), "stop is out of range"),
        (COMPLETIONS, json.dumps({"prompt": "x", "regex": "a" * 70_000}).encode(), "regex has 70000 bytes"),
        (COMPLETIONS, json.dumps({"prompt": "x", "outpace": {"method": "m" * 90_000}}).encode(), "not offered"),
        (COMPLETIONS, json.dumps({"prompt": "x", "z" * 900_000: 1}).encode(), "unknown field"),
        (COMPLETIONS, json.dumps({"prompt": "x", **{f"z{i}": 1 for i in range(40_000)}}).encode(), "unknown field"),
        (COMPLETIONS, json.dumps({"prompt": ["x"] * 64, "logprobs": 20, "max_tokens": 2000}).encode(), "logprobs"),
    ],
    ids=range(16),
)
def test_much_of_anything_is_refused_shortly(path: str, data: bytes, told: str, serve: Callable[..., Live]) -> None:
    live = serve(FakeEngine())
    answer = post(live, path, data)
    message = answer.json()["error"]["message"]
    assert answer.status_code == 400 and told in message and len(answer.content) < 6000, message[:300]
    assert live.app.state.intake.bytes_held == 0


def test_small_requests_do_not_wait_for_large_ones(serve: Callable[..., Live], monkeypatch: pytest.MonkeyPatch) -> None:
    """While large prompts are being tokenized, two of them and no more, others are answered."""
    live = serve(FakeEngine(context=10**6))
    go, inside, most = threading.Event(), [0], [0]
    encode = Tokenizer._encode

    def slow(self: Tokenizer, text: str, *args: Any, **options: Any) -> Any:
        if len(text) > LIGHT:
            inside[0] += 1
            most[0] = max(most[0], inside[0])
            assert go.wait(30)
            inside[0] -= 1
        return encode(self, text, *args, **options)

    monkeypatch.setattr(Tokenizer, "_encode", slow)
    large = json.dumps({"prompt": "x" * (LIGHT + 1), "max_tokens": 2}).encode()
    with ThreadPoolExecutor(5) as pool:
        waiting = [pool.submit(post, live, COMPLETIONS, large) for _ in range(5)]
        until(lambda: inside[0] == 2)
        for _ in range(8):
            assert post(live, CHAT, json.dumps(chat("Hello")).encode()).status_code == 200
        assert httpx.get(live.url + "/health").json()["status"] == "ready"
        assert not any(one.done() for one in waiting)
        go.set()
        assert [one.result().status_code for one in waiting] == [200] * 5
    assert most[0] == 2 and live.app.state.intake.bytes_held == 0


def test_large_bodies_beyond_the_limit_are_told_to_come_again(
    serve: Callable[..., Live], monkeypatch: pytest.MonkeyPatch
) -> None:
    live = serve(FakeEngine(context=10**6), limits=Limits(body_bytes=200_000))  # 800 kB in all, half for one client
    go = threading.Event()
    monkeypatch.setattr(Tokenizer, "check_fits", lambda *_: go.wait(30))
    large = json.dumps({"prompt": "x" * 150_000, "max_tokens": 2}).encode()
    with ThreadPoolExecutor(2) as pool:
        held = [pool.submit(post, live, COMPLETIONS, large) for _ in range(2)]
        until(lambda: live.app.state.intake.bytes_held > 300_000)
        refused = post(live, COMPLETIONS, large)
        assert refused.status_code == 429 and refused.json()["error"]["code"] == "busy"
        assert (
            int(refused.headers["retry-after"]) >= 1 and "2 of your large bodies" in refused.json()["error"]["message"]
        )
        assert post(live, CHAT, b"{").status_code == 400, "a small one is read"
        go.set()
        assert all(one.result().status_code == 200 for one in held)
    assert post(live, COMPLETIONS, large).status_code == 200


def test_what_is_held_is_given_back_once() -> None:
    intake = Intake(SHAPE, most_bytes=10 * LIGHT, most_bodies=4)
    ann, bob = Lease(intake, "ann"), Lease(intake, "bob")
    ann.grow(LIGHT)
    assert not ann.heavy and intake.bytes_held == 0
    ann.grow(3 * LIGHT)
    ann.grow(5 * LIGHT)
    bob.grow(5 * LIGHT)
    assert ann.heavy and intake.bytes_held == 10 * LIGHT
    with pytest.raises(ServiceError, match="large bodies of") as refused:
        bob.grow(6 * LIGHT)
    assert refused.value.status == 429
    ann.release()
    ann.release()
    with pytest.raises(ServiceError, match="of your large bodies"):
        bob.grow(6 * LIGHT)
    bob.release()
    assert intake.bytes_held == 0 and not intake._bytes and not intake._bodies


def test_a_failure_gives_back_what_was_held() -> None:
    class Request:
        client = None

        def __init__(self) -> None:
            self.scope: dict[str, Any] = {}
            self.headers = JSON

        async def stream(self) -> Any:
            yield b"[" + b"1," * LIGHT
            raise ConnectionError("gone")

    from pydantic import TypeAdapter

    async def main() -> None:
        intake = Intake(SHAPE, most_bytes=10 * LIGHT)
        request: Any = Request()
        with pytest.raises(ConnectionError):
            await intake.body(request, TypeAdapter(int))
        assert intake.bytes_held == 0

    asyncio.run(main())


def test_a_body_in_pieces_is_the_same_json() -> None:
    body = {"id": "é", "choices": [{"a": "\ud800"}, {"b": [1, None]}], "usage": {}}
    assert json.loads(bytes(json_response(body).body)) == body == json.loads(bytes(json_response(dict(body)).body))
    one = body | {"choices": []}
    assert json.loads(bytes(json_response(one).body)) == one


def test_grammars_do_not_keep_others_from_their_tokens(serve: Callable[..., Live]) -> None:
    """While grammars are compiled, more of them than there are threads for texts, others are answered."""
    engine = FakeEngine()
    live = serve(engine)
    engine.prepared.clear()
    data = json.dumps(chat("Hello") | {"regex": "a+"}).encode()
    with ThreadPoolExecutor(10) as pool:
        waiting = [pool.submit(post, live, CHAT, data) for _ in range(10)]
        until(lambda: live.app.state.intake.bytes_held == 0 and len(live.service._compilers._threads) >= 10)
        assert post(live, CHAT, json.dumps(chat("Hello")).encode()).status_code == 200
        assert not any(one.done() for one in waiting)
        engine.prepared.set()
        assert all(one.result().status_code == 200 for one in waiting)
