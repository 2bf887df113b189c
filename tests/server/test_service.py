"""Clients that leave, a server that stops, an engine that fails: nobody waits for ever, nothing goes on for nobody."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from fake import FakeEngine, lines
from live import Live

from outpace.errors import GrammarError, ParameterError, QueueFull
from outpace.server import service as service_module
from outpace.server import stream as stream_module
from outpace.server.service import EngineService, Gone, ServiceError, Submission
from outpace.types import SamplingParams

HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello"}]}
URL = "/v1/chat/completions"


def until(what: Callable[[], Any], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


def ask(seed: int = 1) -> Submission:
    return Submission([1, 2, 3], SamplingParams(seed=seed))


def with_service(engine: FakeEngine, use: Callable[[EngineService], Any]) -> Any:
    async def main() -> Any:
        service = EngineService(engine)
        await service.start()
        try:
            return await use(service)
        finally:
            await service.stop()
            assert engine.closed

    return asyncio.run(asyncio.wait_for(main(), 30))


def test_events_cross_in_order_and_nothing_is_lost() -> None:
    async def use(service: EngineService) -> None:
        tickets = [await service.submit([ask(i), ask(100 + i)]) for i in range(20)]
        texts = await asyncio.gather(*(collect(t) for t in tickets))
        assert texts == [
            [f"Seed {i} says hello to the world.", f"Seed {100 + i} says hello to the world."] for i in range(20)
        ]
        assert service.open_calls == 0

    async def collect(ticket: Any) -> list[str]:
        texts = ["", ""]
        while not ticket.finished:
            for index, event in await ticket.take():
                texts[index] += event.text
        assert [r.text for r in ticket.results] == texts
        return texts

    with_service(FakeEngine(), use)


def test_all_or_none_is_submitted() -> None:
    engine = FakeEngine(max_running=1, max_queue=1)
    engine.hold.set()

    async def use(service: EngineService) -> None:
        with pytest.raises(QueueFull):
            await service.submit([ask(), ask(), ask()])
        assert engine.cancelled == [1, 2] and engine.idle and service.open_calls == 0
        with pytest.raises(ParameterError):
            await service.submit([Submission([], SamplingParams())])
        await service.submit([ask(), ask()])

    with_service(engine, use)
    assert engine.cancelled == [1, 2, 3, 4], "stopping cancels what runs"


def test_a_heavy_grammar_holds_up_nobody_else() -> None:
    engine = FakeEngine()
    engine.prepared.clear()

    async def use(service: EngineService) -> None:
        slow = asyncio.create_task(service.submit([Submission([1], SamplingParams(regex="a+"))] * 3))
        quick = await service.submit([ask(7)])
        assert len(await quick.wait()) == 1
        assert not slow.done() and len(engine.asked) == 1, "it waits for its grammar, in nobody's way"
        engine.prepared.set()
        assert len(await (await slow).wait()) == 3
        with pytest.raises(GrammarError, match="unclosed"):
            await service.submit([ask(1), Submission([1], SamplingParams(regex="("))])
        assert len(engine.asked) == 4, "all or none"

    with_service(engine, use)


def test_closing_a_ticket_cancels_what_is_unfinished() -> None:
    engine = FakeEngine()
    engine.hold.set()

    async def use(service: EngineService) -> None:
        ticket = await service.submit([ask(), ask()])
        waiting = asyncio.create_task(ticket.take())
        await asyncio.sleep(0.01)
        ticket.close()
        with pytest.raises(Gone):
            await waiting
        await service.call(lambda: None)
        assert engine.cancelled == [1, 2] and service.open_calls == 0

    with_service(engine, use)


def test_patience_ends_without_events() -> None:
    engine = FakeEngine()
    engine.hold.set()

    async def use(service: EngineService) -> None:
        ticket = await service.submit([ask()])
        assert await ticket.take(0.01) == [] and not ticket.finished
        engine.hold.clear()
        assert (await ticket.wait())[0].text == "Seed 1 says hello to the world."

    with_service(engine, use)


def test_an_error_of_one_request_is_its_own() -> None:
    engine = FakeEngine()
    step = engine.step

    def failing() -> list[Any]:
        events = step()
        for event in events:
            if event.id == 1:
                event.error = ParameterError("the grammar cannot be followed")
        return events

    engine.step = failing  # type: ignore[method-assign]

    async def use(service: EngineService) -> None:
        bad, good = await service.submit([ask()]), await service.submit([ask(2)])
        with pytest.raises(ParameterError):
            await bad.wait()
        assert (await good.wait())[0].text == "Seed 2 says hello to the world."

    with_service(engine, use)


def test_a_failed_step_loses_its_requests_and_spares_those_that_wait() -> None:
    engine = FakeEngine(max_running=1)
    engine.hold.set()

    async def use(service: EngineService) -> None:
        running, waiting = await service.submit([ask()]), await service.submit([ask(2)])
        engine.fail = RuntimeError("no")
        with pytest.raises(ServiceError) as failed:
            await running.wait()
        assert failed.value.status == 500
        engine.hold.clear()
        assert (await waiting.wait())[0].text == "Seed 2 says hello to the world."
        assert service.steps_failed == 1 and service.broken is None

    with_service(engine, use)


def test_books_that_do_not_agree_close_the_service(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_module, "IDLE_CHECK_S", 0.01)
    engine = FakeEngine()

    async def use(service: EngineService) -> None:
        await (await service.submit([ask()])).wait()
        while not engine.checks:
            await asyncio.sleep(0.005)
        service.check_open()
        engine.wrong_books = True
        await (await service.submit([ask()])).wait()
        while service.broken is None:
            await asyncio.sleep(0.005)
        with pytest.raises(ServiceError, match="pages are lost"):
            await service.submit([ask()])

    with_service(engine, use)


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_a_client_that_leaves_frees_what_it_had(stream: bool, serve: Callable[..., Live]) -> None:
    engine = FakeEngine()
    engine.hold.set()
    live = serve(engine)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(live.url + URL, json=HELLO | {"stream": stream, "n": 2}, timeout=0.3)
    until(lambda: engine.cancelled == [1, 2])
    until(lambda: live.service.open_calls == 0)


def test_a_client_that_leaves_in_the_middle(serve: Callable[..., Live]) -> None:
    engine = FakeEngine(lambda asked: "word " * 500, step_s=0.002)
    live = serve(engine)
    with httpx.stream("POST", live.url + URL, json=HELLO | {"stream": True}) as response:
        next(response.iter_bytes())
    until(lambda: engine.cancelled == [1])
    assert httpx.post(live.url + URL, json=HELLO | {"max_tokens": 5}).status_code == 200


def test_who_waits_hears_that_the_server_lives(serve: Callable[..., Live], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_module, "KEEP_ALIVE_S", 0.02)
    engine = FakeEngine()
    engine.hold.set()
    with httpx.stream("POST", serve(engine).url + URL, json=HELLO | {"stream": True}) as response:
        blocks = response.iter_text()
        assert next(blocks).startswith(": ")
        engine.hold.clear()
        rest = "".join(blocks)
    assert lines(rest.encode())[-1] == "[DONE]"


def test_draining_finishes_what_runs_and_refuses_what_comes(serve: Callable[..., Live]) -> None:
    engine = FakeEngine()
    engine.hold.set()
    live = serve(engine)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(httpx.post, live.url + URL, json=HELLO | {"stream": True}, timeout=60)
        until(lambda: engine.asked)
        live.stop_gently()
        until(lambda: live.service.draining)
        late = httpx.post(live.url + URL, json=HELLO)
        assert late.status_code == 503 and late.json()["error"]["code"] == "draining"
        assert late.headers["retry-after"] == "5"
        health = httpx.get(live.url + "/health")
        assert health.status_code == 503 and health.json()["status"] == "draining"
        engine.hold.clear()
        assert lines(running.result().content)[-1] == "[DONE]"
    live.join()
    assert engine.closed and not engine.cancelled


def test_what_outlasts_the_grace_is_told_so(serve: Callable[..., Live]) -> None:
    engine = FakeEngine()
    engine.hold.set()
    live = serve(engine, grace=0.2)
    with ThreadPoolExecutor(2) as pool:
        stream = pool.submit(httpx.post, live.url + URL, json=HELLO | {"stream": True}, timeout=60)
        whole = pool.submit(httpx.post, live.url + URL, json=HELLO, timeout=60)
        until(lambda: len(engine.asked) == 2)
        live.stop_gently()
        told = lines(stream.result().content)
        assert told[-1]["error"]["code"] == "aborted" and "within 0.2 s" in told[-1]["error"]["message"]
        assert whole.result().status_code == 503 and whole.result().json()["error"]["code"] == "aborted"
    live.join()
    assert sorted(engine.cancelled) == [1, 2] and engine.closed


def test_many_streams_at_once_keep_their_tokens(serve: Callable[..., Live]) -> None:
    live = serve(FakeEngine(max_running=16))

    def one(seed: int) -> str:
        response = httpx.post(live.url + URL, json=HELLO | {"stream": True, "seed": seed}, timeout=60)
        chunks = lines(response.content)
        assert chunks[-1] == "[DONE]"
        return "".join(c["choices"][0]["delta"].get("content", "") for c in chunks[:-1])

    with ThreadPoolExecutor(32) as pool:
        texts = list(pool.map(one, range(64)))
    assert texts == [f"Seed {i} says hello to the world." for i in range(64)]


SCRIPT = """
import sys, threading
sys.path[:0] = [{here!r}]
from fake import FakeEngine
from outpace.server.app import create_app
from outpace.server.run import bind, log_to_stderr, make_server
from outpace.server.service import EngineService
engine = FakeEngine(lambda asked: "word " * 100, step_s=0.01)
service = EngineService(engine)
log_to_stderr()
listener = bind("127.0.0.1", {port})
make_server(create_app(service), service, grace=10, ready=lambda: print("up", flush=True)).run(sockets=[listener])
print("closed" if engine.closed and not engine.cancelled else "lost")
"""


@pytest.mark.skipif(os.name == "nt", reason="platform: signals")
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_gently(sent: signal.Signals) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    script = SCRIPT.format(here=str(Path(__file__).parent), port=port)
    child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None and child.stdout.readline() == "up\n"
        results: list[Any] = []
        body = HELLO | {"stream": True}
        url = f"http://127.0.0.1:{port}{URL}"
        reader = threading.Thread(target=lambda: results.append(httpx.post(url, json=body, timeout=60).content))
        reader.start()
        until(lambda: httpx.get(f"http://127.0.0.1:{port}/health").json()["open_calls"] == 1)
        child.send_signal(sent)
        until(lambda: httpx.get(f"http://127.0.0.1:{port}/health").status_code == 503)
        reader.join(60)
        out, err = child.communicate(timeout=60)
    finally:
        child.kill()
    assert lines(results[0])[-1] == "[DONE]"
    assert (out, child.returncode) == ("closed\n", 0), err
    assert "Traceback" not in err and '"status": 200' in err
