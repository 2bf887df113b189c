"""Whatever is sent, the answer is a clear status, and the server goes on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from fake import TOOL_TEMPLATE, FakeEngine
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from live import Live

from outpace.server.protocol import ChatRequest, CompletionRequest
from outpace.server.submissions import Limits

JSON = {"content-type": "application/json"}
FINE = {200, 400, 404, 405, 413, 429}
GOOD_CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 4}
GOOD_TEXT: dict[str, Any] = {"prompt": "x", "max_tokens": 4}

anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from([2**63, -1, 10**30]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
words = st.sampled_from(
    [
        "text",
        "json_object",
        "json_schema",
        "auto",
        "required",
        "function",
        "user",
        "tool",
        "assistant",
        "content",
        "plain",
    ]
)
values = anything | words | st.dictionaries(
    st.sampled_from(["type", "role", "content", "json_schema", "schema", "function", "name", "parameters", "method",
                     "text", "trace", "priority", "include_usage", "tool_calls", "id", "arguments", "tool_call_id"]),
    anything | words | st.lists(anything | words, max_size=2), max_size=4,
)  # fmt: skip
changes = st.tuples(st.integers(0, 99), st.integers(0, 255), st.integers(0, 9))
settled = settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
many = settings(max_examples=3000, suppress_health_check=[HealthCheck.too_slow])


def bodies(model: Any, good: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    """A good body with some of the route's fields set to anything."""
    names = st.sampled_from(sorted(model.model_fields))
    return st.dictionaries(names, values | st.lists(values, max_size=3), max_size=4).map(lambda more: good | more)


@pytest.fixture(scope="module")
def http() -> Iterator[httpx.Client]:
    engine = FakeEngine(template=TOOL_TEMPLATE, step_s=0.0, context=2000)
    limits = Limits(body_bytes=20_000)
    with Live(engine, limits=limits) as live, httpx.Client(base_url=live.url, timeout=60) as client:
        yield client


def send(http: httpx.Client, route: str, body: bytes, headers: dict[str, str] = JSON) -> None:
    response = http.post(route, content=body, headers=headers)
    assert response.status_code in FINE, (response.status_code, response.text, body[:500])
    if response.status_code != 200:
        assert set(response.json()) == {"error"} and response.json()["error"]["message"]


def fuzz_chat(http: httpx.Client, body: dict[str, Any]) -> None:
    send(http, "/v1/chat/completions", json.dumps(body).encode())


def fuzz_text(http: httpx.Client, body: dict[str, Any]) -> None:
    send(http, "/v1/completions", json.dumps(body).encode())


def fuzz_bytes(http: httpx.Client, body: bytes) -> None:
    send(http, "/v1/chat/completions", body)
    send(http, "/v1/completions", body, {"content-type": "text/plain"})


def cut_and_changed(data: tuple[int, int, int]) -> bytes:
    """A good body, one byte changed, cut."""
    body = bytearray(json.dumps(GOOD_CHAT | {"stop": ["a"], "stream": False}).encode())
    at, byte, end = data
    body[at % len(body)] = byte
    return bytes(body[: len(body) - end])


@settled
@given(body=bodies(ChatRequest, GOOD_CHAT))
def test_chats(http: httpx.Client, body: dict[str, Any]) -> None:
    fuzz_chat(http, body)


@settled
@given(body=bodies(CompletionRequest, GOOD_TEXT))
def test_completions(http: httpx.Client, body: dict[str, Any]) -> None:
    fuzz_text(http, body)


@settled
@given(
    body=st.binary(max_size=200)
    | st.tuples(st.integers(0, 99), st.integers(0, 255), st.integers(0, 9)).map(cut_and_changed)
)
def test_bytes(http: httpx.Client, body: bytes) -> None:
    fuzz_bytes(http, body)


@pytest.mark.slow
@many
@given(body=bodies(ChatRequest, GOOD_CHAT))
def test_many_chats(http: httpx.Client, body: dict[str, Any]) -> None:
    fuzz_chat(http, body)


@pytest.mark.slow
@many
@given(body=bodies(CompletionRequest, GOOD_TEXT))
def test_many_completions(http: httpx.Client, body: dict[str, Any]) -> None:
    fuzz_text(http, body)


def test_the_server_still_answers(http: httpx.Client) -> None:
    assert http.post("/v1/chat/completions", json=GOOD_CHAT).status_code == 200
    assert http.get("/health").json()["open_calls"] == 0
    assert "outpace_failed_steps_total 0.0" in http.get("/metrics").text
