"""Connections that say half of something, or nothing, or do not listen: each is closed in its time, others go on."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import httpx
import pytest
from fake import FakeEngine
from live import Live
from test_service import until

from outpace.server.connections import Patience
from outpace.server.run import files_for

LONG = 60.0
CHAT = "/v1/chat/completions"
BODY = json.dumps({"messages": [{"role": "user", "content": "Hello"}]}).encode()
HEAD = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n".encode()
WHOLE = HEAD + f"Content-Length: {len(BODY)}\r\n\r\n".encode() + BODY


@pytest.fixture
def dial() -> Iterator[Callable[..., socket.socket]]:
    """Connections to a server; those still open are closed with the test."""
    with ExitStack() as stack:

        def connect(live: Live, data: bytes = b"") -> socket.socket:
            url = httpx.URL(live.url)
            made = stack.enter_context(socket.create_connection((url.host, url.port), timeout=LONG))
            made.sendall(data)
            return made

        yield connect


def rest(connection: socket.socket) -> bytes:
    """All that comes until the server closes."""
    found = b""
    try:
        while data := connection.recv(1 << 16):
            found += data
    except ConnectionResetError:
        pass
    return found


def said(connection: socket.socket) -> bytes:
    """The body of one answer."""
    found = b""
    while True:
        data = connection.recv(1 << 16)
        assert data, "it was closed"
        found += data
        head, split, body = found.partition(b"\r\n\r\n")
        length = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
        if split and len(body) >= int(length[0].partition(b":")[2]):
            return body


def closed(live: Live, reason: str) -> int:
    return int(live.app.state.connections.closed[reason])


@pytest.mark.parametrize(
    ("data", "reason", "answer"),
    [
        (b"", "header_timeout", b""),
        (HEAD, "header_timeout", b"HTTP/1.1 408 "),
        (HEAD + b"Content-Length: 900\r\n\r\n{", "body_timeout", b"HTTP/1.1 408 "),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n3\r\n{", "body_timeout", b"HTTP/1.1 408 "),
    ],
    ids=["nothing", "half a header", "half a body", "half a chunk"],
)
def test_half_a_request_ends(
    data: bytes, reason: str, answer: bytes, serve: Callable[..., Live], dial: Callable[..., socket.socket]
) -> None:
    short = {"header_timeout": "header_s", "body_timeout": "body_s"}[reason]
    waits = {"header_s": LONG, "body_s": LONG, "idle_s": LONG} | {short: 0.3}
    live = serve(FakeEngine(), patience=Patience(**waits))
    began = time.monotonic()
    connections = [dial(live, data) for _ in range(20)]
    for connection in connections:
        found = rest(connection)
        assert found.startswith(answer) and (found == b"") is (answer == b"")
        if found:
            assert json.loads(found.partition(b"\r\n\r\n")[2])["error"]["code"] == "request_timeout"
    assert time.monotonic() - began >= 0.25
    assert closed(live, reason) == 20 and live.app.state.connections.closed.total() == 20
    until(lambda: live.app.state.connections.open == 0)
    assert httpx.post(live.url + CHAT, content=BODY, headers={"content-type": "application/json"}).status_code == 200


def test_a_header_that_comes_byte_by_byte_ends(serve: Callable[..., Live], dial: Callable[..., socket.socket]) -> None:
    live = serve(FakeEngine(), patience=Patience(header_s=0.5))
    connection = dial(live)
    with pytest.raises(OSError):  # reset or broken pipe
        for byte in HEAD * 1000:
            connection.sendall(bytes([byte]))
            time.sleep(0.02)
    assert closed(live, "header_timeout") == 1


def test_bytes_of_a_header_give_it_no_more_time(serve: Callable[..., Live], dial: Callable[..., socket.socket]) -> None:
    live = serve(FakeEngine(), patience=Patience(header_s=LONG))
    connection = dial(live)
    until(lambda: live.app.state.connections.open == 1)
    (protocol,) = live.server.server_state.connections
    due = protocol._timer.when()
    connection.sendall(HEAD)
    until(lambda: protocol._heard)
    assert protocol._timer.when() == due
    connection.sendall(WHOLE.removeprefix(HEAD))
    assert b"says hello" in said(connection) and protocol._timer is None


def test_half_of_a_further_request_ends(serve: Callable[..., Live], dial: Callable[..., socket.socket]) -> None:
    live = serve(FakeEngine(), patience=Patience(header_s=0.3, idle_s=LONG))
    connection = dial(live, WHOLE)
    assert b"says hello" in said(connection)
    connection.sendall(HEAD)
    assert b"408 Request Timeout" in rest(connection)
    assert closed(live, "header_timeout") == 1


def test_a_slow_body_that_comes_and_a_long_answer_are_not_cut(
    serve: Callable[..., Live], dial: Callable[..., socket.socket]
) -> None:
    engine = FakeEngine()
    engine.hold.set()
    live = serve(engine, patience=Patience(header_s=0.4, body_s=3.0, idle_s=LONG))
    connection = dial(live, WHOLE[:-10])
    time.sleep(0.6)  # longer than a header may take
    connection.sendall(WHOLE[-10:])
    until(lambda: engine.asked)
    time.sleep(0.6)  # while it is answered nothing is waited for
    engine.hold.clear()
    assert b"says hello" in said(connection)
    assert live.app.state.connections.closed.total() == 0
    connection.sendall(WHOLE)
    assert b"says hello" in said(connection), "the connection is kept"


def test_who_does_not_read_is_cut_off(serve: Callable[..., Live], dial: Callable[..., socket.socket]) -> None:
    engine = FakeEngine(lambda asked: "x" * 400_000, context=10**6, step_s=0.0)
    live = serve(engine, patience=Patience(write_s=0.3))
    body = json.loads(BODY) | {"stream": True, "max_tokens": 400_000, "outpace": {"trace": True}}
    data = json.dumps(body).encode()
    dial(live, HEAD + f"Content-Length: {len(data)}\r\n\r\n".encode() + data)
    until(lambda: closed(live, "write_timeout") == 1)
    until(lambda: engine.cancelled and live.service.open_calls == 0)


def test_beyond_the_limit_the_longest_idle_gives_way(
    serve: Callable[..., Live], dial: Callable[..., socket.socket]
) -> None:
    engine = FakeEngine()
    engine.hold.set()
    live = serve(engine, patience=Patience(most=3, header_s=LONG, idle_s=LONG))
    first = dial(live, b"GET")
    until(lambda: live.app.state.connections.open == 1)
    busy = [dial(live, WHOLE) for _ in range(2)]
    until(lambda: len(engine.asked) == 2)
    third = dial(live, WHOLE)
    assert rest(first) == b"" and closed(live, "evicted") == 1
    until(lambda: len(engine.asked) == 3)
    refused = rest(dial(live))
    assert refused.startswith(b"HTTP/1.1 503") and b"retry-after" in refused and closed(live, "refused") == 1
    engine.hold.clear()
    for connection in [*busy, third]:
        assert b"says hello" in said(connection)


def test_the_limit_is_what_the_system_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    resource: Any = pytest.importorskip("resource")
    set_to: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "setrlimit", lambda what, limits: set_to.append(limits))
    monkeypatch.setattr(resource, "getrlimit", lambda what: (256, 4096))
    assert files_for(100) == 100 and not set_to
    assert files_for(1000) == 1000 and set_to == [(1064, 4096)]
    assert files_for(10_000) == 4032 and set_to[-1] == (4096, 4096)
