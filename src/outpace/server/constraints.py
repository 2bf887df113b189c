"""What the output of a request must keep to, however the request names it: at most one of `json_schema`, `regex` and
`grammar`, as SamplingParams takes them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from ..errors import ParameterError
from .protocol import ChatRequest, Generate, ResponseFormat

MOST_CHOICES = 1024  # of guided_choice


def constraint_of(body: Generate) -> tuple[str | None, dict[str, Any]]:
    """(the field that says it, {name of the sampling parameter: its value}); (None, {}) if the output is free. Raises
    ParameterError if several fields say something."""
    wanted: dict[str, tuple[str, Any]] = {  # field -> what it means
        "json_schema": ("json_schema", body.json_schema),
        "regex": ("regex", body.regex),
        "grammar": ("grammar", body.grammar),
        "guided_json": ("json_schema", body.guided_json),
        "guided_regex": ("regex", body.guided_regex),
        "guided_grammar": ("grammar", body.guided_grammar),
        "guided_choice": ("grammar", _one_of(body.guided_choice, "guided_choice")),
    }
    if isinstance(body, ChatRequest):
        wanted["response_format"] = ("json_schema", _schema(body.response_format))
    if body.structured_outputs is not None:
        own = body.structured_outputs
        wanted |= {
            "structured_outputs.json": ("json_schema", own.json_),
            "structured_outputs.regex": ("regex", own.regex),
            "structured_outputs.grammar": ("grammar", own.grammar),
            "structured_outputs.choice": ("grammar", _one_of(own.choice, "structured_outputs.choice")),
            "structured_outputs.json_object": ("json_schema", {"type": "object"} if own.json_object else None),
        }
    said = {field: meant for field, meant in wanted.items() if meant[1] is not None}
    if len(said) > 1:
        raise ParameterError(f"{' and '.join(said)} cannot go together: give one of them")
    for field, (name, value) in said.items():
        return field, {name: value}
    return None, {}


def _one_of(texts: Sequence[str] | None, field: str) -> str | None:
    """A grammar of these texts alone."""
    if texts is None:
        return None
    if len(texts) > MOST_CHOICES or not all(texts):
        raise ParameterError(f"{field} is out of range: it must be at most {MOST_CHOICES} texts, none of them empty")
    return "start: " + " | ".join(json.dumps(text) for text in texts)


def _schema(format: ResponseFormat | None) -> dict[str, Any] | None:
    if format is None:
        return None
    if format.json_schema is not None and format.type != "json_schema":
        raise ParameterError("response_format: json_schema belongs to type json_schema")
    if format.schema_ is not None and format.type != "json_object":
        raise ParameterError("response_format: schema belongs to type json_object, or into json_schema: {name, schema}")
    if format.type == "text":
        return None
    if format.type == "json_object":
        return {"type": "object"} if format.schema_ is None else format.schema_
    if format.json_schema is None:
        raise ParameterError("response_format: type json_schema needs json_schema: {name, schema}")
    schema = format.json_schema.schema_
    return {"type": "object"} if schema is None else schema
