"""Does a server's memory grow? Mixed load for an hour, or less, and its resident memory from a quarter of that time on.

    python benchmarks/memory.py --minutes 60
    python benchmarks/memory.py --minutes 5 --trace       # of what grew: the server runs with tracemalloc

Several clients ask all the time for what clients ask: chats and completions, whole and streamed, of many users, with
common and with new beginnings, with several choices, stop strings, log-probabilities, schemas (each another one),
predictions; some leave in the middle; some send what is malformed, far too long, or half of a request. The KV cache is
small, so that it is full early. Growth: the mean of the last tenth against the mean of the first tenth after the first
quarter, in which caches fill and buffers find their size.
"""

from __future__ import annotations

import json
import random
import signal
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import click
from common import note, public_name, save, table
from servers import HOST, Server, free_port, outpace_serve

QUESTION = "Does the resident memory of a server grow under hours of mixed load?"
LIMIT = 0.02
PATIENCE_S = 900.0  # kernels are compiled at the first start
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
WORDS = (
    *("red", "blue", "green", "one", "two", "three", "the", "a", "of", "and", "river"),
    *("stone", "light", "paper", "house", "walk", "run", "see", "make", "good", "old", "new"),
)


class Client:
    """Asks until it is told to end. Statuses, and what else happened, are counted in `seen`."""

    def __init__(self, port: int, seed: int, over: threading.Event) -> None:
        self._port, self._rng, self._over = port, random.Random(seed), over
        self.seen: Counter[str] = Counter()

    def run(self) -> None:
        kinds: list[tuple[Callable[[], None], int]] = [
            (self._whole, 30), (self._stream, 30), (self._leave, 15), (self._schema, 8), (self._wrong, 6),
            (self._far_too_long, 4), (self._half, 4), (self._look, 3),
        ]  # fmt: skip
        functions, weights = zip(*kinds, strict=True)
        while not self._over.is_set():
            kind = self._rng.choices(functions, weights)[0]
            try:
                kind()
            except (OSError, HTTPException) as error:
                self.seen[f"{kind.__name__[1:]}: {type(error).__name__}"] += 1

    def _text(self, words: int) -> str:
        return " ".join(self._rng.choices(WORDS, k=words))

    def _body(self) -> dict[str, Any]:
        rng = self._rng
        begin = f"Number {rng.randrange(6)}: " + "This is how it begins. " * 20 if rng.random() < 0.5 else ""
        said = [{"role": "user", "content": begin + self._text(rng.randrange(3, 60))}]
        body: dict[str, Any] = {
            "messages": said,
            "max_tokens": rng.randrange(4, 48),
            "user": f"u{rng.randrange(10**6)}",
        }
        if rng.random() < 0.3:
            del body["user"]
        if rng.random() < 0.2:
            body |= {"n": 2, "temperature": 0.7}
        if rng.random() < 0.2:
            body |= {"logprobs": True, "top_logprobs": 3}
        if rng.random() < 0.2:
            body["stop"] = [rng.choice(WORDS)]
        if rng.random() < 0.2:
            body["prediction"] = {"type": "content", "content": self._text(40)}
        if rng.random() < 0.2:
            body |= {"repetition_penalty": 1.1, "logit_bias": {str(rng.randrange(1000)): -5.0}}
        return body

    def _post(self, path: str, data: bytes) -> bytes:
        link = HTTPConnection(HOST, self._port, timeout=120)
        try:
            link.request("POST", path, data, {"content-type": "application/json"})
            answer = link.getresponse()
            self.seen[str(answer.status)] += 1
            return answer.read()
        finally:
            link.close()

    def _whole(self) -> None:
        self._post(CHAT, json.dumps(self._body()).encode())

    def _stream(self, most: int | None = None) -> None:
        link = HTTPConnection(HOST, self._port, timeout=120)
        try:
            body = self._body() | {"stream": True, "outpace": {"trace": self._rng.random() < 0.3}}
            link.request("POST", CHAT, json.dumps(body), {"content-type": "application/json"})
            answer = link.getresponse()
            self.seen[str(answer.status)] += 1
            read = 0
            while answer.readline() and (most is None or read < most):
                read += 1
        finally:
            link.close()
        self.seen["streams read" if most is None else "streams left"] += 1

    def _leave(self) -> None:
        self._stream(self._rng.randrange(1, 12))

    def _schema(self) -> None:
        names = {f"{self._rng.choice(WORDS)}{self._rng.randrange(1000)}": {"type": "integer"} for _ in range(2)}
        schema = {"type": "object", "properties": names, "required": list(names), "additionalProperties": False}
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        self._post(CHAT, json.dumps(self._body() | {"response_format": form, "stop": None}).encode())

    def _wrong(self) -> None:
        data = json.dumps(self._body()).encode()
        wrong = [data[: self._rng.randrange(len(data))], self._rng.randbytes(50), b'{"messages": 3}', b"[" * 5000]
        self._post(CHAT, self._rng.choice(wrong))

    def _far_too_long(self) -> None:
        self._post(COMPLETIONS, json.dumps({"prompt": "far too long " * self._rng.randrange(10_000, 80_000)}).encode())

    def _half(self) -> None:
        with socket.create_connection((HOST, self._port), timeout=10) as link:
            link.sendall(b"POST /v1/completions HTTP/1.1\r\nContent-Length: 900\r\n\r\n{"[: self._rng.randrange(60)])
            self._over.wait(0.1)
        self.seen["halves"] += 1

    def _look(self) -> None:
        for path in ("/metrics", "/health", "/v1/models"):
            with urlopen(f"http://{HOST}:{self._port}{path}", timeout=60) as answer:
                answer.read()


def resident_mb(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))


def soak(port: int, pid: int, seconds: float, clients: int, tell: Callable[[str], None]) -> dict[str, Any]:
    """Load for so long; the resident memory, second by second, and its growth."""
    over = threading.Event()
    asking = [Client(port, seed, over) for seed in range(clients)]
    threads = [threading.Thread(target=client.run) for client in asking]
    for thread in threads:
        thread.start()
    samples: list[float] = []
    began = told = time.monotonic()
    try:
        while (now := time.monotonic()) < began + seconds:
            samples.append(resident_mb(pid))
            if now - told > 60:
                told = now
                done = sum((client.seen for client in asking), Counter())
                tell(f"{(now - began) / 60:.0f} min: {samples[-1]:.0f} MB, {done.total()} requests")
            time.sleep(1.0)
    finally:
        over.set()
        for thread in threads:
            thread.join(180)
    tenth = max(len(samples) // 10, 1)
    quarter = len(samples) // 4
    before, after = statistics.mean(samples[quarter : quarter + tenth]), statistics.mean(samples[-tenth:])
    seen = sum((client.seen for client in asking), Counter())
    return {
        "minutes": round(seconds / 60, 2),
        "before_mb": round(before, 2),
        "after_mb": round(after, 2),
        "growth": round(after / before - 1, 5),
        "seen": dict(seen.most_common()),
        "samples_mb": [round(one, 1) for one in samples[:: max(len(samples) // 240, 1)]],
    }


_TRACED = """
import gc, signal, sys, tracemalloc
tracemalloc.start(12)
kept = []
def look(*_):
    gc.collect()
    kept.append(tracemalloc.take_snapshot())
    if len(kept) > 1:
        with open(sys.argv[1], "w") as out:
            for one in kept[-1].compare_to(kept[0], "traceback")[:25]:
                print(one.size_diff, "bytes in", one.count_diff, "blocks", *one.traceback.format(), sep="\\n", file=out)
signal.signal(signal.SIGUSR1, look)
from outpace.cli import main
sys.argv = ["outpace", *sys.argv[2:]]
main()
"""


@click.command()
@click.option("--model", default="smollm2-135m", show_default=True)
@click.option("--minutes", default=60.0, show_default=True)
@click.option("--clients", default=6, show_default=True)
@click.option("--threads", type=int, help="Of the server.")
@click.option("--trace", is_flag=True, help="Print where memory was allocated that is still there; no result file.")
def main(model: str, minutes: float, clients: int, threads: int | None, trace: bool) -> None:
    where = free_port()
    options = ["--kv-tokens", "4096", "--max-batch", "4", "--max-queue", "64", "--header-timeout", "3"]
    options += [] if threads is None else ["--threads", str(threads)]
    command = outpace_serve(model, where, *options)
    with tempfile.TemporaryDirectory() as folder:
        growth = Path(folder) / "growth"
        if trace:
            command = [sys.executable, "-c", _TRACED, str(growth), *command[3:]]
        with Server(command, where, PATIENCE_S) as server:
            pid = server._process.pid
            if trace:
                soak(where, pid, 15 * minutes, clients, note)
                server._process.send_signal(signal.SIGUSR1)
            found = soak(where, pid, 60 * minutes, clients, note)
            if trace:
                time.sleep(5)
                server._process.send_signal(signal.SIGUSR1)
                time.sleep(20)
                click.echo(growth.read_text())
    rows = [[f"{found['minutes']:g}", f"{found['before_mb']:.0f}", f"{found['after_mb']:.0f}",
             f"{100 * found['growth']:.2f} %", sum(found["seen"].values())]]  # fmt: skip
    head = ["minutes", "after a quarter, MB", "at the end, MB", "growth", "requests"]
    text = f"Growth to stay below: {100 * LIMIT:.0f} %.\n\n{table(head, rows)}"
    click.echo(json.dumps(found["seen"]))
    if trace:
        click.echo(text)
        return
    config = {"model": public_name(model), "clients": clients, "threads": threads, "minutes": minutes}
    save(f"memory-{public_name(model)}", QUESTION, config, found, text)


if __name__ == "__main__":
    main()
