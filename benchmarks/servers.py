"""Servers in processes of their own, started and stopped by the benchmarks, and what a client saw of them."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

from outpace.errors import OutpaceError

HOST = "127.0.0.1"
Body = dict[str, Any]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def outpace_serve(model: str, port: int, *options: str) -> list[str]:
    return [sys.executable, "-m", "outpace", "serve", "--model", model, "--port", str(port), *options]


def llama_server(
    path: Path, model: Path, threads: int, slots: int, context: int, port: int, *options: str
) -> list[str]:
    """`context` tokens for all slots together."""
    numbers = {"-t": threads, "-tb": threads, "-np": slots, "-c": context, "--port": port}
    return [str(path), "-m", str(model), "--host", HOST, *(str(x) for pair in numbers.items() for x in pair), *options]


class Server:
    """Runs while the block runs. Raises OutpaceError, with the end of its log, when it does not come up."""

    def __init__(self, command: list[str], port: int, patience_s: float = 180.0) -> None:
        self.command, self.port, self.patience_s = command, port, patience_s

    def __enter__(self) -> Server:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server ends with the benchmark
        self._log = tempfile.TemporaryFile()
        self._process = subprocess.Popen(self.command, stdout=self._log, stderr=self._log)
        until = time.monotonic() + self.patience_s
        while not self._ready():
            if self._process.poll() is not None or time.monotonic() > until:
                tail = self.log()[-800:]
                self._stop()
                raise OutpaceError(f"{' '.join(self.command)} did not come up:\n{tail}")
            time.sleep(0.2)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def log(self) -> str:
        self._log.seek(0)
        return self._log.read().decode(errors="replace")

    def _ready(self) -> bool:
        try:
            with urlopen(f"http://{HOST}:{self.port}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except (URLError, OSError):
            return False

    def _stop(self) -> None:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(40)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._log.close()


@dataclass
class Answer:
    """What a client saw of one streamed answer. Times in seconds; a failed one has no tokens."""

    ttft_s: float = 0.0
    total_s: float = 0.0
    gaps: list[float] = field(default_factory=list)  # between events that brought text; tokens that came together: one
    tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    error: str | None = None

    @property
    def tbt_s(self) -> float:
        """Mean time between tokens after the first."""
        return (self.total_s - self.ttft_s) / max(self.tokens - 1, 1)


def send(port: int, requests: list[tuple[float, Body]], patience_s: float = 600.0) -> list[Answer]:
    """Send bodies of /v1/completions (each so many seconds after the start) from a process of its own."""
    trace = {
        "requests": [{"at": at, "body": {**body, "stream": True, "stream_options": {"include_usage": True}}}
                     for at, body in requests],
        "patience_s": patience_s,
    }  # fmt: skip
    script = Path(__file__).with_name("load_client.py")
    done = subprocess.run(
        [sys.executable, str(script), HOST, str(port)], input=json.dumps(trace), capture_output=True, text=True
    )
    if done.returncode:
        raise OutpaceError(f"the client failed: {done.stderr[-800:]}")
    return [read_answer(found) for found in json.loads(done.stdout)]


def read_answer(found: dict[str, Any]) -> Answer:
    """From the events of a stream. An answer without its final usage is a failed one."""
    if found["error"] is not None or found["status"] != 200:
        return Answer(error=f"status {found['status']}: {(found['error'] or '')[:200]}")
    times: list[float] = []
    answer = Answer(error="the stream ended early")
    for at, event in found["chunks"]:
        if not event.startswith("data: ") or event == "data: [DONE]":
            continue
        value = json.loads(event[6:])
        if "error" in value:
            answer.error = str(value["error"])[:200]
        if any(choice.get("text") for choice in value.get("choices", [])):
            times.append(at - found["sent"])
        if value.get("usage"):
            usage = value["usage"]
            answer.tokens, answer.prompt_tokens = usage["completion_tokens"], usage["prompt_tokens"]
            answer.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
            answer.error = None if times else "the answer has no text"
    if times:
        answer.ttft_s, answer.total_s = times[0], times[-1]
        answer.gaps = [b - a for a, b in pairwise(times)]
    return answer
