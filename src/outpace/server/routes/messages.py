"""Anthropic's Messages API: its bodies as chat requests, and chat answers as its messages."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from ...errors import ParameterError
from ...types import Result
from .. import vendor
from ..bodies import chat_body
from ..protocol import Body, ChatRequest, OutpaceOptions
from ..service import ServingEngine
from ..submissions import Call, Limits, chat_call
from .translation import NAME, chat_request, named_as

_CACHED = {"cache_control": vendor.MESSAGE["cache_control"]}
_TOOLSET = {"toolset_name": vendor.Refused("tools are named one by one")}
_NAMES = {"response_format": "output_config.format", "stop": "stop_sequences", "tool_calls": "tool_use"}
_SOURCES = {"citations": vendor.MESSAGE["annotations"]}


class Text(Body):
    rules: ClassVar[dict[str, vendor.Rule]] = {**_CACHED, **_SOURCES}

    type: Literal["text"]
    text: str


class ToolUse(Body):
    """A call that the model made in an earlier turn."""

    rules: ClassVar[dict[str, vendor.Rule]] = {**_CACHED, "caller": vendor.Harmless("clients call"), **_TOOLSET}

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


class ToolResult(Body):
    """What a tool answered."""

    rules: ClassVar[dict[str, vendor.Rule]] = {**_CACHED, **_TOOLSET}

    type: Literal["tool_result"]
    tool_use_id: str
    content: str | list[Text] | None = None
    is_error: bool | None = Field(None, description='true: the model reads "Error: " before the content')


Block = Annotated[Text | ToolUse | ToolResult, Field(discriminator="type")]


class Turn(Body):
    role: Literal["user", "assistant"]
    content: str | list[Block]


class MessagesTool(Body):
    rules: ClassVar[dict[str, vendor.Rule]] = {
        **_CACHED,
        "strict": vendor.Harmless("forced calls always keep to the schema"),
        "eager_input_streaming": vendor.Harmless("calls are always streamed as they are made"),
        "input_examples": vendor.Refused("put examples into the description"),
        "defer_loading": vendor.Harmless("all tools are shown to the model", (False,)),
        "allowed_callers": vendor.Harmless("clients call", (["direct"],)),
    }

    type: Literal["custom"] | None = None
    name: str = Field(pattern=NAME)
    description: str | None = None
    input_schema: dict[str, Any] = Field(description="a JSON schema of the input")


class ToolChoice(Body):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Metadata(Body):
    user_id: str | None = Field(None, max_length=512, description="parts owners, as `user` does elsewhere")


class OutputFormat(Body):
    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Body):
    rules: ClassVar[dict[str, vendor.Rule]] = {
        "effort": vendor.Refused("the models served here have no such setting"),
        "task_budget": vendor.Refused("use max_tokens"),
    }

    format: OutputFormat | None = None


class CountRequest(Body):
    """Body of /v1/messages/count_tokens."""

    rules: ClassVar[dict[str, vendor.Rule]] = {
        **_CACHED,
        "thinking": vendor.Harmless("the models served here have no such setting", ({"type": "disabled"},)),
        "mcp_servers": vendor.Refused("the server calls no other one"),
        "context_management": vendor.Refused("the client keeps the conversation"),
        "speed": vendor.Harmless("there is one", ("standard",)),
    }

    model: str | None = Field(None, description="the served model; may be left out")
    messages: list[Turn] = Field(min_length=1)
    system: str | list[Text] | None = None
    tools: list[MessagesTool] | None = None
    tool_choice: ToolChoice | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = None

    @property
    def user(self) -> str | None:
        return None


class MessagesRequest(CountRequest):
    """Body of /v1/messages."""

    rules: ClassVar[dict[str, vendor.Rule]] = {
        **CountRequest.rules,
        "service_tier": vendor.Harmless("there is one tier", ("auto", "standard_only")),
        "inference_geo": vendor.Refused("there is one place, that of this server"),
        "container": vendor.Refused("nothing is run"),
        "diagnostics": vendor.Refused("usage says what was found in the prefix cache"),
    }

    max_tokens: int
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    temperature: float | None = Field(None, description="default 1; 0 takes the likeliest token")
    top_p: float | None = None
    top_k: int | None = None
    metadata: Metadata | None = None

    seed: int | None = Field(None, description="beyond Anthropic's: the same seed gives the same text")
    outpace: OutpaceOptions | None = None

    @property
    def user(self) -> str | None:
        return None if self.metadata is None else self.metadata.user_id


def messages_call(body: MessagesRequest, engine: ServingEngine, owner: str, limits: Limits) -> Call:
    """Raises ParameterError for what does not work, CapacityError for a prompt that leaves no room."""
    if body.outpace is not None and body.outpace.trace:
        raise ParameterError("outpace.trace belongs to /v1/chat/completions and /v1/completions")
    return _call(body, as_chat(body), engine, owner, limits)


def counted_call(body: CountRequest, engine: ServingEngine, owner: str, limits: Limits) -> Call:
    """A call that is not made: its prompt is counted."""
    return _call(body, as_chat(body).model_copy(update={"max_tokens": 1}), engine, owner, limits)


def _call(body: CountRequest, chat: ChatRequest, engine: ServingEngine, owner: str, limits: Limits) -> Call:
    with named_as(_NAMES):
        call = chat_call(chat, engine, owner, limits)
    return replace(call, ignored=[*body.ignored(), *call.ignored])


def as_chat(body: CountRequest) -> ChatRequest:
    """The same conversation in OpenAI's form."""
    fields: dict[str, Any] = {"messages": _turns(body)}
    if body.tools:
        fields["tools"] = [_tool(tool) for tool in body.tools]
    if body.tool_choice is not None:
        fields["tool_choice"] = _choice(body.tool_choice)
        if body.tool_choice.disable_parallel_tool_use is not None and body.tools:
            fields["parallel_tool_calls"] = not body.tool_choice.disable_parallel_tool_use
    if body.output_config is not None and body.output_config.format is not None and body.output_format is not None:
        raise ParameterError("output_format and output_config.format say the same: give one of them")
    form = body.output_format or (body.output_config.format if body.output_config is not None else None)
    if form is not None:
        fields["response_format"] = {"type": "json_schema", "json_schema": {"schema": form.schema_}}
    if fields["messages"][-1]["role"] == "assistant" and not fields["messages"][-1].get("tool_calls"):
        fields["continue_final_message"] = True
    if isinstance(body, MessagesRequest):
        names = ("max_tokens", "stream", "temperature", "top_p", "top_k", "seed")
        fields |= {name: value for name in names if (value := getattr(body, name)) is not None}
        if body.stop_sequences:
            fields["stop"] = body.stop_sequences
        if body.outpace is not None:
            fields["outpace"] = body.outpace.model_dump(exclude_none=True)
    return chat_request(fields)


def _turns(body: CountRequest) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    if body.system:
        found.append({"role": "system", "content": _joined(body.system)})
    for place, turn in enumerate(body.messages):
        blocks = [Text(type="text", text=turn.content)] if isinstance(turn.content, str) else turn.content
        made = _assistant(blocks, place) if turn.role == "assistant" else _user(blocks, place)
        for message in made:
            if found and found[-1]["role"] == message["role"] == "user":  # turns of one side are one turn
                found[-1] = {"role": "user", "content": found[-1]["content"] + "\n\n" + message["content"]}
            else:
                found.append(message)
    return found


def _user(blocks: Sequence[Text | ToolUse | ToolResult], place: int) -> list[dict[str, Any]]:
    """The answers of tools, then what the user says."""
    if any(isinstance(block, ToolUse) for block in blocks):
        raise ParameterError(f"messages[{place}]: tool_use belongs to a message of role assistant")
    found: list[dict[str, Any]] = [
        {"role": "tool", "tool_call_id": block.tool_use_id, "content": _answered(block)}
        for block in blocks
        if isinstance(block, ToolResult)
    ]
    texts = [block.text for block in blocks if isinstance(block, Text)]
    if texts or not found:
        found.append({"role": "user", "content": "\n\n".join(texts)})
    return found


def _answered(block: ToolResult) -> str:
    return ("Error: " if block.is_error else "") + _joined(block.content or "")


def _assistant(blocks: Sequence[Text | ToolUse | ToolResult], place: int) -> list[dict[str, Any]]:
    if any(isinstance(block, ToolResult) for block in blocks):
        raise ParameterError(f"messages[{place}]: tool_result belongs to a message of role user")
    message: dict[str, Any] = {
        "role": "assistant",
        "content": "".join(block.text for block in blocks if isinstance(block, Text)),
    }
    calls = [
        {"id": block.id, "function": {"name": block.name, "arguments": json.dumps(block.input, ensure_ascii=False)}}
        for block in blocks
        if isinstance(block, ToolUse)
    ]
    return [message | {"tool_calls": calls} if calls else message]


def _joined(content: str | Sequence[Text]) -> str:
    return content if isinstance(content, str) else "\n\n".join(block.text for block in content)


def _tool(tool: MessagesTool) -> dict[str, Any]:
    function = {"name": tool.name, "description": tool.description, "parameters": tool.input_schema}
    return {"type": "function", "function": {name: value for name, value in function.items() if value is not None}}


def _choice(choice: ToolChoice) -> Any:
    if (choice.name is not None) != (choice.type == "tool"):
        raise ParameterError("tool_choice: name belongs to type tool, and type tool needs it")
    if choice.type == "tool":
        return {"type": "function", "function": {"name": choice.name}}
    return {"any": "required"}.get(choice.type, choice.type)


# -- answers ---------------------------------------------------------------------------------------------------------


def message_head(model: str, id: str) -> dict[str, Any]:
    """What every message begins with. `id`: of the chat completion."""
    return {
        "id": "msg_" + id.partition("-")[2],
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
    }


def message_body(call: Call, results: Sequence[Result], engine: ServingEngine) -> dict[str, Any]:
    """Of /v1/messages."""
    chat = chat_body(call, results, engine)
    (choice,), (result,) = chat["choices"], results
    content: list[dict[str, Any]] = []
    if choice["message"]["content"]:
        content.append({"type": "text", "text": choice["message"]["content"]})
    for made in choice["message"].get("tool_calls") or []:
        function = made["function"]
        content.append(tool_use(made["id"], function["name"], input_of(function["arguments"])))
    return {
        **message_head(engine.name, chat["id"]),
        "content": content,
        **ended(choice["finish_reason"], result),
        "usage": usage(call, result),
        "outpace": chat["outpace"],
    }


def tool_use(id: str, name: str, given: Any) -> dict[str, Any]:
    return {"type": "tool_use", "id": "toolu_" + id.removeprefix("call_"), "name": name, "input": given}


def input_of(arguments: str) -> Any:
    """The arguments of a call; none of one that was cut by max_tokens."""
    try:
        return json.loads(arguments)
    except ValueError:
        return {}


def ended(finish: str, result: Result) -> dict[str, Any]:
    """`stop_reason` and `stop_sequence`."""
    if finish == "stop" and result.stopped_by is not None:
        return {"stop_reason": "stop_sequence", "stop_sequence": result.stopped_by}
    reason = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}[finish]
    return {"stop_reason": reason, "stop_sequence": None}


def usage(call: Call, result: Result) -> dict[str, Any]:
    """What was found in the prefix cache is not among the `input_tokens`."""
    cached = result.stats.cached_tokens
    return {
        "input_tokens": call.prompt_tokens - cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": len(result.token_ids),
    }
