"""Tools with a model that writes its calls as fenced JSON, without tags."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest
from live import Live
from pydantic import BaseModel

from outpace import LLM

MODEL = "qwen2.5-coder-0.5b"
TOOLS: Any = [
    {"type": "function", "function": {"name": name, "description": text, "parameters": parameters}}
    for name, text, parameters in (
        (
            "get_weather",
            "Current weather of a city",
            {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        ),
        (
            "search_web",
            "Search the web",
            {"type": "object", "properties": {"query": {"type": "string"}}, "required": ["query"]},
        ),
    )
]


class Address(BaseModel):
    street: str
    city: str


class Person(BaseModel):
    name: str
    age: int
    address: Address


@pytest.fixture(scope="module")
def client() -> Iterator[openai.OpenAI]:
    with LLM(MODEL, threads=1, kv_tokens=4096) as llm, Live(llm) as live:
        yield openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0, timeout=600)


def ask(client: openai.OpenAI, text: str, **fields: Any) -> Any:
    messages: Any = [{"role": "user", "content": text}]
    return client.chat.completions.create(model=MODEL, messages=messages, temperature=0, max_tokens=100, **fields)


@pytest.mark.slow
def test_calls_of_auto_are_recognised(client: openai.OpenAI) -> None:
    questions = {
        "What is the weather in Bern?": "Bern",
        "Search the web for the tallest building in Europe.": "building in Europe",
        "How warm is it in Oslo?": "Oslo",
    }
    for question, part in questions.items():
        answer = ask(client, question, tools=TOOLS).choices[0]
        (call,) = answer.message.tool_calls
        assert part in call.function.arguments and answer.finish_reason == "tool_calls"
        chunks = [chunk.choices[0].delta for chunk in ask(client, question, tools=TOOLS, stream=True)]
        (streamed,) = [c.function for delta in chunks for c in delta.tool_calls or []]
        assert (streamed.name, streamed.arguments) == (call.function.name, call.function.arguments)
        assert not any(delta.content for delta in chunks)
    assert ask(client, "Say hello.").choices[0].message.content


@pytest.mark.slow
def test_forced_calls_keep_to_a_nested_model(client: openai.OpenAI) -> None:
    tools: Any = [openai.pydantic_function_tool(Person)]
    asked = "Ann is 31 and lives at Main Street 5 in Bern."
    for choice in ("required", {"type": "function", "function": {"name": "Person"}}):
        message = ask(client, asked, tools=tools, tool_choice=choice).choices[0].message
        person = Person.model_validate_json(message.tool_calls[0].function.arguments)
        assert person.name == "Ann" and person.address.city == "Bern"


@pytest.mark.slow
def test_an_answer_goes_on_from_its_beginning(client: openai.OpenAI) -> None:
    messages: Any = [
        {"role": "user", "content": "Count from one to five."},
        {"role": "assistant", "content": "one, two, three,"},
    ]
    more = {"continue_final_message": True, "stop": [","], "min_tokens": 1}
    answer = client.chat.completions.create(
        model=MODEL, messages=messages, temperature=0, max_tokens=10, extra_body=more
    )
    assert answer.choices[0].message.content == " four"
