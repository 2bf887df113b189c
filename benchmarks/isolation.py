"""What one client posts, and how long the others wait: the largest gap in a stream, and the slowest `/health`.

    python benchmarks/isolation.py --model smollm2-135m
    python benchmarks/isolation.py --only "4 MB" --only "8 MB" --only "7 x 2 MB"

A server of its own is started. While one stream runs (greedy, end of text ignored) and `/health` is asked every 20 ms,
a process beside them posts one case: texts that are too long by far, JSON that is deep or has very much in it, prompts
that just fit, connections that say half of something. Before each case the same is measured with nothing posted:
"longer" is what the case adds to the largest gap of that. The clients share the processors with the server.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

import click
from common import note, public_name, save, table
from servers import HOST, Server, free_port, outpace_serve

QUESTION = "How much longer does a stream, or /health, wait while somebody else posts what is large, deep or endless?"
LIMIT_S = 0.25
PATIENCE_S = 900.0  # kernels are compiled at the first start
CHAT, COMPLETIONS, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
WORDS = "It was a bright cold day in April, and the clocks were striking thirteen. "


@dataclass
class Case:
    """`bodies` are posted at the same time to `path`; `half`: connections that stay open after half a header."""

    path: str = COMPLETIONS
    bodies: list[bytes] = field(default_factory=list)
    half: int = 0


def text(size: int, piece: str = WORDS) -> str:
    return (piece * (size // len(piece) + 1))[:size]


def prompt(value: Any, **more: Any) -> bytes:
    return json.dumps({"prompt": value, "max_tokens": 1, **more}).encode()


def chat(messages: list[Any], **more: Any) -> bytes:
    return json.dumps({"messages": messages, "max_tokens": 1, **more}).encode()


def post(**body: Any) -> bytes:
    return json.dumps(body).encode()


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


MB = 10**6
CASES: dict[str, Callable[[], Case]] = {
    "1 MB": lambda: Case(bodies=[prompt(text(MB))]),
    "4 MB": lambda: Case(bodies=[prompt(text(4 * MB))]),
    "8 MB": lambda: Case(bodies=[prompt(text(8 * MB))]),
    "8 MB, chat": lambda: Case(CHAT, [chat([user(text(8 * MB))])]),
    "7 x 2 MB": lambda: Case(bodies=[prompt(text(2 * MB))] * 7),
    "30 x 200 kB": lambda: Case(bodies=[prompt(text(200_000))] * 30),
    "60 x 60 kB": lambda: Case(bodies=[prompt(text(60_000))] * 60),
    "600 kB without spaces": lambda: Case(bodies=[prompt("a" * 600_000)]),
    "600 kB of white space": lambda: Case(bodies=[prompt(" " * 600_000)]),
    "600 kB of control tokens": lambda: Case(CHAT, [chat([user(text(600_000, "<|im_end|>"))])]),
    "600 kB of prediction": lambda: Case(
        bodies=[prompt("x", prediction={"type": "content", "content": text(600_000)})] * 4
    ),
    "100,000 empty messages": lambda: Case(CHAT, [chat([user("")] * 100_000)]),
    "15,000 empty messages": lambda: Case(CHAT, [chat([user("")] * 15_000)]),
    "50,000 parts": lambda: Case(CHAT, [chat([user([{"type": "text", "text": ""}] * 50_000)])]),
    "8 MB of brackets": lambda: Case(bodies=[b"[" * (8 * MB)]),
    "4 million token ids": lambda: Case(bodies=[b'{"prompt":[' + b"1," * (4 * MB - 20) + b"1]}"]),
    "500,000 token ids": lambda: Case(bodies=[b'{"prompt":[' + b"1," * 500_000 + b"1]}"]),
    "60,000 entries of logit_bias": lambda: Case(bodies=[prompt("x", logit_bias={str(i): 1 for i in range(60_000)})]),
    "60,000 stop strings": lambda: Case(bodies=[prompt("x", stop=["stop"] * 60_000)]),
    "500,000 stop_token_ids": lambda: Case(bodies=[prompt("x", stop_token_ids=[1] * 500_000)]),
    "60,000 unknown fields": lambda: Case(bodies=[prompt("x", **{f"x{i}": 1 for i in range(60_000)})]),
    "a field name of 8 MB": lambda: Case(bodies=[prompt("x", **{"x" * (8 * MB): 1})]),
    "a regular expression of 60 kB": lambda: Case(bodies=[prompt("x", regex="(a|b)" * 12_000)]),
    "a prompt that just fits": lambda: Case(bodies=[prompt([1000] * 8000)]),
    "128 prompts of 60 tokens": lambda: Case(bodies=[prompt([[1000 + i] * 60 for i in range(128)])]),
    "2048 texts to embed": lambda: Case(EMBEDDINGS, [post(input=[f"Text {i}." for i in range(2048)])]),
    "16 long texts to embed": lambda: Case(EMBEDDINGS, [post(input=[text(12_000)] * 16, encoding_format="float")]),
    "a long prompt scored": lambda: Case(bodies=[prompt([1000] * 6000, echo=True, logprobs=20)]),
    "16 prompts scored": lambda: Case(bodies=[prompt([[1000 + i] * 400 for i in range(16)], echo=True, logprobs=5)]),
    "8 MB to tokenize": lambda: Case("/tokenize", [post(content=text(8 * MB))]),
    "6000 tokens with pieces": lambda: Case("/tokenize", [post(content=text(20_000), with_pieces=True)]),
    "500,000 ids to detokenize": lambda: Case("/detokenize", [b'{"tokens":[' + b"1," * 500_000 + b"1]}"]),
    "4 MB of a response": lambda: Case("/v1/responses", [post(input=text(4 * MB))]),
    "15,000 items of a response": lambda: Case("/v1/responses", [post(input=[user("")] * 15_000, max_output_tokens=1)]),
    "15,000 messages": lambda: Case("/v1/messages", [post(messages=[user("")] * 15_000, max_tokens=1)]),
    "50,000 blocks": lambda: Case(
        "/v1/messages", [post(messages=[user([{"type": "text", "text": ""}] * 50_000)], max_tokens=1)]
    ),
    "300 halves of a header": lambda: Case(half=300),
}


class Watcher:
    """Reads a stream and asks `/health`, until it is told to end."""

    def __init__(self, port: int) -> None:
        self._port, self._over = port, threading.Event()
        self.gaps: list[float] = []
        self.health: list[float] = []
        self.errors: list[str] = []
        self._threads = [threading.Thread(target=self._guard, args=(f,)) for f in (self._stream, self._ask)]

    def __enter__(self) -> Watcher:
        for thread in self._threads:
            thread.start()
        until = time.monotonic() + 120
        while len(self.gaps) < 5 and not self.errors and time.monotonic() < until:
            time.sleep(0.05)
        self.gaps.clear()
        self.health.clear()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(60)

    def _guard(self, function: Callable[[], None]) -> None:
        try:
            function()
        except (OSError, HTTPException, ValueError) as error:
            self.errors.append(f"{function.__name__}: {error!r}")

    def _stream(self) -> None:
        while not self._over.is_set():
            link = HTTPConnection(HOST, self._port, timeout=120)
            body = {"prompt": WORDS, "max_tokens": 4000, "ignore_eos": True, "temperature": 0, "stream": True}
            link.request("POST", COMPLETIONS, json.dumps(body), {"content-type": "application/json"})
            answer = link.getresponse()
            if answer.status != 200:
                raise ValueError(f"status {answer.status}: {answer.read()[:200]!r}")
            last = None
            while not self._over.is_set() and (line := answer.readline()):
                if line.startswith(b"data: {"):
                    now = time.perf_counter()
                    if last is not None:
                        self.gaps.append(now - last)
                    last = now
            link.close()

    def _ask(self) -> None:
        while not self._over.wait(0.02):
            began = time.perf_counter()
            link = HTTPConnection(HOST, self._port, timeout=120)
            link.request("GET", "/health")
            link.getresponse().read()
            link.close()
            self.health.append(time.perf_counter() - began)


def post_all(port: int, case: Case) -> dict[str, Any]:
    """Post from a process of its own, whose work does not hold up the watcher."""
    with tempfile.TemporaryDirectory() as folder:
        for i, body in enumerate(case.bodies):
            (Path(folder) / f"{i:03}").write_bytes(body)
        command = [sys.executable, __file__, "--post-from", folder, str(port), case.path, str(case.half)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise click.ClickException(done.stderr[-800:])
        found: dict[str, Any] = json.loads(done.stdout)
        return found


def poster(folder: str, port: int, path: str, half: int) -> None:
    """In that process: prints the statuses and the seconds until the last answer."""
    statuses: Counter[str] = Counter()
    open_ones = []
    began = time.perf_counter()
    for _ in range(half):
        link = socket.create_connection((HOST, port))
        link.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n")
        open_ones.append(link)

    def one(file: Path) -> None:
        link = HTTPConnection(HOST, port, timeout=300)
        try:
            link.request("POST", path, file.read_bytes(), {"content-type": "application/json"})
            statuses[str(link.getresponse().status)] += 1
        except OSError as error:
            statuses[type(error).__name__] += 1

    threads = [threading.Thread(target=one, args=(file,)) for file in sorted(Path(folder).iterdir())]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    closed = 0
    for link in open_ones:
        link.settimeout(60)
        closed += link.recv(1000) is not None
    if half:
        statuses["closed"] = closed
    json.dump({"statuses": statuses, "seconds": time.perf_counter() - began}, sys.stdout)


def memory_mb(pid: int, what: str) -> float:
    """VmRSS (now) or VmHWM (the most so far) of a process."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(what))


def forget_peak(pid: int) -> None:
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def measure(port: int, pid: int, case: Case, quiet_s: float) -> dict[str, Any]:
    with Watcher(port) as watcher:
        time.sleep(quiet_s)
        quiet_gap, quiet_health = max(watcher.gaps, default=0.0), max(watcher.health, default=0.0)
        watcher.gaps.clear()
        watcher.health.clear()
        forget_peak(pid)
        before = memory_mb(pid, "VmRSS")
        answer = post_all(port, case)
        time.sleep(0.5)
        gap, health = max(watcher.gaps, default=0.0), max(watcher.health, default=0.0)
        peak = memory_mb(pid, "VmHWM")
    if watcher.errors:
        raise click.ClickException(f"the watcher failed: {watcher.errors}")
    return {
        "quiet_gap_s": round(quiet_gap, 4),
        "gap_s": round(gap, 4),
        "quiet_health_s": round(quiet_health, 4),
        "health_s": round(health, 4),
        "longer_s": round(max(gap - quiet_gap, health - quiet_health), 4),
        "memory_mb": round(peak - before, 1),
        "answered_after_s": round(answer["seconds"], 3),
        "statuses": answer["statuses"],
    }


@click.command()
@click.option("--model", default="smollm2-135m", show_default=True)
@click.option("--only", multiple=True, help="Cases, by name.  Repeatable.")
@click.option("--threads", type=int, help="Of the server.")
@click.option("--quiet", "quiet_s", default=3.0, show_default=True, help="Seconds of listening before each case.")
@click.option("--post-from", nargs=4, hidden=True)
def main(
    model: str,
    only: tuple[str, ...],
    threads: int | None,
    quiet_s: float,
    post_from: tuple[str, str, str, str] | None,
) -> None:
    if post_from is not None:
        folder, port, path, half = post_from
        poster(folder, int(port), path, int(half))
        return
    unknown = [name for name in only if name not in CASES]
    if unknown:
        raise click.UsageError(f"no case {unknown[0]!r}; there are {', '.join(CASES)}")
    found, where = {}, free_port()
    options = [] if threads is None else ["--threads", str(threads)]
    with Server(outpace_serve(model, where, *options), where, PATIENCE_S) as server:
        for name in only or CASES:
            found[name] = measure(where, server._process.pid, CASES[name](), quiet_s)
            note(f"{name}: {found[name]}")
    worst = max(case["longer_s"] for case in found.values())
    rows = [
        [name, *(f"{1000 * case[key]:.0f}" for key in ("quiet_gap_s", "gap_s", "health_s", "longer_s")),
         f"{case['memory_mb']:.0f}", f"{case['answered_after_s']:.2f}",
         ", ".join(f"{n} x {status}" for status, n in case["statuses"].items())]
        for name, case in found.items()
    ]  # fmt: skip
    head = ["posted", "quiet gap, ms", "gap, ms", "/health, ms", "longer, ms", "memory, MB", "answered, s", "answers"]
    text_of = (
        f"Longest additional wait: {1000 * worst:.0f} ms (to reach: {1000 * LIMIT_S:.0f} ms).\n\n{table(head, rows)}"
    )
    if only:
        click.echo(text_of)
        return
    config = {"model": public_name(model), "threads": threads, "quiet_s": quiet_s}
    save(f"isolation-{public_name(model)}", QUESTION, config, {"worst_longer_s": worst, "cases": found}, text_of)


if __name__ == "__main__":
    main()
