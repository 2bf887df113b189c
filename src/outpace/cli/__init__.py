"""The command line. A command's module is imported when that command is asked for; help needs none of them."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

import click

from .. import __version__
from ..errors import OutpaceError, ParameterError

# name -> (module:attribute, one line of help)
COMMANDS = {
    "run": ("outpace.cli.run:run", "Answer one prompt."),
    "chat": ("outpace.cli.chat:chat", "Talk to a model in the terminal."),
    "serve": ("outpace.cli.serve:serve", "Serve a model over HTTP, as OpenAI's API."),
    "suggest": ("outpace.cli.suggest:suggest", "Continue a text in several ways at once."),
    "batch": ("outpace.cli.batch:batch", "Answer a file of requests."),
    "methods": ("outpace.cli.methods:methods", "List the decoding methods."),
    "models": ("outpace.cli.models:models", "List, fetch and remove models."),
    "compare": ("outpace.cli.compare:compare", "Compare what each method gains."),
    "audit": ("outpace.cli.audit:audit", "Prove what a method does to the output."),
    "tune": ("outpace.cli.tune:tune", "Measure this machine, and say what the planner will do."),
}
INTERRUPTED = 130  # exit code of a command that Ctrl-C ended


class UserError(click.ClickException):
    """An OutpaceError on its way out: one line on stderr, no traceback."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code  # type: ignore[misc]  # click reads it from the instance

    def show(self, file: IO[Any] | None = None) -> None:
        click.echo(f"outpace: error: {self.message}", err=True)


@contextmanager
def clean_errors() -> Iterator[None]:
    """A user's mistake or Ctrl-C ends in one line and an exit code. OUTPACE_DEBUG=1 shows tracebacks."""
    if os.environ.get("OUTPACE_DEBUG", "0") not in ("", "0"):
        yield
        return
    try:
        yield
    except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
        raise
    except KeyboardInterrupt:
        click.echo(err=True)
        sys.exit(INTERRUPTED)
    except OutpaceError as error:
        raise UserError(str(error), 2 if isinstance(error, ParameterError) else 1) from error
    except Exception as error:
        message = f"{type(error).__name__}: {error} (this is a bug; OUTPACE_DEBUG=1 shows the traceback)"
        raise UserError(message, 1) from error


class LazyGroup(click.Group):
    """Commands from COMMANDS, imported when used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, attribute = COMMANDS[cmd_name][0].split(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in COMMANDS.items()])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and not args[0].startswith("-") and args[0] not in COMMANDS:
            known = ", ".join(COMMANDS)
            ctx.fail(f"no command {args[0]!r}; there are: {known}. To answer a prompt: outpace run {args[0]!r}")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        with clean_errors():
            return super().invoke(ctx)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, "-V", "--version", prog_name="outpace", message="%(prog)s %(version)s")
def main() -> None:
    """Language-model inference that emits more than one token per model step, with the same text.

    \b
      outpace run "Write a haiku about speed"      answer a prompt (the model is fetched once)
      outpace run --show-draft "Count to thirty"   see which tokens were drafted, and by whom
      outpace chat                                 talk

    `outpace COMMAND --help` tells more of each command.
    """
