"""From a body of a request to what the engine is asked: prompts as tokens, sampling parameters, options."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from ..errors import CapacityError, ParameterError
from ..types import RequestOptions, SamplingParams
from .protocol import ChatRequest, CompletionRequest, Generate, NamedTool, ResponseFormat
from .service import Ask, ServingEngine
from .shape import Shape
from .tools import CLOSE, FORCED_OPENING, check_template, schema_of_call, template_messages

_SHAPE = Shape(strings=1 << 16, values=1 << 19, depth=100)
COMPLETION_TOKENS = 16  # OpenAI's default of /v1/completions


@dataclass(frozen=True, slots=True)
class Limits:
    """The largest request that is taken. What the engine can hold limits it further."""

    body_bytes: int = 8 << 20
    prompt_tokens: int | None = None  # None: what the model's context and the KV cache hold
    answer_tokens: int = 2048  # of a chat that names no max_tokens
    choices: int = 128  # of one request: n times its prompts
    n: int = 16
    stops: int = 16
    stop_characters: int = 1000  # of one stop string
    bias_entries: int = 1024
    stop_ids: int = 1024
    grammar_bytes: int = 1 << 16  # of a schema, an expression or a grammar
    listed: int = 1 << 20  # log-probabilities of a whole response
    shape: Shape = _SHAPE  # of a body


@dataclass(frozen=True, slots=True)
class Call:
    """A request, understood."""

    asks: list[Ask]
    n: int  # choices of each prompt: ask i * n + j is choice j of prompt i
    stream: bool
    usage_chunk: bool  # a stream ends with a chunk that has the usage
    trace: bool
    logprobs: int | None
    tools: str = "none"  # none | read (calls may be among the text) | forced (the output is one call)
    log: dict[str, Any] = field(default_factory=dict)  # what a log with prompts shows

    @property
    def prompt_tokens(self) -> int:
        """Of all prompts, each counted once."""
        return sum(len(ask.tokens) for ask in self.asks[:: self.n])


def chat_call(body: ChatRequest, engine: ServingEngine, owner: str, limits: Limits) -> Call:
    """Raises ParameterError for what does not work, CapacityError for a prompt that leaves no room."""
    choice = body.tool_choice if body.tools else None
    if body.tool_choice not in (None, "none") and not body.tools:
        raise ParameterError("tool_choice: there are no tools to choose from; give tools")
    if body.parallel_tool_calls is not None and not body.tools:
        raise ParameterError("parallel_tool_calls: there are no tools to call; give tools")
    tools = body.tools if body.tools and choice != "none" else None
    values: dict[str, Any] = {}
    if tools:
        check_template(engine.tokenizer)
        values["tools"] = [tool.model_dump(exclude_none=True) for tool in tools]
    elif any(m.role == "tool" or m.tool_calls for m in body.messages):
        check_template(engine.tokenizer)
    messages = template_messages(body.messages)
    check_fits([*strings([messages, values])], engine, limits)
    tokens = engine.tokenizer.chat(messages, **values)
    constraint = _constraint(body, _schema(body.response_format))
    stops: tuple[str, ...] = ()
    if tools and (choice == "required" or isinstance(choice, NamedTool)):
        if constraint:
            raise ParameterError(f"{next(iter(constraint))} and a forced tool call cannot go together: drop one")
        constraint = {"json_schema": schema_of_call(tools, choice if isinstance(choice, NamedTool) else None)}
        tokens = [*tokens, *engine.tokenizer.encode(FORCED_OPENING)]
        reading = "forced"
    elif tools:
        if constraint:
            raise ParameterError(f"{next(iter(constraint))} leaves no way to call a tool: drop it, or tool_choice none")
        reading = "read"
        stops = (CLOSE,) if body.parallel_tool_calls is False else ()
    else:
        reading = "none"
    if body.top_logprobs is not None and not body.logprobs:
        raise ParameterError("top_logprobs needs logprobs: true")
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    if None not in (body.max_tokens, body.max_completion_tokens) and body.max_tokens != body.max_completion_tokens:
        raise ParameterError("max_tokens and max_completion_tokens differ: give one of them")
    most = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    _check_prompt(tokens, engine, limits)
    if most is None:
        most = min(engine.room(tokens), limits.answer_tokens)
    params = _params(body, limits, most, logprobs, constraint, stops)
    shown = {"messages": [m.model_dump(exclude_none=True) for m in body.messages]}
    return _call(body, [tokens], params, engine, owner, limits, reading, shown)


def completion_call(body: CompletionRequest, engine: ServingEngine, owner: str, limits: Limits) -> Call:
    """The same for /v1/completions."""
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise ParameterError(f"best_of={body.best_of} is not supported: choices are not ranked; use n")
    given = _prompts(body.prompt)
    _check_choices(body, len(given), limits)
    prompts = []
    for prompt in given:
        if isinstance(prompt, str):
            check_fits([prompt], engine, limits)
            prompt = engine.tokenizer.prompt(prompt)
        _check_prompt(prompt, engine, limits)
        prompts.append(prompt)
    most = body.max_tokens if body.max_tokens is not None else COMPLETION_TOKENS
    params = _params(body, limits, most, body.logprobs, _constraint(body, None))
    return _call(body, prompts, params, engine, owner, limits, "none", {"prompt": body.prompt})


def _call(
    body: Generate,
    prompts: Sequence[Sequence[int]],
    params: dict[str, Any],
    engine: ServingEngine,
    owner: str,
    limits: Limits,
    tools: str,
    shown: dict[str, Any],
) -> Call:
    n = _check_choices(body, len(prompts), limits)
    own = body.outpace
    stream = bool(body.stream)
    listed = n * len(prompts) * params["max_tokens"] * ((params["logprobs"] or 0) + 1)
    if params["logprobs"] is not None and not stream and listed > limits.listed:
        raise ParameterError(
            f"logprobs: {listed} log-probabilities in one response, at most {limits.listed} are given: ask for fewer, "
            "or for a stream"
        )
    if body.stream_options is not None and not stream:
        raise ParameterError("stream_options needs stream: true")
    if own is not None and own.trace and not stream:
        raise ParameterError("outpace.trace needs stream: true")
    seed = body.seed if body.seed is not None else secrets.randbits(48)
    each = [SamplingParams(**params, seed=seed + i) for i in range(n)]
    expected: list[int] = []
    if body.prediction is not None:
        text = _joined(body.prediction.content)
        try:
            check_fits([text], engine, limits)
        except CapacityError as error:
            raise ParameterError(f"prediction: {error}".replace("the prompt", "it", 1)) from None
        expected = engine.tokenizer.encode(text)
    chosen = {} if own is None else own.model_dump(exclude={"trace"}, exclude_none=True)
    asks = []
    for tokens in prompts:
        options = RequestOptions(owner=owner, group=uuid4().hex if n > 1 else None, **chosen)
        asks += [Ask(tokens, one, expected, options) for one in each]
    return Call(
        asks=asks,
        n=n,
        stream=stream,
        usage_chunk=body.stream_options is not None and bool(body.stream_options.include_usage),
        trace=own is not None and bool(own.trace),
        logprobs=params["logprobs"],
        tools=tools,
        log=shown,
    )


def _params(
    body: Generate,
    limits: Limits,
    max_tokens: int,
    logprobs: int | None,
    constraint: dict[str, Any],
    stops: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Arguments of SamplingParams, all but the seed. OpenAI's defaults: temperature 1, everything else off."""
    stop = [] if body.stop is None else [body.stop] if isinstance(body.stop, str) else body.stop
    if len(stop) > limits.stops or any(len(text) > limits.stop_characters for text in stop):
        raise ParameterError(
            f"stop is out of range: it must be at most {limits.stops} texts of at most {limits.stop_characters} "
            "characters"
        )
    names = (
        *("top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"),
        *("stop_token_ids", "ignore_eos"),
    )
    if body.stop_token_ids is not None and len(body.stop_token_ids) > limits.stop_ids:
        raise ParameterError(
            f"stop_token_ids has {len(body.stop_token_ids)} entries: it must be at most {limits.stop_ids}"
        )
    given = {name: value for name in names if (value := getattr(body, name)) is not None}
    for name, text in constraint.items():
        size = len(text if isinstance(text, str) else dumped(text))
        if size > limits.grammar_bytes:
            raise ParameterError(f"{name} has {size} bytes: at most {limits.grammar_bytes} are taken here")
    return {
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "max_tokens": max_tokens,
        "logprobs": logprobs,
        "stop": (*stop, *stops),
        "logit_bias": _bias(body.logit_bias or {}, limits),
        **given,
        **constraint,
    }


def _bias(entries: dict[str, float], limits: Limits) -> dict[int, float]:
    if len(entries) > limits.bias_entries:
        raise ParameterError(f"logit_bias has {len(entries)} entries: it must be at most {limits.bias_entries}")
    found = {}
    for token, bias in entries.items():
        if not (token.isascii() and token.isdigit() and len(token) < 10):
            raise ParameterError(f"logit_bias names {token[:40]!r}: its keys must be token ids")
        found[int(token)] = bias
    return found


def _constraint(body: Generate, schema: dict[str, Any] | None) -> dict[str, Any]:
    """At most one of json_schema, regex and grammar; SamplingParams refuses more."""
    wanted = {"json_schema": schema, "regex": body.regex, "grammar": body.grammar}
    return {name: value for name, value in wanted.items() if value is not None}


def _schema(format: ResponseFormat | None) -> dict[str, Any] | None:
    if format is None or format.type == "text":
        if format is not None and format.json_schema is not None:
            raise ParameterError("response_format: json_schema belongs to type json_schema")
        return None
    if format.type == "json_object":
        return {"type": "object"}
    if format.json_schema is None:
        raise ParameterError("response_format: type json_schema needs json_schema: {name, schema}")
    schema = format.json_schema.schema_
    return {"type": "object"} if schema is None else schema


def _prompts(prompt: str | list[str] | list[int] | list[list[int]]) -> list[str | list[int]]:
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise ParameterError("prompt is empty: give text, token ids, or a list of either")
    return [prompt] if isinstance(prompt[0], int) else list(prompt)  # type: ignore[list-item, arg-type]


def _joined(content: Any) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


def _check_choices(body: Generate, prompts: int, limits: Limits) -> int:
    n = 1 if body.n is None else body.n
    if not 1 <= n <= limits.n:
        raise ParameterError(f"n={n} is out of range: it must be from 1 to {limits.n}")
    if n * prompts > limits.choices:
        raise ParameterError(f"{prompts} prompts with n={n} are more than {limits.choices} choices: send less")
    return n


def check_fits(texts: Sequence[str], engine: ServingEngine, limits: Limits) -> None:
    """Raises CapacityError for a prompt of these texts that is far too long, before it is tokenized."""
    most = engine.room([])
    engine.tokenizer.check_fits(texts, most if limits.prompt_tokens is None else min(most, limits.prompt_tokens))


def strings(value: Any) -> Iterator[str]:
    """All texts in a value that JSON can say, names of fields included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield name
            yield from strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from strings(item)


def _check_prompt(tokens: Sequence[int], engine: ServingEngine, limits: Limits) -> None:
    if limits.prompt_tokens is not None and len(tokens) > limits.prompt_tokens:
        raise ParameterError(f"the prompt has {len(tokens)} tokens: at most {limits.prompt_tokens} are taken here")
    if tokens:
        engine.room(tokens)  # CapacityError, before it is copied for each choice


def dumped(value: Any) -> bytes:
    """JSON in UTF-8. Half characters, which a model's own JSON may name, are written as escapes."""
    try:
        return _COMPACT.encode(value).encode()
    except UnicodeEncodeError:
        return json.dumps(value).encode()


_COMPACT = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False)
