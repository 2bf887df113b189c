"""What `outpace` says without arguments: the next step for somebody new."""

from __future__ import annotations

import os

from ..errors import ParameterError
from ..models.catalog import CATALOG, DEFAULT_MODEL
from .settings import read_settings

_SCREEN = """\
Outpace runs language models on this machine. Each step gives several tokens, and the text stays the same.

  outpace run Why is the sky blue       answer a prompt; text may be piped in, files added with -f FILE
  outpace chat                          talk; /help lists what else can be typed
  outpace models                        models known by name, and which of them are here
  outpace serve                         an OpenAI-compatible server
  outpace compare                       what the methods gain on this machine and your text

Model: {model} ({state}). Another one: -m NAME, or OUTPACE_MODEL=NAME for good.
outpace --help lists all commands, outpace COMMAND --help the options of one."""


def first_screen() -> str:
    from . import COMMANDS

    try:
        set_in_file = read_settings(COMMANDS).shared.get("model")
    except ParameterError as error:  # said, and no reason to show nothing
        return f"{_SCREEN.format(model=DEFAULT_MODEL, state=_state(DEFAULT_MODEL))}\n\nThe settings are wrong: {error}"
    model = str(os.environ.get("OUTPACE_MODEL") or set_in_file or DEFAULT_MODEL)
    return _SCREEN.format(model=model, state=_state(model))


def _state(model: str) -> str:
    from ..models.fetch import model_path

    if model not in CATALOG:
        return "your choice"
    known = CATALOG[model]
    return "it is here" if model_path(known).is_file() else f"{known.size / 1e6:.0f} MB are fetched at first use"
