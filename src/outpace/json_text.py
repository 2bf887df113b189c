"""JSON from outside, read without guessing: a key that stands twice is refused, and so is a JSON schema with a keyword
that is almost one of JSON Schema's, since whoever reads schemas passes over what it does not know."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import Any

from .errors import ParameterError, did_you_mean
from .fields import WRONG_TYPE, shown

# fmt: off
#: Keywords that hold one schema or a list of them, and those that hold schemas by name
_SCHEMAS = {
    "additionalItems", "additionalProperties", "allOf", "anyOf", "contains", "contentSchema", "else", "if", "items",
    "not", "oneOf", "prefixItems", "propertyNames", "then", "unevaluatedItems", "unevaluatedProperties",
}
_BY_NAME = {"$defs", "definitions", "dependencies", "dependentSchemas", "patternProperties", "properties"}
#: Every other keyword of drafts 4 to 2020-12, and OpenAPI's notes
_OTHERS = {
    "$anchor", "$comment", "$dynamicAnchor", "$dynamicRef", "$id", "$recursiveAnchor", "$recursiveRef", "$ref",
    "$schema", "$vocabulary", "const", "contentEncoding", "contentMediaType", "default", "dependentRequired",
    "deprecated", "description", "discriminator", "enum", "example", "examples", "exclusiveMaximum",
    "exclusiveMinimum", "externalDocs", "format", "id", "maxContains", "maxItems", "maxLength", "maxProperties",
    "maximum", "minContains", "minItems", "minLength", "minProperties", "minimum", "multipleOf", "nullable", "pattern",
    "readOnly", "required", "title", "type", "uniqueItems", "writeOnly", "xml",
}
# fmt: on
TYPES = ("object", "array", "string", "number", "integer", "boolean", "null")
KEYWORDS = _SCHEMAS | _BY_NAME | _OTHERS
_ALIKE = 0.8  # of 1: so much of a misspelt keyword is right


def read_json(text: str | bytes, what: str) -> Any:
    """The value of a JSON text; `what` it is begins the message.

    Raises ParameterError for text that is no JSON, a key that stands twice in one object, NaN and infinities.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            ((twice, _),) = Counter(key for key, _ in pairs).most_common(1)
            raise ParameterError(f"{what} has the key {shown(twice)} twice in one object: leave one of them out")
        return found

    def refuse(constant: str) -> Any:
        raise ParameterError(f"{what} is no JSON: {constant} is no number there")

    try:
        return json.loads(text, object_pairs_hook=unique, parse_constant=refuse)
    except json.JSONDecodeError as e:
        raise ParameterError(f"{what} is no JSON: {e.msg} at line {e.lineno}, column {e.colno}") from None
    except UnicodeDecodeError as e:
        raise ParameterError(f"{what} is no JSON: it is not text in {e.encoding} ({e.reason})") from None
    except RecursionError:
        raise ParameterError(f"{what} is nested too deeply") from None
    except ParameterError:
        raise
    except ValueError as e:  # a number of thousands of digits
        raise ParameterError(f"{what} cannot be read: {e}") from None


def check_schema(schema: Any, what: str = "json_schema") -> None:
    """Raises ParameterError for a misspelt keyword or type, with the nearest that exists. Notes of other tools may
    stand in a schema under names that are unlike any keyword, or begin with "x-"."""
    for path, part in _parts(schema):
        named = part.get("type")
        for kind in named if isinstance(named, list) else [named]:
            if isinstance(kind, str) and kind not in TYPES:
                raise ParameterError(
                    f"{what} has the unknown type {shown(kind)}{path and ' in ' + path}; {did_you_mean(kind, TYPES)}"
                    f"there are: {', '.join(TYPES)}"
                )
        for key in part:
            if key in KEYWORDS or not isinstance(key, str) or key.startswith("x-"):
                continue
            close = get_close_matches(_plain(key), _PLAIN, 1, _ALIKE)
            if close:
                raise ParameterError(
                    f"{what} has the unknown keyword {shown(key)}{path and ' in ' + path}: did you mean "
                    f"{_PLAIN[close[0]]!r}? (A note of your own may be called x-{key}.)"
                )


def _plain(key: str) -> str:
    return key.replace("_", "").replace("-", "").lower()


_PLAIN = {_plain(key): key for key in sorted(KEYWORDS)}


def _parts(schema: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """A schema and all schemas in it, each with its path."""
    todo: list[tuple[str, Any]] = [("", schema)]
    while todo:
        path, part = todo.pop()
        if isinstance(part, list):
            todo += [(f"{path}[{i}]", item) for i, item in enumerate(part)]
        elif isinstance(part, Mapping):
            yield path, part
            begun = path and f"{path}."
            for key, item in part.items():
                if key in _SCHEMAS:
                    todo.append((f"{begun}{key}", item))
                elif key in _BY_NAME and isinstance(item, Mapping):
                    todo += [(f"{begun}{key}.{name}", one) for name, one in item.items() if not isinstance(one, list)]


class JsonSchema:
    """A JSON schema, as text or as an object; kept as text."""

    allowed = "a schema as text or as an object"

    def fault(self, value: Any) -> str | None:
        return None if isinstance(value, str | Mapping) else WRONG_TYPE

    def plain(self, value: Any) -> str:
        if isinstance(value, str):
            schema, text = read_json(value, "json_schema"), value
        else:
            try:
                schema = _as_json(value)
                text = json.dumps(schema, allow_nan=False)
            except (TypeError, ValueError, RecursionError) as e:
                raise ParameterError(f"json_schema cannot be written as JSON: {e}") from None
        check_schema(schema)
        return text


def _as_json(value: Any) -> Any:
    """Mappings of any kind as dictionaries, tuples as lists."""
    if isinstance(value, Mapping):
        return {key: _as_json(item) for key, item in value.items()}
    return [_as_json(item) for item in value] if isinstance(value, list | tuple) else value
