"""`outpace completion`: the script by which a shell completes commands, options and names."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

SHELLS = ("bash", "zsh", "fish")


@click.command(short_help="Print the shell's completion script.")
@click.argument("shell", type=click.Choice(SHELLS))
def completion(shell: str) -> None:
    """Print the completion script of SHELL.

    \b
      outpace completion bash > ~/.local/share/bash-completion/completions/outpace
      outpace completion zsh > ~/.zfunc/_outpace        (a folder of $fpath, before compinit)
      outpace completion fish > ~/.config/fish/completions/outpace.fish
    """
    from . import main

    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(main, {}, "outpace", "_OUTPACE_COMPLETE").source())
