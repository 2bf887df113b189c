"""Runs the application on uvicorn: stops gracefully, logs as lines of JSON."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
import time
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI

from ..errors import ParameterError
from .connections import Connections, Patience, PatientProtocol
from .service import EngineService

OTHER_FILES = 64  # that a process has open beside its connections
LAST_WORDS_S = 5.0  # for streams to be told that they end


class GracefulServer(uvicorn.Server):
    """The first signal refuses new requests with 503, finishes the running ones within `grace` seconds, and ends what
    is left then with an error that clients see. A second signal ends at once."""

    def __init__(self, config: uvicorn.Config, service: EngineService, grace: float, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._service, self._grace, self._ready = service, grace, ready
        self._ending: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._loop = asyncio.get_running_loop()
            self._ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._service.draining or not self.started:
            self._service.draining = True
            self.should_exit = True
        else:
            self._service.drain()
            self._loop.call_soon_threadsafe(self.end_gently)

    def end_gently(self) -> None:
        """On the event loop."""
        self._service.drain()
        self._ending = asyncio.ensure_future(self._end())

    async def _end(self) -> None:
        if not await self._service.drained(self._grace):
            self._service.abort(f"the server stops, and this request was not finished within {self._grace:g} s")
        self.should_exit = True


def make_server(
    app: FastAPI,
    service: EngineService,
    *,
    grace: float = 30.0,
    patience: Patience | None = None,
    ready: Callable[[], None] = lambda: None,
) -> GracefulServer:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the library's threads do not give way, the intake's do
    patience = patience if patience is not None else Patience()
    app.state.connections = Connections()
    protocol: Any = partial(PatientProtocol, patience, app.state.connections)
    config = uvicorn.Config(
        app,
        http=protocol,
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="on",
        ws="none",
        timeout_keep_alive=patience.idle_s,  # type: ignore[arg-type]  # it is a delay of the event loop
        timeout_graceful_shutdown=int(LAST_WORDS_S),
    )
    return GracefulServer(config, service, grace, ready)


def files_for(connections: int) -> int:
    """Let the process open so many connections, beside its files, as far as the system allows. How many it may."""
    try:
        import resource
    except ImportError:  # not on Windows, where there is no such limit
        return connections
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return connections if soft == resource.RLIM_INFINITY else max(1, min(connections, soft - OTHER_FILES))


def bind(host: str, port: int) -> socket.socket:
    """A socket on that address, before anything slow is done. ParameterError if it cannot be had."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        reason = "it is in use" if error.errno in _IN_USE else error.strerror or str(error)
        raise ParameterError(
            f"cannot listen on {host}, port {port}: {reason}; choose another --port or --host"
        ) from None
    return bound


_IN_USE = (48, 98, 10048)  # of macOS, Linux, Windows


class JsonLines(logging.Formatter):
    """One object in a line. What is JSON already (the log of requests) passes as it is."""

    def format(self, record: logging.LogRecord) -> str:
        message = record.getMessage()
        if record.name == "outpace.server.requests":
            return message
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created)),
            "level": record.levelname.lower(),
            "message": message,
        }
        if record.exc_info:
            line["trace"] = self.formatException(record.exc_info)
        return json.dumps(line)


def log_to_stderr() -> None:
    """The server's and uvicorn's logs, as lines of JSON on stderr."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    for name, level in (("outpace.server", logging.INFO), ("uvicorn.error", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.setLevel(level)
        logger.handlers = [handler]
        logger.propagate = False
