"""`outpace serve`: mistakes are one line before anything is loaded; the rest is tested in tests/server."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from outpace.cli import serve as command


def one_line(result: Result, code: int) -> str:
    assert result.exit_code == code, result.output
    (line,) = [line for line in result.stderr.splitlines() if line]
    assert line.startswith("outpace: error: ")
    return line


def test_a_port_in_use_is_told_before_the_model_is_loaded(outpace: Callable[..., Result]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        line = one_line(outpace("serve", "-m", "missing", "--port", port), 2)
    assert f"port {port}" in line and "in use" in line and "--port" in line


def test_a_host_that_is_not_here(outpace: Callable[..., Result]) -> None:
    assert "cannot listen on 192.0.2.1" in one_line(outpace("serve", "--host", "192.0.2.1"), 2)


def test_a_missing_extra_is_named(outpace: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "find_spec", lambda name: None if name == "uvicorn" else object())
    line = one_line(outpace("serve"), 2)
    assert "serving needs uvicorn" in line and 'pip install "outpace[serve]"' in line


@pytest.mark.parametrize(
    ("text", "told"), [(None, "cannot be read"), ("# none\n", "has no key"), ("short\n", "8 visible")]
)
def test_a_key_file_that_will_not_do(
    text: str | None, told: str, outpace: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OUTPACE_API_KEYS", raising=False)
    file = tmp_path / "keys"
    if text is not None:
        file.write_text(text)
    assert told in one_line(outpace("serve", "--api-key-file", str(file)), 2)


def test_keys_come_from_the_file_and_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from outpace.server.keys import Keys, read_keys

    monkeypatch.setenv("OUTPACE_API_KEYS", "from-the-environment, ")
    (tmp_path / "keys").write_text("# ours\nfrom-the-file  # mine\n\n")
    keys = Keys(read_keys(tmp_path / "keys"))
    assert keys.check("Bearer from-the-file") == "from-the-file"
    assert keys.check("bearer from-the-environment") == "from-the-environment"
    assert keys.check("Bearer # ours") is None and keys.check("Bearer ") is None and keys.check(None) is None


def test_an_unknown_model_and_method_are_one_line(outpace: Callable[..., Result]) -> None:
    assert "no model 'missing'" in outpace("serve", "-m", "missing", "--port", "0").stderr
    assert "magic" in outpace("serve", "-m", "toy", "--port", "0", "--methods", "magic").stderr


def test_help_loads_no_server() -> None:
    code = (
        "import sys\nfrom outpace.cli import main\n"
        "try: main(['serve', '-h'])\n"
        "except SystemExit: print([m for m in ('torch', 'fastapi', 'pydantic') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "--playground" in out and out.endswith("[]\n")


def test_a_file_for_responses_that_cannot_be_used_is_refused_before_loading(
    tmp_path: Path, outpace: Callable[..., Result]
) -> None:
    line = one_line(outpace("serve", "-m", "missing", "--responses-file", str(tmp_path / "none" / "kept.db")), 2)
    assert "--responses-file" in line and "cannot be used" in line and "name another file" in line
