"""The command line over a decoder whose logits are a hash."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from click.testing import CliRunner, Result
from hashing import toy_loaded

from outpace.cli import main
from outpace.engine import llm as llm_module
from outpace.engine import load as load_module
from outpace.errors import ModelNotFound


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

    def run(*args: str, input: str | None = None) -> Result:
        return CliRunner().invoke(main, list(args), input=input)

    return run
