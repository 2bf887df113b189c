"""Defaults of options from a file and from the environment.

    model = "qwen2.5-coder-1.5b"       # for every command: one of SHARED
    temperature = 0.6

    [serve]                            # for one command: any of its options
    port = 9000

The command line comes first, then OUTPACE_SERVE_PORT, OUTPACE_PORT (of the shared ones alone), the table of the
command, the top of the file, and the default last.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from ..errors import ParameterError, did_you_mean
from ..paths import config_file
from .mistakes import plain

#: the same in every command that has them
EVERYWHERE = ("model", "draft_model", "device", "threads")
#: the same in every command that answers
ANSWERING = ("run", "chat", "batch", "serve", "suggest")
_OF_ANSWERS = (
    *("precision", "draft_precision", "method", "verifier", "planner", "max_rows"),
    *("max_tokens", "temperature", "top_k", "top_p", "min_p", "seed", "system"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty", "history"),
)
SHARED = (*EVERYWHERE, *_OF_ANSWERS)
#: variables that are no option's
OTHER_VARIABLES = {
    "OUTPACE_CACHE": "folder of models and what is made of them",
    "OUTPACE_MODELS": "folder of model files",
    "OUTPACE_CONFIG": "file of settings",
    "OUTPACE_STATE": "folder of the last conversation and of what was typed",
    "OUTPACE_API_KEYS": "keys of the server",
    "OUTPACE_ISA": "instructions that the CPU kernels use, to test what other processors run",
    "OUTPACE_DEBUG": "1 shows tracebacks",
}
_OF_TESTS = ("OUTPACE_PEER_", "OUTPACE_PLAYGROUND", "OUTPACE_SCREENSHOTS", "OUTPACE_CI")


@dataclass(frozen=True, slots=True)
class Settings:
    """What the file says; names with underscores. Checked against a command's options when that is known."""

    path: Path
    found: bool
    shared: Mapping[str, Any]
    tables: Mapping[str, Mapping[str, Any]]


def read_settings(commands: Iterable[str]) -> Settings:
    """The file, or nothing where there is none. Raises ParameterError for what is not TOML or not a setting."""
    path, names = config_file(), list(commands)
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError:
        if os.environ.get("OUTPACE_CONFIG"):
            raise ParameterError(f"OUTPACE_CONFIG names {str(path)!r}, which is not there") from None
        return Settings(path, False, {}, {})
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text in UTF-8"
        raise ParameterError(f"the settings {path} cannot be read: {reason}") from None
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ParameterError(f"{path} is not TOML: {error}") from None
    shared: dict[str, Any] = {}
    tables: dict[str, dict[str, Any]] = {}
    for key, value in raw.items():
        name = key.replace("-", "_")
        if isinstance(value, dict):
            if key not in names:
                raise ParameterError(
                    f"{path}: there is no command [{key}]; {did_you_mean(key, names)}there are: {', '.join(names)}"
                )
            tables[key] = {inner.replace("-", "_"): item for inner, item in value.items()}
        elif name in SHARED:
            shared[name] = value
        else:
            raise ParameterError(
                f"{path}: no setting {key!r}; {did_you_mean(name, SHARED)}there are: {', '.join(SHARED)}; options of "
                "one command stand in a table of its name, such as [serve]"
            )
    return Settings(path, True, shared, tables)


def options_of(command: click.Command) -> dict[str, click.Option]:
    """What may be set of a command, by name."""
    return {p.name: p for p in command.params if isinstance(p, click.Option) and p.name and not p.is_eager}


def is_shared(command: str, option: str) -> bool:
    return option in EVERYWHERE or (command in ANSWERING and option in _OF_ANSWERS)


def variables(command: str, option: str) -> list[str]:
    """The environment variables of an option, the narrower first."""
    own = f"OUTPACE_{command.upper()}_{option.upper()}"
    return [own, f"OUTPACE_{option.upper()}"] if is_shared(command, option) else [own]


def name_variables(name: str, command: click.Command) -> None:
    """Let each option of a command be set by the environment."""
    for option, parameter in options_of(command).items():
        if parameter.envvar is None:
            parameter.envvar = variables(name, option)


def defaults(settings: Settings, name: str, command: click.Command) -> dict[str, Any]:
    """What the file sets of a command. Raises ParameterError for an unknown option or a value that will not do."""
    options = options_of(command)
    found = {k: v for k, v in settings.shared.items() if k in options and is_shared(name, k)}
    where = dict.fromkeys(found, "")
    for key, value in settings.tables.get(name, {}).items():
        if key not in options:
            raise ParameterError(
                f"{settings.path}: [{name}] has no option {key!r}; {did_you_mean(key, options)}there are: "
                f"{', '.join(options)}"
            )
        found[key], where[key] = value, f"[{name}] "
    for key, value in found.items():
        said = f"{settings.path}: {where[key]}{key} = {value!r}"
        if wrong := _wrong_type(options[key], value):
            raise ParameterError(f"{said}: it must be {wrong}")
        try:
            options[key].type_cast_value(click.Context(command), value)
        except click.BadParameter as error:
            raise ParameterError(f"{said}: {plain(error.message)}") from None
    return found


def _wrong_type(option: click.Option, value: Any) -> str:
    """What the value should have been, or "". Click would take true for 1."""
    if option.multiple:
        fits = isinstance(value, list) and all(isinstance(item, str | int | float) for item in value)
        return "" if fits else "a list"
    if option.is_flag:
        return "" if isinstance(value, bool) else "true or false"
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return "a text or a number"
    if isinstance(option.type, click.types.IntParamType) and not isinstance(value, int):
        return "a whole number"
    if isinstance(option.type, click.types.FloatParamType) and not isinstance(value, int | float):
        return "a number"
    text = not isinstance(option.type, click.types.IntParamType | click.types.FloatParamType)
    return "a text" if text and not isinstance(value, str) else ""


def environment_of(option: click.Option) -> str | None:
    """The variable that sets an option now."""
    names = [option.envvar] if isinstance(option.envvar, str) else [*(option.envvar or ())]
    return next((name for name in names if os.environ.get(name)), None)


def check_environment(command: click.Command) -> None:
    """Raises ParameterError for a variable whose value will not do, by the variable's name."""
    context = click.Context(command)
    for option in options_of(command).values():
        if variable := environment_of(option):
            try:
                option.type_cast_value(context, option.value_from_envvar(context))
            except click.BadParameter as error:
                raise ParameterError(f"{variable}: {plain(error.message)}") from None


def misspelt_variables(commands: Iterable[str]) -> list[str]:
    """A line for each variable that looks like a setting and is none."""
    names = list(commands)
    known = {f"OUTPACE_{option.upper()}" for option in SHARED} | OTHER_VARIABLES.keys()
    prefixes = (*(f"OUTPACE_{name.upper()}_" for name in names), *_OF_TESTS)
    lines = []
    for variable in sorted(os.environ):
        if variable.startswith("OUTPACE_") and variable not in known and not variable.startswith(prefixes):
            lines.append(
                f"{variable} is no setting and has no effect; {did_you_mean(variable, known)}see outpace config"
            )
    return lines
