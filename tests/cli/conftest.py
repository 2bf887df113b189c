"""The command line over a decoder whose logits are a hash."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from hashing import toy_loaded

from outpace.cli import main
from outpace.engine import llm as llm_module
from outpace.engine import load as load_module
from outpace.errors import ModelNotFound
from outpace.models import recommended as recommended_module
from outpace.models import source as source_module
from outpace.models.recommended import Recommended

_KEPT = ("OUTPACE_CACHE", "OUTPACE_MODELS")  # a machine may have its models elsewhere


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Settings and conversations of a test are its own."""
    for name in [name for name in os.environ if name.startswith("OUTPACE_") and name not in _KEPT]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path


@pytest.fixture
def outpace(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Runs the command line with the toy model under every name but "missing"."""
    monkeypatch.delenv("OUTPACE_DEBUG", raising=False)

    def load(name: str, **how: object) -> object:
        if name == "missing":
            raise ModelNotFound("no model 'missing'; there are: toy")
        return toy_loaded(name, template=None if name == "base" else "{{ messages[-1].content }}:")

    monkeypatch.setattr(llm_module, "load_model", load)
    monkeypatch.setattr(load_module, "load_model", load)  # of draft models

    def recommended(name: str) -> Recommended:
        if name == "missing":
            raise ModelNotFound("no model 'missing'; there are: toy")
        return Recommended({"temperature": 0.5, "top_p": 0.9}, "the model's file")

    monkeypatch.setattr(recommended_module, "recommended", recommended)
    monkeypatch.setattr(source_module, "find", lambda name: recommended(name) and Path(name))

    def run(*args: str, input: str | None = None) -> Result:
        return CliRunner().invoke(main, list(args), input=input)

    return run
