"""The routes under /v1/messages."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from fastapi import Request
from starlette.responses import Response

from ...errors import ParameterError
from ..bodies import ignored
from ..middleware import KEY, RECORD
from ..stream import json_response
from . import described
from .messages import CountRequest, MessagesRequest, counted_call, message_body, messages_call
from .messages_stream import MessageEvents

if TYPE_CHECKING:
    from ..app import Api, Route

_VERSION = re.compile(r"20[0-9]{2}-[0-9]{2}-[0-9]{2}")


class Messages:
    def __init__(self, api: Api) -> None:
        self._api = api

    def routes(self) -> list[Route]:
        return [
            ("/v1/messages", self.create, "POST", described.Message, "Answer a conversation, as Anthropic's API does"),
            ("/v1/messages/count_tokens", self.count, "POST", described.MessageTokens, "How long its prompt would be"),
        ]

    async def create(self, request: Request, body: MessagesRequest) -> Response:
        _check_version(request)
        return await self._api.answer(request, body, messages_call, MessageEvents, message_body)

    async def count(self, request: Request, body: CountRequest) -> Response:
        _check_version(request)
        api = self._api
        request.scope[RECORD]["owner"] = owner = api.keys.owner(request.scope[KEY], None)
        api.check_model(body.model)
        call = await api.intake.run(request, counted_call, body, api.service.engine, owner, api.limits)
        own = {"outpace": ignored(call)} if call.ignored else {}
        return json_response({"input_tokens": call.prompt_tokens, **own})


def _check_version(request: Request) -> None:
    """The bodies of all versions so far have the fields that are understood here."""
    version = request.headers.get("anthropic-version", "2023-06-01")
    if not _VERSION.fullmatch(version):
        raise ParameterError(f"anthropic-version: {version[:40]!r} is no version, send one like 2023-06-01")
