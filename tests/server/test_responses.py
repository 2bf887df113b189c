"""/v1/responses by the `openai` client: answers, events, tools, conversations that are kept, and whose they are."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from fake import TOOL_TEMPLATE, Asked, FakeEngine
from live import Live

from outpace.errors import ParameterError
from outpace.server.keys import Keys
from outpace.server.routes.response_store import Kept, ResponseStore, StoreLimits

WEATHER: Any = {
    "type": "function",
    "name": "weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
CALLING = 'Let me see.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Bern"}}\n</tool_call>'
EXAMPLE = {"type": "object", "properties": {"a": {"type": "integer"}}}


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    with Live(FakeEngine()) as live:
        yield live


def client_of(live: Live, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{live.url}/v1", api_key=key, max_retries=0)


@pytest.fixture(scope="module")
def client(server: Live) -> openai.OpenAI:
    return client_of(server)


def asked(live: Live) -> Asked:
    return live.engine.asked[-1]


def prompt(live: Live) -> str:
    return live.engine.tokenizer.decode(asked(live).tokens)


def test_an_answer(client: openai.OpenAI, server: Live) -> None:
    answer = client.responses.create(
        model="fake", input="Hello", instructions="Be brief.", extra_body={"seed": 7}, metadata={"a": "b"}
    )
    assert answer.output_text == "Seed 7 says hello to the world." and answer.status == "completed"
    assert prompt(server) == "system: Be brief.\nuser: Hello\n"
    assert answer.usage is not None
    assert (answer.usage.input_tokens, answer.usage.output_tokens) == (len(prompt(server)), 32)
    assert answer.metadata == {"a": "b"} and answer.instructions == "Be brief."
    assert answer.model_extra["outpace"]["seed"] == 7 and asked(server).params.max_tokens == 2048


def test_what_is_asked_for_is_passed_on(client: openai.OpenAI, server: Live) -> None:
    more = {"top_k": 4, "stop": ["wor"], "seed": 1, "outpace": {"method": "suffix", "priority": 3}}
    answer = client.responses.create(
        model="fake", input="x", temperature=0.5, top_p=0.9, max_output_tokens=50, user="u", extra_body=more
    )
    params, options = asked(server).params, asked(server).options
    assert (params.temperature, params.top_p, params.top_k, params.max_tokens) == (0.5, 0.9, 4, 50)
    assert params.stop == ("wor",) and answer.output_text == "Seed 1 says hello to the "
    assert options.method == "suffix" and options.priority == 3 and options.owner
    assert (answer.temperature, answer.top_p, answer.max_output_tokens) == (0.5, 0.9, 50)


@pytest.mark.parametrize(
    ("form", "schema"),
    [
        ({"type": "text"}, None),
        ({"type": "json_object"}, {"type": "object"}),
        ({"type": "json_schema", "name": "n", "strict": True, "schema": EXAMPLE}, EXAMPLE),
    ],
)
def test_text_format(form: Any, schema: Any, client: openai.OpenAI, server: Live) -> None:
    answer = client.responses.create(model="fake", input="x", text={"format": form})
    got = asked(server).params.json_schema
    assert (None if got is None else json.loads(got)) == schema  # type: ignore[arg-type]
    assert answer.text is not None and answer.text.format is not None and answer.text.format.type == form["type"]


def test_an_answer_that_is_cut(client: openai.OpenAI) -> None:
    answer = client.responses.create(model="fake", input="x", max_output_tokens=4, extra_body={"seed": 1})
    assert answer.status == "incomplete" and answer.incomplete_details is not None
    assert answer.incomplete_details.reason == "max_output_tokens" and answer.output_text == "Seed"
    assert answer.output[0].status == "incomplete"  # type: ignore[union-attr]


def test_events_of_a_text(client: openai.OpenAI) -> None:
    events = list(client.responses.create(model="fake", input="x", stream=True, extra_body={"seed": 1}))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    whole: Any = events[-1]
    assert len(deltas) > 3 and "".join(deltas) == whole.response.output_text == "Seed 1 says hello to the world."
    assert whole.response.usage.output_tokens == 32
    ids = {event.item_id for event in events if event.type == "response.output_text.delta"}
    assert ids == {whole.response.output[0].id}
    assert client.responses.retrieve(whole.response.id).output_text == whole.response.output_text


def test_a_stream_that_is_cut_or_empty(serve: Callable[..., Live]) -> None:
    live = serve(FakeEngine(lambda asked: ""))
    client = client_of(live)
    *_, last = client.responses.create(model="fake", input="x", stream=True)
    assert last.type == "response.completed" and last.response.output_text == ""
    live = serve(FakeEngine())
    *_, last = client_of(live).responses.create(model="fake", input="x", stream=True, max_output_tokens=3)
    assert last.type == "response.incomplete" and last.response.status == "incomplete"


def test_a_step_that_fails_ends_a_stream_with_an_event(serve: Callable[..., Live]) -> None:
    engine = FakeEngine()
    live = serve(engine)
    engine.hold.set()
    stream = client_of(live).responses.create(model="fake", input="x", stream=True)
    engine.fail = RuntimeError("secret")
    created, _, last = list(stream)
    assert created.type == "response.created" and last.sequence_number == 2
    assert last.type == "response.failed" and last.response.error is not None
    assert last.response.error.code == "server_error" and "secret" not in last.response.error.message


def test_tools(serve: Callable[..., Live]) -> None:
    live = serve(FakeEngine(lambda asked: CALLING, template=TOOL_TEMPLATE))
    client = client_of(live)
    answer = client.responses.create(model="fake", input="Hi", tools=[WEATHER])
    message, call = answer.output
    assert message.type == "message" and answer.output_text == "Let me see."
    assert call.type == "function_call" and call.name == "weather" and json.loads(call.arguments) == {"city": "Bern"}

    result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}
    client.responses.create(model="fake", previous_response_id=answer.id, input=[result], tools=[WEATHER])
    behind = prompt(live)
    assert behind.endswith('assistant: Let me see.<tool_call>{"city": "Bern"}\ntool: rain\n') and "user: Hi" in behind
    client.responses.create(  # the same, sent by the client itself
        model="fake",
        input=[{"role": "user", "content": "Hi"}, message, call, result],
        tools=[WEATHER],  # type: ignore[list-item]
    )
    assert prompt(live) == behind


def test_events_of_a_call(serve: Callable[..., Live]) -> None:
    live = serve(FakeEngine(lambda asked: CALLING, template=TOOL_TEMPLATE))
    events: Any = list(client_of(live).responses.create(model="fake", input="Hi", tools=[WEATHER], stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    added = [event for event in events if event.type == "response.output_item.added"]
    assert [(event.output_index, event.item.type) for event in added] == [(0, "message"), (1, "function_call")]
    deltas = [event for event in events if event.type == "response.function_call_arguments.delta"]
    done = next(event for event in events if event.type == "response.function_call_arguments.done")
    assert "".join(event.delta for event in deltas) == done.arguments and json.loads(done.arguments) == {"city": "Bern"}
    assert {event.item_id for event in deltas} == {added[1].item.id} and {e.output_index for e in deltas} == {1}
    assert [item.type for item in events[-1].response.output] == ["message", "function_call"]


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "weather"}])
def test_a_forced_call(choice: Any, serve: Callable[..., Live]) -> None:
    live = serve(FakeEngine(lambda asked: '{"name": "weather", "arguments": {"city": "Bern"}}', TOOL_TEMPLATE))
    made: dict[str, Any] = dict(
        model="fake", input="Hi", tools=[WEATHER], tool_choice=choice, parallel_tool_calls=False
    )
    (call,) = client_of(live).responses.create(**made).output
    assert call.type == "function_call" and asked(live).params.constraint is not None
    *_, last = client_of(live).responses.create(**made, stream=True)
    assert [(item.name, item.arguments) for item in last.response.output] == [("weather", call.arguments)]


def test_where_a_call_is_forced_there_is_no_text_to_have_a_format(serve: Callable[..., Live]) -> None:
    live = serve(FakeEngine(lambda asked: '{"name": "weather", "arguments": {"city": "Bern"}}', TOOL_TEMPLATE))
    form: Any = {"format": {"type": "json_schema", "name": "n", "schema": EXAMPLE}}
    made: dict[str, Any] = dict(model="fake", input="Hi", tools=[WEATHER], text=form)
    (call,) = client_of(live).responses.create(**made, tool_choice="required").output
    assert call.type == "function_call"
    with pytest.raises(openai.BadRequestError, match=r"text\.format leaves no way to call a tool"):
        client_of(live).responses.create(**made)


def test_a_conversation_goes_on_without_the_instructions_of_before(client: openai.OpenAI, server: Live) -> None:
    first = client.responses.create(model="fake", input="One", instructions="A", extra_body={"seed": 1})
    second = client.responses.create(
        model="fake", input="Two", previous_response_id=first.id, instructions="B", extra_body={"seed": 2}
    )
    client.responses.create(model="fake", input="Three", previous_response_id=second.id)
    said = [f"assistant: Seed {i} says hello to the world.\n" for i in (1, 2)]
    assert prompt(server) == f"user: One\n{said[0]}user: Two\n{said[1]}user: Three\n"


def test_what_is_kept_can_be_had_listed_and_forgotten(client: openai.OpenAI) -> None:
    items: Any = [{"role": "user", "content": str(i)} for i in range(5)]
    made = client.responses.create(model="fake", input=items)
    assert client.responses.retrieve(made.id).model_dump() == made.model_dump()
    listed = client.responses.input_items.list(made.id, order="asc", limit=2)
    assert [item.content[0].text for item in listed] == ["0", "1", "2", "3", "4"]  # type: ignore[union-attr]
    newest: Any = client.responses.input_items.list(made.id, limit=2)
    assert [item.content[0].text for item in newest.data] == ["4", "3"] and newest.has_more
    client.responses.delete(made.id)
    for gone in (client.responses.retrieve, client.responses.delete, client.responses.input_items.list):
        with pytest.raises(openai.NotFoundError, match="there is no response"):
            gone(made.id)
    with pytest.raises(openai.BadRequestError) as refused:
        client.responses.create(model="fake", input="x", previous_response_id=made.id)
    assert refused.value.code == "previous_response_not_found" and refused.value.param == "previous_response_id"


def test_what_must_not_be_kept_is_not(client: openai.OpenAI) -> None:
    made = client.responses.create(model="fake", input="x", store=False)
    assert made.model_extra["store"] is False
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(made.id)


def test_nobody_reads_what_another_was_answered(serve: Callable[..., Live]) -> None:
    live = serve(FakeEngine(), keys=Keys(["first-key", "second-key"]))
    first, second = client_of(live, "first-key"), client_of(live, "second-key")
    made = first.responses.create(model="fake", input="secret")
    named = first.responses.create(model="fake", input="secret", user="ann")
    for other, id, query in ((second, made.id, None), (first, named.id, None), (first, named.id, {"user": "bob"})):
        for call in (other.responses.retrieve, other.responses.delete, other.responses.cancel):
            with pytest.raises(openai.NotFoundError):
                call(id, extra_query=query)
        with pytest.raises(openai.NotFoundError):
            other.responses.input_items.list(id, extra_query=query)
        with pytest.raises(openai.BadRequestError, match="previous_response_id"):
            other.responses.create(model="fake", input="x", previous_response_id=id, extra_body=query)
    assert first.responses.retrieve(named.id, extra_query={"user": "ann"}).id == named.id
    with pytest.raises(openai.BadRequestError, match="none is made in the background"):
        first.responses.cancel(made.id)


def test_owners_who_share_prefixes_do_not_share_what_they_were_told(serve: Callable[..., Live]) -> None:
    live = serve(FakeEngine(), keys=Keys(["first-key", "second-key"], share=True))
    made = client_of(live, "first-key").responses.create(model="fake", input="secret")
    assert asked(live).options.owner == ""
    with pytest.raises(openai.NotFoundError):
        client_of(live, "second-key").responses.retrieve(made.id)
    assert client_of(live, "first-key").responses.retrieve(made.id).id == made.id


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ({}, "input is missing"),
        ({"input": ""}, None),
        ({"input": []}, "input is empty"),
        ({"input": "x", "background": True}, "background=true is not supported"),
        ({"input": "x", "conversation": "c"}, "use previous_response_id"),
        ({"input": "x", "truncation": "auto"}, "truncation"),
        ({"input": "x", "include": ["message.output_text.logprobs"]}, "include"),
        ({"input": "x", "tools": [{"type": "web_search"}]}, "tools.0.type"),
        ({"input": [{"type": "reasoning", "summary": []}]}, "'reasoning'"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input"),
        ({"input": "x", "n": 2}, "unknown field 'n'"),
        ({"input": "x", "max_output_tokens": 0}, "max_output_tokens: Input should be"),
        ({"input": "x", "max_output_tokens": 0}, "max_output_tokens"),
        ({"input": "x", "top_logprobs": 2}, "log-probabilities come from /v1/chat/completions"),
        ({"input": "x", "tools": [{"type": "function", "name": "a b"}]}, "tools.0.name"),
        ({"input": "x", "reasoning": {"effort": "x" * 50}}, "reasoning_effort"),
        ({"input": "x", "outpace": {"trace": True}}, "outpace.trace belongs to"),
        ({"input": "x", "text": {"format": {"type": "json_schema", "name": "n"}}}, "needs schema"),
        ({"input": [{"type": "function_call_output", "call_id": "c", "output": "x"}]}, "tool_call_id"),
    ],
)
def test_what_does_not_work_is_refused_by_name(body: Any, told: str | None, server: Live) -> None:
    answer = httpx.post(f"{server.url}/v1/responses", json=body)
    assert answer.status_code == (200 if told is None else 400), answer.text
    assert told is None or told in answer.json()["error"]["message"]


def test_a_query_that_is_wrong_is_refused_by_name(client: openai.OpenAI, server: Live) -> None:
    made = client.responses.create(model="fake", input="x")
    for query, name in (({"limit": 0}, "limit"), ({"order": "up"}, "order"), ({"after": "no"}, "after")):
        answer = httpx.get(f"{server.url}/v1/responses/{made.id}/input_items", params=query)  # type: ignore[arg-type]
        assert answer.status_code == 400 and answer.json()["error"]["param"] == name


def test_fields_without_effect_are_named(server: Live) -> None:
    body = {"input": "x", "truncation": "disabled", "prompt_cache_key": "k", "service_tier": "auto"}
    answer = httpx.post(f"{server.url}/v1/responses", json=body)
    assert answer.json()["outpace"]["ignored"] == ["truncation", "prompt_cache_key", "service_tier"]
    form = {"type": "json_schema", "name": "n", "description": "d", "schema": EXAMPLE}
    answer = httpx.post(f"{server.url}/v1/responses", json={"input": "x", "text": {"format": form}})
    assert answer.json()["outpace"]["ignored"] == ["text.format.description"]


def test_a_file_keeps_responses_between_servers(tmp_path: Path) -> None:
    file = tmp_path / "responses.db"
    with Live(FakeEngine(), store=ResponseStore(file)) as live:
        made = client_of(live).responses.create(model="fake", input="x")
    with Live(FakeEngine(), store=ResponseStore(file)) as live:
        assert client_of(live).responses.retrieve(made.id).output_text == made.output_text


def test_a_response_that_is_too_large_is_answered_and_not_kept(serve: Callable[..., Live]) -> None:
    live = serve(FakeEngine(), store=ResponseStore(limits=StoreLimits(bytes=100)))
    made = client_of(live).responses.create(model="fake", input="x")
    assert made.output_text and made.model_extra["store"] is False


def stored(id: str, size: int, previous: str | None = None) -> Kept:
    return Kept([], {"id": id, "previous_response_id": previous, "output": [], "metadata": {"a": "m" * size}})


def test_a_conversation_that_is_too_large_is_refused_before_it_is_read(serve: Callable[..., Live]) -> None:
    store = ResponseStore(limits=StoreLimits(conversation_bytes=10_000))
    live = serve(FakeEngine(), store=store)
    for place in range(3):
        store.put("", stored(f"resp_{place}", 4000, f"resp_{place - 1}" if place else None))
    read: list[str] = []
    get = store.get
    store.get = lambda owner, id: read.append(id) or get(owner, id)  # type: ignore[method-assign, func-returns-value]
    body = {"input": "x", "previous_response_id": "resp_2"}
    refused = httpx.post(f"{live.url}/v1/responses", json=body)
    assert refused.status_code == 400 and not read
    assert "more than 10000 bytes" in refused.json()["error"]["message"]
    assert httpx.post(f"{live.url}/v1/responses", json=body | {"previous_response_id": "resp_1"}).status_code == 200
    assert read == ["resp_0", "resp_1"]


@pytest.mark.parametrize("metadata", [{"a": "m" * 513}, {"k" * 65: "v"}, {str(i): "" for i in range(17)}])
def test_metadata_are_as_large_as_openai_has_them(metadata: dict[str, str], server: Live) -> None:
    refused = httpx.post(f"{server.url}/v1/responses", json={"input": "x", "metadata": metadata})
    assert refused.status_code == 400 and refused.json()["error"]["param"].startswith("metadata")


def test_an_answer_comes_though_the_disk_is_full(
    serve: Callable[..., Live], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = ResponseStore(tmp_path / "responses.db")
    (pages,) = store._db.execute("PRAGMA page_count").fetchone()
    store._db.execute(f"PRAGMA max_page_count = {pages}")
    client = client_of(serve(FakeEngine(), store=store))
    text = "y" * 3500  # fills pages, and the context nearly
    with caplog.at_level("ERROR", "outpace.server"):
        made = [client.responses.create(model="fake", input=text, extra_body={"seed": 1}) for _ in range(5)][-1]
    assert made.output_text and made.model_extra["store"] is False
    assert "could not be kept: database or disk is full" in caplog.text


def test_users_of_one_key_do_not_push_out_what_another_key_keeps(serve: Callable[..., Live]) -> None:
    live = serve(
        FakeEngine(), keys=Keys(["key-of-ann", "key-of-bob"]), store=ResponseStore(limits=StoreLimits(entries=3))
    )
    ann, bob = client_of(live, "key-of-ann"), client_of(live, "key-of-bob")
    first = ann.responses.create(model="fake", input="x" * 500)
    for user in "abcdef":
        bob.responses.create(model="fake", input="x", user=user)
    assert ann.responses.retrieve(first.id).output_text == first.output_text


def test_the_file_is_for_its_owner_alone_and_one_server(tmp_path: Path) -> None:
    file = tmp_path / "responses.db"
    file.touch(mode=0o644)
    store = ResponseStore(file)
    store.put("", stored("resp_0", 10))
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o600}
    with pytest.raises(ParameterError, match="another server uses it: name another file"):
        ResponseStore(file)
    store.close()
