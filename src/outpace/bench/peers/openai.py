"""Any server with OpenAI's API behind a URL: vLLM, SGLang, llama.cpp's server, Ollama, ours. Standard library alone.

The prompts of a batch are as many requests at once, streamed. Tokens are counted over the text by our tokenizer, as a
server's own count may leave out or add what others count; a count of its own that is far from ours is an error.
Which method the server uses is the server's business: give each way of starting it a name of its own.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import ssl
from collections.abc import Sequence
from contextlib import suppress
from threading import Thread
from time import perf_counter
from typing import Any
from urllib.parse import urlsplit

from ...errors import ParameterError
from .peer import Peer, PeerAnswer, PeerError, PeerPrompt, Words, check_ask

KEY = "OUTPACE_PEER_KEY"  # the environment variable with the server's key, if it wants one
_LINE = 1 << 20  # bytes of one event at most
_START_S = 20.0
_GRACE_S = 1.0  # beyond the timeout, for a request to notice that it was cut


class Refusal(Exception):
    """The server's answer is none, in words for the user."""


class OpenAIPeer(Peer):
    """`url` with or without /v1. `model`: the first that the server names, when not given.

    Raises ParameterError for a URL that is none.
    """

    def __init__(self, url: str, words: Words, model: str | None = None, name: str | None = None) -> None:
        parts = urlsplit(url)
        try:
            self._host, self._port = parts.hostname, parts.port
        except ValueError as e:
            raise ParameterError(f"{url!r} is no URL: {e}") from None
        if parts.scheme not in ("http", "https") or not self._host or parts.username or parts.query or parts.fragment:
            raise ParameterError(f"{url!r}: a server's URL is http(s)://host:port or http(s)://host:port/v1")
        path = parts.path.rstrip("/")
        self._secure, self._path = parts.scheme == "https", path or "/v1"
        self.url = f"{parts.scheme}://{parts.netloc}{self._path}"
        self.name = name or self.url
        self._words, self._wanted = words, model
        self._model: str | None = None
        self._server: dict[str, Any] = {}
        self._open: dict[int, socket.socket] = {}  # of requests under way, by their number in the batch

    def start(self) -> None:
        if self._model is not None:
            return
        try:
            listed = self._get(f"{self._path}/models").get("data")
            known = (
                [m["id"] for m in listed if isinstance(m, dict) and isinstance(m.get("id"), str)]
                if isinstance(listed, list)
                else []
            )
        except Refusal as e:
            raise PeerError(f"{self.name}: {e}; is a server with OpenAI's API running at {self.url}?") from None
        if self._wanted is None and not known:
            raise PeerError(f"{self.name}: {self.url} names no model; say which one is meant")
        if self._wanted is not None and known and self._wanted not in known:
            raise PeerError(f"{self.name}: {self.url} has no model {self._wanted!r}; it has {', '.join(known[:5])}")
        with suppress(Refusal):
            self._server["version"] = str(self._get("/version").get("version"))[:80]
        self._model = self._wanted or known[0]

    def close(self) -> None:
        self._model = None
        self._cut()

    def about(self) -> dict[str, Any]:
        model = os.path.basename(self._model or "")
        return {"engine": "server", "url": self.url, "model": model, "batches": "requests at once", **self._server}

    def generate(
        self, prompts: Sequence[PeerPrompt], max_tokens: int, temperature: float, seed: int, timeout_s: float
    ) -> list[PeerAnswer]:
        check_ask(prompts, max_tokens, temperature, timeout_s)
        if self._model is None:
            return [PeerAnswer(error=f"{self.name} was not started")] * len(prompts)
        late = PeerAnswer(error=f"{self.name} gave no answer within {timeout_s:g} s")
        answers = [late] * len(prompts)
        began = perf_counter()
        sampling = {"max_tokens": max_tokens, "temperature": temperature}

        def ask(i: int) -> None:
            try:
                answer = self._stream(i, prompts[i], {**sampling, "seed": seed + i}, began, began + timeout_s)
            except Refusal as e:
                answer = PeerAnswer(error=f"{self.name}: {e}")
            if perf_counter() < began + timeout_s:
                answers[i] = answer

        workers = [Thread(target=ask, args=(i,), daemon=True) for i in range(len(prompts))]
        try:
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join(max(began + timeout_s - perf_counter(), 0.0))
        finally:
            self._cut()
            for worker in workers:
                worker.join(_GRACE_S if worker.ident is not None else 0.0) if worker.is_alive() else None
        return list(answers)

    def _stream(
        self, number: int, prompt: PeerPrompt, sampling: dict[str, Any], began: float, until: float
    ) -> PeerAnswer:
        """One request. Raises Refusal."""
        body: dict[str, Any]
        if prompt.messages:
            route, body = "chat/completions", {"messages": [dict(m) for m in prompt.messages]}
        else:
            route, body = "completions", {"prompt": prompt.text or list(prompt.token_ids)}
        body |= {"model": self._model, "stream": True, "stream_options": {"include_usage": True}, **sampling}
        answer = _Answer(began)
        try:
            connection = self._connect(until - perf_counter())
            try:
                assert connection.sock is not None
                self._open[number] = connection.sock
                connection.request("POST", f"{self._path}/{route}", json.dumps(body), self._headers())
                response = connection.getresponse()
                if response.status != 200:
                    raise Refusal(_refused(response.status, response.read(_LINE)))
                while line := response.readline(_LINE):
                    if answer.take(line):
                        break
            finally:
                self._open.pop(number, None)
                connection.close()
        except (OSError, http.client.HTTPException) as e:
            raise Refusal(f"{type(e).__name__}: {e}"[:300]) from e
        return answer.finished(self._words, sampling["max_tokens"])

    def _connect(self, timeout_s: float) -> http.client.HTTPConnection:
        assert self._host is not None
        timeout_s = max(timeout_s, 0.001)
        connection: http.client.HTTPConnection
        if self._secure:
            context = ssl.create_default_context()
            connection = http.client.HTTPSConnection(self._host, self._port, timeout=timeout_s, context=context)
        else:
            connection = http.client.HTTPConnection(self._host, self._port, timeout=timeout_s)
        connection.connect()
        return connection

    def _headers(self) -> dict[str, str]:
        key = os.environ.get(KEY)
        return {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})

    def _get(self, path: str) -> dict[str, Any]:
        """Raises Refusal."""
        try:
            connection = self._connect(_START_S)
            try:
                connection.request("GET", path, headers=self._headers())
                response = connection.getresponse()
                data = response.read(_LINE)
            finally:
                connection.close()
        except (OSError, http.client.HTTPException) as e:
            raise Refusal(f"{type(e).__name__}: {e}"[:300]) from e
        if response.status != 200:
            raise Refusal(_refused(response.status, data))
        try:
            value = json.loads(data)
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            raise Refusal(f"GET {path} gave what is no JSON object: {data[:60].decode('utf-8', 'replace')!r}")
        return value

    def _cut(self) -> None:
        """End the requests that are under way: their threads see the end of the stream."""
        for open_socket in list(self._open.values()):
            with suppress(OSError):
                open_socket.shutdown(socket.SHUT_RDWR)


class _Answer:
    """Put together from the events of a stream."""

    def __init__(self, began: float) -> None:
        self._began = began
        self._pieces: list[str] = []
        self._times: list[float] = []  # of the pieces
        self._first: float | None = None
        self._last = 0.0
        self._reason: str | None = None
        self._reported: int | None = None

    def take(self, line: bytes) -> bool:
        """One line of the stream; True at its end. Raises Refusal."""
        if not line.endswith(b"\n") and len(line) >= _LINE:
            raise Refusal(f"sent an event of more than {_LINE} bytes")
        if not line.startswith(b"data:"):
            if line.strip() and not line.startswith((b":", b"event:", b"id:", b"retry:")):
                raise Refusal(f"does not stream: {line[:60].decode('utf-8', 'replace')!r}")
            return False
        data = line[5:].strip()
        if data == b"[DONE]":
            return True
        try:
            event = json.loads(data)
            if error := event.get("error"):
                raise Refusal(f"broke off: {_message(error)}")
            for choice in event.get("choices") or ():
                self._choice(choice)
            usage = event.get("usage")
            if usage and type(usage.get("completion_tokens")) is int:
                self._reported = usage["completion_tokens"]
        except (ValueError, RecursionError, AttributeError, TypeError, KeyError):
            raise Refusal(f"sent an event that is no completion: {data[:60].decode('utf-8', 'replace')!r}") from None
        return False

    def _choice(self, choice: dict[str, Any]) -> None:
        delta = choice.get("delta") or {"content": choice.get("text")}
        text = (delta.get("reasoning_content") or "") + (delta.get("content") or "")
        now = perf_counter() - self._began
        if text:
            self._first = now if self._first is None else self._first
            self._pieces.append(text)
            self._times.append(now)
        if choice.get("finish_reason"):
            self._reason = str(choice["finish_reason"])
        if text or choice.get("finish_reason"):
            self._last = now

    def finished(self, words: Words, max_tokens: int) -> PeerAnswer:
        """Raises Refusal when the stream did not come to its end, or its count is far from ours."""
        text = "".join(self._pieces)
        if self._reason is None:
            raise Refusal(f"its stream broke off after {len(text)} characters")
        if self._reason not in ("stop", "length"):
            raise Refusal(f"ended for another reason than stop or length: {self._reason}")
        tokens = len(words.encode(text)) + (self._reason == "stop")
        if not tokens:
            raise Refusal("gave no token")
        slack = 8 + max_tokens // 4
        if tokens > max_tokens + slack:
            raise Refusal(f"gave {tokens} tokens instead of at most {max_tokens}")
        if self._reported is not None and abs(self._reported - tokens) > slack:
            raise Refusal(f"says that it gave {self._reported} tokens, and its text has {tokens}")
        at_first = min(max(len(words.encode(self._pieces[0])), 1), tokens) if self._pieces else 1
        arrivals = tuple(
            at for at, piece in zip(self._times[1:], self._pieces[1:], strict=True) for _ in words.encode(piece)
        )
        return PeerAnswer(text, None, tokens, self._first, self._last, None, None, self._reported, at_first, arrivals)


def _refused(status: int, body: bytes) -> str:
    try:
        said = json.loads(body)
        said = said.get("error", said) if isinstance(said, dict) else said
    except (ValueError, RecursionError):
        said = body[:200].decode("utf-8", "replace")
    return f"refused with status {status}: {_message(said)}"


def _message(error: Any) -> str:
    said = error.get("message", error) if isinstance(error, dict) else error
    return " ".join(str(said).split())[:300]
