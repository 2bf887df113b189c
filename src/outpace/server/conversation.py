"""What a chat template is given: messages, tools and further values, and which of them it does not read."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import ParameterError
from ..models.tokenizer import Tokenizer
from .protocol import ChatRequest, Message
from .tools import Plan, form_of


@dataclass(frozen=True, slots=True)
class Conversation:
    """Arguments of `Tokenizer.chat`. `ignored`: fields that this model's template does not read."""

    messages: list[dict[str, Any]]
    begin: bool  # the assistant's turn begins behind them
    goes_on: bool  # the output goes on with the last message
    values: dict[str, Any]
    ignored: list[str]


def conversation(body: ChatRequest, tools: Plan | None, tokenizer: Tokenizer) -> Conversation:
    """Raises ParameterError for messages and values that do not fit together, or not this model."""
    messages = template_messages(body.messages)
    if tools is not None or any(m.role == "tool" or m.tool_calls for m in body.messages):
        form_of(tokenizer)
    wanted = dict(body.chat_template_kwargs or {})
    both = {"reasoning_effort": body.reasoning_effort, "enable_thinking": body.enable_thinking}
    own = {name: value for name, value in both.items() if value is not None}
    for name in own.keys() & wanted.keys():
        raise ParameterError(f"{name} and chat_template_kwargs.{name} say the same: give one of them")
    values, unread = template_values(wanted | own, tokenizer)
    ignored = [name if name in own else f"chat_template_kwargs.{name}" for name in unread]
    if tools is not None:
        values["tools"] = [tool.model_dump(exclude_none=True) for tool in tools.tools]
    goes_on = _goes_on(body, tools)
    begin = not goes_on if body.add_generation_prompt is None else body.add_generation_prompt
    return Conversation(messages, begin, goes_on, values, ignored + unread_of_messages(body.messages, tokenizer))


def _goes_on(body: ChatRequest, tools: Plan | None) -> bool:
    """Whether the output goes on with the last message. ParameterError where it cannot."""
    *earlier, last = body.messages
    if any(message.prefix for message in earlier):
        raise ParameterError("prefix: only the last message can be gone on with")
    if not (body.continue_final_message or last.prefix):
        return False
    name = "continue_final_message" if body.continue_final_message else "prefix"
    if last.role != "assistant" or last.tool_calls:
        raise ParameterError(f"{name}: the last message must be text of the assistant")
    if body.add_generation_prompt:
        raise ParameterError(f"{name} and add_generation_prompt cannot go together: drop one of them")
    if tools is not None and tools.forced:
        raise ParameterError(f"{name} and a forced tool call cannot go together: drop one of them")
    return True


def template_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """As chat templates want them: text for content, arguments as objects, the answers of tools in the order of the
    calls, `developer` as the system that it is a new name of. ParameterError for what does not fit together."""
    found: list[dict[str, Any]] = []
    calls: dict[str, int] = {}  # of the last assistant message: id -> place
    answers: list[tuple[int, dict[str, Any]]] = []
    for place, message in enumerate(messages):
        where = f"messages[{place}]"
        if message.role != "tool":
            found += [answer for _, answer in sorted(answers, key=lambda item: item[0])]
            answers = []
            calls = {call.id: i for i, call in enumerate(message.tool_calls or [])}
        turn = _turn(message, where)
        if message.role != "tool":
            found.append(turn)
        elif message.tool_call_id is None or message.tool_call_id not in calls:
            raise ParameterError(f"{where}: tool_call_id must name a call of the assistant message before it")
        else:
            answers.append((calls[message.tool_call_id], turn))
    return found + [answer for _, answer in sorted(answers, key=lambda item: item[0])]


def _turn(message: Message, where: str) -> dict[str, Any]:
    assistant = message.role == "assistant"
    if message.tool_call_id is not None and message.role != "tool":
        raise ParameterError(f"{where}: tool_call_id belongs to a message of role tool")
    for name in ("tool_calls", "refusal", "reasoning_content", "prefix"):
        if getattr(message, name) and not assistant:
            raise ParameterError(f"{where}: {name} belong to a message of role assistant")
    turn: dict[str, Any] = {"role": "system" if message.role == "developer" else message.role}
    turn["content"] = text_of(message, where)
    if message.name:
        turn["name"] = message.name
    if message.reasoning_content:
        turn["reasoning_content"] = message.reasoning_content
    if message.tool_calls:
        turn["tool_calls"] = [_made(call.function.name, call.function.arguments, where) for call in message.tool_calls]
    return turn


def text_of(message: Message, where: str) -> str:
    """The text of a message's content. An assistant may have said nothing, and a tool may have nothing to say."""
    content = message.content
    if content and message.refusal:
        raise ParameterError(f"{where}: content and refusal cannot go together: drop one of them")
    if content is None:
        if message.role == "assistant" and (message.refusal or message.tool_calls is not None):
            return message.refusal or ""
        if message.role in ("assistant", "tool") and "content" in message.model_fields_set:
            return ""
        raise ParameterError(f"{where}: content is missing")
    return content if isinstance(content, str) else "".join(part.text for part in content)


def _made(name: str, arguments: str, where: str) -> Mapping[str, Any]:
    try:
        parsed = json.loads(arguments) if arguments.strip() else {}
    except (ValueError, RecursionError):
        parsed = None
    if not isinstance(parsed, dict):
        raise ParameterError(f"{where}: the arguments of tool call {name!r} are not the text of a JSON object")
    return {"type": "function", "function": {"name": name, "arguments": parsed}}


_READ = re.compile(r"^[A-Za-z_][A-Za-z0-9_]{0,63}$")
_OURS = (
    *("messages", "tools", "add_generation_prompt", "continue_final", "template", "self"),
    *("bos_token", "eos_token", "unk_token", "pad_token"),
)
MOST_VALUES, MOST_CHARACTERS = 32, 16_384  # of chat_template_kwargs


def template_values(values: Mapping[str, Any], tokenizer: Tokenizer) -> tuple[dict[str, Any], list[str]]:
    """Values for the chat template, and the names of those that it does not read. Raises ParameterError for names that
    are not the client's to set."""
    if len(values) > MOST_VALUES or len(json.dumps(values)) > MOST_CHARACTERS:
        raise ParameterError(
            f"chat_template_kwargs is out of range: at most {MOST_VALUES} values of {MOST_CHARACTERS} characters in all"
        )
    for name in values:
        if name in _OURS or not _READ.match(name):
            raise ParameterError(
                f"chat_template_kwargs names {name[:64]!r}: it must be a variable that the chat template reads, and "
                f"none of {', '.join(_OURS)}"
            )
    unread = [name for name in values if name not in tokenizer.template_values]
    return {name: value for name, value in values.items() if name not in unread}, unread


def unread_of_messages(messages: Sequence[Message], tokenizer: Tokenizer) -> list[str]:
    """Fields of messages that this chat template does not read."""
    readers = {
        "name": ("message.name", "message['name']", 'message["name"]', "msg.name"),
        "reasoning_content": ("reasoning_content",),
    }
    return [
        f"messages.{field}"
        for field, texts in readers.items()
        if any(getattr(message, field) for message in messages) and not any(map(tokenizer.template_has, texts))
    ]
