"""click's usage errors as one line: what was wrong, what is allowed, where to read on."""

from __future__ import annotations

import re

import click

from ..errors import did_you_mean

_RANGES = (
    (r"^(\S+)<=x<=(\S+)$", r"from \1 to \2"),
    (r"^x>=(\S+)$", r"at least \1"),
    (r"^x<=(\S+)$", r"at most \1"),
    (r"^x>(\S+)$", r"above \1"),
    (r"^(\S+)<x<=(\S+)$", r"above \1, at most \2"),
)


def usage_line(error: click.UsageError) -> str:
    """What is said of a usage error, without the newline."""
    command = error.ctx.command if error.ctx else None
    if isinstance(error, click.NoSuchOption):
        known = [flag for p in command.params for flag in (*p.opts, *p.secondary_opts)] if command else []
        near = did_you_mean(error.option_name, [*known, *(error.possibilities or ())])
        said = f"no option {error.option_name!r}; {near}".rstrip("; ")
    elif isinstance(error, click.MissingParameter) and error.param and error.ctx:
        name = error.param.opts[-1] if isinstance(error.param, click.Option) else error.param.make_metavar(error.ctx)
        said = f"{name} is missing"
    elif isinstance(error, click.BadParameter) and error.param:
        named = "/".join(error.param.opts) if isinstance(error.param, click.Option) else error.param.human_readable_name
        said = f"{named}: {plain(error.message)}"
    else:
        said = error.format_message().replace("Got unexpected extra argument", "unexpected argument").rstrip(".")
    stop = "" if said.endswith(("?", ".")) else "."
    return f"{said}{stop} See {error.ctx.command_path} --help" if error.ctx else said


def plain(message: str) -> str:
    """click's words for a value that will not do, for readers who do not program."""
    message = re.sub(r"is not a valid integer( range)?\.$", "is not a whole number", message)
    message = re.sub(r"is not a valid float( range)?\.$", "is not a number", message)
    if found := re.match(r"^(.*) is not in the range (.*)\.$", message):
        allowed = found[2]
        for pattern, words in _RANGES:
            allowed = re.sub(pattern, words, allowed)
        return f"{found[1]} is out of range: it must be {allowed}"
    return message.rstrip(".")
