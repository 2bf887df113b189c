"""From the bytes of a body to what the engine is asked, beside the event loop, and for no more bodies at once than
memory and processors allow.

Whoever sends much waits for others who send much, never those for him who send little: large bodies have threads of
their own, and a limit on their number and their bytes, of which one client gets half.
"""

from __future__ import annotations

import asyncio
import email.message
import json
import os
import sys
import threading
from collections import Counter
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, TypeVar

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import TypeAdapter, ValidationError

from .middleware import KEY
from .service import ServiceError
from .shape import SMALL, Shape, check_shape, parse

T = TypeVar("T")
LEASE = "outpace.lease"  # where a scope keeps what its request holds of the intake
LIGHT = 1 << 16  # bytes: what is no larger needs no lease
_LIGHT_THREADS, _HEAVY_THREADS = 2, 2
_NICE = 5  # these threads give way to those that decode
_RETRY_S = 2.0


class Lease:
    """What one request holds of the intake until it is understood. Belongs to the event loop."""

    def __init__(self, intake: Intake, owner: str) -> None:
        self._intake, self._owner = intake, owner
        self.size = 0

    @property
    def heavy(self) -> bool:
        return self.size > 0

    def grow(self, size: int) -> None:
        """Its body has come to `size` bytes. ServiceError 429 if that is too much beside the others."""
        if size > LIGHT:
            self._intake._take(self._owner, size - self.size, new=not self.heavy)
            self.size = size

    def release(self) -> None:
        """Safe to call twice."""
        if self.heavy:
            self._intake._give(self._owner, self.size)
            self.size = 0


class Intake:
    """`most_bytes` and `most_bodies` of all large bodies together that are being read or understood."""

    def __init__(self, shape: Shape, most_bytes: int, most_bodies: int = 64) -> None:
        self.shape, self.most_bytes, self.most_bodies = shape, most_bytes, most_bodies
        self._bytes: Counter[str] = Counter()
        self._bodies: Counter[str] = Counter()
        self._light = ThreadPoolExecutor(_LIGHT_THREADS, "outpace-light", _give_way)
        self._heavy = ThreadPoolExecutor(_HEAVY_THREADS, "outpace-heavy", _give_way)

    @property
    def bytes_held(self) -> int:
        return self._bytes.total()

    async def body(self, request: Request, model: TypeAdapter[T]) -> T:
        """The body of a request. Raises RequestValidationError, ParameterError and ServiceError 429."""
        client = request.client.host if request.client is not None else ""
        lease = request.scope[LEASE] = Lease(self, request.scope.get(KEY) or client)
        try:
            parts, size = [], 0
            async for part in request.stream():
                parts.append(part)
                size += len(part)
                lease.grow(size)
            data = b"".join(parts)
            parts.clear()
            kind = request.headers.get("content-type", "")
            if size <= SMALL:
                return self._understood(data, kind, model)
            return await self._in_thread(lease, self._understood, data, kind, model)
        except BaseException:
            lease.release()
            raise

    async def run(self, request: Request, function: Callable[..., T], *args: Any) -> T:
        """The function's result, from a thread for requests of this size; what the request held is given back."""
        lease: Lease | None = request.scope.get(LEASE)
        try:
            return await self._in_thread(lease, function, *args)
        finally:
            if lease is not None:
                lease.release()

    async def _in_thread(self, lease: Lease | None, function: Callable[..., T], *args: Any) -> T:
        pool = self._heavy if lease is not None and lease.heavy else self._light
        return await asyncio.get_running_loop().run_in_executor(pool, lambda: function(*args))

    def _understood(self, data: bytes, kind: str, model: TypeAdapter[T]) -> T:
        if data and not _is_json(kind):
            raise RequestValidationError([{"type": "model_type", "loc": ("body",), "msg": "it must be JSON"}])
        if not data:
            raise RequestValidationError([{"type": "missing", "loc": ("body",), "msg": "Field required"}])
        check_shape(data, self.shape)
        try:
            value = parse(data)
        except json.JSONDecodeError as error:
            wrong = {"type": "json_invalid", "loc": ("body", error.pos), "msg": "no JSON", "ctx": {"error": error.msg}}
            raise RequestValidationError([wrong]) from None
        try:
            return model.validate_python(value)
        except ValidationError as error:
            found = error.errors(include_url=False, include_input=False)
            raise RequestValidationError([{**one, "loc": ("body", *one["loc"])} for one in found]) from None

    def close(self) -> None:
        """Nothing more is read."""
        for pool in (self._light, self._heavy):
            pool.shutdown(wait=False, cancel_futures=True)

    def _take(self, owner: str, size: int, new: bool) -> None:
        held, bodies = self._bytes.total() + size, self._bodies.total() + new
        own, own_bodies = self._bytes[owner] + size, self._bodies[owner] + new
        if held > self.most_bytes or bodies > self.most_bodies:
            reason = f"{bodies - new} large bodies of {held - size} bytes are being read"
        elif 2 * own > self.most_bytes or 2 * own_bodies > self.most_bodies:
            reason = f"{own_bodies - new} of your large bodies, {own - size} bytes, are being read"
        else:
            self._bytes[owner], self._bodies[owner] = own, own_bodies
            return
        raise ServiceError(f"{reason}, and no more are taken at once; send it again later", 429, "busy", _RETRY_S)

    def _give(self, owner: str, size: int) -> None:
        self._bytes[owner] -= size
        self._bodies[owner] -= 1
        if not self._bodies[owner]:
            del self._bytes[owner], self._bodies[owner]


class BodyRoute(APIRoute):
    """A route whose body is read by the application's `state.intake`, beside the event loop. What answers takes
    `request` and `body`, and nothing else."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        if self.body_field is None:
            return super().get_route_handler()
        annotation: Any = self.body_field.field_info.annotation
        model: TypeAdapter[Any] = TypeAdapter(annotation)
        answer = self.endpoint

        async def handle(request: Request) -> Response:
            intake: Intake = request.app.state.intake
            body = await intake.body(request, model)
            try:
                response: Response = await answer(request=request, body=body)
                return response
            finally:
                request.scope[LEASE].release()

        return handle


def _is_json(kind: str) -> bool:
    said = email.message.Message()
    said["content-type"] = kind
    subtype = said.get_content_subtype()
    return said.get_content_maintype() == "application" and (subtype == "json" or subtype.endswith("+json"))


def _give_way() -> None:
    """Of lower priority than the rest of the process, where the system has that for one thread."""
    if sys.platform == "linux":
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
