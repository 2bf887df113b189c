"""Bodies of requests, in OpenAI's form. What is not understood is refused by name, never ignored: tables in `vendor`
have every field, also those that are taken without effect or refused.

Ranges of sampling parameters are `SamplingParams`' to check, sizes are `Limits`'. `user` parts owners, no more.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    PlainValidator,
    PrivateAttr,
    model_validator,
)

from ..types import Exactness
from . import vendor


class Body(BaseModel):
    """Strict: no unknown field, no number in quotes, no infinity. `rules`: what becomes of fields that it has not."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    rules: ClassVar[dict[str, vendor.Rule]] = {}
    _ignored: list[str] = PrivateAttr(default_factory=list)

    @model_validator(mode="wrap")
    @classmethod
    def _sift(cls, value: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        if not isinstance(value, dict) or not cls.rules:
            return handler(value)
        left, ignored = vendor.sift(value, cls.rules)
        made = handler(left)
        made._ignored = ignored
        return made

    def ignored(self) -> list[str]:
        """Names of the fields that were taken without effect, those of parts as `messages.cache_control`."""
        return list(dict.fromkeys(self._names()))

    def _names(self) -> Iterator[str]:
        yield from self._ignored
        for name in self.model_fields_set:
            value = getattr(self, name)
            for part in value if isinstance(value, list) else (value,):
                if isinstance(part, Body):
                    yield from (f"{name}.{inner}" for inner in part._names())


class Part(Body):
    """A piece of a message. Only text is understood."""

    rules = vendor.PART

    type: Literal["text"]
    text: str


class RefusalPart(Body):
    """What an assistant refused with."""

    type: Literal["refusal"]
    refusal: str

    @property
    def text(self) -> str:
        return self.refusal


Content = str | list[Part]


class CalledFunction(Body):
    rules = vendor.CALLED_FUNCTION

    name: str
    arguments: str = Field(description="a JSON object, as text")


class ToolCall(Body):
    """A call that the model made in an earlier turn."""

    rules = vendor.TOOL_CALL

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Body):
    """One turn of the conversation."""

    rules = vendor.MESSAGE

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part | RefusalPart] | None = None
    name: str | None = Field(None, max_length=256, description="of the speaker; for chat templates that read it")
    refusal: str | None = Field(None, description="what an assistant said instead of a content")
    reasoning_content: str | None = Field(None, description="for chat templates that read it")
    prefix: bool | None = Field(None, description="of the last message, an assistant's: the output goes on with it")
    tool_calls: list[ToolCall] | None = Field(None, description="of an assistant message")
    tool_call_id: str | None = Field(None, description="of a tool message: which call it answers")


class Function(Body):
    rules = vendor.FUNCTION

    name: str = Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = Field(None, description="a JSON schema of the arguments")
    strict: bool | None = Field(None, description="forced calls always keep to the schema, whatever stands here")


class Tool(Body):
    rules = vendor.TOOL

    type: Literal["function"]
    function: Function


class NamedFunction(Body):
    name: str


class NamedTool(Body):
    type: Literal["function"]
    function: NamedFunction


class AllowedTools(Body):
    mode: Literal["auto", "required"]
    tools: list[NamedTool] = Field(min_length=1)


class AllowedToolChoice(Body):
    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


class JsonSchema(Body):
    rules = vendor.SCHEMA

    name: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = Field(None, description="the output always keeps to the schema, whatever stands here")


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema", description="of type json_object, as llama.cpp has it")


class StructuredOutputs(Body):
    """vLLM's: one of these."""

    rules: ClassVar[dict[str, vendor.Rule]] = {
        "whitespace_pattern": vendor.REQUEST["guided_whitespace_pattern"],
        "structural_tag": vendor.REQUEST["structural_tag"],
        "disable_fallback": vendor.REQUEST["guided_decoding_backend"],
        "disable_any_whitespace": vendor.Refused("give a grammar with the white space that you want"),
        "disable_additional_properties": vendor.Refused("say it in the schema"),
    }

    json_: dict[str, Any] | str | None = Field(None, alias="json")
    regex: str | None = None
    choice: list[str] | None = Field(None, min_length=1)
    grammar: str | None = None
    json_object: bool | None = None


class Prediction(Body):
    """Text that the output is expected to repeat in large part. It changes the speed, never the output."""

    type: Literal["content"]
    content: Content


class StreamOptions(Body):
    rules = vendor.STREAM_OPTIONS

    include_usage: bool | None = None


class OutpaceOptions(Body):
    """How this request is served; nothing here changes which tokens it gets, unless `method` is not lossless."""

    method: str | None = Field(None, description="a decoding method that the server was started with")
    max_draft: int | None = Field(None, description="most draft nodes of a step; 0: plain decoding")
    exactness: Exactness | None = Field(None, description="the weakest result that will do")
    priority: int | None = Field(None, description="-100 to 100; lower starts first")
    logprobs: Literal["processed", "raw"] | None = Field(
        None, description="of which distribution: behind penalties, bias and grammar (the default), or before them"
    )
    trace: bool | None = Field(None, description="streams only: who drafted each token, and what was rejected")


def _token_ids(value: Any) -> Any:
    """One error, however many are wrong."""
    if isinstance(value, list) and not {int}.issuperset(map(type, value)):
        raise ValueError("it must be a list of token ids")
    return value


class Generate(Body):
    """What both routes share."""

    rules = vendor.REQUEST

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
    best_of: int | None = Field(None, description="only the value of n: choices are not ranked")

    # beyond OpenAI's
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    stop_token_ids: Annotated[list[int] | None, BeforeValidator(_token_ids)] = None
    ignore_eos: bool | None = None
    regex: str | None = Field(None, description="the whole output matches it")
    grammar: str | None = Field(None, description="the output is a sentence of it (Lark or GBNF)")
    outpace: OutpaceOptions | None = None

    # as vLLM and llama.cpp name them
    min_tokens: int | None = Field(None, description="what ends an output cannot come before so many tokens")
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_grammar: str | None = None
    guided_choice: list[str] | None = Field(None, min_length=1, description="the output is one of these texts")
    structured_outputs: StructuredOutputs | None = None
    json_schema: dict[str, Any] | None = None
    truncate_prompt_tokens: int | None = Field(None, ge=1, description="read the prompt's last so many tokens alone")
    priority: int | None = Field(None, description="as outpace.priority")
    n_predict: int | None = Field(None, description="as max_tokens; -1: not given")


class ChatRequest(Generate):
    """Body of /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1, fail_fast=True)
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | AllowedToolChoice | None = None
    parallel_tool_calls: bool | None = None

    reasoning_effort: str | None = Field(None, max_length=40, description="for chat templates that read it")
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="values for the chat template")
    enable_thinking: bool | None = Field(None, description="for chat templates that read it")
    add_generation_prompt: bool | None = Field(None, description="false: nothing tells the model to answer")
    continue_final_message: bool | None = Field(None, description="the output goes on with the last message")


def prompts_of(value: Any) -> Any:
    """Looks once at each id: a union of lists would try, and report, every item as every kind."""
    if isinstance(value, list):
        inner = set(map(type, value))
        if inner == {list}:
            if {type(id) for ids in value for id in ids} <= {int}:
                return value
        elif inner in (set(), {str}, {int}):
            return value
    elif isinstance(value, str):
        return value
    raise ValueError("it must be text, a list of texts, token ids, or a list of lists of token ids")


class CompletionRequest(Generate):
    """Body of /v1/completions."""

    prompt: Annotated[
        str | list[str] | list[int] | list[list[int]],
        PlainValidator(prompts_of, json_schema_input_type=str | list[str] | list[int] | list[list[int]]),
    ]
    logprobs: int | None = Field(None, description="log-probabilities of the chosen token and of this many likeliest")
    echo: bool | None = Field(None, description="the prompt comes before the output, with log-probabilities as well")
    suffix: str | None = Field(None, description="what follows the output: it fills the middle, with models that can")
