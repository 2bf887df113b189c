"""OpenAI's Responses API: its bodies as chat requests, and chat answers as its output items."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, Literal
from uuid import uuid4

from pydantic import Field, model_validator

from ...errors import ParameterError
from ...types import Result
from .. import vendor
from ..bodies import chat_body
from ..protocol import Body, ChatRequest, OutpaceOptions, Prediction, RefusalPart
from ..service import ServingEngine
from ..submissions import Call, Limits, chat_call
from .translation import NAME, chat_request, named_as

_STATUS = {"status": vendor.Harmless("an item of a request is complete", ("completed", "incomplete"))}


class TextPart(Body):
    rules: ClassVar[dict[str, vendor.Rule]] = {
        "annotations": vendor.MESSAGE["annotations"],
        "logprobs": vendor.Harmless("what was written is read as it is"),
        "parsed": vendor.MESSAGE["parsed"],
        "prompt_cache_breakpoint": vendor.MESSAGE["cache_control"],
    }

    type: Literal["input_text", "output_text", "text"]
    text: str


class MessageItem(Body):
    rules: ClassVar[dict[str, vendor.Rule]] = {
        **_STATUS,
        "id": vendor.Harmless("items have no name in a request"),
        "phase": vendor.Harmless("all of a conversation is read"),
    }

    type: Literal["message"]
    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[TextPart | RefusalPart]


class CallItem(Body):
    """A call that the model made in an earlier turn."""

    rules: ClassVar[dict[str, vendor.Rule]] = {
        **_STATUS,
        "id": vendor.Harmless("items have no name in a request"),
        "namespace": vendor.Harmless("tools have one"),
        "caller": vendor.Harmless("clients call"),
        "parsed_arguments": vendor.Harmless("the arguments have it"),
    }

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str = Field(description="a JSON object, as text")


class AnswerItem(Body):
    """What a tool answered."""

    rules: ClassVar[dict[str, vendor.Rule]] = CallItem.rules

    type: Literal["function_call_output"]
    call_id: str
    output: str | list[TextPart]


Item = Annotated[MessageItem | CallItem | AnswerItem, Field(discriminator="type")]


class FunctionTool(Body):
    rules: ClassVar[dict[str, vendor.Rule]] = {
        "strict": vendor.Harmless("forced calls always keep to the schema"),
        "defer_loading": vendor.Harmless("all tools are shown to the model", (False,)),
    }

    type: Literal["function"]
    name: str = Field(pattern=NAME)
    description: str | None = None
    parameters: dict[str, Any] | None = Field(None, description="a JSON schema of the arguments")


class NamedChoice(Body):
    type: Literal["function"]
    name: str


class TextFormat(Body):
    rules: ClassVar[dict[str, vendor.Rule]] = {
        "strict": vendor.Harmless("the output always keeps to the schema"),
        "description": vendor.SCHEMA["description"],
    }

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")


class TextOptions(Body):
    rules: ClassVar[dict[str, vendor.Rule]] = {"verbosity": vendor.Harmless("there is no such setting", ("medium",))}

    format: TextFormat | None = None


class ReasoningOptions(Body):
    rules: ClassVar[dict[str, vendor.Rule]] = {
        **dict.fromkeys(
            ("summary", "generate_summary", "context"), vendor.Harmless("the models here do not reason apart")
        ),
    }

    effort: str | None = Field(None, description="a value of the chat template, where that reads it")


class ResponsesRequest(Body):
    """Body of /v1/responses."""

    rules: ClassVar[dict[str, vendor.Rule]] = {
        "service_tier": vendor.REQUEST["service_tier"],
        "safety_identifier": vendor.REQUEST["safety_identifier"],
        "prompt_cache_key": vendor.REQUEST["prompt_cache_key"],
        "prompt_cache_retention": vendor.REQUEST["prompt_cache_retention"],
        "prompt_cache_options": vendor.REQUEST["prompt_cache_key"],
        "stream_options": vendor.Harmless("nothing is padded, and the usage always comes"),
        "background": vendor.Harmless("requests are answered while the client waits", (False,)),
        "truncation": vendor.Harmless("a conversation that is too long is refused", ("disabled",)),
        "include": vendor.Harmless(
            "there is nothing of that kind to include",
            ([], ["reasoning.encrypted_content"]),
        ),
        "top_logprobs": vendor.Harmless("log-probabilities come from /v1/chat/completions", (0,)),
        "max_tool_calls": vendor.Harmless("it is about tools of the server, which has none"),
        "conversation": vendor.Refused("use previous_response_id"),
        "prompt": vendor.Refused("prompts are not stored: put the text into input and instructions"),
        "context_management": vendor.Refused("the client keeps the conversation short"),
        "moderation": vendor.Refused("nothing is moderated"),
    }

    model: str | None = Field(None, description="the served model; may be left out")
    input: str | list[Item]
    instructions: str | None = Field(None, description="a system message of this response alone")
    previous_response_id: str | None = Field(None, max_length=100, description="the conversation goes on behind it")
    store: bool | None = Field(None, description="false: the response cannot be asked for later")
    max_output_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, description="default 1; 0 takes the likeliest token")
    top_p: float | None = None
    stream: bool | None = None
    text: TextOptions | None = None
    tools: list[FunctionTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedChoice | None = None
    parallel_tool_calls: bool | None = None
    reasoning: ReasoningOptions | None = None
    metadata: dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]] | None = Field(
        None, max_length=16
    )
    user: str | None = Field(None, max_length=512, description="parts owners: their prefixes and drafts are not shared")

    # beyond OpenAI's
    seed: int | None = None
    stop: str | list[str] | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    prediction: Prediction | None = None
    outpace: OutpaceOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _name_items(cls, value: Any) -> Any:
        """A message may be written without its type."""
        if isinstance(value, dict) and isinstance(value.get("input"), list):
            items = [
                {"type": "message", **item}
                if isinstance(item, dict) and "type" not in item and "role" in item
                else item
                for item in value["input"]
            ]
            return {**value, "input": items}
        return value

    def items(self) -> list[dict[str, Any]]:
        """The input as items."""
        if isinstance(self.input, str):
            return [{"type": "message", "role": "user", "content": self.input}]
        return [item.model_dump(exclude_none=True) for item in self.input]


_NAMES = {
    "response_format": "text.format",
    "max_tokens": "max_output_tokens",
    "reasoning_effort": "reasoning.effort",
    "messages": "input",
}
_AS_THEY_ARE = (
    *("temperature", "top_p", "stream", "parallel_tool_calls", "user", "seed", "stop", "top_k", "min_p"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias"),
)


@dataclass(slots=True)
class Turn:
    """One response in the making: what was asked, and the items that came before it in its conversation."""

    body: ResponsesRequest
    earlier: Sequence[Mapping[str, Any]] = ()
    id: str = field(default_factory=lambda: f"resp_{uuid4().hex}")

    def call(self, body: ResponsesRequest, engine: ServingEngine, owner: str, limits: Limits) -> Call:
        """Raises ParameterError for what does not work, CapacityError for a prompt that leaves no room."""
        if body.outpace is not None and body.outpace.trace:
            raise ParameterError("outpace.trace belongs to /v1/chat/completions and /v1/completions")
        with named_as(_NAMES):
            call = chat_call(as_chat(body, self.earlier), engine, owner, limits)
        return replace(call, ignored=[*body.ignored(), *call.ignored])


def as_chat(body: ResponsesRequest, earlier: Sequence[Mapping[str, Any]] = ()) -> ChatRequest:
    """The same request in the form of chat completions. `earlier`: items before its own."""
    fields: dict[str, Any] = {"messages": _messages(body.instructions, [*earlier, *body.items()])}
    if body.max_output_tokens is not None:
        fields["max_completion_tokens"] = body.max_output_tokens
    fields |= {name: value for name in _AS_THEY_ARE if (value := getattr(body, name)) is not None}
    if not body.tools:  # clients name these defaults whether there are tools or not
        fields.pop("parallel_tool_calls", None)
    if body.tools:
        fields["tools"] = [
            {"type": "function", "function": tool.model_dump(exclude={"type"}, exclude_none=True)}
            for tool in body.tools
        ]
    if isinstance(body.tool_choice, NamedChoice):
        fields["tool_choice"] = {"type": "function", "function": {"name": body.tool_choice.name}}
    elif body.tool_choice is not None and (body.tools or body.tool_choice == "required"):
        fields["tool_choice"] = body.tool_choice
    forced = body.tool_choice == "required" or isinstance(body.tool_choice, NamedChoice)
    if body.text is not None and body.text.format is not None and not forced:  # where a call is forced there is no text
        fields["response_format"] = _format(body.text.format)
    if body.reasoning is not None and body.reasoning.effort is not None:
        fields["reasoning_effort"] = body.reasoning.effort
    for name in ("prediction", "outpace"):
        part: Body | None = getattr(body, name)
        if part is not None:
            fields[name] = part.model_dump(exclude_none=True)
    return chat_request(fields)


def _format(form: TextFormat) -> dict[str, Any]:
    if form.type != "json_schema":
        if form.schema_ is not None:
            raise ParameterError("text.format: schema belongs to type json_schema")
        return {"type": form.type}
    if form.schema_ is None:
        raise ParameterError("text.format: type json_schema needs schema")
    return {"type": "json_schema", "json_schema": {"name": form.name, "schema": form.schema_}}


def _messages(instructions: str | None, items: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Items as messages: the calls that follow what an assistant said, or each other, are of one message."""
    found: list[dict[str, Any]] = []
    if instructions:
        found.append({"role": "system", "content": instructions})
    for item in items:
        last = found[-1] if found else None
        if item["type"] == "function_call":
            call = {"id": item["call_id"], "function": {"name": item["name"], "arguments": item["arguments"]}}
            if last is None or last["role"] != "assistant":
                last = {"role": "assistant", "content": ""}
                found.append(last)
            last["tool_calls"] = [*last.get("tool_calls", []), call]
        elif item["type"] == "function_call_output":
            found.append({"role": "tool", "tool_call_id": item["call_id"], "content": _joined(item["output"])})
        else:
            found.append({"role": item["role"], "content": _joined(item["content"])})
    if not any(message["role"] != "system" for message in found):
        raise ParameterError("input is empty: give a text, or at least one item")
    return found


def _joined(content: str | Sequence[Mapping[str, Any]]) -> str:
    if isinstance(content, str):
        return content
    return "".join(part.get("text", part.get("refusal", "")) for part in content)


# -- answers ---------------------------------------------------------------------------------------------------------


def response_head(turn: Turn, created: int, model: str, call: Call) -> dict[str, Any]:
    """A response before anything is written: what was asked, with the defaults that hold."""
    body, params = turn.body, call.submissions[0].params
    form = None if body.text is None or body.text.format is None else body.text.format
    return {
        "id": turn.id,
        "object": "response",
        "created_at": created,
        "completed_at": None,
        "status": "in_progress",
        "error": None,
        "incomplete_details": None,
        "background": False,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": None,
        "metadata": body.metadata or {},
        "model": model,
        "output": [],
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": body.previous_response_id,
        "reasoning": {"effort": None if body.reasoning is None else body.reasoning.effort, "summary": None},
        "service_tier": "default",
        "store": body.store is not False,
        "temperature": params.temperature,
        "text": {"format": {"type": "text"} if form is None else form.model_dump(exclude_none=True, by_alias=True)},
        "tool_choice": "auto" if body.tool_choice is None else _dumped(body.tool_choice),
        "tools": [
            {"description": None, "parameters": None, **_dumped(tool), "strict": True} for tool in body.tools or []
        ],
        "top_logprobs": 0,
        "top_p": params.top_p,
        "truncation": "disabled",
        "usage": None,
        "user": body.user,
    }


def _dumped(value: Any) -> Any:
    return value.model_dump(exclude_none=True) if isinstance(value, Body) else value


def finished(
    head: Mapping[str, Any], output: list[dict[str, Any]], chat: Mapping[str, Any], now: int
) -> dict[str, Any]:
    """The response when it is written. `chat`: the chat completion's finish_reason, usage and `outpace`."""
    cut = chat["finish_reason"] == "length"
    usage = chat["usage"]
    return {
        **head,
        "status": "incomplete" if cut else "completed",
        "completed_at": None if cut else now,
        "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
        "output": output,
        "usage": {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": {"cached_tokens": usage["prompt_tokens_details"]["cached_tokens"]},
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage["total_tokens"],
        },
        "outpace": chat["outpace"],
    }


def response_body(turn: Turn, call: Call, results: Sequence[Result], engine: ServingEngine) -> dict[str, Any]:
    """Of /v1/responses."""
    chat = chat_body(call, results, engine)
    (choice,) = chat["choices"]
    message, cut = choice["message"], choice["finish_reason"] == "length"
    calls = message.get("tool_calls") or []
    output: list[dict[str, Any]] = []
    if message["content"] or not calls:
        text = message["content"] or ""
        output.append(message_item(text, "incomplete" if cut and not calls else "completed"))
    for i, made in enumerate(calls):
        function = made["function"]
        status = "incomplete" if cut and i == len(calls) - 1 else "completed"
        output.append(call_item(made["id"], function["name"], function["arguments"], status))
    figures = {"finish_reason": choice["finish_reason"], "usage": chat["usage"], "outpace": chat["outpace"]}
    return finished(response_head(turn, chat["created"], engine.name, call), output, figures, chat["created"])


def message_item(text: str, status: str, id: str | None = None) -> dict[str, Any]:
    content = [{"type": "output_text", "text": text, "annotations": [], "logprobs": []}]
    id = id or f"msg_{uuid4().hex}"
    return {"id": id, "type": "message", "role": "assistant", "status": status, "content": content}


def call_item(call_id: str, name: str, arguments: str, status: str, id: str | None = None) -> dict[str, Any]:
    id = id or f"fc_{uuid4().hex}"
    return {
        "id": id,
        "type": "function_call",
        "call_id": call_id,
        "name": name,
        "arguments": arguments,
        "status": status,
    }


def as_input(output: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The output of a response as items of the conversation that goes on."""
    found: list[dict[str, Any]] = []
    for item in output:
        if item["type"] == "message":
            found.append({"type": "message", "role": "assistant", "content": _joined(item["content"])})
        elif item["status"] == "completed":
            found.append({name: item[name] for name in ("type", "call_id", "name", "arguments")})
    return found
