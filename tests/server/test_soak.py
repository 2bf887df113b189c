"""Many streams, clients that vanish, bad bodies, a full queue, a full KV cache, and faults at every stage of a step.

What must hold: a stream that ends well has exactly the tokens of its request alone; whatever fails says so with a clear
status; nothing leaks; and the server still answers.
"""

from __future__ import annotations

import asyncio
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
from hashing import toy_loaded
from live import Live

from outpace.cache.pages import PagedKVCache
from outpace.cache.storage import PAGE_SIZE
from outpace.engine.llm import LLM
from outpace.engine.text import TextStream
from outpace.server.submissions import Limits
from outpace.types import SamplingParams

CHAT = "/v1/chat/completions"
STAGES = ("propose", "reserve", "forward", "verify", "commit", "detokenise")
BODY_BYTES = 20_000
MUST_BE_SEEN = (
    "stream right",
    "whole right",
    "stream failed",
    "stream 429",
    "vanished",
    "malformed 400",
    "oversized 413",
)


class Faults:
    """Raises at one stage after another, once every so many steps of the engine."""

    def __init__(self, every: int) -> None:
        self._every = every
        self._steps = 0
        self._armed: str | None = None  # the engine's thread alone reads and writes it
        self.fired: Counter[str] = Counter()
        self.over = False

    def install(self, llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
        way = llm._engine.advance
        places: dict[str, tuple[Any, str]] = {
            "propose": (type(way.drafter), "propose"),
            "reserve": (PagedKVCache, "reserve"),
            "forward": (type(llm.decoder), "forward"),
            "verify": (type(way.verifier), "verify"),
            "commit": (PagedKVCache, "commit"),
            "detokenise": (TextStream, "push"),
        }
        assert tuple(places) == STAGES
        for stage, (owner, name) in places.items():
            monkeypatch.setattr(owner, name, self._wrapped(stage, getattr(owner, name)))
        step = LLM.step

        def counted(llm: LLM) -> Any:
            self._steps += 1
            if self._steps % self._every == 0 and not self.over:
                self._armed = STAGES[self._steps // self._every % len(STAGES)]
            return step(llm)

        monkeypatch.setattr(LLM, "step", counted)

    def _wrapped(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **options: Any) -> Any:
            if self._armed == stage and not self.over and threading.current_thread().name == "outpace-engine":
                self._armed = None
                self.fired[stage] += 1
                raise RuntimeError(f"injected at {stage}")
            return function(*args, **options)

        return wrapped


@dataclass
class Asked:
    """A greedy request and what it says alone."""

    body: dict[str, Any]
    text: str
    tokens: list[int]


def requests(n: int, seed: int) -> list[Asked]:
    """Greedy requests with a few common beginnings, answered one at a time by plain decoding."""
    rng = random.Random(seed)
    begins = ["".join(rng.choices("abcdef ", k=rng.randrange(30, 60))) for _ in range(4)]
    found = []
    with LLM(toy_loaded(), method="plain", max_batch=1, prefix_cache=False) as alone:
        for i in range(n):
            messages = [{"role": "user", "content": rng.choice(begins) + f" {i}"}]
            most = rng.randrange(8, 110)
            result = alone.generate(messages, SamplingParams(max_tokens=most))[0]
            found.append(
                Asked({"messages": messages, "max_tokens": most, "temperature": 0}, result.text, result.token_ids)
            )
    return found


@dataclass
class Soak:
    """What clients do until it is enough, and what they saw."""

    url: str
    asked: list[Asked]
    enough: Callable[[Counter[str]], bool]
    seen: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    async def run(self, streams: int, seed: int) -> None:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        async with httpx.AsyncClient(base_url=self.url, limits=limits, timeout=120) as http:
            await asyncio.gather(*(self._client(http, random.Random(f"{seed} {i}")) for i in range(streams)))

    async def _client(self, http: httpx.AsyncClient, rng: random.Random) -> None:
        kinds = (self._stream, self._vanish, self._whole, self._malformed, self._oversized, self._half)
        first = True
        while first or not self.enough(self.seen):
            first = False
            kind = rng.choices(kinds, (60, 18, 10, 6, 3, 3))[0]
            try:
                await kind(http, rng)
            except httpx.HTTPError as error:
                self.wrong.append(f"{kind.__name__}: {error!r}")

    def _check(self, what: str, response: httpx.Response, allowed: set[int]) -> bool:
        """Whether it is a good answer; one that is not must say what it is in OpenAI's form."""
        status = response.status_code
        self.seen[f"{what} {status}"] += 1
        if status not in allowed:
            self.wrong.append(f"{what}: {status} {response.text[:200]}")
        if status == 200:
            return True
        try:
            error = response.json()["error"]
            assert error["message"] and error["type"], error
        except Exception as broken:
            self.wrong.append(f"{what}: {status} without a reason: {response.text[:200]} ({broken!r})")
        if status == 429 and int(response.headers["retry-after"]) < 1:
            self.wrong.append("429 that does not say when to come back")
        return False

    async def _stream(self, http: httpx.AsyncClient, rng: random.Random, leave_after: int | None = None) -> None:
        """Read a stream to its end, or leave after some events."""
        asked = rng.choice(self.asked)
        body = asked.body | {"stream": True, "outpace": {"trace": True}, "user": rng.choice(["ann", "bob", "cy"])}
        async with http.stream("POST", CHAT, json=body) as response:
            if response.status_code != 200:
                await response.aread()
                self._check("stream", response, {429, 500})
                await asyncio.sleep(rng.random() * 0.2)
                return
            tokens, text, ended, events = [], "", False, 0
            async for line in response.aiter_lines():
                if not line.startswith("data: "):
                    continue
                if leave_after is not None and events >= leave_after:
                    self.seen["vanished"] += 1
                    return
                events += 1
                if line == "data: [DONE]":
                    ended = True
                    continue
                chunk = json.loads(line.removeprefix("data: "))
                if "error" in chunk:
                    self.seen["stream failed"] += 1
                    if not chunk["error"]["message"]:
                        self.wrong.append("a stream failed without a reason")
                    # what came before the failure was right
                    if tokens != asked.tokens[: len(tokens)] or not asked.text.startswith(text):
                        self.wrong.append("wrong tokens before a failure")
                    return
                tokens += [token["id"] for token in chunk.get("outpace", {}).get("tokens", [])]
                for choice in chunk["choices"]:
                    text += choice["delta"].get("content") or ""
        if not ended:
            self.wrong.append("a stream ended without [DONE] and without an error")
        elif tokens != asked.tokens or text != asked.text:
            self.wrong.append(f"{asked.body['messages']}: {tokens} instead of {asked.tokens}")
        else:
            self.seen["stream right"] += 1

    async def _vanish(self, http: httpx.AsyncClient, rng: random.Random) -> None:
        if rng.random() < 0.7:
            await self._stream(http, rng, leave_after=rng.randrange(0, 6))
            return
        try:  # before there is any answer
            await asyncio.wait_for(http.post(CHAT, json=rng.choice(self.asked).body), rng.random() * 0.05)
        except TimeoutError:
            self.seen["vanished"] += 1

    async def _whole(self, http: httpx.AsyncClient, rng: random.Random) -> None:
        asked = rng.choice(self.asked)
        response = await http.post(CHAT, json=asked.body)
        if self._check("whole", response, {200, 429, 500}):
            if response.json()["choices"][0]["message"]["content"] != asked.text:
                self.wrong.append(f"{asked.body['messages']}: another text")
            else:
                self.seen["whole right"] += 1

    async def _malformed(self, http: httpx.AsyncClient, rng: random.Random) -> None:
        good = json.dumps(rng.choice(self.asked).body).encode()
        data = rng.choice(
            [
                good[: rng.randrange(len(good))],
                rng.randbytes(rng.randrange(100)),
                b"[" * 5000,
                json.dumps({"messages": [{"role": "user", "content": "x" * 9000}], "max_tokens": 10**9}).encode(),
                json.dumps({"messages": rng.choice([1, None, [], [[]], "x"])}).encode(),
            ]
        )
        response = await http.post(CHAT, content=data, headers={"content-type": "application/json"})
        self._check("malformed", response, {400})

    async def _oversized(self, http: httpx.AsyncClient, rng: random.Random) -> None:
        data = b" " * rng.randrange(BODY_BYTES + 1, 4 * BODY_BYTES)
        try:
            response = await http.post(CHAT, content=data, headers={"content-type": "application/json"})
        except (httpx.WriteError, httpx.ReadError, httpx.RemoteProtocolError):
            self.seen["oversized cut off"] += 1  # the server need not read what it will not take
            return
        self._check("oversized", response, {413})

    async def _half(self, http: httpx.AsyncClient, rng: random.Random) -> None:
        """A connection that says half of something, or nonsense, and goes."""
        address = httpx.URL(self.url)
        _, writer = await asyncio.open_connection(address.host, address.port)
        said = rng.choice(
            [b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: 900\r\n\r\n{", rng.randbytes(40), b""]
        )
        writer.write(said)
        await asyncio.sleep(rng.random() * 0.05)
        writer.close()
        self.seen["half"] += 1


def soak(streams: int, seconds: float, every: int, monkeypatch: pytest.MonkeyPatch, seed: int = 0) -> None:
    asked = requests(40, seed)
    # the cache holds two or three requests of eight that may run, the queue few of the clients
    llm = LLM(
        toy_loaded(),
        max_batch=8,
        kv_tokens=13 * PAGE_SIZE,
        max_queue=max(6, streams // 8),
        swap_tokens=8 * PAGE_SIZE,
    )
    faults = Faults(every)
    faults.install(llm, monkeypatch)
    scheduler = llm._engine.scheduler
    began = time.monotonic()

    def enough(seen: Counter[str]) -> bool:
        """All that should happen has, or it never will."""
        after = time.monotonic() - began
        happened = (
            all(faults.fired[stage] for stage in STAGES)
            and scheduler.stats.swapped + scheduler.stats.recomputed
            and all(seen[what] for what in MUST_BE_SEEN)
        )
        return after > 10 * seconds or (after > seconds and bool(happened))

    with Live(llm, limits=Limits(body_bytes=BODY_BYTES)) as live:
        tried = Soak(live.url, asked, enough)
        asyncio.run(tried.run(streams, seed))
        faults.over = True
        assert not tried.wrong, f"{len(tried.wrong)}: {tried.wrong[:5]}; {dict(tried.seen)}"
        check_quiet(live, llm)
        figures = ask_engine(live, lambda: dict(llm.metrics()))
        for i, one in enumerate(asked[:5]):  # alive, and right
            answer = httpx.post(live.url + CHAT, json=one.body, timeout=60)
            assert answer.status_code == 200 and answer.json()["choices"][0]["message"]["content"] == one.text, i
        assert httpx.get(live.url + "/health").json()["status"] == "ready"
        check_quiet(live, llm)
    seen = tried.seen
    assert all(faults.fired[stage] for stage in STAGES), f"a stage had no fault: {faults.fired}"
    assert all(seen[what] for what in MUST_BE_SEEN), f"not everything happened: {seen}"
    assert figures["swapped"] + figures["recomputed"] > 0, "the cache was never full"
    assert figures["refused"] > 0, "the queue was never full"
    assert live.service.steps_failed <= sum(faults.fired.values())
    failed = seen["stream failed"] + seen["stream 500"] + seen["whole 500"]
    assert 0 < failed <= 8 * sum(faults.fired.values())


def ask_engine(live: Live, question: Callable[[], Any]) -> Any:
    loop = live.service._loop
    assert loop is not None
    return asyncio.run_coroutine_threadsafe(live.service.call(question), loop).result(60)


def check_quiet(live: Live, llm: LLM) -> None:
    """Nobody is served any more; then every page is free or belongs to the prefix cache, and all books agree."""
    patience = time.monotonic() + 30
    while not ask_engine(live, lambda: llm.idle) or live.service.open_calls:
        assert time.monotonic() < patience, "requests of clients that have gone still run"
        time.sleep(0.02)

    def leaks() -> None:
        llm.check_integrity()
        engine = llm._engine
        assert engine.prefixes is not None
        cache = engine.cache
        assert cache.available_pages == cache.storage.num_pages
        engine.prefixes.clear()
        assert cache.free_pages == cache.storage.num_pages, "pages are lost"
        engine.check_integrity()

    ask_engine(live, leaks)


def test_twenty_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    soak(20, 2.0, every=60, monkeypatch=monkeypatch)


@pytest.mark.slow
def test_two_hundred_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    soak(200, 110.0, every=200, monkeypatch=monkeypatch, seed=1)
