"""A pytest plugin that puts `outpace serve` where llama.cpp's tests start `llama-server`.

Servers are kept from test to test, one for each set of options, since every test starts one. Regular expressions that
name words of llama.cpp's tiny test model are read as "some text".
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest
from requests.structures import CaseInsensitiveDict

from . import translate
from .by_design import reason_of

#: Names of models that the tests use; ours answers to all of them.
NAMES = (
    "text-embedding-3-small",
    "davinci-002",
    "gpt-3.5-turbo",
    "gpt-3.5-turbo-instruct",
    "gpt-4.1",
    "codellama70b",
    "test",
    "tinyllama-2",
)
STORY_WORDS = re.compile(r"^[(^]|^But she|^Whill|\|")
sys.modules.setdefault("wget", types.ModuleType("wget"))  # the tests fetch models by it; here they do not
current = ""  # the test that runs
outcomes: list[dict[str, Any]] = []
_servers: dict[tuple[str, ...], tuple[subprocess.Popen[bytes], int]] = {}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def options_of(server: Any) -> tuple[str, ...]:
    """The options of `outpace serve` that stand for those of a ServerProcess."""
    alias = (server.model_alias or "").split(",")
    names = [*dict.fromkeys([*filter(None, alias), *NAMES])]
    found = ["--threads", os.environ.get("OUTPACE_TEST_THREADS", "2"), "--answer-tokens", "64"]
    if current.endswith("test_server_models"):  # it counts the names
        names = names[:1]
    found += [word for name in names for word in ("--served-model-name", name)]
    if server.n_slots:
        found += ["--max-batch", str(server.n_slots)]
    if server.n_ctx:
        found += ["--kv-tokens", str(max(server.n_ctx, 256))]
    if server.cors_origins or server.api_key:
        found += ["--cors-origin", server.cors_origins or "*"]
    return tuple(found)


def start(server: Any, timeout_seconds: int = 60) -> None:
    options = options_of(server)
    tools = re.search("anthropic|tool-call", server.model_alias or "")
    model = os.environ["OUTPACE_TEST_TOOL_MODEL" if tools else "OUTPACE_TEST_MODEL"]
    key = (model, *options, server.api_key or "")
    if key not in _servers or _servers[key][0].poll() is not None:
        if len(_servers) >= 3:
            _end(next(iter(_servers)))
        port = free_port()
        command = [sys.executable, "-m", "outpace", "serve", "-m", model, "--port"]
        env = {**os.environ, **({"OUTPACE_API_KEYS": server.api_key} if server.api_key else {})}
        _servers[key] = subprocess.Popen([*command, str(port), *options], env=env), port
    process, server.server_port = _servers[key]
    until = time.monotonic() + 600  # kernels may have to be compiled
    while time.monotonic() < until:
        if process.poll() is not None:
            raise RuntimeError(f"outpace serve ended with exit code {process.returncode}")
        try:
            with socket.create_connection(("127.0.0.1", server.server_port), 1):
                if server.make_request("GET", "/health").status_code == 200:
                    return
        except OSError:
            pass
        time.sleep(0.05)
    raise TimeoutError("the server did not become ready")


def _end(key: tuple[str, ...]) -> None:
    process, _ = _servers.pop(key)
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()


def endless(body: dict[str, Any]) -> None:
    """The tests' own model never ends an answer by itself."""
    if not body.keys() & {"tools", "response_format", "json_schema", "grammar"}:
        body.setdefault("ignore_eos", True)


def adapt(utils: Any) -> None:
    """Change the tests' own helpers in place."""
    process = utils.ServerProcess
    ask, stream, match = process.make_request, process.make_stream_request, utils.match_regex

    def make_request(
        self: Any, method: str, path: str, data: Any = None, headers: Any = None, *args: Any, **more: Any
    ) -> Any:
        native = method == "POST" and path in translate.NATIVE and isinstance(data, dict)
        if native:
            data = translate.request(data, self.temperature, self.seed)
        elif method == "POST" and path.endswith("/chat/completions") and isinstance(data, dict):
            endless(data)
        sent = {name: value for name, value in (headers or {}).items() if value is not None}
        response = ask(self, method, translate.PATHS.get(path, path), data, sent, *args, **more)
        response.headers = CaseInsensitiveDict(response.headers)  # which HTTP's are
        if native and isinstance(response.body, dict):
            response.body = translate.answer(response.body)
        return response

    def make_stream_request(self: Any, method: str, path: str, data: Any = None, *args: Any, **more: Any) -> Any:
        native = path in translate.NATIVE
        if native:
            data = translate.request(data, self.temperature, self.seed)
            data["stream_options"] = {"include_usage": True}
        elif path.endswith("/chat/completions"):
            endless(data)
        for item in stream(self, method, translate.PATHS.get(path, path), data, *args, **more):
            if not native:
                yield item
            elif item.get("choices"):
                yield translate.chunk(item)

    def match_regex(regex: str, text: str) -> bool:
        return bool(text) if STORY_WORDS.search(regex) else match(regex, text)

    process.start, process.stop = start, lambda self: None
    process.make_request, process.make_stream_request = make_request, make_stream_request
    utils.match_regex = match_regex
    utils.ServerPreset.load_all = staticmethod(lambda: None)


def pytest_configure(config: pytest.Config) -> None:
    sys.path.insert(0, os.getcwd())
    import utils

    adapt(utils)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        why = reason_of(item.nodeid)
        if why is not None:
            item.add_marker(pytest.mark.skip(reason=why))


@pytest.hookimpl(trylast=True)
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or (report.when == "setup" and report.outcome != "passed"):
        crash = getattr(report.longrepr, "reprcrash", None)
        why = report.longrepr[2].removeprefix("Skipped: ") if report.skipped else crash.message if crash else ""
        outcomes.append({"test": report.nodeid, "outcome": report.outcome, "why": why[:400]})


def pytest_runtest_setup(item: pytest.Item) -> None:
    global current
    current = item.nodeid


def pytest_sessionfinish() -> None:
    for key in list(_servers):
        _end(key)
    Path(os.environ["OUTPACE_TEST_RESULT"]).write_text(json.dumps(outcomes), "utf-8")
