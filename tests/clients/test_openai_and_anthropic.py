"""The two official clients, on every route that they have."""

from __future__ import annotations

import json
from typing import Any

import pytest
from shapes import ASK, Person, Weather, is_ann

HELLO: Any = [{"role": "user", "content": "Say hello."}]
COUNT: Any = [{"role": "user", "content": "Count from one to five."}]
TOOL: Any = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}


@pytest.fixture
def openai_small(small: Any) -> Any:
    import openai

    return openai.OpenAI(base_url=small.url, api_key="none", max_retries=0, timeout=300)


@pytest.fixture
def openai_coder(coder: Any) -> Any:
    import openai

    return openai.OpenAI(base_url=coder.url, api_key="none", max_retries=0, timeout=300)


@pytest.fixture
def anthropic_coder(coder: Any) -> Any:
    import anthropic

    return anthropic.Anthropic(base_url=coder.root, api_key="none", max_retries=0, timeout=300)


def test_chat_and_stream(openai_small: Any, small: Any) -> None:
    made: dict[str, Any] = dict(model=small.model, messages=COUNT, max_tokens=64, temperature=0, stop=["3"])
    whole = openai_small.chat.completions.create(**made)
    chunks = list(openai_small.chat.completions.create(**made, stream=True, stream_options={"include_usage": True}))
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    with openai_small.chat.completions.stream(**made) as stream:
        assert stream.until_done().get_final_completion().choices[0].message.content == text


def test_text_and_its_log_probabilities(openai_small: Any, small: Any) -> None:
    got = openai_small.completions.create(
        model=small.model, prompt="The capital of France is", max_tokens=4, echo=True, logprobs=2, temperature=0
    )
    assert got.choices[0].text.startswith("The capital of France is Paris")
    assert len(got.choices[0].logprobs.tokens) == got.usage.total_tokens


def test_the_middle_is_filled_in(openai_coder: Any, coder: Any) -> None:
    got = openai_coder.completions.create(
        model=coder.model,
        prompt="def add(a, b):\n    return",
        suffix="\n\nprint(add(2, 3))\n",
        max_tokens=16,
        temperature=0,
    )
    assert got.choices[0].text.strip().startswith("a + b") and got.choices[0].finish_reason == "stop"


def test_vectors(openai_small: Any, small: Any) -> None:
    first, second, third = (
        d.embedding
        for d in openai_small.embeddings.create(
            model=small.model, input=["The cat sleeps.", "A kitten is sleeping.", "Interest rates rose by 2 percent."]
        ).data
    )
    near, far = (sum(a * b for a, b in zip(first, other, strict=True)) for other in (second, third))
    assert near > far


def test_responses(openai_small: Any, small: Any) -> None:
    made: dict[str, Any] = dict(model=small.model, temperature=0, max_output_tokens=64, extra_body={"stop": ["."]})
    first = openai_small.responses.create(input="Say hello.", **made)
    with openai_small.responses.stream(input="Say hello.", **made) as stream:
        assert stream.get_final_response().output_text == first.output_text
    second = openai_small.responses.create(input="Again.", previous_response_id=first.id, **made)
    assert second.usage.input_tokens > first.usage.input_tokens
    assert openai_small.responses.retrieve(first.id).output_text == first.output_text
    openai_small.responses.delete(first.id)


def test_openai_parses_models(openai_coder: Any, coder: Any) -> None:
    got = openai_coder.chat.completions.parse(
        model=coder.model, messages=[{"role": "user", "content": ASK}], response_format=Person, temperature=0
    )
    is_ann(got.choices[0].message.parsed)
    is_ann(openai_coder.responses.parse(model=coder.model, input=ASK, text_format=Person, temperature=0).output_parsed)


def test_openai_calls_tools(openai_coder: Any, coder: Any) -> None:
    import openai

    tool = openai.pydantic_function_tool(Weather, name="weather")
    messages: Any = [{"role": "user", "content": "What is the weather in Bern?"}]
    made: dict[str, Any] = dict(model=coder.model, tools=[tool], temperature=0)
    got = openai_coder.chat.completions.parse(messages=messages, tool_choice="required", **made)
    (call,) = got.choices[0].message.tool_calls
    assert call.function.name == "weather" and "Bern" in call.function.parsed_arguments.city
    messages += [got.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": "It rains."}]
    assert "rain" in openai_coder.chat.completions.create(messages=messages, **made).choices[0].message.content.lower()


def test_anthropic_answers_and_streams(anthropic_coder: Any, coder: Any) -> None:
    made: dict[str, Any] = dict(
        model=coder.model, max_tokens=24, messages=COUNT, system="Be brief.", extra_body={"temperature": 0}
    )
    whole = anthropic_coder.messages.create(**made)
    with anthropic_coder.messages.stream(**made) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert whole.content[0].text == text == final.content[0].text
    assert final.usage.output_tokens == whole.usage.output_tokens and final.stop_reason == whole.stop_reason
    counted = anthropic_coder.messages.count_tokens(model=coder.model, messages=COUNT, system="Be brief.")
    assert counted.input_tokens == whole.usage.input_tokens + (whole.usage.cache_read_input_tokens or 0)
    stopped = anthropic_coder.messages.create(**{**made, "stop_sequences": ["2", "two"]})
    assert stopped.stop_reason == "stop_sequence" and stopped.stop_sequence in ("2", "two")


def test_anthropic_calls_tools(anthropic_coder: Any, coder: Any) -> None:
    tools: Any = [{"name": "weather", "description": "The weather of a city", "input_schema": TOOL}]
    messages: Any = [{"role": "user", "content": "What is the weather in Bern?"}]
    made: dict[str, Any] = dict(model=coder.model, max_tokens=64, tools=tools, extra_body={"temperature": 0})
    got = anthropic_coder.messages.create(messages=messages, tool_choice={"type": "any"}, **made)
    use = got.content[-1]
    assert got.stop_reason == "tool_use" and use.name == "weather" and "Bern" in use.input["city"]
    with anthropic_coder.messages.stream(
        messages=messages, tool_choice={"type": "tool", "name": "weather"}, **made
    ) as stream:
        pieces = "".join(event.partial_json for event in stream if event.type == "input_json")
        assert json.loads(pieces) == stream.get_final_message().content[-1].input
    result = {"type": "tool_result", "tool_use_id": use.id, "content": "It rains."}
    brief = {"type": "text", "text": "Answer in one sentence."}
    messages += [{"role": "assistant", "content": got.content}, {"role": "user", "content": [result, brief]}]
    told = anthropic_coder.messages.create(messages=messages, **made)
    assert "rain" in told.content[0].text.lower()


def test_anthropic_errors_and_prefill(anthropic_coder: Any, coder: Any) -> None:
    import anthropic

    with pytest.raises(anthropic.NotFoundError):
        anthropic_coder.messages.create(model="other", max_tokens=4, messages=HELLO)
    with pytest.raises(anthropic.BadRequestError, match="image"):
        image = {"type": "image", "source": {"type": "url", "url": "https://example.com/x.png"}}
        anthropic_coder.messages.create(
            model=coder.model, max_tokens=4, messages=[{"role": "user", "content": [image]}]
        )
    begun: Any = [
        {"role": "user", "content": "Write one JSON object."},
        {"role": "assistant", "content": '{"answer": 4'},
    ]
    got = anthropic_coder.messages.create(
        model=coder.model, max_tokens=8, messages=begun, extra_body={"temperature": 0}
    )
    assert "}" in got.content[0].text
