"""llama.cpp as a program that the user built: `llama-server`, or `llama-bench` where only speed is wanted.

`scripts/run_binary.py` starts it, once with this peer (a server) or for every answer (a bench), and ends it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import ClassVar

from ...errors import ParameterError
from .process import ScriptPeer

PROGRAMS = ("llama-server", "llama-bench")
_PLACES = (".", "bin", "build/bin")  # of a program in a folder
#: Options that are the comparison's own
_OURS = ("-m", "--model", "--host", "--port")


class LlamaProgramPeer(ScriptPeer):
    engine = "llama.cpp"
    script = "run_binary.py"
    takes: ClassVar[tuple[str, ...]] = ("a GGUF file",)
    counts = True

    def _public(self, error: object) -> str:
        program = str(self.config.settings["program"])
        return super()._public(error).replace(program, Path(program).name)


def find_program(written: str) -> Path:
    """A file that can be run, from its path or a folder that has it. Raises ParameterError."""
    path = Path(written).expanduser().absolute()
    if path.is_dir():
        found = [path / place / name for name in PROGRAMS for place in _PLACES]
        path = next((file for file in found if file.is_file()), path)
        if path.is_dir():
            raise ParameterError(f"{written} has no {' and no '.join(PROGRAMS)}, neither in bin nor in build/bin")
    if not path.exists():
        raise ParameterError(f"{written}: there is no such file; name a llama-server, a llama-bench or their folder")
    if not path.is_file() or not os.access(path, os.X_OK):
        raise ParameterError(f"{written} is no program: it is not an executable file")
    return path


def check_arguments(arguments: list[str]) -> None:
    """Raises ParameterError for those that would undo what the comparison does."""
    for word in arguments:
        if word.partition("=")[0] in _OURS:
            raise ParameterError(f"leave out {word}: model, host and port are given by the comparison")
