"""The routes. `create_app` makes an ASGI application over an `EngineService`."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Security
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

from .. import __version__
from ..errors import OutpaceError
from ..types import SamplingParams
from .asks import Call, Limits, chat_call, completion_call, dumped
from .bodies import chat_body, completion_body
from .connections import Connections
from .intake import BodyRoute, Intake
from .keys import Keys
from .metrics import CONTENT_TYPE, Follower, Metrics
from .middleware import KEY, RECORD, Around
from .numbers import Figures
from .protocol import ChatRequest, CompletionRequest, Generate
from .refusals import Refusal, refusal_of, refusal_of_body
from .responses import ERRORS, STREAM, ChatCompletion, Completion, Health, Model, ModelList
from .service import EngineService, Gone, ServiceError, ServingEngine, Ticket
from .stream import ChatChunks, Chunks, CompletionChunks, EventStream, chunks_of, sse, watch

log = logging.getLogger("outpace.server")
PLAYGROUND = Path(__file__).parent / "playground"
CLIENT_LEFT = 499
_BODIES: dict[str, type[Generate]] = {"/v1/chat/completions": ChatRequest, "/v1/completions": CompletionRequest}
_PAGE_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


def create_app(
    service: EngineService,
    *,
    keys: Keys | None = None,
    limits: Limits | None = None,
    playground: bool = False,
    log_prompts: bool = False,
    hosts: frozenset[str] | None = None,
    aliases: Sequence[str] = (),
    origins: Sequence[str] = (),
) -> FastAPI:
    """The application starts and stops the service with itself.

    hosts    names by which it may be called; None: any
    aliases  of the model, beside its name
    origins  of web pages whose scripts may call; "*": any
    """
    keys, limits, metrics = keys or Keys(), limits or Limits(), Metrics(_build(service.engine))
    service.on_lost = lambda result: metrics.ended(result, None)
    api = Api(service, keys, limits, metrics, log_prompts, aliases)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await asyncio.to_thread(_warm_up, service.engine, app)
        await service.start()
        try:
            yield
        finally:
            await service.stop()
            api.intake.close()

    app = FastAPI(title="Outpace", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.intake = api.intake
    app.router.route_class = BodyRoute
    guard = [Security(HTTPBearer(auto_error=False))] if keys.needed else []  # for the description: Around checks
    for path, route, verb, model, description in api.routes():
        more: dict[int | str, dict[str, Any]] = dict(ERRORS) if verb == "POST" else {s: ERRORS[s] for s in (401, 404)}
        if verb == "POST":
            more[200] = {"description": description, "content": STREAM}
        if path in ("/health", "/metrics"):
            more = {503: {"model": Health, "description": "Stopping"}} if path == "/health" else {401: ERRORS[401]}
        app.add_api_route(
            path,
            route,
            methods=[verb],
            response_model=model,
            response_class=JSONResponse if model is not None else PlainTextResponse,
            responses=more,
            summary=description,
            dependencies=guard,
        )
        if verb == "GET":  # as HTTP wants it, and load balancers
            app.add_api_route(path, route, methods=["HEAD"], include_in_schema=False)
    for kind, handler in api.handlers().items():
        app.add_exception_handler(kind, handler)
    if playground:
        app.mount("/playground", Pages(directory=PLAYGROUND, html=True))
        app.add_route("/", lambda request: RedirectResponse("/playground/"), include_in_schema=False)
    names = frozenset(path for path, *_ in api.routes())
    app.add_middleware(Around, metrics=metrics, keys=keys, body_bytes=limits.body_bytes, routes=names, hosts=hosts)
    if origins:  # outermost: what is refused must be readable to pages too
        app.add_middleware(
            CORSMiddleware,
            allow_origins=origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after"],
        )
    app.openapi = lambda: _described(app)  # type: ignore[method-assign]
    return app


def _warm_up(engine: ServingEngine, app: FastAPI) -> None:
    """What takes a second once, before anybody waits: the vocabulary, that of grammars, the description of the API."""
    engine.tokenizer.vocabulary  # noqa: B018
    with suppress(OutpaceError):  # grammars need a library that may be missing; who asks for one is told
        engine.prepare(SamplingParams(regex="a"))
    app.openapi()


def _build(engine: ServingEngine) -> dict[str, str]:
    """What `/metrics` says of what runs here."""
    return {"version": __version__, "model": engine.name, "method": engine.method, "precision": engine.precision}


def _described(app: FastAPI) -> dict[str, Any]:
    """The description of the API, without the status 422 that the framework puts everywhere: here it is 400."""
    if app.openapi_schema is None:
        found = get_openapi(title=app.title, version=app.version, routes=app.routes)
        for operations in found["paths"].values():
            for operation in operations.values():
                operation["responses"].pop("422", None)
        for name in ("HTTPValidationError", "ValidationError"):
            found["components"]["schemas"].pop(name, None)
        app.openapi_schema = found
    return app.openapi_schema


class Pages(StaticFiles):
    """The playground's files; nothing in them may load or run anything from elsewhere."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        response.headers.update(_PAGE_HEADERS)
        return response


class Api:
    """What the routes do."""

    def __init__(
        self,
        service: EngineService,
        keys: Keys,
        limits: Limits,
        metrics: Metrics,
        log_prompts: bool = False,
        aliases: Sequence[str] = (),
    ) -> None:
        self.service, self.keys, self.limits, self.metrics = service, keys, limits, metrics
        self.log_prompts = log_prompts
        self.names = list(dict.fromkeys([service.engine.name, *aliases]))  # of the model
        self.intake = Intake(limits.shape, 4 * limits.body_bytes)
        self.started = int(time.time())

    def routes(self) -> list[tuple[str, Callable[..., Any], str, Any, str]]:
        """(path, what answers, verb, its body, what it is)."""
        return [
            ("/v1/chat/completions", self.chat, "POST", ChatCompletion, "Answer a conversation"),
            ("/v1/completions", self.complete, "POST", Completion, "Continue a text"),
            ("/v1/models", self.models, "GET", ModelList, "What is served"),
            ("/v1/models/{name:path}", self.model, "GET", Model, "One model"),
            ("/health", self.health, "GET", Health, "Whether requests are taken"),
            ("/metrics", self.figures, "GET", None, "Numbers for Prometheus"),
        ]

    # -- generation ---------------------------------------------------------------------------------------------

    async def chat(self, request: Request, body: ChatRequest) -> Response:
        return await self._answer(request, body, chat_call, ChatChunks, chat_body)

    async def complete(self, request: Request, body: CompletionRequest) -> Response:
        return await self._answer(request, body, completion_call, CompletionChunks, completion_body)

    async def _answer(
        self,
        request: Request,
        body: Any,
        understand: Callable[..., Call],
        chunks: type[Chunks],
        whole: Callable[..., dict[str, Any]],
    ) -> Response:
        record = request.scope[RECORD]
        engine = self.service.engine
        owner = self.keys.owner(request.scope[KEY], body.user)
        record["owner"] = owner
        self.service.check_open()
        self._check_model(body.model)
        call = await self.intake.run(request, understand, body, engine, owner, self.limits)
        del body  # it may be large, and the answer long
        record |= {"stream": call.stream, "choices": len(call.asks), "prompt_tokens": call.prompt_tokens}
        if self.log_prompts:
            record["request"] = call.log
        follow = self.metrics.follow(record["arrived"])
        ticket = await self.service.submit(call.asks)
        if call.stream:
            source = self._guarded(chunks_of(ticket, chunks(call, engine, record["arrived"]), follow), record)
            return EventStream(source, ticket.close, lambda: self._over(ticket, follow, record))
        watcher = asyncio.create_task(watch(request.receive, ticket.close))
        try:
            while not ticket.finished:
                follow(await ticket.take())
        finally:
            watcher.cancel()
            with suppress(asyncio.CancelledError):
                await watcher
            self._over(ticket, follow, record)
        results = [result for result in ticket.results if result is not None]
        if call.logprobs is None:
            return json_response(whole(call, results, engine))
        return await self.intake.run(request, lambda: json_response(whole(call, results, engine)))  # they may be many

    async def _guarded(self, source: AsyncIterator[bytes], record: dict[str, Any]) -> AsyncIterator[bytes]:
        """A stream that has begun can only tell of an error in an event; it then ends without [DONE]."""
        try:
            async for data in source:
                yield data
        except Gone:
            pass
        except Exception as error:
            if not isinstance(error, OutpaceError | ServiceError):
                log.error("a stream failed: %s", type(error).__name__, exc_info=error)
            refusal = refusal_of(error)
            record["error"] = refusal.code
            yield sse(refusal.body())

    def _over(self, ticket: Ticket, follow: Follower, record: dict[str, Any]) -> None:
        """What the log will tell; whatever is unfinished is cancelled."""
        left = ticket.closed
        ticket.close()
        results = [result for result in ticket.results if result is not None]
        record["completion_tokens"] = follow.tokens
        record["finish"] = "left" if left else ",".join(r.finish_reason for r in results) or "error"
        record["first_token_s"] = None if follow.first_s is None else round(follow.first_s, 4)
        if results:
            record["cached_tokens"] = min(r.stats.cached_tokens for r in results)
            record["queue_s"] = round(max(r.stats.queue_s for r in results), 4)
            record["method"] = results[0].method
        if self.log_prompts:
            record["outputs"] = [r.text for r in results]

    def _check_model(self, name: str | None) -> None:
        if name is not None and name not in self.names:
            served = " or ".join(map(repr, self.names))
            raise HTTPException(404, f"no model {name[:200]!r} here; served is {served}")

    # -- about the server ---------------------------------------------------------------------------------------

    async def models(self) -> Response:
        return json_response({"object": "list", "data": [self._model(name) for name in self.names]})

    async def model(self, name: str) -> Response:
        self._check_model(name)
        return json_response(self._model(name))

    def _model(self, name: str) -> dict[str, Any]:
        engine = self.service.engine
        own = {"methods": list(engine.methods), "method": engine.method, "precision": engine.precision}
        return {"id": name, "object": "model", "created": self.started, "owned_by": "outpace", "outpace": own}

    async def health(self) -> Response:
        status = "broken" if self.service.broken else "draining" if self.service.draining else "ready"
        body = {"status": status, "model": self.service.engine.name, "open_calls": self.service.open_calls}
        return json_response(body, 200 if status == "ready" else 503)

    async def figures(self, request: Request) -> Response:
        own: dict[str, float | Mapping[str, float]] = {
            "open_calls": self.service.open_calls,
            "failed_steps": self.service.steps_failed,
            "large_body_bytes": self.intake.bytes_held,
        }
        connections: Connections | None = getattr(request.app.state, "connections", None)
        if connections is not None:
            own |= {"open_connections": connections.open, "closed_connections": connections.closed}
        return Response(self.metrics.text(Figures(await self.service.metrics(), own)), media_type=CONTENT_TYPE)

    # -- errors -------------------------------------------------------------------------------------------------

    def handlers(self) -> Mapping[type[Exception], Callable[[Request, Any], Any]]:
        return {
            RequestValidationError: self._malformed,
            HTTPException: self._refused,
            OutpaceError: self._failed,
            ServiceError: self._failed,
            Gone: self._gone,
            ClientDisconnect: self._gone,
        }

    async def _malformed(self, request: Request, error: RequestValidationError) -> Response:
        fields = list(_BODIES[request.url.path].model_fields) if request.url.path in _BODIES else []
        return refused(refusal_of_body(error.errors(), fields, request.headers.get("content-type", "")))

    async def _refused(self, request: Request, error: HTTPException) -> Response:
        code = {404: "not_found", 405: "method_not_allowed", 413: "body_too_large"}.get(error.status_code)
        if error.status_code == 404 and error.detail.startswith("no model"):
            code = "model_not_found"
        elif error.status_code == 404:
            known = ", ".join(path for path, *_ in self.routes())
            error.detail = f"no route {request.url.path[:200]}; there are {known}"
        return refused(Refusal(error.status_code, error.detail, code=code, headers=error.headers or {}))

    async def _failed(self, request: Request, error: Exception) -> Response:
        return refused(refusal_of(error))

    async def _gone(self, request: Request, error: Exception) -> Response:
        return Response(status_code=CLIENT_LEFT)


def json_response(body: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    if isinstance(body, dict) and len(body.get("choices") or []) > 1:
        return Response(_in_pieces(body), status, headers, "application/json")
    return Response(dumped(body), status, headers, "application/json")


def _in_pieces(body: dict[str, Any]) -> bytes:
    """JSON of a body, choice by choice: the library lets no other thread run while it writes one value."""
    choices = b"[" + b",".join([dumped(choice) for choice in body["choices"]]) + b"]"
    parts = [dumped(name) + b":" + (choices if name == "choices" else dumped(value)) for name, value in body.items()]
    return b"{" + b",".join(parts) + b"}"


def refused(refusal: Refusal) -> Response:
    return json_response(refusal.body(), refusal.status, refusal.headers)
