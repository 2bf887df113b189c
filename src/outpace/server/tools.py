"""Tools: what a chat template must know of them, and calls read out of what the model writes.

One format is read, that of Qwen 2.5 and Hermes: `<tool_call>{"name": …, "arguments": {…}}</tool_call>`, once for each
call, text before them allowed. A call that must be made is forced: the prompt goes on with the opening tag and the
output keeps to a JSON schema, so that it cannot be anything else.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from ..errors import ParameterError
from ..models.tokenizer import Tokenizer
from .protocol import Message, NamedTool, Tool

OPEN, CLOSE = "<tool_call>", "</tool_call>"
FORCED_OPENING = OPEN + "\n"
_ANY = {"type": "object"}


@dataclass(frozen=True, slots=True)
class Call:
    """One call, as a client sees it."""

    name: str
    arguments: str  # a JSON object, as text

    def body(self) -> dict[str, Any]:
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": f"call_{uuid4().hex[:24]}", "type": "function", "function": function}


def check_template(tokenizer: Tokenizer) -> None:
    """ParameterError if the model's chat template cannot take tools, or has calls written in an unknown format."""
    if not tokenizer.takes_tools:
        raise ParameterError("tools: the chat template of this model has no place for them; use another model")
    if not tokenizer.template_has(OPEN):
        raise ParameterError(f"tools: this model writes calls in a format that is not read here ({OPEN} with JSON is)")


def schema_of_call(tools: Sequence[Tool], choice: NamedTool | None) -> dict[str, Any]:
    """A JSON schema of one call of any of the tools, or of the one that is named."""
    named = [t for t in tools if choice is None or t.function.name == choice.function.name]
    if not named:
        known = ", ".join(t.function.name for t in tools) or "none"
        assert choice is not None
        raise ParameterError(f"tool_choice names {choice.function.name!r}, and tools has {known}")
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": t.function.name},
                "arguments": t.function.parameters or _ANY,
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for t in named
    ]
    return calls[0] if len(calls) == 1 else {"anyOf": calls}


def parse_call(text: str) -> Call | None:
    """The call in the text between two tags; None if there is none."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or not isinstance(found.get("name"), str):
        return None
    arguments = found.get("arguments", {})
    if isinstance(arguments, str):  # written as text, as clients get it
        return Call(found["name"], arguments)
    return Call(found["name"], json.dumps(arguments, ensure_ascii=False)) if isinstance(arguments, dict) else None


class ToolReader:
    """Splits a stream of text into plain text and calls. What may be the beginning of a tag is held back, and so is
    white space, which belongs to the tag behind it if there is one. What is no call comes out as plain text."""

    def __init__(self) -> None:
        self._held = ""
        self._inside = False

    def push(self, text: str) -> list[str | Call]:
        """What has become certain."""
        self._held += text
        found: list[str | Call] = []
        while True:
            tag = CLOSE if self._inside else OPEN
            before, hit, behind = self._held.partition(tag)
            if not hit:
                break
            if self._inside:
                found.append(parse_call(before) or OPEN + before + CLOSE)
            elif before.strip():
                found.append(before.rstrip())
            self._held, self._inside = behind, not self._inside
        if not self._inside:
            safe = len(self._held) - _could_begin(self._held)
            safe = len(self._held[:safe].rstrip())
            if safe:
                found.append(self._held[:safe])
                self._held = self._held[safe:]
        return found

    def flush(self) -> list[str | Call]:
        """The output is over: what was held back. The last call may lack its closing tag."""
        held, inside = self._held, self._inside
        self._held, self._inside = "", False
        if inside:
            return [parse_call(held) or OPEN + held]
        return [held] if held else []


def _could_begin(text: str) -> int:
    """Length of the longest end of `text` that begins the opening tag."""
    return next((n for n in range(min(len(OPEN) - 1, len(text)), 0, -1) if text.endswith(OPEN[:n])), 0)


def split(text: str) -> tuple[str | None, list[Call]]:
    """Text and calls of a whole output."""
    reader = ToolReader()
    found = reader.push(text) + reader.flush()
    calls = [item for item in found if isinstance(item, Call)]
    plain = "".join(item for item in found if isinstance(item, str))
    return (plain if plain.strip() or not calls else None), calls


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
        if message.role == "tool":
            if message.tool_call_id is None or message.tool_call_id not in calls:
                raise ParameterError(f"{where}: tool_call_id must name a call of the assistant message before it")
            answers.append((calls[message.tool_call_id], {"role": "tool", "content": text_of(message, where)}))
            continue
        if message.tool_call_id is not None:
            raise ParameterError(f"{where}: tool_call_id belongs to a message of role tool")
        if message.tool_calls and message.role != "assistant":
            raise ParameterError(f"{where}: tool_calls belong to a message of role assistant")
        made = message.tool_calls or []
        calls = {call.id: i for i, call in enumerate(made)}
        turn: dict[str, Any] = {"role": "system" if message.role == "developer" else message.role}
        turn["content"] = text_of(message, where, empty=bool(made))
        if made:
            turn["tool_calls"] = [_made(call.function.name, call.function.arguments, where) for call in made]
        found.append(turn)
    return found + [answer for _, answer in sorted(answers, key=lambda item: item[0])]


def text_of(message: Message, where: str, empty: bool = False) -> str:
    """The text of a message's content. `empty`: there may be none."""
    content = message.content
    if content is None:
        if empty:
            return ""
        raise ParameterError(f"{where}: content is missing")
    return content if isinstance(content, str) else "".join(part.text for part in content)


def _made(name: str, arguments: str, where: str) -> Mapping[str, Any]:
    try:
        parsed = json.loads(arguments)
    except (ValueError, RecursionError):
        parsed = None
    if not isinstance(parsed, dict):
        raise ParameterError(f"{where}: the arguments of tool call {name!r} are not the text of a JSON object")
    return {"type": "function", "function": {"name": name, "arguments": parsed}}
