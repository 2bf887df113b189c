"""/tokenize, /detokenize and /tokenizer_info, with the fields of vLLM and of llama.cpp."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastapi import Request
from pydantic import Field
from starlette.responses import Response

from ...errors import ParameterError
from ...types import SamplingParams
from ..logprobs import Shown
from ..protocol import Body, ChatRequest, Message, Tool
from ..service import ServingEngine
from ..stream import json_response
from ..submissions import Limits, chat_prompt, check_fits, check_ids
from ..tools import plan
from . import described

if TYPE_CHECKING:
    from ..app import Api, Route

MOST_TOKENS = 1 << 20  # to be detokenized at once


class TokenizeRequest(Body):
    """Body of /tokenize: one of `prompt` (vLLM), `content` (llama.cpp) and `messages` (vLLM)."""

    model: str | None = Field(None, description="the served model; may be left out")
    prompt: str | None = None
    content: str | None = None
    messages: list[Message] | None = Field(None, min_length=1)
    tools: list[Tool] | None = None
    add_generation_prompt: bool | None = None
    add_special_tokens: bool | None = Field(None, description="the beginning token; default true with prompt")
    add_special: bool | None = Field(None, description="the same; default false with content")
    parse_special: bool | None = Field(None, description="false: control tokens in the text are letters, as in prompts")
    return_token_strs: bool | None = None
    with_pieces: bool | None = None


class DetokenizeRequest(Body):
    """Body of /detokenize."""

    model: str | None = Field(None, description="the served model; may be left out")
    tokens: list[int] = Field(max_length=MOST_TOKENS)


class Tokens:
    def __init__(self, api: Api) -> None:
        self._api = api

    def routes(self) -> list[Route]:
        return [
            ("/tokenize", self.tokenize, "POST", described.Tokenized, "Token ids of a text or a conversation"),
            ("/detokenize", self.detokenize, "POST", described.Detokenized, "The text of token ids"),
            ("/tokenizer_info", self.info, "GET", described.TokenizerInfo, "Named tokens and the chat template"),
        ]

    async def tokenize(self, request: Request, body: TokenizeRequest) -> Response:
        self._api.check_model(body.model)
        engine, limits = self._api.service.engine, self._api.limits
        return json_response(await self._api.intake.run(request, tokenized, body, engine, limits))

    async def detokenize(self, request: Request, body: DetokenizeRequest) -> Response:
        self._api.check_model(body.model)
        return json_response(await self._api.intake.run(request, detokenized, body, self._api.service.engine))

    async def info(self) -> Response:
        engine = self._api.service.engine
        named = engine.tokenizer.named_tokens
        more = {"chat_template": engine.tokenizer.chat_template, "model_max_length": engine.max_new_tokens([])}
        return json_response({**named, **more})


def tokenized(body: TokenizeRequest, engine: ServingEngine, limits: Limits) -> dict[str, Any]:
    """Raises ParameterError for what does not work, CapacityError for a text that no prompt could hold."""
    tokens, unread = _tokens(body, engine, limits)
    found: dict[str, Any] = {"count": len(tokens), "max_model_len": engine.max_new_tokens([]), "tokens": tokens}
    shown = Shown(engine.tokenizer, SamplingParams())
    if body.return_token_strs:
        found["token_strs"] = [shown.token(id)[0] for id in tokens]
    if body.with_pieces:
        found["tokens"] = [{"id": id, "piece": _piece(shown.token(id)[1])} for id in tokens]
    if ignored := [*body.ignored(), *unread]:
        found["outpace"] = {"ignored": ignored}
    return found


def _tokens(body: TokenizeRequest, engine: ServingEngine, limits: Limits) -> tuple[list[int], list[str]]:
    """The tokens, and the fields that the chat template does not read."""
    given = [name for name in ("prompt", "content", "messages") if getattr(body, name) is not None]
    if len(given) != 1:
        raise ParameterError(f"give one of prompt, content and messages, not {' and '.join(given) or 'none'}")
    if body.messages is not None:
        for name in ("add_special_tokens", "add_special", "parse_special"):
            if getattr(body, name) is not None:
                raise ParameterError(f"{name} goes with prompt or content: the chat template decides for messages")
        chat = ChatRequest.model_construct(messages=body.messages, add_generation_prompt=body.add_generation_prompt)
        return chat_prompt(chat, plan(body.tools, None, None), engine, limits)
    for name in ("tools", "add_generation_prompt"):
        if getattr(body, name) is not None:
            raise ParameterError(f"{name} goes with messages")
    if None not in (body.add_special_tokens, body.add_special) and body.add_special_tokens != body.add_special:
        raise ParameterError("add_special_tokens and add_special differ: give one of them")
    text = body.prompt if body.prompt is not None else body.content
    assert text is not None
    check_fits([text], engine, limits)
    wanted = next((v for v in (body.add_special_tokens, body.add_special) if v is not None), body.prompt is not None)
    special = body.parse_special is not False
    if wanted:
        return engine.tokenizer.prompt(text, special=special), []
    return engine.tokenizer.encode(text, special=special), []


def _piece(data: bytes) -> str | list[int]:
    """A token's text, or its bytes where it holds a part of a character."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return list(data)


def detokenized(body: DetokenizeRequest, engine: ServingEngine) -> dict[str, Any]:
    check_ids("tokens", body.tokens, engine)
    text = engine.tokenizer.decode(body.tokens, skip_special=False)
    return {"content": text, "prompt": text}
