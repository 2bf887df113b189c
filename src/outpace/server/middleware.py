"""Around every request: an id, a limit on the body, a line in the log, a count. Plain ASGI: streams pass."""

from __future__ import annotations

import json
import logging
import time
from contextlib import suppress
from time import perf_counter
from typing import Any
from uuid import uuid4

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .keys import Keys
from .metrics import Metrics
from .refusals import Refusal, refusal_of
from .submissions import dumped

RECORD, KEY = "outpace", "outpace.key"  # where a scope keeps what its log line will tell, and who asks
requests_log = logging.getLogger("outpace.server.requests")
errors_log = logging.getLogger("outpace.server")
KEYED = ("/v1", "/metrics", "/tokenize", "/detokenize", "/tokenizer_info")  # the rest tells nothing of anybody
QUIET = {"/health", "/metrics"}  # asked all the time: counted, not logged


NO_KEY = Refusal(
    401,
    "a key is needed: send it as  Authorization: Bearer KEY  or as  x-api-key: KEY",
    code="invalid_api_key",
    headers={"www-authenticate": "Bearer"},
)


WRONG_HOST = Refusal(
    403,
    "this server is not called by the name in the Host header; names of its own are set with --allow-host",
    code="wrong_host",
)


class RequestMiddleware:
    """`routes`: the paths that are counted by name; all others are one. `hosts`: the names by which the server may be
    called (None: any). A page whose own name its owner lets point to this machine sends that name, and is refused."""

    def __init__(
        self,
        app: ASGIApp,
        metrics: Metrics,
        keys: Keys,
        body_bytes: int,
        routes: frozenset[str],
        hosts: frozenset[str] | None = None,
    ) -> None:
        self._app, self._metrics, self._keys = app, metrics, keys
        self._most, self._routes, self._hosts = body_bytes, routes, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record: dict[str, Any] = {"id": f"req-{uuid4().hex[:24]}", "arrived": perf_counter(), "status": None}
        scope[RECORD] = record

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                record["status"] = message["status"]
                named = [(name, record["id"].encode()) for name in (b"x-request-id", b"request-id")]
                message = {**message, "headers": [*message["headers"], *named]}
            await send(message)

        key = self._keys.check(_header(scope, b"authorization"), _header(scope, b"x-api-key"))
        scope[KEY] = key or ""
        try:
            if self._hosts is not None and _host(scope) not in self._hosts:
                await self._refuse(scope, sending, record, WRONG_HOST)
            elif key is None and scope["path"].startswith(KEYED):
                await self._refuse(scope, sending, record, NO_KEY)
            else:
                await self._app(scope, self._limited(scope, receive), sending)
        except Exception as error:
            errors_log.error("request %s failed: %s", record["id"], type(error).__name__, exc_info=error)
            await self._refuse(scope, sending, record, refusal_of(error))
        finally:
            self._tell(scope, record)

    def _limited(self, scope: Scope, receive: Receive) -> Receive:
        """`receive` that refuses what is beyond the limit, at once if the length is announced."""
        said = _header(scope, b"content-length") or "0"
        announced = int(said) if said.isdigit() and len(said) < 19 else 0
        read = 0

        async def receiving() -> Message:
            nonlocal read
            if announced > self._most:
                raise self._too_large()
            message = await receive()
            read += len(message.get("body", b""))
            if read > self._most:
                raise self._too_large()
            return message

        return receiving

    async def _refuse(self, scope: Scope, send: Send, record: dict[str, Any], refusal: Refusal) -> None:
        if record["status"] is not None:  # a response has begun: all that is left is to break it off
            return
        body = dumped(refusal.body_for(scope["path"], record["id"]))
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        headers += [(name.encode(), value.encode()) for name, value in refusal.headers.items()]
        with suppress(OSError):
            await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
            await send({"type": "http.response.body", "body": body})

    def _too_large(self) -> HTTPException:
        # what is still on its way is not read
        text = f"the body is too large: at most {self._most} bytes are taken here"
        return HTTPException(413, text, headers={"connection": "close"})

    def _tell(self, scope: Scope, record: dict[str, Any]) -> None:
        template = getattr(scope.get("route"), "path", scope["path"])
        route = template if template in self._routes else "other"
        status = record.pop("status") or 499  # the client left before there was an answer
        self._metrics.response(route, status)
        if scope["path"] in QUIET:
            return
        seconds = perf_counter() - record.pop("arrived")
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "id": record.pop("id"),
            "verb": scope["method"],
            "route": scope["path"][:200] if route == "other" else route,
            "status": status,
            "seconds": round(seconds, 4),
            **record,
        }
        requests_log.info(json.dumps(line, default=str))


def _host(scope: Scope) -> str:
    """The name in the Host header, without its port. "localhost" where there is none, which no browser does."""
    said = (_header(scope, b"host") or "localhost").lower()
    return said[1:].partition("]")[0] if said.startswith("[") else said.partition(":")[0]


def _header(scope: Scope, name: bytes) -> str | None:
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), None)
