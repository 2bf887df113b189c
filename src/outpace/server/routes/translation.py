"""What the families of routes share that are translated into chat requests."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from pydantic import ValidationError

from ...errors import ParameterError
from ..protocol import ChatRequest
from ..refusals import Refused, refusal_of_body

NAME = r"^[a-zA-Z0-9_.-]{1,64}$"  # of a tool


def chat_request(fields: dict[str, Any]) -> ChatRequest:
    """Raises Refused for what a chat request cannot have, with its names for it."""
    try:
        return ChatRequest.model_validate(fields)
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False)
        wrong = [{**one, "loc": ("body", *one["loc"])} for one in found]
        raise Refused(refusal_of_body(wrong, [], "application/json")) from None


@contextmanager
def named_as(names: Mapping[str, str]) -> Iterator[None]:
    """What is wrong with a chat request is said with the client's names for its fields."""
    try:
        yield
    except ParameterError as error:
        pattern = r"\b(" + "|".join(names) + r")\b"
        raise ParameterError(re.sub(pattern, lambda found: names[found[1]], str(error))) from None
