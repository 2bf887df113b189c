"""Calls that must be made: what a grammar allows, and what clients get of them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest
from fake import EOS, TOOL_TEMPLATE, VOCAB, FakeEngine, byte_tokenizer, lines
from live import Live
from pydantic import BaseModel

from outpace.decoding.grammar import Grammars
from outpace.errors import ParameterError
from outpace.server.protocol import Tool
from outpace.server.tools import BARE, TAGGED, Form, Plan, constraint_of_calls
from outpace.types import SamplingParams

pytest.importorskip("llguidance")

TOKENIZER = byte_tokenizer(None)
HELLO: Any = [{"role": "user", "content": "Hello"}]
BETWEEN = "\n</tool_call>\n<tool_call>\n"
LLAMA = (
    'Respond in the format {"name": function name, "parameters": dictionary}. {% if tools %}{{ tools | tojson }}'
    "{{ '\"parameters\": ' }}{% endif %}{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}"
)


class Street(BaseModel):
    name: str
    number: int


class House(BaseModel):
    street: Street
    rooms: list[Street] = []


class Node(BaseModel):
    value: int
    next: Node | None = None


def tool(name: str, parameters: Any) -> Tool:
    return Tool.model_validate({"type": "function", "function": {"name": name, "parameters": parameters}})


def of_model(model: type[BaseModel]) -> Tool:
    return tool(model.__name__, model.model_json_schema())


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return Grammars(TOKENIZER, VOCAB)


def keeps(grammars: Grammars, tools: list[Tool], text: str, single: bool = True, form: Form = TAGGED) -> bool:
    """Whether an output of this text, ended behind it, is allowed."""
    params = SamplingParams(**constraint_of_calls(Plan(tools, forced=True, single=single), form))
    matcher = grammars.matcher(params, [EOS])
    for token in [*TOKENIZER.encode(text), EOS]:
        allowed = matcher.allowed()
        assert allowed is not None
        if not allowed[token]:
            return False
        matcher.advance(token)
    return True


def call(name: str, arguments: Any, key: str = "arguments") -> str:
    return json.dumps({"name": name, key: arguments})


HOUSE = {"street": {"name": "Main", "number": 5}, "rooms": [{"name": "Hall", "number": 1}]}


def test_nested_and_recursive_models(grammars: Grammars) -> None:
    tools = [of_model(House), of_model(Node)]
    assert keeps(grammars, tools, call("House", HOUSE))
    assert keeps(grammars, tools, call("Node", {"value": 1, "next": {"value": 2, "next": {"value": 3}}}))
    assert not keeps(grammars, tools, call("House", {"street": {"name": "Main", "number": "5"}}))
    assert not keeps(grammars, tools, call("Node", {"value": 1, "next": {"value": "x"}}))
    assert not keeps(grammars, tools, call("Node", HOUSE))
    assert not keeps(grammars, tools, call("Other", {}))


def test_definitions_of_two_tools_do_not_clash(grammars: Grammars) -> None:
    def with_item(kind: str) -> dict[str, Any]:
        return {"properties": {"a": {"$ref": "#/$defs/Item"}}, "required": ["a"], "$defs": {"Item": {"type": kind}}}

    tools = [tool("f", with_item("integer")), tool("g", with_item("string"))]
    assert keeps(grammars, tools, call("f", {"a": 1})) and keeps(grammars, tools, call("g", {"a": "x"}))
    assert not keeps(grammars, tools, call("f", {"a": "x"})) and not keeps(grammars, tools, call("g", {"a": 1}))


def test_references_of_every_kind(grammars: Grammars) -> None:
    whole = {
        "type": "object",
        "properties": {"next": {"$ref": "#"}, "n": {"type": "integer"}},
        "additionalProperties": False,
    }
    assert keeps(grammars, [tool("f", whole)], call("f", {"next": {"next": {"n": 1}}}))
    assert not keeps(grammars, [tool("f", whole)], call("f", {"next": {"next": {"n": "x"}}}))
    root = {
        "$ref": "#/definitions/A",
        "definitions": {"A": {"type": "object", "required": ["b"], "properties": {"b": {"type": "null"}}}},
    }
    assert keeps(grammars, [tool("f", root)], call("f", {"b": None}))
    assert not keeps(grammars, [tool("f", root)], call("f", {}))
    data = {"properties": {"$ref": {"const": {"$ref": "#/a"}}}, "required": ["$ref"]}
    assert keeps(grammars, [tool("f", data)], call("f", {"$ref": {"$ref": "#/a"}})), "data is no reference"


@pytest.mark.parametrize("parameters", [None, {}, {"properties": {}}, {"type": ["object", "null"]}])
def test_arguments_are_an_object(parameters: Any, grammars: Grammars) -> None:
    assert keeps(grammars, [tool("f", parameters)], call("f", {}))
    assert not keeps(grammars, [tool("f", parameters)], call("f", None))
    with pytest.raises(ParameterError, match="arguments are an object"):
        keeps(grammars, [tool("f", {"type": "array"})], "")
    with pytest.raises(ParameterError, match=r"tools\[0\].function.parameters has the unknown keyword 'requird'"):
        keeps(grammars, [tool("f", {"requird": []})], "")
    deep: dict[str, Any] = {}
    for _ in range(5000):
        deep = {"items": deep}
    with pytest.raises(ParameterError, match="nested too deeply"):
        keeps(grammars, [tool("f", deep)], "")


def test_several_calls_where_they_are_wanted(grammars: Grammars) -> None:
    tools = [of_model(Street), of_model(Node)]
    one, two = call("Street", {"name": "a", "number": 1}), call("Node", {"value": 1, "next": None})
    for text in (one, one + BETWEEN + two, one + BETWEEN + two + "\n</tool_call>", BETWEEN.join([one, two, one])):
        assert keeps(grammars, tools, text, single=False)
        assert keeps(grammars, tools, text) == (text == one)
    for text in ("", one + two, one + BETWEEN, one + BETWEEN + "x", f"{one}\n</tool_call>\n"):
        assert not keeps(grammars, tools, text, single=False)
    assert keeps(grammars, tools, call("Node", {"value": 1}, "parameters"), single=False, form=BARE)


SUNNY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER: Any = {"type": "function", "function": {"name": "weather", "parameters": SUNNY}}
SEARCH: Any = {"type": "function", "function": {"name": "search", "parameters": {}}}
ONE = '{"name": "weather", "arguments": {"city": "Bern"}}'
OTHER = '{"name": "search", "arguments": {}}'


def ask(live: Live, **fields: Any) -> Any:
    client = openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0)
    fields = {"tools": [WEATHER, SEARCH], "tool_choice": "required", **fields}
    return client.chat.completions.create(model="fake", messages=HELLO, **fields)


def says(serve: Callable[..., Live], text: str, template: str = TOOL_TEMPLATE) -> Live:
    return serve(FakeEngine(lambda asked: text, template=template))


def test_several_forced_calls_reach_the_client(serve: Callable[..., Live]) -> None:
    live = says(serve, ONE + BETWEEN + OTHER + "\n</tool_call>")
    answer = ask(live).choices[0]
    assert [c.function.name for c in answer.message.tool_calls] == ["weather", "search"]
    assert answer.message.content is None and answer.finish_reason == "tool_calls"
    assert "call)*" in live.engine.asked[-1].params.grammar
    deltas = [c for chunk in ask(live, stream=True) for c in chunk.choices[0].delta.tool_calls or []]
    made = {i: "".join(c.function.arguments for c in deltas if c.index == i) for i in (0, 1)}
    assert made == {0: '{"city": "Bern"}', 1: "{}"}
    assert [c.function.name for c in deltas if c.id] == ["weather", "search"] and len({c.id for c in deltas}) == 3
    ask(live, parallel_tool_calls=False)
    assert live.engine.asked[-1].params.json_schema and not live.engine.asked[-1].params.grammar


@pytest.mark.parametrize(("forced", "said"), [(True, ONE), (False, "<tool_call>" + ONE), (False, ONE)])
def test_a_call_that_max_tokens_cuts_is_a_part_of_a_call(forced: bool, said: str, serve: Callable[..., Live]) -> None:
    live = says(serve, said)
    most = len(said) - 5
    fields = {"tool_choice": "required" if forced else "auto", "max_tokens": most}
    answer = ask(live, **fields).choices[0]
    (made,) = answer.message.tool_calls
    assert (made.function.name, made.function.arguments) == ("weather", '{"city": "Be')
    assert answer.finish_reason == "length" and answer.message.content is None
    chunks = [chunk.choices[0] for chunk in ask(live, **fields, stream=True)]
    assert chunks[-1].finish_reason == "length" and not any(c.delta.content for c in chunks)
    assert "".join(t.function.arguments for c in chunks for t in c.delta.tool_calls or []) == '{"city": "Be'


def test_text_that_is_cut_behind_a_whole_call_is_cut(serve: Callable[..., Live]) -> None:
    said = f"<tool_call>{ONE}</tool_call> And more"
    answer = ask(says(serve, said), tool_choice="auto", max_tokens=len(said) - 3).choices[0]
    assert answer.finish_reason == "length" and len(answer.message.tool_calls) == 1


def test_too_little_for_a_name_is_no_call_and_no_content(serve: Callable[..., Live]) -> None:
    live = says(serve, ONE)
    answer = ask(live, max_tokens=6).choices[0]
    assert (answer.message.content, answer.message.tool_calls, answer.finish_reason) == (None, None, "length")
    chunks = [chunk.choices[0] for chunk in ask(live, max_tokens=6, stream=True)]
    assert chunks[-1].finish_reason == "length" and not any(c.delta.content or c.delta.tool_calls for c in chunks)


@pytest.mark.parametrize("said", [ONE, f"```json\n{ONE}\n```", f"Here:\n\n```json\n[{ONE}]\n```\n"])
def test_calls_without_tags_are_calls(said: str, serve: Callable[..., Live]) -> None:
    live = says(serve, said)
    answer = ask(live, tool_choice="auto").choices[0]
    assert [c.function.arguments for c in answer.message.tool_calls] == ['{"city": "Bern"}']
    assert answer.message.content == ("Here:" if "Here" in said else None) and answer.finish_reason == "tool_calls"
    chunks = [chunk.choices[0] for chunk in ask(live, tool_choice="auto", stream=True)]
    assert "".join(c.delta.content or "" for c in chunks) == ("Here:" if "Here" in said else "")
    assert [t.function.name for c in chunks for t in c.delta.tool_calls or []] == ["weather"]
    assert chunks[-1].finish_reason == "tool_calls"


def test_json_that_is_no_call_is_text(serve: Callable[..., Live]) -> None:
    said = 'As in:\n{"name": "rain", "arguments": {}}\n[1]\n'
    answer = ask(says(serve, said), tool_choice="auto").choices[0]
    assert answer.message.content == said and answer.message.tool_calls is None and answer.finish_reason == "stop"


def allowed(mode: str, *names: str) -> Any:
    named = [{"type": "function", "function": {"name": name}} for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": named}}


def test_allowed_tools(serve: Callable[..., Live]) -> None:
    live = says(serve, OTHER)
    prompt = live.engine.tokenizer.decode
    answer = ask(live, tool_choice=allowed("auto", "weather"))
    assert answer.choices[0].message.tool_calls is None, "search may not be called"
    assert "weather" in prompt(live.engine.asked[-1].tokens) and "search" not in prompt(live.engine.asked[-1].tokens)
    assert ask(live, tool_choice=allowed("auto", "search")).choices[0].message.tool_calls
    ask(live, tool_choice=allowed("required", "weather"))
    assert '"weather"' in live.engine.asked[-1].params.grammar and "search" not in live.engine.asked[-1].params.grammar
    for choice in (allowed("required", "rain"), {"type": "function", "function": {"name": "rain"}}):
        with pytest.raises(openai.BadRequestError, match="tool_choice names 'rain', and tools has weather, search"):
            ask(live, tool_choice=choice)
    with pytest.raises(openai.BadRequestError, match="same name"):
        ask(live, tools=[WEATHER, WEATHER])


def test_models_that_write_bare_json(serve: Callable[..., Live]) -> None:
    said = '{"name": "weather", "parameters": {"city": "Bern"}}'
    live = says(serve, said, LLAMA)
    for choice in ("auto", "required"):
        answer = ask(live, tool_choice=choice).choices[0]
        assert [c.function.arguments for c in answer.message.tool_calls] == ['{"city": "Bern"}']
    params = live.engine.asked[-1].params
    assert re.search('"parameters": {"\\$ref"', params.json_schema) and not params.grammar
    assert not live.engine.tokenizer.decode(live.engine.asked[-1].tokens).endswith("<tool_call>\n")


def test_a_forced_call_goes_with_nothing_that_shapes_the_output(serve: Callable[..., Live]) -> None:
    live = says(serve, ONE)
    body = {"messages": HELLO, "tools": [WEATHER], "guided_choice": ["a"]}
    for choice, told in (
        ("required", "guided_choice and a forced tool call"),
        ("auto", "leaves no way to call a tool"),
    ):
        answer = httpx.post(f"{live.url}/v1/chat/completions", json={**body, "tool_choice": choice})
        assert answer.status_code == 400 and told in answer.json()["error"]["message"]
    begun = [*HELLO, {"role": "assistant", "content": "a"}]
    more = {"messages": begun, "tools": [WEATHER], "tool_choice": "required", "continue_final_message": True}
    assert "forced tool call" in httpx.post(f"{live.url}/v1/chat/completions", json=more).json()["error"]["message"]
    stream = httpx.post(f"{live.url}/v1/chat/completions", json=body | {"guided_choice": None, "stream": True})
    assert lines(stream.content)[-1] == "[DONE]"
