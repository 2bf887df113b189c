"""The command line. A command's module is imported when that command is asked for; help needs none of them."""

from __future__ import annotations

import importlib
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

import click

from .. import __version__
from ..errors import OutpaceError, did_you_mean
from .exits import BUG, INTERRUPTED, MEANINGS, USAGE, code_of
from .mistakes import usage_line

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
    "distil": ("outpace.cli.distil:distil", "Let a model write the texts that a head is trained on."),
    "train-head": ("outpace.cli.distil:train_head", "Train a head that drafts for a model."),
    "config": ("outpace.cli.config:config", "Show the defaults in force, and where they come from."),
    "completion": ("outpace.cli.completion:completion", "Print the shell's completion script."),
}
#: what other tools call it -> the command that is run
HABITS = {
    "pull": ("models", "fetch"),
    "list": ("models", "list"),
    "ls": ("models", "list"),
    "rm": ("models", "remove"),
}


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
    except click.UsageError as error:
        raise UserError(usage_line(error), USAGE) from error
    except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
        raise
    except KeyboardInterrupt:
        click.echo(err=True)
        sys.exit(INTERRUPTED)
    except OutpaceError as error:
        raise UserError(str(error), code_of(error)) from error
    except Exception as error:
        message = f"{type(error).__name__}: {error} (this is a bug; OUTPACE_DEBUG=1 shows the traceback)"
        raise UserError(message, BUG) from error


def command_of(name: str) -> click.Command:
    """The command of that name, whose options the environment may set."""
    from .settings import name_variables

    module, attribute = COMMANDS[name][0].split(":")
    command: click.Command = getattr(importlib.import_module(module), attribute)
    name_variables(name, command)
    return command


class LazyGroup(click.Group):
    """Commands from COMMANDS, imported when used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return command_of(cmd_name) if cmd_name in COMMANDS else None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in COMMANDS.items()])

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Exit codes"):
            formatter.write_dl([(str(code), meaning) for code, meaning in MEANINGS.items()])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] in HABITS and not ctx.resilient_parsing:
            ours = HABITS[args[0]]
            click.echo(f"outpace: {args[0]} is called outpace {' '.join(ours)} here", err=True)
            args = [*ours, *args[1:]]
        elif args and not args[0].startswith("-") and args[0] not in COMMANDS:
            near = did_you_mean(args[0], COMMANDS) or did_you_mean(args[0], HABITS)
            known = f"{near}there are: {', '.join(COMMANDS)}"
            prompt = f"To answer a prompt: outpace run {shlex.join(args)}"
            raise UserError(f"no command {args[0]!r}; {known}. {prompt}", USAGE)
        name, command, rest = super().resolve_command(ctx, args)
        if name is None or command is None or ctx.resilient_parsing:
            return name, command, rest
        return name, command, _prepare(ctx, name, command, rest)

    def make_context(self, *args: Any, **more: Any) -> click.Context:
        with clean_errors():
            return super().make_context(*args, **more)

    def invoke(self, ctx: click.Context) -> Any:
        with clean_errors():
            return super().invoke(ctx)


def _prepare(ctx: click.Context, name: str, command: click.Command, args: list[str]) -> list[str]:
    """Defaults from the file of settings; options as other tools call them. Returns the arguments as ours are."""
    from .habits import translate
    from .settings import check_environment, defaults, misspelt_variables, read_settings

    args, hints = translate(command, args)
    if name != "config" and not {"-h", "--help"} & {*args}:  # these are to be had whatever is wrong
        check_environment(command)
        ctx.default_map = {name: defaults(read_settings(COMMANDS), name, command)}
        hints += misspelt_variables(COMMANDS)
    for hint in hints:
        click.echo(f"outpace: {hint}", err=True)
    return args


@click.group(
    cls=LazyGroup,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, "-V", "--version", prog_name="outpace", message="%(prog)s %(version)s")
@click.pass_context
def main(ctx: click.Context) -> None:
    """Language-model inference that emits more than one token per model step, with the same text.

    \b
      outpace run Write a haiku about speed        answer a prompt (the model is fetched once)
      outpace run --show-draft Count to thirty     see which tokens were drafted, and by whom
      outpace chat                                 talk

    `outpace COMMAND --help` tells more of each command, `outpace config` what is set on this machine.
    """
    if ctx.invoked_subcommand is None:
        from .start import first_screen

        click.echo(first_screen())
