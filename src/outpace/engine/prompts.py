"""What a prompt may be, and the tokens that the model reads for it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any, TypeAlias

from ..errors import ParameterError
from ..fields import Each, Whole, checked, nearest, shown
from ..json_text import read_json
from ..models.tokenizer import Tokenizer

#: Text to continue, token ids, or the messages of a chat
Prompt: TypeAlias = str | Sequence[int] | Sequence[Mapping[str, Any]]

ROLES = ("system", "developer", "user", "assistant", "tool")
#: What a message may have, as OpenAI's API has it; all but the first two only where the chat template reads them
FIELDS = ("role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content")

_KINDS = "a prompt is text, token ids or messages"
_TOKEN = Whole(0)
_TOKENS = Each(_TOKEN, "text or token ids")


def token_ids(tokenizer: Tokenizer, prompt: Prompt) -> list[int]:
    """A string is continued as it is; messages go through the model's chat template. Raises ParameterError for anything
    that is not one of them."""
    if isinstance(prompt, str):
        return tokenizer.prompt(prompt)
    if isinstance(prompt, Mapping | bytes | bytearray) or not isinstance(prompt, Sequence):
        raise ParameterError(f"{_KINDS}, not {shown(prompt)}")
    if prompt and isinstance(prompt[0], Mapping):
        return tokenizer.chat([_message(tokenizer, message, place) for place, message in enumerate(prompt)])
    return checked_tokens("prompt", prompt)


def checked_tokens(name: str, tokens: Any) -> list[int]:
    """A list of token ids. Raises ParameterError, under this name, for anything else."""
    if isinstance(tokens, list | tuple) and all(type(token) is int for token in tokens):  # nearly always, and many
        return list(tokens)
    return list(checked(name, tokens, _TOKENS))


def as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or many, as a list. A list of numbers, or of messages, is one prompt."""
    if isinstance(prompts, str):
        return [prompts]
    if isinstance(prompts, Mapping | bytes | bytearray | Set) or not isinstance(prompts, Iterable):
        raise ParameterError(f"{_KINDS}, not {shown(prompts)}")
    found = list(prompts)
    if found and all(isinstance(p, Mapping) for p in found):
        return [found]  # type: ignore[list-item]
    if found and all(type(p) is int or _TOKEN.fault(p) is None for p in found):
        return [found]  # type: ignore[list-item]
    for p in found:
        if isinstance(p, Mapping | bytes | bytearray) or not isinstance(p, Sequence):
            raise ParameterError(f"{_KINDS}, not {shown(p)}")
    return found  # type: ignore[return-value]


def _message(tokenizer: Tokenizer, message: Any, place: int) -> dict[str, Any]:
    """One message as the template wants it: its content as text, the arguments of calls as objects. Raises
    ParameterError for what the template would pass over."""
    where = f"messages[{place}]"
    if not isinstance(message, Mapping):
        raise ParameterError(f"{where} must be an object with a role and a content, not {shown(message)}")
    found = {name: item for name, item in message.items() if item is not None and not (item == [] and name != "role")}
    for name in found:
        if name not in FIELDS:
            raise ParameterError(
                f"{where} has the unknown field {shown(name)}; there are: {', '.join(FIELDS)}{nearest(name, FIELDS)}"
            )
        if name not in FIELDS[:2] and not tokenizer.template_has(name):
            raise ParameterError(f"{where}: the model's chat template has no place for {name}: leave it out")
    found["role"] = _role(tokenizer, found.get("role"), where)
    if "content" in found:
        found["content"] = _content(found["content"], where)
    elif message.get("content", "") == []:
        found["content"] = ""
    elif "content" in message:
        found["content"] = None
    elif "tool_calls" not in found:
        raise ParameterError(f"{where} has no content")
    if "tool_calls" in found:
        found["tool_calls"] = [_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(found["tool_calls"])]
    return found


def _role(tokenizer: Tokenizer, role: Any, where: str) -> str:
    own = isinstance(role, str) and any(tokenizer.template_has(f"{q}{role}{q}") for q in "'\"")
    if not own and role not in ROLES:
        raise ParameterError(f"{where}.role={shown(role)} must be one of {', '.join(ROLES)}{nearest(role, ROLES)}")
    # the newer name of the same role; most templates know the older
    return "system" if role == "developer" and not own else str(role)


def _content(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list | tuple):
        raise ParameterError(f"{where}.content={shown(content)} must be text, or a list of parts of it")
    for i, part in enumerate(content):
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ParameterError(
                f'{where}.content[{i}]={shown(part)} must be {{"type": "text", "text": …}}: only text is understood'
            )
    return "".join(part["text"] for part in content)


def _call(call: Any, where: str) -> Any:
    """A call that the model made, its arguments as an object; OpenAI's clients send them as text."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ParameterError(f'{where} must be {{"type": "function", "function": {{"name": …, "arguments": …}}}}')
    given = function.get("arguments")
    if isinstance(given, str):
        given = read_json(given, f"{where}.function.arguments") if given.strip() else {}
    if not isinstance(given, Mapping | None):
        raise ParameterError(f"{where}.function.arguments={shown(given)} must be an object")
    return {**call, "function": {**function, "arguments": dict(given or {})}}
