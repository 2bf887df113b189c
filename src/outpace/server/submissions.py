"""From a body of a request to submissions to the engine: prompts as tokens, sampling parameters, options."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from uuid import uuid4

from ..errors import CapacityError, ParameterError
from ..types import RequestOptions, Result, SamplingParams
from .calls import CLOSE, ForcedReader, Reader, ToolReader
from .constraints import constraint_of
from .conversation import conversation
from .infill import infill
from .protocol import ChatRequest, CompletionRequest, Generate
from .service import ServingEngine, Submission
from .shape import Shape
from .tools import Plan, constraint_of_calls, form_of, plan

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
    echoed: int = 1 << 17  # those of its prompts, with echo
    shape: Shape = _SHAPE  # of a body


@dataclass(frozen=True, slots=True)
class Call:
    """A request, understood."""

    submissions: list[Submission]
    n: int  # choices of each prompt: submission i * n + j is choice j of prompt i
    stream: bool
    usage_chunk: bool  # a stream ends with a chunk that has the usage
    trace: bool
    logprobs: int | None
    tools: Plan | None = None  # calls that may be in the output
    echo: list[str] | None = None  # the prompts as text, to stand before their outputs
    silent: bool = False  # max_tokens 0: nothing is written, what comes behind the prompt is dropped
    ignored: list[str] = field(default_factory=list)  # fields of the body that had no effect
    log: dict[str, Any] = field(default_factory=dict)  # what a log with prompts shows

    @property
    def prompt_tokens(self) -> int:
        """Of all prompts, each counted once."""
        return sum(len(submission.tokens) for submission in self.submissions[:: self.n])

    def answered(self, result: Result) -> Result:
        """As the client gets it."""
        if not self.silent:
            return result
        nothing: dict[str, Any] = {} if result.logprobs is None else {"logprobs": [], "top_logprobs": []}
        return replace(result, text="", token_ids=[], sources=[], finish_reason="length", stopped_by=None, **nothing)

    def reader(self) -> Reader | None:
        """For the calls in one output; None if there can be none."""
        if self.tools is None:
            return None
        return ForcedReader() if self.tools.forced else ToolReader(self.tools.names, self.tools.single)


def chat_call(body: ChatRequest, engine: ServingEngine, owner: str, limits: Limits) -> Call:
    """Raises ParameterError for what does not work, CapacityError for a prompt that fills the context."""
    tools = plan(body.tools, body.tool_choice, body.parallel_tool_calls)
    field, constraint = constraint_of(body)
    tokens, unread = chat_prompt(body, tools, engine, limits)
    tokens = tokens[-(body.truncate_prompt_tokens or 0) :]
    stops: tuple[str, ...] = ()
    if tools is not None and field is not None:
        way = "and a forced tool call cannot go together" if tools.forced else "leaves no way to call a tool"
        raise ParameterError(f"{field} {way}: drop it, or say tool_choice none")
    if tools is not None and tools.forced:
        form = form_of(engine.tokenizer)
        constraint = constraint_of_calls(tools, form)
        tokens = [*tokens, *engine.tokenizer.encode(form.opening)]
    elif tools is not None:
        stops = (CLOSE,) if tools.single else ()
    if body.top_logprobs is not None and not body.logprobs:
        raise ParameterError("top_logprobs needs logprobs: true")
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    most = _most_tokens(body, body.max_completion_tokens)
    check_prompt(tokens, engine, limits)
    if most is None:
        most = min(engine.max_new_tokens(tokens), limits.answer_tokens)
    params = _params(body, limits, most, logprobs, constraint, stops)
    shown = {"messages": [m.model_dump(exclude_none=True) for m in body.messages]}
    call = _call(body, [tokens], params, engine, owner, limits, shown)
    return replace(call, tools=tools, ignored=[*call.ignored, *unread])


def chat_prompt(
    body: ChatRequest, tools: Plan | None, engine: ServingEngine, limits: Limits
) -> tuple[list[int], list[str]]:
    """A conversation as tokens, and the fields that the model's chat template does not read."""
    said = conversation(body, tools, engine.tokenizer)
    check_fits([*strings([said.messages, said.values])], engine, limits)
    return engine.tokenizer.chat(said.messages, said.begin, said.goes_on, **said.values), said.ignored


def check_ids(name: str, ids: Sequence[int], engine: ServingEngine) -> None:
    """Raises ParameterError for a token id that the tokenizer has no text for."""
    most = len(engine.tokenizer.vocabulary.bytes)
    bad = next((id for id in ids if not 0 <= id < most), None)
    if bad is not None:
        raise ParameterError(f"{name}: id {bad} is outside the vocabulary: ids run from 0 to {most - 1}")


def completion_call(body: CompletionRequest, engine: ServingEngine, owner: str, limits: Limits) -> Call:
    """The same for /v1/completions."""
    given = _prompts(body.prompt)
    _check_choices(body, len(given), limits)
    if body.suffix is not None:
        return _infill_call(body, given, engine, owner, limits)
    prompts = []
    for prompt in given:
        if isinstance(prompt, str):
            check_fits([prompt], engine, limits)
            prompt = engine.tokenizer.prompt(prompt)
        prompt = prompt[-(body.truncate_prompt_tokens or 0) :]
        check_prompt(prompt, engine, limits)
        prompts.append(prompt)
    most = _most_tokens(body)
    silent = most == 0 and bool(body.echo)
    if most == 0 and not silent:
        raise ParameterError("max_tokens=0 writes nothing: it goes with echo")
    most = COMPLETION_TOKENS if most is None else max(most, 1)
    params = _params(body, limits, most, body.logprobs, constraint_of(body)[1])
    if body.echo:
        params["prompt_logprobs"] = body.logprobs
        listed = (body.n or 1) * sum(map(len, prompts)) * ((body.logprobs or 0) + 1)
        if body.logprobs is not None and listed > limits.echoed:
            raise ParameterError(
                f"logprobs: {listed} log-probabilities of prompts in one response, at most {limits.echoed} are given: "
                "ask for fewer, or send less text"
            )
    call = _call(body, prompts, params, engine, owner, limits, {"prompt": body.prompt})
    if not body.echo:
        return call
    for prompt in given:
        if not isinstance(prompt, str):
            check_ids("prompt", prompt, engine)  # the engine would, but they become text before
    texts = [
        p if isinstance(p, str) and not body.truncate_prompt_tokens else engine.tokenizer.decode(tokens)
        for p, tokens in zip(given, prompts, strict=True)
    ]
    return replace(call, echo=texts, silent=silent)


def _infill_call(
    body: CompletionRequest, given: Sequence[str | list[int]], engine: ServingEngine, owner: str, limits: Limits
) -> Call:
    """What stands between each prompt and the suffix."""
    assert body.suffix is not None
    for name in ("echo", "truncate_prompt_tokens"):
        if getattr(body, name):
            raise ParameterError(f"suffix and {name} cannot go together: drop one of them")
    prompts, ends = [], list(body.stop_token_ids or [])
    for text in given:
        if not isinstance(text, str):
            raise ParameterError("suffix needs a prompt that is text, not token ids")
        check_fits([text, body.suffix], engine, limits)
        tokens, more = infill(engine.tokenizer, text, body.suffix)
        check_prompt(tokens, engine, limits)
        prompts.append(tokens)
        ends += [id for id in more if id not in ends]
    most = _most_tokens(body)
    params = _params(body, limits, COMPLETION_TOKENS if most is None else most, body.logprobs, constraint_of(body)[1])
    params["stop_token_ids"] = ends
    return _call(body, prompts, params, engine, owner, limits, {"prompt": body.prompt, "suffix": body.suffix})


def _most_tokens(body: Generate, completion: int | None = None) -> int | None:
    """The output's limit, by whichever name it is given. `completion`: max_completion_tokens."""
    predicted = None if body.n_predict == -1 else body.n_predict
    names = ("max_tokens", "max_completion_tokens", "n_predict")
    given = {n: v for n, v in zip(names, (body.max_tokens, completion, predicted), strict=True) if v is not None}
    if len(set(given.values())) > 1:
        raise ParameterError(f"{' and '.join(given)} differ: give one of them")
    return next(iter(given.values()), None)


def _call(
    body: Generate,
    prompts: Sequence[Sequence[int]],
    params: dict[str, Any],
    engine: ServingEngine,
    owner: str,
    limits: Limits,
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
    chosen = {} if own is None else own.model_dump(exclude={"trace", "logprobs"}, exclude_none=True)
    if body.priority is not None and chosen.setdefault("priority", body.priority) != body.priority:
        raise ParameterError("priority and outpace.priority differ: give one of them")
    submissions: list[Submission] = []
    for tokens in prompts:
        options = RequestOptions(owner=owner, group=uuid4().hex if n > 1 else None, **chosen)
        submissions += [Submission(tokens, one, expected, options) for one in each]
    return Call(
        submissions=submissions,
        n=n,
        stream=stream,
        usage_chunk=body.stream_options is not None and bool(body.stream_options.include_usage),
        trace=own is not None and bool(own.trace),
        logprobs=params["logprobs"],
        ignored=body.ignored(),
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
        *("min_tokens", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"),
        *("stop_token_ids", "ignore_eos"),
    )
    if body.stop_token_ids is not None and len(body.stop_token_ids) > limits.stop_ids:
        raise ParameterError(
            f"stop_token_ids has {len(body.stop_token_ids)} entries: it must be at most {limits.stop_ids}"
        )
    which = None if body.outpace is None else body.outpace.logprobs
    if which is not None and logprobs is None:
        raise ParameterError("outpace.logprobs says of which distribution they are: ask for logprobs too")
    given = {name: value for name in names if (value := getattr(body, name)) is not None}
    for name, text in constraint.items():
        size = len(text if isinstance(text, str) else dumped(text))
        if size > limits.grammar_bytes:
            raise ParameterError(f"{name} has {size} bytes: at most {limits.grammar_bytes} are taken here")
    return {
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "max_tokens": max_tokens,
        "logprobs": logprobs,
        "raw_logprobs": which == "raw",
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
    if body.best_of is not None and body.best_of != n:
        raise ParameterError(f"best_of={body.best_of} is not supported: choices are not ranked; use n")
    if n * prompts > limits.choices:
        raise ParameterError(f"{prompts} prompts with n={n} are more than {limits.choices} choices: send less")
    return n


def check_fits(texts: Sequence[str], engine: ServingEngine, limits: Limits) -> None:
    """Raises CapacityError for a prompt of these texts that is far too long, before it is tokenized."""
    most = engine.max_new_tokens([])
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


def check_prompt(tokens: Sequence[int], engine: ServingEngine, limits: Limits) -> None:
    if limits.prompt_tokens is not None and len(tokens) > limits.prompt_tokens:
        raise ParameterError(f"the prompt has {len(tokens)} tokens: at most {limits.prompt_tokens} are taken here")
    if tokens:
        engine.max_new_tokens(tokens)  # CapacityError, before it is copied for each choice


def dumped(value: Any) -> bytes:
    """JSON in UTF-8. Half characters, which a model's own JSON may name, are written as escapes."""
    try:
        return _COMPACT.encode(value).encode()
    except UnicodeEncodeError:
        return json.dumps(value).encode()


_COMPACT = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False)
