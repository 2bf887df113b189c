"""Frameworks that call OpenAI's and Anthropic's APIs: litellm, LangChain, instructor, pydantic-ai."""

from __future__ import annotations

from typing import Any

import pytest
from shapes import ASK, Person, Report, Weather, get_weather, is_ann

HELLO: Any = [{"role": "user", "content": "Say hello."}]
RAIN = "What is the weather in Bern?"


def openai_of(server: Any) -> Any:
    import openai

    return openai.OpenAI(base_url=server.url, api_key="none", max_retries=0, timeout=300)


def anthropic_of(server: Any) -> Any:
    import anthropic

    return anthropic.Anthropic(base_url=server.root, api_key="none", max_retries=0, timeout=300)


# -- litellm ---------------------------------------------------------------------------------------------------------


def test_litellm(small: Any, coder: Any) -> None:
    import litellm

    litellm.telemetry = False
    where: dict[str, Any] = dict(api_base=small.url, api_key="none", temperature=0, max_tokens=12)
    model = f"openai/{small.model}"
    whole = litellm.completion(model=model, messages=HELLO, **where)
    chunks = litellm.completion(model=model, messages=HELLO, stream=True, **where)
    text = whole.choices[0].message.content
    assert text and "".join(c.choices[0].delta.content or "" for c in chunks) == text
    prompted = litellm.text_completion(model=f"text-completion-openai/{small.model}", prompt="One, two,", **where)
    assert "three" in prompted.choices[0].text
    vector = litellm.embedding(model=model, input=["Hello"], api_base=small.url, api_key="none").data[0]["embedding"]
    assert abs(sum(x * x for x in vector) - 1) < 1e-4
    answer = litellm.responses(
        model=model, input="Say hello.", api_base=small.url, api_key="none", max_output_tokens=12
    )
    assert answer.output[0].content[0].text
    message = litellm.completion(
        model=f"anthropic/{coder.model}", messages=HELLO, api_base=coder.root, api_key="none", max_tokens=12
    )
    assert message.choices[0].message.content

    tool = {"type": "function", "function": {"name": "weather", "parameters": Weather.model_json_schema()}}
    called = litellm.completion(
        model=f"openai/{coder.model}", messages=[{"role": "user", "content": RAIN}], tools=[tool],
        tool_choice="required", api_base=coder.url, api_key="none", temperature=0,
    )  # fmt: skip
    assert called.choices[0].message.tool_calls[0].function.name == "weather"
    typed = litellm.completion(
        model=f"openai/{coder.model}", messages=[{"role": "user", "content": ASK}], response_format=Person,
        api_base=coder.url, api_key="none", temperature=0,
    )  # fmt: skip
    is_ann(Person.model_validate_json(typed.choices[0].message.content))


# -- LangChain -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("responses", [False, True])
def test_langchain_chat(responses: bool, small: Any) -> None:
    from langchain_openai import ChatOpenAI

    chat = ChatOpenAI(
        model=small.model, base_url=small.url, api_key="none", temperature=0, max_tokens=12, use_responses_api=responses
    )
    whole = chat.invoke("Say hello.")
    text = "".join(chunk.text for chunk in chat.stream("Say hello."))
    assert whole.text and whole.text == text and whole.usage_metadata["output_tokens"] > 0


@pytest.mark.parametrize("method", ["json_schema", "function_calling", "json_mode"])
def test_langchain_structured_output(method: str, coder: Any) -> None:
    from langchain_openai import ChatOpenAI

    chat = ChatOpenAI(model=coder.model, base_url=coder.url, api_key="none", temperature=0, max_tokens=128)
    if method == "json_mode":  # any JSON: the fields are told in the prompt
        form = '{"name": string, "age": number, "home": {"name": string, "country": string}}'
        found = chat.with_structured_output(Person, method=method).invoke(f"{ASK}\nAnswer in JSON of the form {form}")
        assert isinstance(found, Person) and found.age == 31
    else:
        is_ann(chat.with_structured_output(Person, method=method).invoke(ASK))


def test_langchain_tools_and_vectors(coder: Any, small: Any) -> None:
    from langchain_core.messages import HumanMessage, ToolMessage
    from langchain_core.tools import tool
    from langchain_openai import ChatOpenAI, OpenAIEmbeddings

    chat = ChatOpenAI(model=coder.model, base_url=coder.url, api_key="none", temperature=0, max_tokens=64)
    weather = tool(get_weather)
    asked = HumanMessage(RAIN)
    called = chat.bind_tools([weather], tool_choice="any").invoke([asked])
    (call,) = called.tool_calls
    assert call["name"] == "get_weather" and "Bern" in call["args"]["city"]
    told = ToolMessage(weather.invoke(call["args"]), tool_call_id=call["id"])
    brief = HumanMessage("Answer in one sentence.")
    assert "rain" in chat.bind_tools([weather]).invoke([asked, called, told, brief]).text.lower()
    vectors = OpenAIEmbeddings(
        model=small.model, base_url=small.url, api_key="none", check_embedding_ctx_length=False
    ).embed_documents(["a", "b"])
    assert len(vectors) == 2 and len(vectors[0]) == 576


# -- instructor ------------------------------------------------------------------------------------------------------

OPENAI_MODES = ["TOOLS", "TOOLS_STRICT", "JSON", "JSON_SCHEMA", "MD_JSON", "FUNCTIONS"]
RESPONSES_MODES = ["RESPONSES_TOOLS", "RESPONSES_TOOLS_WITH_INBUILT_TOOLS"]
ANTHROPIC_MODES = ["ANTHROPIC_TOOLS", "ANTHROPIC_REASONING_TOOLS", "ANTHROPIC_JSON"]
TOLD: Any = [{"role": "user", "content": ASK}]


@pytest.mark.parametrize("mode", OPENAI_MODES)
def test_instructor(mode: str, coder: Any) -> None:
    import instructor

    client = instructor.from_openai(openai_of(coder), mode=instructor.Mode[mode])
    made: dict[str, Any] = dict(model=coder.model, messages=TOLD, response_model=Person, temperature=0, max_retries=2)
    is_ann(client.chat.completions.create(**made))
    *_, last = client.chat.completions.create_partial(**made)
    is_ann(Person.model_validate(last.model_dump()))


@pytest.mark.parametrize("mode", RESPONSES_MODES)
def test_instructor_by_responses(mode: str, coder: Any) -> None:
    import instructor

    client = instructor.from_openai(openai_of(coder), mode=instructor.Mode[mode])
    is_ann(client.responses.create(model=coder.model, input=ASK, response_model=Person, temperature=0, max_retries=2))


@pytest.mark.parametrize("mode", ANTHROPIC_MODES)
def test_instructor_by_messages(mode: str, coder: Any) -> None:
    import instructor

    client = instructor.from_anthropic(anthropic_of(coder), mode=instructor.Mode[mode])
    made: dict[str, Any] = dict(model=coder.model, max_tokens=128, extra_body={"temperature": 0}, max_retries=2)
    is_ann(client.messages.create(messages=TOLD, response_model=Person, **made))


def test_instructor_several_at_once(coder: Any) -> None:
    from collections.abc import Iterable

    import instructor

    said: Any = [{"role": "user", "content": "Call weather for Bern and for Rome."}]
    client = instructor.from_openai(openai_of(coder), mode=instructor.Mode.PARALLEL_TOOLS)
    found = list(
        client.chat.completions.create(
            model=coder.model, messages=said, response_model=Iterable[Weather], temperature=0, tool_choice="required"
        )
    )
    assert found and all(isinstance(one, Weather) for one in found)
    client = instructor.from_anthropic(anthropic_of(coder), mode=instructor.Mode.ANTHROPIC_PARALLEL_TOOLS)
    found = list(
        client.messages.create(
            model=coder.model, messages=said, response_model=Iterable[Weather], max_tokens=128,
            tool_choice={"type": "any"}, extra_body={"temperature": 0},
        )
    )  # fmt: skip
    assert found and all(isinstance(one, Weather) for one in found)
    client = instructor.from_openai(openai_of(coder), mode=instructor.Mode.TOOLS)
    listed = client.chat.completions.create_iterable(
        model=coder.model, response_model=Weather, temperature=0,
        messages=[{"role": "user", "content": "List the cities Bern and Rome."}],
    )  # fmt: skip
    assert all(isinstance(one, Weather) for one in listed)


# -- pydantic-ai -----------------------------------------------------------------------------------------------------


def models_of(server: Any) -> list[Any]:
    import anthropic
    from pydantic_ai.models.anthropic import AnthropicModel
    from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
    from pydantic_ai.providers.anthropic import AnthropicProvider
    from pydantic_ai.providers.openai import OpenAIProvider

    by_openai = OpenAIProvider(base_url=server.url, api_key="none")
    client = anthropic.AsyncAnthropic(base_url=server.root, api_key="none", max_retries=0)
    return [
        OpenAIChatModel(server.model, provider=by_openai),
        OpenAIResponsesModel(server.model, provider=by_openai),
        AnthropicModel(server.model, provider=AnthropicProvider(anthropic_client=client)),
    ]


@pytest.mark.parametrize("which", [0, 1, 2], ids=["chat", "responses", "messages"])
def test_pydantic_ai(which: int, coder: Any) -> None:
    from pydantic_ai import Agent

    model = models_of(coder)[which]
    settings: Any = {"temperature": 0, "max_tokens": 128}
    assert Agent(model, model_settings=settings).run_sync("Say hello.").output
    is_ann(Agent(model, output_type=Person, model_settings=settings).run_sync(ASK).output)

    seen: list[str] = []

    def weather(city: str) -> str:
        """The weather of a city."""
        seen.append(city)
        return f"It rains in {city}. Report it."

    agent = Agent(model, tools=[weather], output_type=Report, model_settings=settings)
    report = agent.run_sync("Call weather for Bern.").output
    assert seen == ["Bern"] and isinstance(report, Report) and "rain" in report.weather.lower()


@pytest.mark.parametrize("which", [0, 1, 2], ids=["chat", "responses", "messages"])
def test_pydantic_ai_streams(which: int, coder: Any) -> None:
    import asyncio

    from pydantic_ai import Agent

    async def run() -> str:
        agent = Agent(models_of(coder)[which], model_settings={"temperature": 0, "max_tokens": 24})
        async with agent.run_stream("Count from one to five.") as stream:
            pieces = [piece async for piece in stream.stream_text(delta=True, debounce_by=None)]
        assert len(pieces) > 1
        return "".join(pieces)

    assert asyncio.run(run()).strip()
