"""The routes. `create_app` makes an ASGI application over an `EngineService`."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, get_type_hints

from fastapi import FastAPI, Request, Security
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.security import HTTPBearer
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

from .. import __version__
from ..engine.request import StepEvent
from ..errors import OutpaceError
from ..types import Result, SamplingParams
from .bodies import chat_body, completion_body
from .connections import Connections
from .intake import BodyRoute, Intake
from .keys import Keys
from .metrics import CONTENT_TYPE, Follower, Metrics
from .middleware import KEY, RECORD, RequestMiddleware
from .numbers import Figures
from .protocol import ChatRequest, CompletionRequest
from .refusals import ANTHROPIC, Refusal, Refused, refusal_of, refusal_of_body
from .responses import ERRORS, NAMED_STREAM, STREAM, ChatCompletion, Completion, Health, Model, ModelList
from .routes.described import MessageError
from .routes.embeddings import Embeddings
from .routes.messages_routes import Messages
from .routes.response_store import ResponseStore
from .routes.responses_routes import Responses
from .routes.tokens import Tokens
from .service import EngineService, Gone, ServiceError, ServingEngine, Submission, Ticket
from .stream import ChatChunks, Chunks, CompletionChunks, EventStream, chunks_of, json_response, watch
from .submissions import Call, Limits, chat_call, completion_call

log = logging.getLogger("outpace.server")
PLAYGROUND = Path(__file__).parent / "playground"
CLIENT_LEFT = 499
Route = tuple[str, Callable[..., Any], str, Any, str]  # path, what answers, verb, its body, what it is
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
    store: ResponseStore | None = None,
) -> FastAPI:
    """The application starts and stops the service with itself.

    hosts    names by which it may be called; None: any
    aliases  of the model, beside its name
    origins  of web pages whose scripts may call; "*": any
    store    of responses; None: in memory
    """
    keys, limits, metrics = keys or Keys(), limits or Limits(), Metrics(_build(service.engine))
    service.on_lost = lambda result: metrics.ended(result, None)
    store = ResponseStore() if store is None else store
    api = Api(service, keys, limits, metrics, log_prompts, aliases)
    api.families = [Messages(api), Responses(api, store), Embeddings(api), Tokens(api)]

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await asyncio.to_thread(_warm_up, service.engine, app)
        await service.start()
        try:
            yield
        finally:
            await service.stop()
            api.intake.close()
            await asyncio.to_thread(store.close)

    app = FastAPI(title="Outpace", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.intake = api.intake
    app.router.route_class = BodyRoute
    guard = [Security(HTTPBearer(auto_error=False))] if keys.needed else []  # to be described; the middleware checks
    for path, route, verb, model, description in api.routes():
        more = _responses(path, route, verb, description)
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
    app.add_middleware(
        RequestMiddleware, metrics=metrics, keys=keys, body_bytes=limits.body_bytes, routes=names, hosts=hosts
    )
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
    with suppress(OutpaceError):  # grammars need a library that may be missing; a request for one is refused then
        engine.prepare(SamplingParams(regex="a"))
    app.openapi()


def _build(engine: ServingEngine) -> dict[str, str]:
    """What `/metrics` says of what runs here."""
    return {"version": __version__, "model": engine.name, "method": engine.method, "precision": engine.precision}


def _responses(path: str, route: Callable[..., Any], verb: str, description: str) -> dict[int | str, dict[str, Any]]:
    """What a route may answer beside its body, for the description."""
    if path == "/health":
        return {503: {"model": Health, "description": "Stopping"}}
    if path == "/metrics":
        return {401: ERRORS[401]}
    if verb != "POST":
        return {status: ERRORS[status] for status in (400, 401, 404)}
    found = dict(ERRORS)
    if path.startswith(ANTHROPIC):
        found = {status: {**error, "model": MessageError} for status, error in found.items()}
    if "stream" in getattr(_body_of(route), "model_fields", {}):
        named = path not in ("/v1/chat/completions", "/v1/completions")
        found[200] = {"description": description, "content": NAMED_STREAM if named else STREAM}
    return found


def _body_of(route: Callable[..., Any]) -> type[BaseModel] | None:
    return get_type_hints(route).get("body")


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
        self.families: list[Any] = []  # further ones, which use this one
        self.started = int(time.time())

    def routes(self) -> list[Route]:
        further = [route for family in self.families for route in family.routes()]
        return [
            ("/v1/chat/completions", self.chat, "POST", ChatCompletion, "Answer a conversation"),
            ("/v1/completions", self.complete, "POST", Completion, "Continue a text"),
            ("/v1/models", self.models, "GET", ModelList, "What is served"),
            ("/v1/models/{name:path}", self.model, "GET", Model, "One model"),
            ("/health", self.health, "GET", Health, "Whether requests are taken"),
            ("/metrics", self.figures, "GET", None, "Numbers for Prometheus"),
            *further,
        ]

    # -- generation ---------------------------------------------------------------------------------------------

    async def chat(self, request: Request, body: ChatRequest) -> Response:
        return await self.answer(request, body, chat_call, ChatChunks, chat_body)

    async def complete(self, request: Request, body: CompletionRequest) -> Response:
        return await self.answer(request, body, completion_call, CompletionChunks, completion_body)

    async def answer(
        self,
        request: Request,
        body: Any,
        understand: Callable[..., Call],
        chunks: Callable[[Call, ServingEngine, float], Chunks],
        whole: Callable[[Call, Sequence[Result], ServingEngine], dict[str, Any]],
        keep: Callable[[dict[str, Any]], Awaitable[None]] | None = None,
    ) -> Response:
        """From a body to what is sent. `understand(body, engine, owner, limits)` makes the call of it, `chunks` those
        of a stream, `whole` the body of an answer that is none, which `keep` gets before it is sent."""
        record = request.scope[RECORD]
        engine = self.service.engine
        owner = self.keys.owner(request.scope[KEY], body.user)
        record["owner"] = owner
        self.service.check_open()
        self.check_model(body.model)
        call = await self.intake.run(request, understand, body, engine, owner, self.limits)
        del body  # it may be large, and the answer long
        record |= {"stream": call.stream, "choices": len(call.submissions), "prompt_tokens": call.prompt_tokens}
        if self.log_prompts:
            record["request"] = call.log
        follow = self.metrics.follow(record["arrived"])
        ticket = await self.service.submit(call.submissions)
        if call.stream:
            made = chunks(call, engine, record["arrived"])
            source = self._guarded(chunks_of(ticket, made, follow), made, record)
            return EventStream(source, ticket.close, lambda: self._over(ticket, follow, record))
        try:
            results = await self._wait(request, ticket, follow)
        finally:
            self._over(ticket, follow, record)
        build = partial(whole, call, results, engine)
        if call.logprobs is None:
            answer = build()
        else:  # they may be many
            answer = await self.intake.run(request, build)
        if keep is not None:
            await keep(answer)
        return json_response(answer) if call.logprobs is None else await self.intake.run(request, json_response, answer)

    async def results(self, request: Request, submissions: Sequence[Submission]) -> list[Result]:
        """What comes of them, all or none. Whoever leaves gets nothing."""
        ticket = await self.service.submit(submissions)
        try:
            return await self._wait(request, ticket, lambda batch: None)
        finally:
            ticket.close()

    async def _wait(
        self, request: Request, ticket: Ticket, follow: Callable[[list[tuple[int, StepEvent]]], None]
    ) -> list[Result]:
        """All results. Raises Gone when the client leaves, which cancels what is unfinished."""
        watcher = asyncio.create_task(watch(request.receive, ticket.close))
        try:
            while not ticket.finished:
                follow(await ticket.take())
        finally:
            watcher.cancel()
            with suppress(asyncio.CancelledError):
                await watcher
        return [result for result in ticket.results if result is not None]

    async def _guarded(
        self, source: AsyncIterator[bytes], chunks: Chunks, record: dict[str, Any]
    ) -> AsyncIterator[bytes]:
        """A stream that has begun can only tell of an error in an event, which then is its last."""
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
            yield chunks.failed(refusal, record["id"])

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

    def check_model(self, name: str | None) -> None:
        if name is not None and name not in self.names:
            served = " or ".join(map(repr, self.names))
            raise HTTPException(404, f"no model {name[:200]!r} here; served is {served}")

    # -- about the server ---------------------------------------------------------------------------------------

    async def models(self) -> Response:
        return json_response({"object": "list", "data": [self._model(name) for name in self.names]})

    async def model(self, name: str) -> Response:
        self.check_model(name)
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
            Refused: self._failed,
            Gone: self._gone,
            ClientDisconnect: self._gone,
        }

    async def _malformed(self, request: Request, error: RequestValidationError) -> Response:
        body = _body_of(request.scope["endpoint"])
        fields = [] if body is None else list(body.model_fields)
        return self.refuse(request, refusal_of_body(error.errors(), fields, request.headers.get("content-type", "")))

    async def _refused(self, request: Request, error: HTTPException) -> Response:
        code = {404: "not_found", 405: "method_not_allowed", 413: "body_too_large"}.get(error.status_code)
        if error.status_code == 404 and error.detail.startswith("no model"):
            code = "model_not_found"
        elif error.status_code == 404:
            known = ", ".join(dict.fromkeys(path for path, *_ in self.routes()))
            error.detail = f"no route {request.url.path[:200]}; there are {known}"
        return self.refuse(request, Refusal(error.status_code, error.detail, code=code, headers=error.headers or {}))

    async def _failed(self, request: Request, error: Exception) -> Response:
        return self.refuse(request, refusal_of(error))

    def refuse(self, request: Request, refusal: Refusal) -> Response:
        body = refusal.body_for(request.url.path, request.scope[RECORD]["id"])
        return json_response(body, refusal.status, refusal.headers)

    async def _gone(self, request: Request, error: Exception) -> Response:
        return Response(status_code=CLIENT_LEFT)
