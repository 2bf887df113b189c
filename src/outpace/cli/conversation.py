"""A conversation as a file: of `/save` and `/load`, and the last one, which `--continue` goes on with.

JSON, readable by its owner alone. What is read is checked: a file may come from anywhere.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import ParameterError
from ..paths import state_dir

VERSION = 1
MOST_BYTES = 16 << 20
ROLES = ("system", "user", "assistant")


@dataclass(slots=True)
class Conversation:
    """`messages` alternate between user and assistant behind an optional system message."""

    model: str
    messages: list[dict[str, str]] = field(default_factory=list)

    @property
    def system(self) -> str:
        return self.messages[0]["content"] if self.messages and self.messages[0]["role"] == "system" else ""

    def set_system(self, text: str) -> None:
        """Replace the system message; "" takes it away."""
        rest = self.messages[1:] if self.system else self.messages
        self.messages = [*([{"role": "system", "content": text}] if text else []), *rest]

    def clear(self) -> None:
        """Forget all but the system message."""
        self.messages = self.messages[:1] if self.system else []

    def drop_answer(self) -> str | None:
        """Take the last question and its answer away; returns the question, or None when there is none."""
        if len(self.messages) < 2 or self.messages[-1]["role"] != "assistant":
            return None
        question = self.messages[-2]["content"]
        self.messages = self.messages[:-2]
        return question


def last_path() -> Path:
    return state_dir() / "last-conversation.json"


def private_folder(folder: Path) -> None:
    """Make a folder that only its owner enters. Raises ParameterError."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ParameterError(
            f"the folder {folder} cannot be made: {error.strerror or error}; set OUTPACE_STATE to one that can"
        ) from None


def save(conversation: Conversation, path: Path) -> None:
    """Replace the file as a whole; only its owner may read it. Raises ParameterError."""
    record = {"version": VERSION, "model": conversation.model, "messages": conversation.messages}
    partial = ""
    try:
        handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}", suffix=".partial")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(record, file, ensure_ascii=False, indent=1)
        os.replace(partial, path)
    except (OSError, UnicodeEncodeError) as error:
        with suppress(OSError):
            os.unlink(partial)
        reason = error.strerror if isinstance(error, OSError) else "it holds characters that are not valid Unicode"
        raise ParameterError(f"the conversation cannot be written to {path}: {reason}") from None


def save_last(conversation: Conversation) -> None:
    """For `--continue`. Raises ParameterError."""
    private_folder(state_dir())
    save(conversation, last_path())


def load(path: Path) -> Conversation:
    """Raises ParameterError for a file that is not there, too long, or no conversation."""
    try:
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise ParameterError(f"the conversation {str(path)!r} cannot be read: {error.strerror or error}") from None
    if len(data) > MOST_BYTES:
        raise ParameterError(f"{path}: more than {MOST_BYTES >> 20} MB, which no conversation is")
    try:
        raw = json.loads(data)
    except (ValueError, RecursionError):
        raise ParameterError(f"{path}: not a conversation that was saved here: it is no JSON") from None
    return _checked(raw, path)


def load_last() -> Conversation:
    """Raises ParameterError if there is none."""
    if not last_path().exists():
        raise ParameterError("--continue: there is no conversation yet to go on with")
    return load(last_path())


def _checked(raw: Any, path: Path) -> Conversation:
    def wrong(why: str) -> ParameterError:
        return ParameterError(f"{path}: not a conversation that was saved here: {why}")

    if not isinstance(raw, dict) or raw.keys() != {"version", "model", "messages"}:
        raise wrong("it must be an object with version, model and messages")
    if raw["version"] != VERSION or isinstance(raw["version"], bool):
        raise wrong(f"version {raw['version']!r}, {VERSION} is known")
    if not isinstance(raw["model"], str) or not isinstance(raw["messages"], list):
        raise wrong("model must be a text and messages a list")
    for message in raw["messages"]:
        if not isinstance(message, dict) or message.keys() != {"role", "content"}:
            raise wrong("a message is an object with role and content")
        if message["role"] not in ROLES or not isinstance(message["content"], str):
            raise wrong(f"a message has one of the roles {', '.join(ROLES)} and a text")
    if not _alternates(message["role"] for message in raw["messages"]):
        raise wrong("after an optional system message, user and assistant take turns, and the assistant has the last")
    return Conversation(raw["model"], raw["messages"])


def _alternates(roles: Iterable[str]) -> bool:
    turns = list(roles)
    turns = turns[1:] if turns[:1] == ["system"] else turns
    return len(turns) % 2 == 0 and turns == ["user", "assistant"] * (len(turns) // 2)
