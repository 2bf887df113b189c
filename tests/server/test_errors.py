"""What is refused, with which status, and that it is said which field was wrong."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from fake import TOOL_TEMPLATE, FakeEngine, lines
from live import Live

from outpace.cli.serve import LOOPBACK, allowed_hosts
from outpace.server.keys import Keys
from outpace.server.submissions import Limits

HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello"}]}
TOOL = {"type": "function", "function": {"name": "f"}}


@pytest.fixture(scope="module")
def http() -> Iterator[httpx.Client]:
    with Live(FakeEngine(context=300)) as live, httpx.Client(base_url=live.url) as client:
        yield client


def error(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json" and response.headers["x-request-id"]
    found = response.json()
    assert set(found) == {"error"} and set(found["error"]) == {"message", "type", "param", "code"}
    assert "Traceback" not in response.text
    return found["error"]


WRONG: list[tuple[dict[str, Any], str, str | None]] = [
    ({"temprature": 1}, "did you mean 'temperature'", "temprature"),
    ({"messages": []}, "messages", "messages"),
    ({"messages": None}, "messages", "messages"),
    ({"messages": [{"role": "user"}]}, "messages[0]: content is missing", None),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role", "messages.0.role"),
    ({"messages": [{"role": "user", "content": "x", "nam": "me"}]}, "unknown field", "messages.0.nam"),
    ({"messages": [{"role": "user", "content": "x", "audio": {"id": "a"}}]}, "text only", "messages.0.audio"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "'text'", "messages.0.content.0.type"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "tool", None),
    ({"temperature": -1}, "temperature=-1", "temperature"),
    ({"temperature": "1"}, "valid number", "temperature"),
    ({"temperature": True}, "valid number", "temperature"),
    ({"top_p": 0}, "top_p=0", "top_p"),
    ({"seed": -1}, "seed=-1", "seed"),
    ({"seed": 1.5}, "integer", "seed"),
    ({"n": 0}, "n=0 is out of range", "n"),
    ({"n": 17}, "n=17 is out of range", "n"),
    ({"max_tokens": 0}, "max_tokens=0", "max_tokens"),
    ({"max_tokens": 3, "max_completion_tokens": 4}, "differ", None),
    ({"max_tokens": 100000}, "need more than 300 tokens", None),
    ({"stop": [""]}, "stop", "stop"),
    ({"stop": ["x"] * 17}, "at most 16 texts", "stop"),
    ({"stop": "x" * 1001}, "at most 16 texts", "stop"),
    ({"logit_bias": {"x": 1}}, "must be token ids", None),
    ({"logit_bias": {"1": 101}}, "logit_bias", "logit_bias"),
    ({"logit_bias": {str(i): 1 for i in range(1025)}}, "at most 1024", None),
    ({"top_logprobs": 2}, "needs logprobs", None),
    ({"logprobs": True, "top_logprobs": 21}, "logprobs=21", "logprobs"),
    ({"response_format": {"type": "yaml"}}, "response_format.type", "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "needs json_schema", "response_format"),
    ({"response_format": {"type": "json_object"}, "regex": "a"}, "cannot go together", None),
    ({"stream_options": {"include_usage": True}}, "needs stream", None),
    ({"tool_choice": "required"}, "there are no tools", "tool_choice"),
    ({"parallel_tool_calls": False}, "there are no tools", "parallel_tool_calls"),
    ({"tools": [TOOL]}, "no place for them", "tools"),
    ({"functions": [{"name": "f"}]}, "functions is not supported: use tools", "functions"),
    ({"verbosity": "low"}, "verbosity is not supported", "verbosity"),
    ({"store": True}, "store=true is not supported, only false", "store"),
    ({"service_tier": "flex"}, "only 'auto', 'default'", "service_tier"),
    ({"modalities": ["audio"]}, "modalities=['audio'] is not supported", "modalities"),
    ({"outpace": {"method": "magic"}}, "'magic' is not offered", None),
    ({"outpace": {"metod": "plain"}}, "unknown field 'outpace.metod'", "outpace.metod"),
    ({"outpace": {"priority": 101}}, "priority=101", "priority"),
    ({"outpace": {"max_draft": -1}}, "max_draft=-1", "max_draft"),
    ({"outpace": {"exactness": "roughly"}}, "outpace.exactness", "outpace.exactness"),
    ({"outpace": {"trace": True}}, "needs stream", None),
    ({"prediction": {"type": "content"}}, "prediction.content is missing", "prediction.content"),
]


@pytest.mark.parametrize(("wrong", "told", "param"), WRONG, ids=lambda value: str(value)[:60])
def test_a_wrong_chat_is_refused_by_name(
    wrong: dict[str, Any], told: str, param: str | None, http: httpx.Client
) -> None:
    found = error(http.post("/v1/chat/completions", json=HELLO | wrong), 400)
    assert told in found["message"] and found["type"] == "invalid_request_error"
    if param is not None:
        assert found["param"] == param


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": []}, "prompt is empty"),
        ({"prompt": [[]]}, "the prompt is empty"),
        ({"prompt": [99999]}, "outside the model's vocabulary"),
        ({"prompt": [-1]}, "outside the model's vocabulary"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": "x" * 300}, "leaves no room"),
        ({"prompt": ["x"] * 129}, "more than 128 choices"),
        ({"prompt": "\ud800"}, "not valid Unicode"),
        ({"suffix": "x"}, "suffix: this model has no control tokens"),
        ({"best_of": 2}, "best_of=2 is not supported"),
        ({"n": 2, "best_of": 3}, "best_of=3 is not supported"),
        ({"logprobs": True}, "logprobs"),
        ({"messages": []}, "unknown field 'messages'"),
    ],
    ids=lambda value: str(value)[:40].encode("ascii", "replace").decode(),
)
def test_a_wrong_completion_is_refused_by_name(wrong: dict[str, Any], told: str, http: httpx.Client) -> None:
    body = json.dumps({"prompt": "x"} | wrong).encode()
    found = error(http.post("/v1/completions", content=body, headers={"content-type": "application/json"}), 400)
    assert told in found["message"]


def test_what_is_no_json(http: httpx.Client) -> None:
    json_type = {"content-type": "application/json"}
    for body in (b"", b"{", b"[]", b"null", b"\xff", b"1", b'{"messages": ' + b"[" * 100_000):
        error(http.post("/v1/chat/completions", content=body, headers=json_type), 400)
    found = error(http.post("/v1/chat/completions", data={"messages": "x"}), 400)
    assert "application/json" in found["message"]
    for number in ("NaN", "Infinity", "1e999", "9" * 5000):
        body = b'{"prompt": "x", "temperature": %s}' % number.encode()
        error(http.post("/v1/completions", content=body, headers=json_type), 400)


def test_routes_and_models_that_are_not(http: httpx.Client) -> None:
    assert "/v1/completions" in error(http.get("/v2"), 404)["message"]
    assert error(http.get("/v1/completions"), 405)["code"] == "method_not_allowed"
    found = error(http.post("/v1/chat/completions", json=HELLO | {"model": "gpt"}), 404)
    assert found["code"] == "model_not_found" and "'fake'" in found["message"]
    assert error(http.get("/playground/"), 404)


def test_an_empty_model_name_is_wrong_and_none_is_right(http: httpx.Client) -> None:
    error(http.post("/v1/chat/completions", json=HELLO | {"model": ""}), 404)
    assert http.post("/v1/chat/completions", json=HELLO).status_code == 200


def test_bodies_that_are_too_large(serve: Callable[..., Live]) -> None:
    live = serve(FakeEngine(), limits=Limits(body_bytes=1000, prompt_tokens=50))
    with httpx.Client(base_url=live.url) as http:
        announced = http.post("/v1/completions", json={"prompt": "x" * 1000})
        assert error(announced, 413)["code"] == "body_too_large" and "1000 bytes" in announced.text
        error(http.post("/v1/completions", content=(b"x" * 100 for _ in range(11))), 413)
        assert "at most 50" in error(http.post("/v1/completions", json={"prompt": "x" * 51}), 400)["message"]
        assert http.post("/v1/completions", json={"prompt": "x" * 50}).status_code == 200


def test_pages_of_other_names_that_point_here_are_refused(serve: Callable[..., Live]) -> None:
    live = serve(FakeEngine(), hosts=allowed_hosts("127.0.0.1", ["Box.lan"], keyed=False))
    body = {"prompt": "x"}
    with httpx.Client(base_url=live.url) as http:
        for host in (
            "evil.example",
            "evil.example:8000",
            "[::2]:80",
            "127.0.0.1.evil.example",
            "localhost.",
            "box",
            "[",
        ):
            for path in ("/v1/models", "/metrics", "/health", "/"):
                assert error(http.get(path, headers={"host": host}), 403)["code"] == "wrong_host", (host, path)
            error(http.post("/v1/completions", json=body, headers={"host": host}), 403)
        for host in ("localhost", "LOCALHOST:1", "127.0.0.1:8000", "[::1]:8000", "box.lan", "box.lan:443"):
            assert http.post("/v1/completions", json=body, headers={"host": host}).status_code == 200, host


def test_names_matter_where_no_key_is_needed_on_this_machine() -> None:
    assert allowed_hosts("127.0.0.1", [], keyed=False) == allowed_hosts("::1", [], keyed=False) == {*LOOPBACK}
    assert allowed_hosts("127.0.0.1", [], keyed=True) is None and allowed_hosts("0.0.0.0", [], keyed=False) is None
    assert allowed_hosts("0.0.0.0", ["box"], keyed=True) == {*LOOPBACK, "box"}


def test_without_a_key_nothing_is_told(serve: Callable[..., Live]) -> None:
    live = serve(FakeEngine(), keys=Keys(["right-key"]))
    with httpx.Client(base_url=live.url) as http:
        for header in ({}, {"authorization": "Bearer wrong-key"}, {"authorization": "right-key"}):
            for path in ("/v1/models", "/metrics", "/v1/nothing"):
                response = http.get(path, headers=header)
                assert error(response, 401)["code"] == "invalid_api_key"
                assert response.headers["www-authenticate"] == "Bearer" and "fake" not in response.text
            error(http.post("/v1/chat/completions", content=b"{", headers=header), 401)
        assert http.get("/health").status_code == 200
        right = {"authorization": "Bearer right-key"}
        assert (
            http.get("/metrics", headers=right).status_code == http.get("/v1/models", headers=right).status_code == 200
        )


def test_a_step_that_fails_fails_its_requests_only(serve: Callable[..., Live]) -> None:
    engine = FakeEngine(max_running=1)
    live = serve(engine)
    with httpx.Client(base_url=live.url, timeout=20) as http:
        engine.fail = RuntimeError("secret detail")
        found = http.post("/v1/chat/completions", json=HELLO)
        assert error(found, 500)["code"] == "step_failed" and "secret" not in found.text
        assert engine.cancelled == [1]
        engine.hold.set()
        with http.stream("POST", "/v1/chat/completions", json=HELLO | {"stream": True}) as stream:
            engine.fail = RuntimeError("secret detail")
            told = lines(stream.read())
        engine.hold.clear()
        assert told[-1]["error"]["code"] == "step_failed" and "[DONE]" not in told
        assert http.post("/v1/chat/completions", json=HELLO).status_code == 200
        assert "outpace_failed_steps_total 2.0" in http.get("/metrics").text


def test_an_engine_that_cannot_cancel_is_out_of_order(serve: Callable[..., Live]) -> None:
    engine = FakeEngine()
    live = serve(engine)
    with httpx.Client(base_url=live.url, timeout=20) as http:
        engine.fail, engine.fail_cancel = RuntimeError("x"), RuntimeError("y")
        error(http.post("/v1/chat/completions", json=HELLO), 500)
        assert error(http.post("/v1/chat/completions", json=HELLO), 503)["code"] == "engine_broken"
        assert http.get("/health").json()["status"] == "broken" and http.get("/health").status_code == 503


def test_tools_need_a_template_whose_calls_can_be_read(serve: Callable[..., Live]) -> None:
    unread = serve(FakeEngine(template="{{ tools }}{{ messages[0].content }}"))
    assert "form that is not read" in error(
        httpx.post(f"{unread.url}/v1/chat/completions", json=HELLO | {"tools": [TOOL]}), 400
    )["message"]  # fmt: skip
    live = serve(FakeEngine(template=TOOL_TEMPLATE))
    url = f"{live.url}/v1/chat/completions"
    named = {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}}
    assert "names 'g', and tools has f" in error(httpx.post(url, json=HELLO | named), 400)["message"]
    both = {"tools": [TOOL], "tool_choice": "required", "response_format": {"type": "json_object"}}
    assert "cannot go together" in error(httpx.post(url, json=HELLO | both), 400)["message"]
    auto = {"tools": [TOOL], "response_format": {"type": "json_object"}}
    assert "leaves no way" in error(httpx.post(url, json=HELLO | auto), 400)["message"]


def test_no_chat_template(serve: Callable[..., Live]) -> None:
    live = serve(FakeEngine(template=None))
    found = error(httpx.post(f"{live.url}/v1/chat/completions", json=HELLO), 400)
    assert "no chat template" in found["message"]
    assert httpx.post(f"{live.url}/v1/completions", json={"prompt": "x"}).status_code == 200


def test_the_log_has_a_line_for_each_request_and_no_prompt(
    serve: Callable[..., Live], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "outpace.server.requests")
    for shown in (False, True):
        caplog.clear()
        live = serve(FakeEngine(), log_prompts=shown, keys=Keys(["right-key"]))
        right = {"authorization": "Bearer right-key"}
        with httpx.Client(base_url=live.url, headers=right) as http:
            http.post("/v1/chat/completions", json=HELLO | {"user": "somebody", "seed": 4})
            http.post("/v1/chat/completions", json=HELLO | {"stream": True})
            http.post("/v1/chat/completions", json={"secret": "Hello"})
            http.get("/health")
        told = [json.loads(r.message) for r in caplog.records if r.name == "outpace.server.requests"]
        assert [t["status"] for t in told] == [200, 200, 400]
        first = told[0]
        assert first["completion_tokens"] == 32 and first["prompt_tokens"] == 12 and first["finish"] == "stop"
        assert len(first["owner"]) == 24 and first["seconds"] > 0 and first["first_token_s"] > 0
        assert told[1]["stream"] is True and told[1]["completion_tokens"] > 30
        text = json.dumps(told)
        assert "somebody" not in text and "right-key" not in text
        assert ("Hello" in text) is shown, "the prompt"
        assert ("says hello" in text) is shown, "the answer"


def test_metrics_can_be_scraped(http: httpx.Client) -> None:
    from prometheus_client.parser import text_string_to_metric_families

    http.post("/v1/chat/completions", json=HELLO | {"max_tokens": 20})
    response = http.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    found = {s.name: s for family in text_string_to_metric_families(response.text) for s in family.samples}
    assert found["outpace_engine_kv_pages"].value == 64
    assert found["outpace_engine_steps_total"].value > 0
    names = {(s.name, s.labels.get("source")) for f in text_string_to_metric_families(response.text) for s in f.samples}
    assert ("outpace_tokens_total", "suffix") in names and ("outpace_tokens_total", "target") in names
    assert found["outpace_time_to_first_token_seconds_count"].value >= 1
