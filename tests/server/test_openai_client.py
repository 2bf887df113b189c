"""The `openai` client against a live server: every parameter once."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest
from fake import TOOL_TEMPLATE, Asked, FakeEngine
from live import Live

from outpace.types import RequestOptions, SamplingParams

HELLO: Any = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    with Live(FakeEngine()) as live:
        yield live


def client_of(live: Live, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{live.url}/v1", api_key=key, max_retries=0)


@pytest.fixture(scope="module")
def client(server: Live) -> openai.OpenAI:
    return client_of(server)


def asked(server: Live) -> Asked:
    return server.engine.asked[-1]


def test_chat(client: openai.OpenAI, server: Live) -> None:
    answer = client.chat.completions.create(model="fake", messages=HELLO, seed=7)
    assert answer.choices[0].message.content == "Seed 7 says hello to the world."
    assert answer.choices[0].finish_reason == "stop" and answer.object == "chat.completion"
    assert answer.usage is not None
    prompt = "user: Hello\n"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(prompt), 32)
    assert answer.usage.total_tokens == len(prompt) + 32
    assert server.engine.tokenizer.decode(asked(server).tokens) == prompt
    own = answer.model_extra["outpace"]
    assert own["seed"] == 7 and own["exactness"] == "identical" and own["stats"]["accepted_by_source"] == {"suffix": 15}


def test_openais_defaults(client: openai.OpenAI, server: Live) -> None:
    client.chat.completions.create(model="fake", messages=HELLO)
    params = asked(server).params
    first = params.seed
    assert params == SamplingParams(temperature=1.0, max_tokens=2048, seed=first)
    answer = client.chat.completions.create(model="fake", messages=HELLO)
    assert asked(server).params.seed != first, "a seed is drawn for each request"
    assert answer.model_extra["outpace"]["seed"] == asked(server).params.seed
    assert asked(server).options == RequestOptions()
    client.completions.create(model="fake", prompt="Hello")
    assert asked(server).params == SamplingParams(temperature=1.0, max_tokens=16, seed=asked(server).params.seed)


SAMPLING: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"temperature": 0}, {"temperature": 0.0}),
    ({"temperature": 0.5}, {"temperature": 0.5}),
    ({"top_p": 0.9}, {"top_p": 0.9}),
    ({"presence_penalty": 0.5}, {"presence_penalty": 0.5}),
    ({"frequency_penalty": -0.5}, {"frequency_penalty": -0.5}),
    ({"logit_bias": {"50": -100}}, {"logit_bias": {50: -100.0}}),
    ({"stop": "world"}, {"stop": ("world",)}),
    ({"stop": ["x", "y"]}, {"stop": ("x", "y")}),
    ({"max_tokens": 5}, {"max_tokens": 5}),
    ({"extra_body": {"top_k": 4}}, {"top_k": 4}),
    ({"extra_body": {"min_p": 0.1}}, {"min_p": 0.1}),
    ({"extra_body": {"repetition_penalty": 1.1}}, {"repetition_penalty": 1.1}),
    ({"extra_body": {"stop_token_ids": [3]}}, {"stop_token_ids": (3,)}),
    ({"extra_body": {"ignore_eos": True}}, {"ignore_eos": True}),
    ({"extra_body": {"regex": "a+"}}, {"regex": "a+"}),
    ({"extra_body": {"grammar": 'start: "a"'}}, {"grammar": 'start: "a"'}),
]
NOTHING: list[dict[str, Any]] = [
    {"metadata": {"a": "b"}},
    {"store": False},
    {"service_tier": "auto"},
    {"extra_body": {"safety_identifier": "x", "prompt_cache_key": "y", "functions": None, "temperature": None}},
]


@pytest.mark.parametrize(("sent", "meant"), SAMPLING, ids=lambda value: str(value))
@pytest.mark.parametrize("chat", [True, False], ids=["chat", "completion"])
def test_sampling_parameters(
    sent: dict[str, Any], meant: dict[str, Any], chat: bool, client: openai.OpenAI, server: Live
) -> None:
    if chat:
        client.chat.completions.create(model="fake", messages=HELLO, seed=1, **sent)
    else:
        client.completions.create(model="fake", prompt="Hello", seed=1, **sent)
    most = 2048 if chat else 16
    assert asked(server).params == SamplingParams(**{"temperature": 1.0, "max_tokens": most, "seed": 1} | meant)


@pytest.mark.parametrize("sent", NOTHING, ids=lambda value: str(value))
def test_fields_that_promise_nothing_change_nothing(sent: dict[str, Any], client: openai.OpenAI, server: Live) -> None:
    client.chat.completions.create(model="fake", messages=HELLO, seed=1, **sent)
    assert asked(server).params == SamplingParams(temperature=1.0, max_tokens=2048, seed=1)
    assert asked(server).options == RequestOptions()


def test_max_completion_tokens(client: openai.OpenAI, server: Live) -> None:
    answer = client.chat.completions.create(model="fake", messages=HELLO, max_completion_tokens=3)
    assert asked(server).params.max_tokens == 3
    assert answer.choices[0].finish_reason == "length" and answer.usage.completion_tokens == 3  # type: ignore[union-attr]


def test_stop_ends_the_text(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="fake", messages=HELLO, stop=["hello"], seed=1)
    assert answer.choices[0].message.content == "Seed 1 says "
    assert answer.choices[0].finish_reason == "stop"


def test_streams_with_usage(client: openai.OpenAI) -> None:
    options: Any = {"include_usage": True}
    stream = client.chat.completions.create(model="fake", messages=HELLO, seed=3, stream=True, stream_options=options)
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == "Seed 3 says hello to the world."
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert chunks[-1].choices == [] and chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 32
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[-2].model_extra["outpace"]["stats"]["tokens"] == 32


def test_completions_stream(client: openai.OpenAI) -> None:
    stream = client.completions.create(model="fake", prompt="x", seed=3, max_tokens=40, stream=True)
    chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks) == "Seed 3 says hello to the world."
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_n_choices_have_consecutive_seeds_and_one_group(client: openai.OpenAI, server: Live) -> None:
    answer = client.chat.completions.create(model="fake", messages=HELLO, seed=10, n=3)
    assert [c.message.content for c in answer.choices] == [f"Seed {10 + i} says hello to the world." for i in range(3)]
    assert [c.index for c in answer.choices] == [0, 1, 2]
    groups = {a.options.group for a in server.engine.asked[-3:]}
    assert len(groups) == 1 and groups != {None}
    assert answer.usage is not None and answer.usage.prompt_tokens == 12 and answer.usage.completion_tokens == 99
    assert [own["seed"] for own in answer.model_extra["outpace"]["choices"]] == [10, 11, 12]


def test_n_choices_stream(client: openai.OpenAI) -> None:
    texts = ["", ""]
    ends = []
    for chunk in client.chat.completions.create(model="fake", messages=HELLO, seed=10, n=2, stream=True):
        (choice,) = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        if choice.finish_reason:
            ends.append((choice.index, chunk.model_extra["outpace"]["seed"]))
    assert texts == ["Seed 10 says hello to the world.", "Seed 11 says hello to the world."]
    assert sorted(ends) == [(0, 10), (1, 11)]


@pytest.mark.parametrize("prompt", [["ab", "c"], [[1, 2], [3]]], ids=["texts", "ids"])
def test_many_prompts(prompt: Any, client: openai.OpenAI, server: Live) -> None:
    answer = client.completions.create(model="fake", prompt=prompt, seed=1, n=2, max_tokens=40)
    assert [c.index for c in answer.choices] == [0, 1, 2, 3]
    assert [a.params.seed for a in server.engine.asked[-4:]] == [1, 2, 1, 2]
    assert [len(a.tokens) for a in server.engine.asked[-4:]] == [2, 2, 1, 1]
    assert answer.usage is not None and answer.usage.prompt_tokens == 3
    first, second = server.engine.asked[-4].options.group, server.engine.asked[-2].options.group
    assert first and second and first != second


def test_token_ids_as_a_prompt(client: openai.OpenAI, server: Live) -> None:
    client.completions.create(model="fake", prompt=[5, 6, 7])
    assert asked(server).tokens == [5, 6, 7]


def test_logprobs_of_chat(client: openai.OpenAI) -> None:
    made: dict[str, Any] = dict(model="fake", messages=HELLO, seed=1, logprobs=True, top_logprobs=2)
    answer = client.chat.completions.create(**made)
    content = answer.choices[0].logprobs.content  # type: ignore[union-attr]
    assert content is not None and "".join(e.token for e in content) == "Seed 1 says hello to the world."
    assert all(e.logprob == -0.25 and bytes(e.bytes or []) == e.token.encode() for e in content)
    assert all(len(e.top_logprobs) == 2 and e.top_logprobs[0].logprob == -0.5 for e in content)
    streamed = [
        entry
        for chunk in client.chat.completions.create(**made, stream=True)
        if chunk.choices[0].logprobs
        for entry in chunk.choices[0].logprobs.content or []
    ]
    assert streamed == content
    bare = client.chat.completions.create(model="fake", messages=HELLO, logprobs=True)
    assert bare.choices[0].logprobs.content[0].top_logprobs == []  # type: ignore[union-attr, index]


def test_logprobs_of_completions(client: openai.OpenAI) -> None:
    made: dict[str, Any] = dict(model="fake", prompt="x", seed=1, logprobs=2, max_tokens=40)
    answer = client.completions.create(**made)
    got = answer.choices[0].logprobs
    assert got is not None and got.tokens is not None and got.token_logprobs is not None
    assert "".join(got.tokens) == answer.choices[0].text
    assert got.text_offset == list(range(31)) and got.token_logprobs == [-0.25] * 31
    assert got.top_logprobs is not None and all(len(top) == 2 for top in got.top_logprobs)
    offsets: list[int] = []
    for chunk in client.completions.create(**made, stream=True):
        if chunk.choices[0].logprobs:
            offsets += chunk.choices[0].logprobs.text_offset or []
    assert offsets == got.text_offset


def test_prediction(client: openai.OpenAI, server: Live) -> None:
    prediction: Any = {"type": "content", "content": [{"type": "text", "text": "Seed "}, {"type": "text", "text": "1"}]}
    answer = client.chat.completions.create(model="fake", messages=HELLO, prediction=prediction)
    assert asked(server).prediction == server.engine.tokenizer.encode("Seed 1")
    details = answer.usage.completion_tokens_details  # type: ignore[union-attr]
    assert details is not None
    assert (details.accepted_prediction_tokens, details.rejected_prediction_tokens) == (3, 1)


@pytest.mark.parametrize(
    ("format", "schema"),
    [
        ({"type": "text"}, None),
        ({"type": "json_object"}, {"type": "object"}),
        ({"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "array"}}}, {"type": "array"}),
        ({"type": "json_schema", "json_schema": {"name": "n", "strict": True}}, {"type": "object"}),
    ],
)
def test_response_format(format: Any, schema: Any, client: openai.OpenAI, server: Live) -> None:
    client.chat.completions.create(model="fake", messages=HELLO, response_format=format)
    got = asked(server).params.json_schema
    assert (None if got is None else json.loads(got)) == schema  # type: ignore[arg-type]


def test_how_it_is_served(client: openai.OpenAI, server: Live) -> None:
    own = {"method": "suffix", "max_draft": 3, "exactness": "identical", "priority": -2}
    answer = client.chat.completions.create(model="fake", messages=HELLO, extra_body={"outpace": own})
    assert asked(server).options == RequestOptions(**own)  # type: ignore[arg-type]
    assert answer.model_extra["outpace"]["method"] == "suffix"


def test_trace(client: openai.OpenAI) -> None:
    made: dict[str, Any] = dict(model="fake", messages=HELLO, seed=1, stream=True, stop=["wor"])
    tokens, drafts, times = [], [], []
    text = ""
    for chunk in client.chat.completions.create(**made, extra_body={"outpace": {"trace": True}}):
        own = chunk.model_extra["outpace"]
        text += chunk.choices[0].delta.content or ""
        if "tokens" in own:
            tokens += own["tokens"]
            drafts.append(own["draft"])
            times.append(own["t"])
    assert text == "".join(t["text"] for t in tokens) == "Seed 1 says hello to the "
    assert drafts[0] is None and drafts[1]["tokens"] == ["e", "b"] and drafts[1]["accepted"] == [0]
    assert drafts[1]["parents"] == [-1, -1] and drafts[1]["sources"] == ["suffix", "suffix"]
    assert {t["source"] for t in tokens} == {"suffix", "target"} and times == sorted(times)


def test_messages_of_every_kind(client: openai.OpenAI, server: Live) -> None:
    messages: Any = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "c", "refusal": None},
        {"role": "user", "content": "d"},
    ]
    client.chat.completions.create(model="fake", messages=messages)
    prompt = server.engine.tokenizer.decode(asked(server).tokens)
    assert prompt == "system: Be brief.\nuser: ab\nassistant: c\nuser: d\n"


def test_models(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert model.id == "fake" and model.model_extra["outpace"]["methods"] == ["plain", "suffix"]
    assert client.models.retrieve("fake").id == "fake"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_a_full_queue_says_when_to_come_back(serve: Callable[..., Live]) -> None:
    engine = FakeEngine(max_running=1, max_queue=0)
    engine.hold.set()
    client = client_of(serve(engine))
    with client.chat.completions.create(model="fake", messages=HELLO, stream=True, timeout=None) as _:
        with pytest.raises(openai.RateLimitError) as refused:
            client.chat.completions.create(model="fake", messages=HELLO)
        assert refused.value.response.headers["retry-after"] == "3" and refused.value.code == "queue_full"
        engine.hold.clear()


def test_keys(serve: Callable[..., Live]) -> None:
    from outpace.server.keys import Keys

    live = serve(FakeEngine(), keys=Keys(["first-key", "second-key"]))
    with pytest.raises(openai.AuthenticationError):
        client_of(live, "third-key").chat.completions.create(model="fake", messages=HELLO)
    with pytest.raises(openai.AuthenticationError):
        client_of(live, "third-key").models.list()
    owners = []
    for key, user in (("first-key", None), ("second-key", None), ("first-key", "a"), ("first-key", "b")):
        more = {} if user is None else {"user": user}
        client_of(live, key).chat.completions.create(model="fake", messages=HELLO, **more)  # type: ignore[call-overload]
        owners.append(asked(live).options.owner)
    assert len(set(owners)) == 4 and all(len(owner) == 24 and "key" not in owner for owner in owners)


def test_users_are_owners_without_keys_too_unless_they_share(serve: Callable[..., Live]) -> None:
    from outpace.server.keys import Keys

    for share, expected in ((False, 2), (True, 1)):
        live = serve(FakeEngine(), keys=Keys(share=share))
        for user in ("a", "b"):
            client_of(live).chat.completions.create(model="fake", messages=HELLO, user=user)
        assert len({a.options.owner for a in live.engine.asked}) == expected


WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def test_tools_are_called(serve: Callable[..., Live]) -> None:
    said = 'Let me see.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Bern"}}\n</tool_call>'
    live = serve(FakeEngine(lambda asked: said, template=TOOL_TEMPLATE))
    client = client_of(live)
    answer = client.chat.completions.create(model="fake", messages=HELLO, tools=[WEATHER])
    message = answer.choices[0].message
    assert message.content == "Let me see." and answer.choices[0].finish_reason == "tool_calls"
    (call,) = message.tool_calls or []
    assert call.function.name == "weather" and json.loads(call.function.arguments) == {"city": "Bern"}  # type: ignore[union-attr]
    assert '"name": "weather"' in live.engine.tokenizer.decode(asked(live).tokens)

    stream = client.chat.completions.create(model="fake", messages=HELLO, tools=[WEATHER], stream=True)
    deltas = [chunk.choices[0] for chunk in stream]
    assert "".join(d.delta.content or "" for d in deltas) == "Let me see."
    calls = [c for d in deltas for c in d.delta.tool_calls or []]
    assert [(c.index, c.function.name, c.function.arguments) for c in calls] == [(0, "weather", '{"city": "Bern"}')]  # type: ignore[union-attr]
    assert deltas[-1].finish_reason == "tool_calls"

    follow: Any = [*HELLO, message, {"role": "tool", "tool_call_id": call.id, "content": "rain"}]
    client.chat.completions.create(model="fake", messages=follow, tools=[WEATHER])
    assert live.engine.tokenizer.decode(asked(live).tokens).endswith("tool: rain\n")


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_forced_call_is_a_schema(choice: Any, serve: Callable[..., Live]) -> None:
    said = '{"name": "weather", "arguments": {"city": "Bern"}}'
    live = serve(FakeEngine(lambda asked: said, template=TOOL_TEMPLATE))
    made: dict[str, Any] = dict(model="fake", messages=HELLO, tools=[WEATHER], tool_choice=choice)
    answer = client_of(live).chat.completions.create(**made)
    (call,) = answer.choices[0].message.tool_calls or []
    assert call.function.name == "weather" and json.loads(call.function.arguments) == {"city": "Bern"}
    assert answer.choices[0].message.content is None
    assert live.engine.tokenizer.decode(asked(live).tokens).endswith("<tool_call>\n")
    params = asked(live).params
    if choice == "required":  # more than one call is allowed
        assert params.grammar is not None and '"const": "weather"' in params.grammar
    else:
        schema = json.loads(params.json_schema or "")  # type: ignore[arg-type]
        assert schema["properties"]["name"] == {"const": "weather"}
        assert schema["$defs"]["tool0"]["required"] == ["city"]
    stream = client_of(live).chat.completions.create(**made, stream=True)
    calls = [c for chunk in stream for c in chunk.choices[0].delta.tool_calls or []]
    assert [c.function.name for c in calls if c.function.name] == ["weather"] and len(calls) > 5
    assert "".join(c.function.arguments for c in calls) == '{"city": "Bern"}'
    assert calls[0].id and calls[0].function.arguments == "" and {c.index for c in calls} == {0}


def test_tools_that_must_not_be_called_are_not_shown(serve: Callable[..., Live]) -> None:
    live = serve(FakeEngine(template=TOOL_TEMPLATE))
    client_of(live).chat.completions.create(model="fake", messages=HELLO, tools=[WEATHER], tool_choice="none")
    assert "weather" not in live.engine.tokenizer.decode(asked(live).tokens)


def test_one_call_at_a_time_is_a_stop(serve: Callable[..., Live]) -> None:
    one = '<tool_call>{"name": "weather", "arguments": {}}</tool_call>'
    live = serve(FakeEngine(lambda asked: one + one, template=TOOL_TEMPLATE))
    made: dict[str, Any] = dict(model="fake", messages=HELLO, tools=[WEATHER])
    both = client_of(live).chat.completions.create(**made)
    single = client_of(live).chat.completions.create(**made, parallel_tool_calls=False)
    assert [len(a.choices[0].message.tool_calls or []) for a in (both, single)] == [2, 1]
