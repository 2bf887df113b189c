"""`outpace config`: which defaults are in force, and where they come from."""

from __future__ import annotations

import json
import os
from typing import Any

import click

from ..errors import ParameterError, did_you_mean
from . import COMMANDS, command_of
from .settings import (
    OTHER_VARIABLES,
    Settings,
    check_environment,
    defaults,
    environment_of,
    is_shared,
    misspelt_variables,
    options_of,
    read_settings,
)


@click.command(short_help="Show the defaults in force, and where they come from.")
@click.argument("command", default="run")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def config(command: str, as_json: bool) -> None:
    """Show the defaults of COMMAND (of run, if none is named), and where each comes from.

    They are set in a file in TOML, which is named in the first line, and by environment variables. The command line
    comes first, then OUTPACE_RUN_TEMPERATURE, OUTPACE_TEMPERATURE, the table [run] of the file, the top of the file.

    \b
      model = "qwen2.5-coder-1.5b"
      temperature = 0.6
      [serve]
      port = 9000
    """
    if command not in COMMANDS:
        raise ParameterError(
            f"no command {command!r}; {did_you_mean(command, COMMANDS)}there are: {', '.join(COMMANDS)}"
        )
    settings = read_settings(COMMANDS)
    for table in settings.tables:  # all of the file is checked, not this command's alone
        defaults(settings, table, command_of(table))
    rows = in_force(settings, command)
    variables = {name: value for name in OTHER_VARIABLES if (value := os.environ.get(name)) is not None}
    if as_json:
        record = {"file": str(settings.path), "found": settings.found, "command": command, "settings": rows}
        click.echo(json.dumps(record | {"variables": variables}, indent=1, ensure_ascii=False))
        return
    click.echo(f"file of settings: {settings.path}{'' if settings.found else ' (not there; make it to set defaults)'}")
    click.echo(f"\ndefaults of outpace {command}:")
    for row in rows:
        value = "-" if row["value"] is None else row["value"]
        click.echo(f"  {row['name']:<20} {value!s:<24} {row['from']}")
    if variables:
        click.echo("\nother variables:")
        for name, value in variables.items():
            click.echo(f"  {name:<20} {value:<24} {OTHER_VARIABLES[name]}")
    for line in misspelt_variables(COMMANDS):
        click.echo(line, err=True)


def in_force(settings: Settings, name: str) -> list[dict[str, Any]]:
    """name, value and origin of each option of a command: the shared ones, and those that something sets."""
    command = command_of(name)
    from_file = defaults(settings, name, command)
    check_environment(command)
    context = command.make_context(name, [], resilient_parsing=True, default_map=from_file)
    rows = []
    for key, option in options_of(command).items():
        value = context.params.get(key)
        if variable := environment_of(option):
            origin = variable
        elif key in from_file:
            table = key in settings.tables.get(name, {})
            origin = f"{settings.path.name}{f' [{name}]' if table else ''}"
        else:
            own = isinstance(option.show_default, str)  # a default that the command chooses itself
            value, origin = (None, f"{option.show_default}") if own else (value, "default")
        if origin != "default" or is_shared(name, key):
            plain = list(value) if isinstance(value, tuple) else value
            rows.append({"name": key, "value": plain if _is_json(plain) else str(plain), "from": origin})
    return rows


def _is_json(value: Any) -> bool:
    return value is None or isinstance(value, str | int | float | bool | list)
