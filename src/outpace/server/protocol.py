"""Bodies of requests, in OpenAI's form. What is not understood is refused by name, never ignored.

Ranges of sampling parameters are `SamplingParams`' to check, sizes are `Limits`'. These fields are accepted though they
change nothing, because that is what they promise: `metadata`, `safety_identifier`, `prompt_cache_key`, `store: false`,
`service_tier: "auto"` or `"default"`, `modalities: ["text"]`, and any field that is null. `user` parts owners, no more.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, model_validator

from ..types import Exactness

_NO_PLACE = "the model's chat template has no place for it"


class Body(BaseModel):
    """Strict: no unknown field, no number in quotes, no infinity."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    refused: ClassVar[dict[str, str]] = {}  # fields of OpenAI's API that do not work here, and why

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, value: Any) -> Any:
        """A field that is refused may still be null (or an empty list), as clients send what they were given."""
        if not isinstance(value, dict):
            return value
        for name in cls.refused.keys() & value.keys():
            if value[name] not in (None, []):
                raise ValueError(f"{name} is not supported: {cls.refused[name]}")
        return {name: item for name, item in value.items() if name not in cls.refused}


class Part(Body):
    """A piece of a message. Only text is understood."""

    type: Literal["text"]
    text: str


Content = str | list[Part]


class CalledFunction(Body):
    name: str
    arguments: str = Field(description="a JSON object, as text")


class ToolCall(Body):
    """A call that the model made in an earlier turn."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Body):
    """One turn of the conversation."""

    refused = {
        "name": _NO_PLACE,
        "refusal": _NO_PLACE,
        "audio": "text only",
        "annotations": _NO_PLACE,
        "function_call": "use tool_calls",
        "reasoning_content": _NO_PLACE,
    }

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    tool_calls: list[ToolCall] | None = Field(None, description="of an assistant message")
    tool_call_id: str | None = Field(None, description="of a tool message: which call it answers")


class Function(Body):
    name: str = Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = Field(None, description="a JSON schema of the arguments")
    strict: bool | None = Field(None, description="forced calls always keep to the schema, whatever stands here")


class Tool(Body):
    type: Literal["function"]
    function: Function


class NamedFunction(Body):
    name: str


class NamedTool(Body):
    type: Literal["function"]
    function: NamedFunction


class JsonSchema(Body):
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = Field(None, description="the output always keeps to the schema, whatever stands here")


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class Prediction(Body):
    """Text that the output is expected to repeat in large part. It changes the speed, never the output."""

    type: Literal["content"]
    content: Content


class StreamOptions(Body):
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class OutpaceOptions(Body):
    """How this request is served; nothing here changes which tokens it gets, unless `method` is not lossless."""

    method: str | None = Field(None, description="a decoding method that the server was started with")
    max_draft: int | None = Field(None, description="most draft nodes of a step; 0: plain decoding")
    exactness: Exactness | None = Field(None, description="the weakest result that will do")
    priority: int | None = Field(None, description="-100 to 100; lower starts first")
    trace: bool | None = Field(None, description="streams only: who drafted each token, and what was rejected")


def _token_ids(value: Any) -> Any:
    """One error, however many are wrong."""
    if isinstance(value, list) and not {int}.issuperset(map(type, value)):
        raise ValueError("it must be a list of token ids")
    return value


class Generate(Body):
    """What both routes share."""

    model: str | None = Field(None, description="the served model; may be left out")
    max_tokens: int | None = None
    n: int | None = Field(None, description="choices; choice i has the seed seed + i")
    seed: int | None = Field(None, description="the same seed gives the same text; one is drawn and reported if absent")
    stop: str | list[str] | None = Field(None, description="end before any of these texts")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(None, description="default 1; 0 takes the likeliest token")
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = Field(None, description="token id -> bias")
    prediction: Prediction | None = None

    user: str | None = Field(None, max_length=512, description="parts owners: their prefixes and drafts are not shared")
    metadata: dict[str, str] | None = None
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    # beyond OpenAI's
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    stop_token_ids: Annotated[list[int] | None, BeforeValidator(_token_ids)] = None
    ignore_eos: bool | None = None
    regex: str | None = Field(None, description="the whole output matches it")
    grammar: str | None = Field(None, description="the output is a sentence of it (Lark or GBNF)")
    outpace: OutpaceOptions | None = None


_NO_MEDIA = "text only"


class ChatRequest(Generate):
    """Body of /v1/chat/completions."""

    refused = {
        "functions": "use tools",
        "function_call": "use tool_choice",
        "audio": _NO_MEDIA,
        "web_search_options": "the server searches nothing",
        "reasoning_effort": "the models served here have no such setting",
        "verbosity": "the models served here have no such setting",
    }

    messages: list[Message] = Field(min_length=1, fail_fast=True)
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    modalities: list[Literal["text"]] | None = None


def _prompt(value: Any) -> Any:
    """Looks once at each id: a union of lists would try, and report, every item as every kind."""
    if isinstance(value, list):
        inner = set(map(type, value))
        if inner == {list}:
            inner = {*inner, *(type(id) for ids in value for id in ids)} - {list}
            if inner <= {int}:
                return value
        elif inner in (set(), {str}, {int}):
            return value
    elif isinstance(value, str):
        return value
    raise ValueError("it must be text, a list of texts, token ids, or a list of lists of token ids")


class CompletionRequest(Generate):
    """Body of /v1/completions."""

    refused = {"suffix": "text is written forwards only; put what follows into the prompt"}

    prompt: Annotated[
        str | list[str] | list[int] | list[list[int]],
        PlainValidator(_prompt, json_schema_input_type=str | list[str] | list[int] | list[list[int]]),
    ]
    logprobs: int | None = Field(None, description="log-probabilities of the chosen token and of this many likeliest")
    echo: Literal[False] | None = Field(None, description="not true: a prompt is read without the logits of its tokens")
    best_of: int | None = Field(None, description="only the value of n: choices are not ranked")
