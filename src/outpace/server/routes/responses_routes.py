"""The routes under /v1/responses."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

from fastapi import Query, Request
from starlette.responses import Response

from ...errors import ParameterError
from ..middleware import KEY
from ..refusals import Refusal, Refused
from ..stream import json_response
from . import described
from .response_store import Kept, ResponseStore
from .responses import ResponsesRequest, Turn, as_input, response_body
from .responses_stream import ResponseEvents

if TYPE_CHECKING:
    from ..app import Api, Route

MOST_ITEMS = 100  # of one page
User = Annotated[str | None, Query(max_length=512, description="as it was named when the response was made")]


class Responses:
    """Answers, and keeps what it answered in a store."""

    def __init__(self, api: Api, store: ResponseStore) -> None:
        self._api, self._store = api, store

    def routes(self) -> list[Route]:
        one = "/v1/responses/{response_id}"
        return [
            ("/v1/responses", self.create, "POST", described.Response, "Answer, and keep the answer for later"),
            (one, self.get, "GET", described.Response, "A response that was kept"),
            (one, self.delete, "DELETE", described.DeletedResponse, "Forget a response"),
            (f"{one}/input_items", self.items, "GET", described.ItemList, "What a response answered"),
            (f"{one}/cancel", self.cancel, "POST", described.Response, "Refused: nothing runs in the background"),
        ]

    async def create(self, request: Request, body: ResponsesRequest) -> Response:
        owner = self._api.keys.person(request.scope[KEY], body.user)
        turn = Turn(body)
        if body.previous_response_id is not None:
            earlier = await asyncio.to_thread(self._store.conversation, owner, body.previous_response_id)
            if earlier is None:
                raise Refused(
                    Refusal(
                        400,
                        f"previous_response_id: {_missing(body.previous_response_id)}, or one that it leads back to is "
                        "gone: send the whole conversation as input",
                        param="previous_response_id",
                        code="previous_response_not_found",
                    )
                )
            turn.earlier = [item for kept in earlier for item in [*kept.input, *as_input(kept.response["output"])]]
        keep = partial(self._keep, owner, self._api.keys.person(request.scope[KEY], None), body)
        chunks = partial(ResponseEvents, turn=turn, keep=keep)
        return await self._api.answer(request, body, turn.call, chunks, partial(response_body, turn), keep)

    async def _keep(self, owner: str, account: str, body: ResponsesRequest, response: dict[str, Any]) -> None:
        if body.store is not False:
            kept = Kept(body.items(), response)
            response["store"] = await asyncio.to_thread(self._store.put, owner, kept, account)

    async def get(self, request: Request, response_id: str, user: User = None) -> Response:
        return json_response((await self._find(request, response_id, user)).response)

    async def delete(self, request: Request, response_id: str, user: User = None) -> Response:
        owner = self._api.keys.person(request.scope[KEY], user)
        if not await asyncio.to_thread(self._store.delete, owner, response_id):
            raise self._not_found(response_id)
        return json_response({"id": response_id, "object": "response.deleted", "deleted": True})

    async def items(
        self,
        request: Request,
        response_id: str,
        user: User = None,
        limit: Annotated[int, Query(ge=1, le=MOST_ITEMS)] = 20,
        order: Literal["asc", "desc"] = "desc",
        after: Annotated[str | None, Query(max_length=100)] = None,
    ) -> Response:
        kept = await self._find(request, response_id, user)
        found = [_listed(item, f"{response_id.replace('resp_', 'item_', 1)}_{i}") for i, item in enumerate(kept.input)]
        if order == "desc":
            found.reverse()
        if after is not None:
            places = [i for i, item in enumerate(found) if item["id"] == after]
            if not places:
                raise ParameterError(f"after: this response has no input item {after!r}")
            found = found[places[0] + 1 :]
        page = found[:limit]
        ends = {"first_id": page[0]["id"] if page else None, "last_id": page[-1]["id"] if page else None}
        return json_response({"object": "list", "data": page, **ends, "has_more": len(found) > limit})

    async def cancel(self, request: Request, response_id: str, user: User = None) -> Response:
        await self._find(request, response_id, user)
        raise ParameterError(
            "cancel: this response is complete, and none is made in the background; to end one that is being "
            "streamed, close its connection"
        )

    async def _find(self, request: Request, id: str, user: str | None) -> Kept:
        kept = await asyncio.to_thread(self._store.get, self._api.keys.person(request.scope[KEY], user), id)
        if kept is None:
            raise self._not_found(id)
        return kept

    def _not_found(self, id: str) -> Exception:
        message = f"{_missing(id)}; one that was made with `user` is found with ?user=NAME"
        return Refused(Refusal(404, message, code="response_not_found"))


def _missing(id: str) -> str:
    return f"there is no response {id[:100]!r} of this key and user (it was not kept, has been deleted or is too old)"


def _listed(item: dict[str, Any], id: str) -> dict[str, Any]:
    """An input item as it is listed: a text is one part."""
    if item["type"] == "message" and isinstance(item["content"], str):
        kind = "output_text" if item["role"] == "assistant" else "input_text"
        item = {**item, "content": [{"type": kind, "text": item["content"]}]}
    return {"id": id, "status": "completed", **item}
