"""A `llama-server`: started on a port of its own, asked by HTTP, one request for each prompt of a batch.

Answers are not streamed: the server says how long it generated (`timings`), so a first token came that long before the
answer was there, and sending each token costs it nothing. Prompts are always read anew. The server reads those of a
batch by the thousand tokens, and an answer gets one token meanwhile for each such step: as if all began when the last
prompt was read.
"""

from __future__ import annotations

import http.client
import json
import re
import socket
import subprocess
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from time import perf_counter
from typing import Any

from peer_loop import Refused
from program import Own, Program

_HOST = "127.0.0.1"
_PORTS = 3  # tried; another program may take a free port before the server does
_TAKEN = re.compile(r"\bbind|address already in use|port.*in use", re.I)
_CLOCKS_S = 0.05  # by which two processes' ideas of a duration may differ
_DEATH_S = 0.5
_PLACES = 256  # a cache is made in multiples of it
#: Names that builds have for drafting with a second model, and for n-grams of prompt and output
_DRAFTING = ("draft-simple", "draft")
_LOOKUP = ("ngram-simple", "ngram-map-k", "ngram-mod", "ngram-cache")


class LlamaServer:
    """Raises Refused when it does not come up, with what it said last."""

    def __init__(self, program: Program, hello: dict[str, Any]) -> None:
        self.stop, self.past_end = hello["stop_ids"], hello["past_end"]
        self._program, self._said = program, deque[str](maxlen=200)
        self._built_for: str | None = None
        self._process: subprocess.Popen[str] | None = None
        self._pool = ThreadPoolExecutor(hello["max_batch"])
        version = program.version()
        own = _own(program, hello)
        for attempt in range(_PORTS):
            self.port = _free_port()
            command = program.command([*own, (("--host",), _HOST), (("--port",), self.port)])
            if self._start(command) is None:
                break
            if attempt == _PORTS - 1 or not any(map(_TAKEN.search, self._said)):
                raise Refused(f"{program.name} {self._death()}")
        self.about = {
            "program": program.name,
            "version": version or "not said",
            "built_for": self._built_for or "not said",
            "arguments": program.shown(program.command(own)),
            "batches": "requests at once",
        }

    def _start(self, command: list[str]) -> int | None:
        """Its exit code; None: it answers. How long it may take is the business of whoever asked."""
        self._said.clear()
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            errors="replace",
        )
        self._listener = threading.Thread(target=self._listen, args=(self._process,), daemon=True)
        self._listener.start()
        while (code := self._process.poll()) is None:
            with suppress(OSError, http.client.HTTPException):
                status, _ = self._ask("GET", "/health", None, 5.0)
                if status == 200 and self._process.poll() is None:
                    return None
                if status == 404:
                    self.close()
                    raise Refused("answers, but has no /health: it is no llama-server")
            time.sleep(0.05)
        return code

    def _listen(self, process: subprocess.Popen[str]) -> None:
        """Read what it says, so that it never waits for a reader."""
        assert process.stdout is not None
        for line in process.stdout:
            self._said.append(line.rstrip())
            if "system_info" in line:
                self._built_for = line.partition("|")[2].strip(" |\n") or None

    def _death(self) -> str:
        assert self._process is not None
        code = self._process.wait()
        self._listener.join(1.0)
        return self._program.ended(code, list(self._said))

    @property
    def memory_bytes(self) -> int | None:
        with suppress(OSError, ValueError, IndexError, AttributeError):
            assert self._process is not None
            with open(f"/proc/{self._process.pid}/status", encoding="ascii", errors="replace") as status:
                for line in status:
                    if line.startswith("VmHWM:"):
                        return int(line.split()[1]) * 1024
        return None

    def generate(self, request: dict[str, Any]) -> list[dict[str, Any]]:
        prompts, began = request["prompts"], perf_counter()
        numbers = range(len(prompts))
        answers = list(self._pool.map(lambda i: self._answer(i, prompts[i], request, began), numbers))
        assert self._process is not None
        if any("error" in answer for answer in answers):
            with suppress(subprocess.TimeoutExpired):  # one that dies closes its connections a moment before
                self._process.wait(_DEATH_S)
                raise Refused(self._death())
        read = max((a["first_token_s"] for a in answers if "error" not in a), default=0.0)
        return [a if "error" in a else a | {"first_token_s": min(read, a["total_s"])} for a in answers]

    def _answer(self, number: int, prompt: list[int], request: dict[str, Any], began: float) -> dict[str, Any]:
        body: dict[str, Any] = {
            "prompt": prompt,
            "n_predict": request["max_tokens"],
            "temperature": request["temperature"],
            "seed": (request["seed"] + number) % 2**32,
            "stream": False,
            "cache_prompt": False,
            "return_tokens": True,
            "samplers": ["temperature"] if request["temperature"] else ["top_k"],
            "top_k": 0 if request["temperature"] else 1,
        }
        if self.past_end:  # some builds know one end token, where the model has several
            body |= {"ignore_eos": True, "logit_bias": [[token, False] for token in self.stop]}
        try:
            status, data = self._ask("POST", "/completion", json.dumps(body), None)
            total_s = perf_counter() - began
            said = json.loads(data)
            if status != 200:
                error = said.get("error", said)
                message = error.get("message", error) if isinstance(error, dict) else error
                return {"error": f"refused with status {status}: {' '.join(str(message).split())[:300]}"}
            return _understood(said, len(prompt), total_s)
        except (OSError, http.client.HTTPException) as error:
            return {"error": f"gave no answer: {type(error).__name__}: {error}"[:300]}
        except (ValueError, TypeError, AttributeError, KeyError, RecursionError):
            return {"error": f"answered with what is no completion: {data[:80].decode('utf-8', 'replace')!r}"}

    def _ask(self, verb: str, path: str, body: str | None, timeout_s: float | None) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection(_HOST, self.port, timeout=timeout_s)
        try:
            connection.request(verb, path, body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def close(self) -> None:
        """It has nothing to save."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()


def _own(program: Program, hello: dict[str, Any]) -> list[Own]:
    """What makes it comparable, and how it speculates. Raises Refused when it cannot speculate as wanted."""
    places = -(-hello["context"] // _PLACES) * _PLACES
    own: list[Own] = [
        (("--model", "-m"), hello["model"]),
        (("--threads", "-t"), hello["threads"]),
        (("--threads-batch", "-tb"), hello["threads"]),
        (("--parallel", "-np"), hello["max_batch"]),
        (("--ctx-size", "-c"), places * hello["max_batch"]),
        (("--n-gpu-layers", "--gpu-layers", "-ngl"), 0),
        (("--no-kv-unified", "-no-kvu"), None),  # each sequence attends to its own part alone
        (("--cache-ram", "-cram"), 0),  # prompts are read anew, and keeping them costs time
    ]
    if hello["mode"] == "draft":
        if not program.has("--model-draft", "-md"):
            raise Refused(f"{program.name} drafts with no second model: its --help lists no --model-draft")
        own.append((("--model-draft", "-md"), hello["draft"]))
        own.append((("--n-gpu-layers-draft", "--gpu-layers-draft", "-ngld"), 0))
        if kind := program.offers("--spec-type", *_DRAFTING):  # else a draft model is all it needs
            own.append((("--spec-type",), kind))
    elif hello["mode"] == "lookup":
        kind = program.offers("--spec-type", *_LOOKUP)
        if kind is None and not program.given("--spec-type"):
            raise Refused(f"{program.name} looks no drafts up: its --help lists no --spec-type with {_LOOKUP[0]}")
        own.append((("--spec-type",), kind))
    return own


def _understood(said: dict[str, Any], prompt: int, total_s: float) -> dict[str, Any]:
    """An answer from what the server said. Raises what `_answer` calls no completion."""
    timings = said["timings"]
    tokens, decode_s = timings["predicted_n"], timings["predicted_ms"] / 1000
    read = timings.get("prompt_n", prompt)
    if said.get("truncated") or read < prompt:
        return {"error": f"read {read} of the prompt's {prompt} tokens" + " and cut it" * bool(said.get("truncated"))}
    if decode_s > total_s + _CLOCKS_S:
        return {"error": f"says that it generated for {decode_s:.3f} s, and all took {total_s:.3f} s"}
    accepted = min(timings.get("draft_n_accepted", 0), tokens - 1)
    answer = {
        "tokens": tokens,
        "first_token_s": max(total_s - decode_s, 0.0),
        "total_s": total_s,
        "steps": max(tokens - 1 - accepted, 0),
    }
    ids = said.get("tokens")
    return answer | ({"token_ids": ids} if ids else {"text": said["content"]})


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((_HOST, 0))
        return int(probe.getsockname()[1])
