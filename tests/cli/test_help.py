"""Help and mistakes: fast, light and in one line."""

from __future__ import annotations

import subprocess
import sys

import pytest
from click.testing import CliRunner

from outpace.cli import COMMANDS, main


def test_help_names_every_command_and_loads_no_torch() -> None:
    code = (
        "import sys\nfrom outpace.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit as e: print(e.code, 'torch' in sys.modules, 'numpy' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    assert all(name in out for name in COMMANDS)
    assert out.endswith("0 False False\n")


@pytest.mark.parametrize("name", ["run", "chat", "methods"])
def test_help_of_a_command_loads_no_torch(name: str) -> None:
    code = (
        f"import sys\nfrom outpace.cli import main\n"
        f"try: main(['{name}', '-h'])\nexcept SystemExit as e: print(e.code, 'torch' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    assert out.startswith(f"Usage: main {name}") or f"{name} [OPTIONS]" in out
    assert out.endswith("0 False\n")


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_both_help_flags(flag: str) -> None:
    result = CliRunner().invoke(main, [flag])
    assert result.exit_code == 0 and "outpace run" in result.stdout


def test_version() -> None:
    from outpace import __version__

    assert CliRunner().invoke(main, ["--version"]).stdout == f"outpace {__version__}\n"


def test_an_unknown_command_says_what_there_is() -> None:
    result = CliRunner().invoke(main, ["walk"])
    assert result.exit_code == 2
    assert "no command 'walk'" in result.stderr and "run, chat" in result.stderr
    assert "outpace run walk" in result.stderr
