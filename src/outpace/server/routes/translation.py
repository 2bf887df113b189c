"""What the families of routes share that are translated into chat requests."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from ..protocol import ChatRequest
from ..refusals import Refused, refusal_of_body

NAME = r"^[a-zA-Z0-9_.-]{1,64}$"  # of a tool


def chat_request(said: dict[str, Any]) -> ChatRequest:
    """Raises Refused for what a chat request cannot have, with its names for it."""
    try:
        return ChatRequest.model_validate(said)
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False)
        wrong = [{**one, "loc": ("body", *one["loc"])} for one in found]
        raise Refused(refusal_of_body(wrong, [], "application/json")) from None
