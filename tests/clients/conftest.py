"""Real servers for other people's clients. Needs the extra `clients`; reaches nothing but this machine."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

#: Nothing is fetched, reported or traced
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "DO_NOT_TRACK": "1",
    "ANONYMIZED_TELEMETRY": "False",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "LITELLM_MODE": "PRODUCTION",  # it reads no .env file
    "LANGSMITH_TRACING": "false",
    "LANGCHAIN_TRACING_V2": "false",
    "LOGFIRE_SEND_TO_LOGFIRE": "false",
    "TOKENIZERS_PARALLELISM": "false",
    "OPENAI_API_KEY": "none",
    "ANTHROPIC_API_KEY": "none",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "clients" in item.path.parts:
            item.add_marker(pytest.mark.clients)


class Server:
    """`outpace serve` as a person starts it."""

    def __init__(self, model: str, *options: str) -> None:
        self.model = model
        command = [sys.executable, "-m", "outpace", "serve", "-m", model, "--port", "0", "--threads", "1"]
        sizes = ["--max-batch", "4", "--kv-tokens", "8192", "--answer-tokens", "256"]
        self.process = subprocess.Popen([*command, *sizes, *options], stderr=subprocess.PIPE, text=True)
        said = ""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            said += line
            if "Ctrl-C stops it" in line:
                break
        found = re.search(r"base_url=\"(\S+)/v1\"", said)
        assert found is not None, said
        self.root, self.url = found[1], f"{found[1]}/v1"

    def stop(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture(scope="session", autouse=True)
def alone() -> Iterator[None]:
    """The environment of all clients, and no way out of this machine."""
    connect = socket.socket.connect

    def inside(self: socket.socket, address: Any) -> None:
        if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "localhost", "::1"):
            raise OSError(f"a client wants to reach {address}")
        connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
            patch.delenv(name)
        patch.setattr(socket.socket, "connect", inside)
        yield


@pytest.fixture(scope="session")
def small(alone: None) -> Iterator[Server]:
    """The default model, which has no tools."""
    made = Server("smollm2-135m")
    try:
        yield made
    finally:
        made.stop()


@pytest.fixture(scope="session")
def coder(alone: None) -> Iterator[Server]:
    """A model whose chat template has tools, and that fills in the middle."""
    made = Server("qwen2.5-coder-0.5b")
    try:
        yield made
    finally:
        made.stop()
