"""Run a command of Outpace in a terminal and draw what the terminal shows as an SVG: the picture at the top of
README.md.

    python tools/record.py docs/images/run.svg -- outpace run --show-draft --against-plain "Name three rivers."

Needs a POSIX system. The picture is of that run and no other: run the command once before, so that nothing is fetched,
packed or compiled in it, and record on an idle machine.
"""

from __future__ import annotations

import os
import pty
import re
import shlex
import struct
import subprocess
import sys
from fcntl import ioctl
from pathlib import Path
from termios import TIOCSWINSZ

import click
from rich.console import Console
from rich.text import Text

ERASE = re.compile(r"\x1b\[[0-2]?K")
OTHER = re.compile(r"\x1b\[[0-9;?]*[A-LN-Za-ln-z]")  # all but colours (…m): cursor movements, hidden cursors


def run(command: list[str], columns: int) -> tuple[str, int]:
    """What the command writes to a terminal of so many columns, and its exit code."""
    ours, theirs = pty.openpty()
    ioctl(theirs, TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": str(columns), "PYTHONUNBUFFERED": "1"}
    child = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, close_fds=True)
    os.close(theirs)
    written = bytearray()
    try:
        while piece := os.read(ours, 65536):
            written += piece
    except OSError:  # Linux says so when the other side is closed
        pass
    finally:
        os.close(ours)
    return written.decode("utf-8", "replace"), child.wait()


def shown(written: str) -> str:
    """The lines that are left on the terminal: what a carriage return goes back over is overwritten."""
    lines = []
    for line in written.replace("\r\n", "\n").split("\n"):
        last = ERASE.split(line)[-1].rsplit("\r", 1)[-1]
        lines.append(OTHER.sub("", last))
    return "\n".join(lines).strip("\n")


def local_fonts(picture: str) -> str:
    """The picture without fonts from the network."""
    picture = re.sub(r"\s*@font-face \{.*?\}", "", picture, flags=re.S)
    return picture.replace("Fira Code", "ui-monospace, Menlo, Consolas, DejaVu Sans Mono")


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("target", type=click.Path(dir_okay=False, path_type=Path))
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
@click.option("--columns", default=100, show_default=True)
@click.option("--title", default="", help="Above the picture; by default the command's name.")
def main(target: Path, command: tuple[str, ...], columns: int, title: str) -> None:
    written, code = run(list(command), columns)
    if code:
        sys.exit(f"the command ended with exit code {code}, nothing was drawn:\n{written}")
    with open(os.devnull, "w") as nowhere:
        console = Console(record=True, width=columns, file=nowhere, force_terminal=True, legacy_windows=False)
        console.print(Text(f"$ {shlex.join(command)}", style="bold"))
        console.print(Text.from_ansi(shown(written)), soft_wrap=False)
    picture = console.export_svg(title=title or command[0], unique_id="run")
    target.write_text(local_fonts(picture), "utf-8")


if __name__ == "__main__":
    main()
