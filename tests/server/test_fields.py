"""Fields of other servers' APIs: what is honoured, what has no effect and says so, what is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from fake import TOOL_TEMPLATE, Asked, FakeEngine, lines
from live import Live

from outpace.server import protocol, vendor
from outpace.server.vendor import Harmless, Honoured, Refused

PAGE = Path(__file__).parents[2] / "docs" / "serving.md"
HELLO: Any = [{"role": "user", "content": "Hello"}]
READING = (
    "{% if enable_thinking %}Think. {% endif %}{{ reasoning_effort }}{{ style }}|{% for message in messages %}"
    "{{ message.role }}{% if message.name %} {{ message.name }}{% endif %}: {{ message.content | trim }}</s>"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
TABLES: list[tuple[dict[str, vendor.Rule], list[type[protocol.Body]]]] = [
    (vendor.REQUEST, [protocol.ChatRequest, protocol.CompletionRequest]),
    (vendor.MESSAGE, [protocol.Message]),
    (vendor.PART, [protocol.Part]),
    (vendor.TOOL_CALL, [protocol.ToolCall]),
    (vendor.CALLED_FUNCTION, [protocol.CalledFunction]),
    (vendor.TOOL, [protocol.Tool]),
    (vendor.FUNCTION, [protocol.Function]),
    (vendor.STREAM_OPTIONS, [protocol.StreamOptions]),
]


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    with Live(FakeEngine(template=READING)) as live:
        yield live


@pytest.fixture(scope="module")
def client(server: Live) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def asked(server: Live) -> Asked:
    return server.engine.asked[-1]


def prompt_of(server: Live) -> str:
    return server.engine.tokenizer.decode(asked(server).tokens, skip_special=False)


def chat(client: openai.OpenAI, messages: Any = HELLO, **fields: Any) -> Any:
    return client.chat.completions.create(model="fake", messages=messages, seed=1, extra_body=fields)


@pytest.mark.parametrize(
    ("table", "bodies"), TABLES, ids=lambda value: value[0].__name__ if type(value) is list else ""
)
def test_what_is_honoured_is_what_the_models_have(
    table: dict[str, vendor.Rule], bodies: list[type[protocol.Body]]
) -> None:
    fields = {field.alias or name for body in bodies for name, field in body.model_fields.items()}
    assert fields == {name for name, rule in table.items() if isinstance(rule, Honoured)}
    assert all(set(table) <= set(body.rules) for body in bodies)


def test_the_page_lists_every_field_as_what_it_is() -> None:
    text = PAGE.read_text().partition("What becomes of each field")[2].partition("**Every other field")[0]
    listed: dict[str, set[str]] = {}
    for item in text.split("\n- **")[1:]:
        title, _, rest = item.partition("**")
        names = re.findall(r"`([a-z_0-9.]+)`", rest)
        assert len(names) == len(set(names)), title
        listed.setdefault(title.split(",")[0], set()).update(names)
    kinds = {"Honoured": Honoured, "Taken": Harmless, "Refused": Refused}
    for title, kind in kinds.items():
        assert listed[title] == {name for name, rule in vendor.REQUEST.items() if isinstance(rule, kind)}
    assert len(text.split("\n- **")) == 6
    only = text.partition("at the value at which they have none")[2].partition("- **")[0]
    at_values = {
        name for name, rule in vendor.REQUEST.items() if isinstance(rule, Harmless) and rule.values is not None
    }
    assert set(re.findall(r"`([a-z_0-9.]+)`", only)) == at_values


@pytest.mark.parametrize("name", [name for name, rule in vendor.REQUEST.items() if isinstance(rule, Harmless)])
def test_what_is_harmless_is_taken_and_named(name: str, client: openai.OpenAI, server: Live) -> None:
    rule = vendor.REQUEST[name]
    assert isinstance(rule, Harmless) and rule.why
    plain = chat(client)
    expected = asked(server)
    for value in rule.values if rule.values is not None else (1, "x", [2], {"a": True}):
        answer = chat(client, **{name: value})
        assert answer.model_extra["outpace"]["ignored"] == [name]
        assert answer.choices[0].message.content == plain.choices[0].message.content
        assert (asked(server).params, asked(server).tokens) == (expected.params, expected.tokens)
    assert "ignored" not in chat(client, **{name: None}).model_extra["outpace"]
    if rule.values is not None:
        with pytest.raises(openai.BadRequestError, match="is not supported, only") as refused:
            chat(client, **{name: "something else"})
        assert refused.value.param == name and refused.value.code == "unsupported_parameter"


@pytest.mark.parametrize("name", [name for name, rule in vendor.REQUEST.items() if isinstance(rule, Refused)])
def test_what_is_refused_says_why_unless_it_is_not_wanted(name: str, client: openai.OpenAI) -> None:
    for value in (True, "x", 7, {"a": 1}):
        with pytest.raises(openai.BadRequestError, match=f"{name} is not supported: [a-z]") as refused:
            chat(client, **{name: value})
        assert refused.value.param == name
    assert chat(client, **{name: False}).model_extra["outpace"]["ignored"] == [name]
    assert "ignored" not in chat(client, **{name: None}).model_extra["outpace"]


def test_true_is_no_number() -> None:
    for value in (True, 1.5, "1"):
        with pytest.raises(ValueError, match="repeat_penalty"):
            vendor.sift({"repeat_penalty": value}, vendor.REQUEST)
    assert vendor.sift({"repeat_penalty": 1.0}, vendor.REQUEST) == ({}, ["repeat_penalty"])


def test_streams_and_several_choices_name_them_too(server: Live) -> None:
    body = {"messages": HELLO, "cache_prompt": True, "n": 2}
    whole = httpx.post(f"{server.url}/v1/chat/completions", json=body).json()
    assert whole["outpace"]["ignored"] == ["cache_prompt"] and len(whole["outpace"]["choices"]) == 2
    stream = lines(httpx.post(f"{server.url}/v1/chat/completions", json={**body, "stream": True}).content)
    ends = [e["outpace"]["ignored"] for e in stream[:-1] if e["choices"][0]["finish_reason"]]
    assert ends == [["cache_prompt"]] * 2
    text = httpx.post(f"{server.url}/v1/completions", json={"prompt": "x", "cache_prompt": True}).json()
    assert text["outpace"]["ignored"] == ["cache_prompt"]
    form = {"type": "json_schema", "json_schema": {"name": "n", "description": "d", "schema": {"type": "object"}}}
    described = httpx.post(f"{server.url}/v1/chat/completions", json={"messages": HELLO, "response_format": form})
    assert described.json()["outpace"]["ignored"] == ["response_format.json_schema.description"]


def test_fields_of_messages_and_tools_are_named_with_their_place(serve: Callable[..., Live]) -> None:
    live = serve(FakeEngine(template=TOOL_TEMPLATE))
    mark = {"cache_control": {"type": "ephemeral"}}
    call = {"id": "a", "type": "function", "index": 0, "function": {"name": "f", "arguments": "{}"}}
    messages: Any = [
        {
            "role": "user",
            "name": "ann",
            "content": [{"type": "text", "text": "x", **mark}, {"type": "text", "text": "y"}],
        },
        {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "Hm.", "annotations": [1]},
        {"role": "tool", "tool_call_id": "a", "content": "z", **mark},
    ]
    tools = [{"type": "function", "function": {"name": "f"}, **mark}]
    answer = httpx.post(f"{live.url}/v1/chat/completions", json={"messages": messages, "tools": tools}).json()
    places = ("content.cache_control", "tool_calls.index", "annotations", "cache_control", "name", "reasoning_content")
    assert set(answer["outpace"]["ignored"]) == {"tools.cache_control", *(f"messages.{place}" for place in places)}


MEANT: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"min_tokens": 3}, {"min_tokens": 3}),
    ({"guided_json": {"type": "array"}}, {"json_schema": '{"type": "array"}'}),
    ({"guided_json": '{"type":"array"}'}, {"json_schema": '{"type":"array"}'}),
    ({"json_schema": {"type": "array"}}, {"json_schema": '{"type": "array"}'}),
    ({"guided_regex": "a+"}, {"regex": "a+"}),
    ({"guided_grammar": "root ::= [a]"}, {"grammar": "root ::= [a]"}),
    ({"guided_choice": ["yes", 'no "'] }, {"grammar": 'start: "yes" | "no \\""'}),
    ({"structured_outputs": {"choice": ["a"]}}, {"grammar": 'start: "a"'}),
    ({"structured_outputs": {"json": {"type": "array"}}}, {"json_schema": '{"type": "array"}'}),
    ({"structured_outputs": {"json_object": True}}, {"json_schema": '{"type": "object"}'}),
    ({"response_format": {"type": "json_object", "schema": {"type": "array"}}}, {"json_schema": '{"type": "array"}'}),
    ({"n_predict": 7}, {"max_tokens": 7}),
    ({"n_predict": -1}, {}),
    ({"n_predict": 5, "max_tokens": 5}, {"max_tokens": 5}),
]  # fmt: skip


@pytest.mark.parametrize(("sent", "meant"), MEANT, ids=str)
def test_other_names_of_what_there_is(
    sent: dict[str, Any], meant: dict[str, Any], client: openai.OpenAI, server: Live
) -> None:
    answer = chat(client, **sent)
    params = asked(server).params
    for name, value in ({"max_tokens": 2048, "json_schema": None, "regex": None, "grammar": None} | meant).items():
        assert getattr(params, name) == value
    assert "ignored" not in answer.model_extra["outpace"]


CLASHES: list[tuple[dict[str, Any], str]] = [
    ({"guided_json": {}, "regex": "a"}, "regex and guided_json cannot go together"),
    ({"response_format": {"type": "json_object"}, "guided_choice": ["a"]}, "guided_choice and response_format cannot"),
    ({"structured_outputs": {"regex": "a", "grammar": "b"}}, "structured_outputs.regex and structured_outputs.grammar"),
    ({"guided_choice": [""]}, "none of them empty"),
    ({"n_predict": 3, "max_tokens": 4}, "max_tokens and n_predict differ"),
    ({"priority": 1, "outpace": {"priority": 2}}, "priority and outpace.priority differ"),
    ({"min_tokens": 9, "max_tokens": 8}, "min_tokens=9 is out of range"),
    ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
    ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs names 'messages'"),
    ({"chat_template_kwargs": {"add_generation_prompt": True}}, "chat_template_kwargs names 'add_generation_prompt'"),
    ({"chat_template_kwargs": {"a b": 1}}, "chat_template_kwargs names 'a b'"),
    ({"chat_template_kwargs": {"self": 1}}, "chat_template_kwargs names 'self'"),
    ({"chat_template_kwargs": {"template": "x"}}, "chat_template_kwargs names 'template'"),
    ({"chat_template_kwargs": {"style": "x" * 20_000}}, "16384 characters in all"),
    ({"chat_template_kwargs": {f"v{i}": i for i in range(33)}}, "at most 32 values"),
    ({"chat_template_kwargs": {"enable_thinking": True}, "enable_thinking": True}, "say the same"),
    ({"continue_final_message": True}, "continue_final_message: the last message must be text of the assistant"),
    ({"response_format": {"type": "text", "schema": {}}}, "schema belongs to type json_object"),
]


@pytest.mark.parametrize(("sent", "told"), CLASHES, ids=str)
def test_fields_that_do_not_fit_together(sent: dict[str, Any], told: str, client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match=re.escape(told)):
        chat(client, **sent)


def test_priorities_and_shortened_prompts(client: openai.OpenAI, server: Live) -> None:
    chat(client, priority=-3, truncate_prompt_tokens=4)
    assert asked(server).options.priority == -3 and prompt_of(server) == "nt: "
    client.completions.create(model="fake", prompt="abcdef", extra_body={"truncate_prompt_tokens": 2, "n_predict": 3})
    assert prompt_of(server) == "ef" and asked(server).params.max_tokens == 3


def test_values_of_the_chat_template(client: openai.OpenAI, server: Live) -> None:
    values = {"style": "curt", "other": 1, "Think": 2, "message": 3, "raise_exception": "x"}
    answer = chat(client, chat_template_kwargs=values, enable_thinking=True, reasoning_effort="low")
    assert prompt_of(server) == "Think. lowcurt|user: Hello</s>assistant: "
    unread = ("other", "Think", "message", "raise_exception")
    assert answer.model_extra["outpace"]["ignored"] == [f"chat_template_kwargs.{name}" for name in unread]
    chat(client, chat_template_kwargs={"style": "</s>"})
    assert asked(server).tokens.count(server.engine.tokenizer.token_id("</s>")) == 1, "no control token of a user's"
    chat(client, [{"role": "user", "content": "x", "name": "ann"}])
    assert prompt_of(server) == "|user ann: x</s>assistant: "


def test_what_the_template_does_not_read_is_named(serve: Callable[..., Live]) -> None:
    live = serve(FakeEngine())
    body = {"messages": HELLO, "reasoning_effort": "low", "enable_thinking": False}
    answer = httpx.post(f"{live.url}/v1/chat/completions", json=body).json()
    assert set(answer["outpace"]["ignored"]) == {"reasoning_effort", "enable_thinking"}


def test_an_answer_that_was_begun_goes_on(client: openai.OpenAI, server: Live) -> None:
    begun = [*HELLO, {"role": "assistant", "content": "Well,  "}]
    chat(client, begun, continue_final_message=True)
    assert prompt_of(server) == "|user: Hello</s>assistant: Well,  "
    chat(client, begun, continue_final_message=True, add_generation_prompt=False)
    assert prompt_of(server) == "|user: Hello</s>assistant: Well,  "
    chat(client, [HELLO[0], begun[1] | {"prefix": True}])
    assert prompt_of(server) == "|user: Hello</s>assistant: Well,  "
    chat(client, begun)
    assert prompt_of(server).endswith("Well,</s>assistant: "), "without it a new turn begins"
    chat(client, begun, add_generation_prompt=False)
    assert prompt_of(server).endswith("Well,</s>")
    chat(client, [*HELLO, {"role": "assistant", "content": "a</s>b"}], continue_final_message=True)
    assert prompt_of(server).endswith("a</s>b") and asked(server).tokens.count(257) == 1
    with pytest.raises(openai.BadRequestError, match="add_generation_prompt cannot go together"):
        chat(client, begun, continue_final_message=True, add_generation_prompt=True)
    with pytest.raises(openai.BadRequestError, match="only the last message"):
        chat(client, [begun[1] | {"prefix": True}, *HELLO])


def test_a_field_given_twice_is_refused(server: Live) -> None:
    for body in ('{"prompt": "a", "prompt": "b"}', '{"prompt": "a", "outpace": {"trace": true, "trace": false}}'):
        answer = httpx.post(f"{server.url}/v1/completions", content=body, headers={"content-type": "application/json"})
        assert answer.status_code == 400 and "given twice" in json.loads(answer.content)["error"]["message"]
