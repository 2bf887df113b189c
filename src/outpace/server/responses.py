"""Bodies of responses, for the description of the API (openapi.json) alone: they are built as plain dictionaries, and
tests hold what is sent to what is described here."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from ..types import Exactness


class Described(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ErrorDetail(Described):
    message: str
    type: str
    param: str | None
    code: str | None


class Error(Described):
    error: ErrorDetail


class Health(Described):
    status: Literal["ready", "draining", "broken"]
    model: str
    open_calls: int


class ModelFigures(Described):
    methods: list[str]
    method: str
    precision: str


class Model(Described):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    outpace: ModelFigures


class ModelList(Described):
    object: Literal["list"]
    data: list[Model]


class PromptDetails(Described):
    cached_tokens: int


class CompletionDetails(Described):
    accepted_prediction_tokens: int
    rejected_prediction_tokens: int
    reasoning_tokens: int


class Usage(Described):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    completion_tokens_details: CompletionDetails


class Stats(Described):
    tokens: int
    steps: int
    mean_accepted: float
    acceptance_rate: float
    tokens_per_s: float
    time_to_first_token_s: float
    queue_s: float
    cached_tokens: int
    preemptions: int
    accepted_by_source: dict[str, int]
    drafted_by_source: dict[str, int]


class Decoding(Described):
    """How a choice was decoded, and the seed that repeats it."""

    method: str
    exactness: Exactness
    notes: list[str]
    seed: int
    logprobs: Literal["processed", "raw"] | None = None  # which distribution those of this choice are of
    stats: Stats
    ignored: list[str] | None = None  # fields of the request that had no effect, if there were any


class Decodings(Described):
    """Of several choices."""

    choices: list[Decoding]
    ignored: list[str] | None = None


class TopLogprob(Described):
    token: str
    logprob: float
    bytes: list[int]


class ScoredToken(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Described):
    content: list[ScoredToken]
    refusal: None


class CalledFunction(Described):
    name: str
    arguments: str


class ToolCall(Described):
    id: str
    type: Literal["function"]
    function: CalledFunction


class Answer(Described):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[ToolCall] | None = None


class ChatChoice(Described):
    index: int
    message: Answer
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]


class ChatCompletion(Described):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage
    outpace: Decoding | Decodings


class Logprobs(Described):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]
    bytes: list[list[int]]


class CompletionChoice(Described):
    index: int
    text: str
    logprobs: Logprobs | None
    finish_reason: Literal["stop", "length"]


class Completion(Described):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage
    outpace: Decoding | Decodings


ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": Error, "description": text}
    for status, text in {
        400: "A parameter is wrong or unknown, or the prompt does not fit",
        401: "A key is needed",
        404: "No such model",
        413: "The body is too large",
        429: "The queue is full; Retry-After says when to come back",
        500: "The step that held the request failed",
        503: "The server is stopping",
    }.items()
}
_DATA = {"data": {"type": "string"}}
_NAMED = {"event": {"type": "string"}, **_DATA}
STREAM = {"text/event-stream": {"schema": {"type": "object", "properties": _DATA, "required": list(_DATA)}}}
NAMED_STREAM = {"text/event-stream": {"schema": {"type": "object", "properties": _NAMED, "required": list(_NAMED)}}}
