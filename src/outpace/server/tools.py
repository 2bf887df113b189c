"""Tools: what a chat template must be given of them and of the calls made earlier, and how a call is forced.

A forced call begins behind an opening that the prompt goes on with, and keeps to a grammar, so that it cannot be
anything else. Several calls are forced in the form in which the model writes them: each on a line between its tags.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import ParameterError
from ..json_text import check_schema
from ..models.tokenizer import Tokenizer
from .calls import CLOSE, OPEN
from .protocol import AllowedToolChoice, NamedTool, Tool

Choice = str | NamedTool | AllowedToolChoice | None


@dataclass(frozen=True, slots=True)
class Form:
    """How a model writes calls: `opening` JSON `closing`, the arguments under `key`. Without an opening, one call."""

    opening: str
    closing: str
    key: str


TAGGED = Form(OPEN + "\n", "\n" + CLOSE, "arguments")  # Qwen 2.5 and 3, Hermes
BARE = Form("", "", "parameters")  # Llama 3


def form_of(tokenizer: Tokenizer) -> Form:
    """ParameterError if the model's chat template cannot take tools, or has calls written in an unknown form."""
    if not tokenizer.takes_tools:
        raise ParameterError("tools: the chat template of this model has no place for them; use another model")
    if tokenizer.template_has(OPEN):
        return TAGGED
    if tokenizer.template_has('"parameters":') and tokenizer.template_has('{"name":'):
        return BARE
    raise ParameterError(f"tools: this model writes calls in a form that is not read here ({OPEN} with JSON is)")


@dataclass(frozen=True, slots=True)
class Plan:
    """What a request wants of tools. `tools`: those that the model is shown."""

    tools: list[Tool]
    forced: bool
    single: bool  # at most one call

    @property
    def names(self) -> list[str]:
        return [tool.function.name for tool in self.tools]


def plan(tools: Sequence[Tool] | None, choice: Choice, parallel: bool | None) -> Plan | None:
    """None if no tool may be called. Raises ParameterError for a choice that does not fit the tools."""
    if not tools:
        if choice not in (None, "none"):
            raise ParameterError("tool_choice: there are no tools to choose from; give tools")
        if parallel is not None:
            raise ParameterError("parallel_tool_calls: there are no tools to call; give tools")
        return None
    if choice == "none":
        return None
    known = [tool.function.name for tool in tools]
    if len(set(known)) < len(known):
        raise ParameterError("tools: two of them have the same name; each needs its own")
    if isinstance(choice, NamedTool):
        return Plan(_named([choice], tools), forced=True, single=True)
    if isinstance(choice, AllowedToolChoice):
        allowed = _named(choice.allowed_tools.tools, tools)
        return Plan(allowed, choice.allowed_tools.mode == "required", parallel is False)
    return Plan(list(tools), choice == "required", parallel is False)


def _named(names: Sequence[NamedTool], tools: Sequence[Tool]) -> list[Tool]:
    wanted = {named.function.name for named in names}
    unknown = sorted(wanted - {tool.function.name for tool in tools})
    if unknown:
        known = ", ".join(tool.function.name for tool in tools)
        raise ParameterError(f"tool_choice names {unknown[0]!r}, and tools has {known}")
    return [tool for tool in tools if tool.function.name in wanted]


# -- forced calls ---------------------------------------------------------------------------------------------------

_COMBINED = ("$ref", "anyOf", "oneOf", "allOf")
_MAPS = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})  # name -> schema
_DATA = frozenset({"const", "enum", "default", "examples"})  # what only looks like a schema
# Without free white space a model cannot lose itself in it.
_WRITTEN = {"whitespace_flexible": False, "key_separator": ": ", "item_separator": ", "}


def constraint_of_calls(plan: Plan, form: Form) -> dict[str, Any]:
    """What an output of calls keeps to, behind the form's opening: as SamplingParams takes it."""
    schema = schema_of_call(plan.tools, form)
    if plan.single or not form.opening:
        return {"json_schema": schema}
    between, closing = json.dumps(form.closing + "\n" + form.opening), json.dumps(form.closing)
    return {"grammar": f"start: call ({between} call)* {closing}?\ncall: %json {json.dumps(schema)}\n"}


def schema_of_call(tools: Sequence[Tool], form: Form = TAGGED) -> dict[str, Any]:
    """A JSON schema of one call of any of the tools. The schema of each tool's arguments stands whole under a name of
    its own in `$defs`, and its references lead there, so that no two definitions clash."""
    calls, definitions = [], {}
    for place, tool in enumerate(tools):
        name, root = f"tool{place}", f"#/$defs/tool{place}"
        try:
            definitions[name] = _moved(_arguments(tool, place), root)
        except RecursionError:
            raise ParameterError(f"tools[{place}].function.parameters is nested too deeply") from None
        calls.append(
            {
                "type": "object",
                "properties": {"name": {"const": tool.function.name}, form.key: {"$ref": root}},
                "required": ["name", form.key],
                "additionalProperties": False,
            }
        )
    whole = calls[0] if len(calls) == 1 else {"anyOf": calls}
    return {**whole, "$defs": definitions, "x-guidance": _WRITTEN}


def _arguments(tool: Tool, place: int) -> dict[str, Any]:
    """The schema of a tool's arguments, which are an object."""
    check_schema(tool.function.parameters, f"tools[{place}].function.parameters")
    schema = {key: value for key, value in (tool.function.parameters or {}).items() if key not in ("$schema", "$id")}
    kind = schema.get("type", None if any(key in schema for key in _COMBINED) else "object")
    if kind is None:
        return schema
    if kind != "object" and not (isinstance(kind, list) and "object" in kind):
        raise ParameterError(f"tools[{place}].function.parameters: arguments are an object, not of type {kind!r}")
    return {**schema, "type": "object"}


def _moved(schema: Any, root: str) -> Any:
    """A schema with the references to its own parts leading there from under `root`."""
    if isinstance(schema, list):
        return [_moved(item, root) for item in schema]
    if not isinstance(schema, dict):
        return schema
    found: dict[str, Any] = {}
    for key, value in schema.items():
        if key == "$ref" and isinstance(value, str) and (value == "#" or value.startswith("#/")):
            found[key] = root + value[1:]
        elif key in _MAPS and isinstance(value, dict):
            found[key] = {name: _moved(item, root) for name, item in value.items()}
        else:
            found[key] = value if key in _DATA else _moved(value, root)
    return found
