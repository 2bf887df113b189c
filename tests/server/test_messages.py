"""/v1/messages as Anthropic's API has it: bodies, events, tools, errors. tests/clients has the `anthropic` client."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from fake import TOOL_TEMPLATE, Asked, FakeEngine
from live import Live

from outpace.server.keys import Keys
from outpace.server.routes.messages import MessagesRequest, messages_call, usage
from outpace.server.submissions import Limits
from outpace.types import DecodingStats, Result

HELLO: Any = [{"role": "user", "content": "Hello"}]
WEATHER: Any = {
    "name": "weather",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
CALLING = 'Let me see.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Bern"}}\n</tool_call>'


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    with Live(FakeEngine()) as live:
        yield live


def post(live: Live, body: dict[str, Any], path: str = "/v1/messages", **headers: str) -> httpx.Response:
    return httpx.post(live.url + path, json={"messages": HELLO, **body}, headers=headers)


def answer(live: Live, **body: Any) -> dict[str, Any]:
    got = post(live, {"max_tokens": 100, **body})
    assert got.status_code == 200, got.text
    return got.json()


def events(live: Live, **body: Any) -> list[dict[str, Any]]:
    got = post(live, {"max_tokens": 100, "stream": True, **body})
    assert got.headers["content-type"].startswith("text/event-stream"), got.text
    found = []
    for block in got.text.strip().split("\n\n"):
        name, data = block.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    return found


def asked(live: Live) -> Asked:
    return live.engine.asked[-1]


def prompt(live: Live) -> str:
    return live.engine.tokenizer.decode(asked(live).tokens)


def test_an_answer(server: Live) -> None:
    got = answer(server, system="Be brief.", seed=7, model="fake")
    assert got["content"] == [{"type": "text", "text": "Seed 7 says hello to the world."}]
    assert (got["type"], got["role"], got["model"]) == ("message", "assistant", "fake") and got["id"].startswith("msg_")
    assert (got["stop_reason"], got["stop_sequence"]) == ("end_turn", None)
    assert prompt(server) == "system: Be brief.\nuser: Hello\n"
    assert got["usage"]["input_tokens"] == len(prompt(server)) and got["usage"]["output_tokens"] == 32
    assert got["outpace"]["seed"] == 7


def test_what_is_asked_for_is_passed_on(server: Live) -> None:
    own = {"method": "suffix", "priority": 2}
    answer(server, temperature=0.5, top_p=0.9, top_k=3, stop_sequences=["x", "y"], outpace=own)
    params, options = asked(server).params, asked(server).options
    assert (params.temperature, params.top_p, params.top_k, params.max_tokens) == (0.5, 0.9, 3, 100)
    assert params.stop == ("x", "y") and (options.method, options.priority) == ("suffix", 2)
    assert not options.owner
    answer(server, metadata={"user_id": "ann"})
    assert asked(server).options.owner and asked(server).params.temperature == 1.0


def test_why_it_ended(server: Live) -> None:
    got = answer(server, stop_sequences=["nothing", "wor"], seed=1)
    assert (got["stop_reason"], got["stop_sequence"]) == ("stop_sequence", "wor")
    assert got["content"][0]["text"] == "Seed 1 says hello to the "
    assert answer(server, max_tokens=3)["stop_reason"] == "max_tokens"
    *_, delta, last = events(server, stop_sequences=["wor"])
    assert delta["delta"] == {"stop_reason": "stop_sequence", "stop_sequence": "wor"}
    assert last == {"type": "message_stop"}


def test_events_of_a_text(server: Live) -> None:
    start, ping, *rest = events(server, seed=1)
    assert start["type"] == "message_start" and ping == {"type": "ping"}
    assert start["message"]["content"] == [] and start["message"]["stop_reason"] is None
    assert start["message"]["usage"]["input_tokens"] == len(prompt(server))
    begin, *deltas, stop, delta, last = rest
    assert begin == {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}
    assert all(d["type"] == "content_block_delta" and d["index"] == 0 for d in deltas) and len(deltas) > 3
    assert "".join(d["delta"]["text"] for d in deltas) == "Seed 1 says hello to the world."
    assert stop == {"type": "content_block_stop", "index": 0}
    assert delta["delta"]["stop_reason"] == "end_turn" and delta["usage"]["output_tokens"] == 32
    assert delta["outpace"]["seed"] == 1 and last == {"type": "message_stop"}


def test_what_the_prefix_cache_had_is_not_counted_twice(server: Live) -> None:
    call = messages_call(
        MessagesRequest.model_validate({"messages": HELLO, "max_tokens": 5}), server.engine, "", Limits()
    )
    stats = DecodingStats(prompt_tokens=call.prompt_tokens, cached_tokens=5)
    told = usage(call, Result("abc", [1, 2, 3], "stop", "plain", "identical", stats, []))
    assert (told["input_tokens"], told["cache_read_input_tokens"]) == (call.prompt_tokens - 5, 5)
    assert told["output_tokens"] == 3


def test_an_empty_answer_has_no_block(serve: Callable[..., Live]) -> None:
    live = serve(FakeEngine(lambda asked: ""))
    assert answer(live)["content"] == []
    assert [e["type"] for e in events(live)] == ["message_start", "ping", "message_delta", "message_stop"]


def test_tools(serve: Callable[..., Live]) -> None:
    live = serve(FakeEngine(lambda asked: CALLING, template=TOOL_TEMPLATE))
    got = answer(live, tools=[WEATHER])
    text, use = got["content"]
    assert text == {"type": "text", "text": "Let me see."} and got["stop_reason"] == "tool_use"
    assert (use["type"], use["name"], use["input"]) == ("tool_use", "weather", {"city": "Bern"})
    result = {"type": "tool_result", "tool_use_id": use["id"], "content": [{"type": "text", "text": "rain"}]}
    behind = [
        *HELLO,
        {"role": "assistant", "content": got["content"]},
        {"role": "user", "content": [result, {"type": "text", "text": "Well?"}]},
    ]
    answer(live, messages=behind, tools=[WEATHER])
    assert prompt(live).endswith('assistant: Let me see.<tool_call>{"city": "Bern"}\ntool: rain\nuser: Well?\n')
    answer(live, messages=[*behind[:2], {"role": "user", "content": [{**result, "is_error": True}]}], tools=[WEATHER])
    assert prompt(live).endswith("tool: Error: rain\n")


def test_events_of_a_call(serve: Callable[..., Live]) -> None:
    live = serve(FakeEngine(lambda asked: CALLING, template=TOOL_TEMPLATE))
    found = events(live, tools=[WEATHER])
    starts = [e for e in found if e["type"] == "content_block_start"]
    assert [(e["index"], e["content_block"]["type"]) for e in starts] == [(0, "text"), (1, "tool_use")]
    assert starts[1]["content_block"]["input"] == {} and starts[1]["content_block"]["name"] == "weather"
    pieces = [e["delta"]["partial_json"] for e in found if e.get("delta", {}).get("type") == "input_json_delta"]
    assert json.loads("".join(pieces)) == {"city": "Bern"}
    stops = [e["index"] for e in found if e["type"] == "content_block_stop"]
    assert stops == [0, 1] and found[-2]["delta"]["stop_reason"] == "tool_use"


@pytest.mark.parametrize(
    ("choice", "constrained"),
    [({"type": "any"}, True), ({"type": "tool", "name": "weather"}, True), ({"type": "auto"}, False)],
)
def test_tool_choice(choice: Any, constrained: bool, serve: Callable[..., Live]) -> None:
    live = serve(FakeEngine(lambda asked: '{"name": "weather", "arguments": {"city": "Bern"}}', TOOL_TEMPLATE))
    got = answer(live, tools=[WEATHER], tool_choice={**choice, "disable_parallel_tool_use": True})
    assert (asked(live).params.constraint is not None) == constrained
    assert [block["type"] for block in got["content"]] == ["tool_use"]
    answer(live, tools=[WEATHER], tool_choice={"type": "none"})
    assert "weather" not in prompt(live)


def test_turns_of_one_side_are_one(server: Live) -> None:
    said = [
        {"role": "user", "content": "a"},
        {"role": "user", "content": [{"type": "text", "text": "b", "cache_control": {"type": "ephemeral"}}]},
        {"role": "assistant", "content": "c"},
        {"role": "user", "content": "d"},
    ]
    got = answer(server, messages=said, system=[{"type": "text", "text": "S"}, {"type": "text", "text": "T"}])
    assert prompt(server) == "system: S\n\nT\nuser: a\n\nb\nassistant: c\nuser: d\n"
    assert got["outpace"]["ignored"] == ["messages.content.cache_control"]


def test_the_last_message_of_the_assistant_is_gone_on_with(server: Live) -> None:
    answer(server, messages=[*HELLO, {"role": "assistant", "content": "It is ("}])
    assert prompt(server) == "user: Hello\nassistant: It is ("


def test_a_schema_binds_the_answer(server: Live) -> None:
    form = {"type": "json_schema", "schema": {"type": "object"}}
    answer(server, output_config={"format": form})
    assert json.loads(asked(server).params.json_schema or "") == {"type": "object"}
    answer(server, output_format=form)
    assert json.loads(asked(server).params.json_schema or "") == {"type": "object"}


def test_tokens_are_counted(server: Live) -> None:
    got = post(server, {"system": "S"}, "/v1/messages/count_tokens")
    assert got.json() == {"input_tokens": len("system: S\nuser: Hello\n")}
    before = len(server.engine.asked)
    assert post(server, {}, "/v1/messages/count_tokens").status_code == 200 and len(server.engine.asked) == before


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ({}, "max_tokens is missing"),
        ({"max_tokens": 0}, "max_tokens=0 is out of range"),
        ({"max_tokens": 5, "messages": []}, "messages"),
        ({"max_tokens": 5, "messages": [{"role": "system", "content": "x"}]}, "messages.0.role"),
        ({"max_tokens": 5, "messages": [{"role": "user", "content": [{"type": "image"}]}]}, "'image'"),
        ({"max_tokens": 5, "thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking"),
        ({"max_tokens": 5, "mcp_servers": [{}]}, "mcp_servers is not supported"),
        ({"max_tokens": 5, "tool_choice": {"type": "any"}}, "tool_choice"),
        ({"max_tokens": 5, "tool_choice": {"type": "tool"}, "tools": [WEATHER]}, "type tool needs it"),
        ({"max_tokens": 5, "stop": ["x"]}, "unknown field 'stop'"),
        ({"max_tokens": 5, "stop_sequences": ["x"] * 17}, "stop_sequences is out of range"),
        ({"max_tokens": 5, "outpace": {"trace": True}}, "outpace.trace belongs to"),
    ],
)
def test_what_does_not_work_is_refused_in_anthropics_form(body: Any, told: str, server: Live) -> None:
    got = post(server, body)
    error = got.json()
    assert got.status_code == 400 and error["type"] == "error" and error["error"]["type"] == "invalid_request_error"
    assert told in error["error"]["message"]
    assert error["request_id"] == got.headers["request-id"] == got.headers["x-request-id"]


def test_other_errors_too(serve: Callable[..., Live]) -> None:
    live = serve(FakeEngine(max_running=1, max_queue=0), keys=Keys(["a-long-key"]))
    body = {"max_tokens": 5}
    for headers, status, kind in (
        ({}, 401, "authentication_error"),
        ({"x-api-key": "another-key"}, 401, "authentication_error"),
        ({"x-api-key": "a-long-key", "anthropic-version": "latest"}, 400, "invalid_request_error"),
        ({"x-api-key": "a-long-key", "anthropic-version": "2023-06-01"}, 200, None),
        ({"authorization": "Bearer a-long-key"}, 200, None),
        ({"authorization": "Bearer another-key", "x-api-key": "a-long-key"}, 401, "authentication_error"),
    ):
        got = httpx.post(f"{live.url}/v1/messages", json={"messages": HELLO, **body}, headers=headers)
        assert got.status_code == status, got.text
        assert kind is None or got.json()["error"]["type"] == kind
    got = post(live, {**body, "model": "other"}, **{"x-api-key": "a-long-key"})
    assert got.status_code == 404 and got.json()["error"]["type"] == "not_found_error"
    got = httpx.post(f"{live.url}/v1/messages", content="{", headers={"x-api-key": "a-long-key"})
    assert got.status_code == 400 and got.json()["type"] == "error"


def test_a_key_is_the_same_owner_in_either_header(serve: Callable[..., Live]) -> None:
    live = serve(FakeEngine(), keys=Keys(["a-long-key", "b-long-key"]))
    for headers in ({"x-api-key": "a-long-key"}, {"authorization": "Bearer a-long-key"}, {"x-api-key": "b-long-key"}):
        post(live, {"max_tokens": 5}, **headers)
    first, second, third = (one.options.owner for one in live.engine.asked)
    assert first == second != third


def test_a_step_that_fails_ends_a_stream_with_an_error(serve: Callable[..., Live]) -> None:
    engine = FakeEngine()
    live = serve(engine)
    engine.hold.set()
    engine.fail = RuntimeError("secret")
    got = post(live, {"max_tokens": 5, "stream": True})
    assert "\nevent: error\n" in got.text and "secret" not in got.text and "message_stop" not in got.text
    last = json.loads(got.text.strip().rpartition("data: ")[2])
    assert last["type"] == "error" and last["request_id"] == got.headers["request-id"]


def test_fields_without_effect_are_named_where_tokens_are_counted_too(server: Live) -> None:
    marked = [{"role": "user", "content": [{"type": "text", "text": "Hello", "cache_control": {"type": "ephemeral"}}]}]
    got = post(server, {"messages": marked}, "/v1/messages/count_tokens").json()
    assert got["outpace"] == {"ignored": ["messages.content.cache_control"]}
