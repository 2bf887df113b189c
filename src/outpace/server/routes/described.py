"""Bodies of what these routes answer, for the description of the API alone; tests hold what is sent to it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from ..responses import Decoding, Described


class Ignored(Described):
    """Fields of a request that had no effect; it is there if there were any."""

    ignored: list[str]


# -- /v1/messages ----------------------------------------------------------------------------------------------------


class TextBlock(Described):
    type: Literal["text"]
    text: str


class ToolUseBlock(Described):
    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


class MessageUsage(Described):
    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int


class Message(Described):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[Annotated[TextBlock | ToolUseBlock, Field(discriminator="type")]]
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]
    stop_sequence: str | None
    usage: MessageUsage
    outpace: Decoding


class MessageTokens(Described):
    input_tokens: int
    outpace: Ignored | None = None


class MessageErrorDetail(Described):
    type: str
    message: str


class MessageError(Described):
    type: Literal["error"]
    error: MessageErrorDetail
    request_id: str | None


# -- /v1/responses ---------------------------------------------------------------------------------------------------


class OutputText(Described):
    type: Literal["output_text"]
    text: str
    annotations: list[Any]
    logprobs: list[Any]


class OutputMessage(Described):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    status: Literal["completed", "incomplete"]
    content: list[OutputText]


class OutputCall(Described):
    id: str
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    status: Literal["completed", "incomplete"]


class Incomplete(Described):
    reason: Literal["max_output_tokens"]


class Cached(Described):
    cached_tokens: int


class Reasoned(Described):
    reasoning_tokens: int


class ResponseUsage(Described):
    input_tokens: int
    input_tokens_details: Cached
    output_tokens: int
    output_tokens_details: Reasoned
    total_tokens: int


class Response(Described):
    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Literal["completed", "incomplete"]
    error: None
    incomplete_details: Incomplete | None
    background: Literal[False]
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: None
    metadata: dict[str, str]
    model: str
    output: list[Annotated[OutputMessage | OutputCall, Field(discriminator="type")]]
    parallel_tool_calls: bool
    previous_response_id: str | None
    reasoning: dict[str, str | None]
    service_tier: Literal["default"]
    store: bool
    temperature: float
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_logprobs: Literal[0]
    top_p: float
    truncation: Literal["disabled"]
    usage: ResponseUsage
    user: str | None
    outpace: Decoding


class DeletedResponse(Described):
    id: str
    object: Literal["response.deleted"]
    deleted: Literal[True]


class ItemList(Described):
    object: Literal["list"]
    data: list[dict[str, Any]]
    first_id: str | None
    last_id: str | None
    has_more: bool


# -- /v1/embeddings, /tokenize, /detokenize ---------------------------------------------------------------------------


class Embedding(Described):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(Described):
    prompt_tokens: int
    total_tokens: int


class Pooled(Described):
    pooling: Literal["mean", "last"]
    of: str
    normalised: Literal[True]
    ignored: list[str] | None = None


class EmbeddingList(Described):
    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage
    outpace: Pooled


class TokenPiece(Described):
    id: int
    piece: str | list[int]


class Tokenized(Described):
    count: int
    max_model_len: int
    tokens: list[int] | list[TokenPiece]
    token_strs: list[str] | None = None
    outpace: Ignored | None = None


class TokenizerInfo(Described):
    bos_token: str | None
    eos_token: str | None
    unk_token: str | None
    pad_token: str | None
    chat_template: str | None
    model_max_length: int


class Detokenized(Described):
    content: str
    prompt: str
