"""/v1/embeddings: texts as vectors, pooled from the final hidden states of the model that is served."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
from fastapi import Request
from pydantic import Field, PlainValidator
from starlette.responses import Response

from ...errors import ParameterError
from ...types import Pooling, RequestOptions, Result, SamplingParams
from .. import vendor
from ..middleware import KEY, RECORD
from ..protocol import Body, prompts_of
from ..service import ServingEngine
from ..submissions import Limits, Submission, check_fits, check_prompt
from . import described

if TYPE_CHECKING:
    from ..app import Api, Route

MOST_INPUTS = 2048  # of one request, as OpenAI has it
PORTION = 32  # inputs that are queued at once: between them others have their turn
_ONE = SamplingParams(max_tokens=1)  # the token behind the text, which is dropped
Input = str | list[str] | list[int] | list[list[int]]


class EmbeddingRequest(Body):
    """Body of /v1/embeddings."""

    rules: ClassVar[dict[str, vendor.Rule]] = {
        "truncate_prompt_tokens": vendor.Refused("a text that is too long is refused"),
        "add_special_tokens": vendor.REQUEST["add_special_tokens"],
        "normalize": vendor.Harmless("vectors have unit length", (True,)),
        "embd_normalize": vendor.Harmless("vectors have unit length", (2,)),
        "safety_identifier": vendor.REQUEST["safety_identifier"],
    }

    model: str | None = Field(None, description="the served model; may be left out")
    input: Annotated[Input, PlainValidator(prompts_of, json_schema_input_type=Input)] = Field(
        description="text, a list of texts, token ids, or a list of lists of token ids"
    )
    encoding_format: Literal["float", "base64"] | None = Field(None, description="base64: of float32, little-endian")
    dimensions: int | None = Field(None, description="only the model's width")
    pooling: Pooling | None = Field(None, description="mean (the default) or last: of the final hidden states")
    user: str | None = Field(None, max_length=512, description="parts owners: their turns in the queue are not shared")
    priority: int | None = Field(None, description="-100 to 100; lower starts first")


class Embeddings:
    def __init__(self, api: Api) -> None:
        self._api = api

    def routes(self) -> list[Route]:
        return [("/v1/embeddings", self.embed, "POST", described.EmbeddingList, "Texts as vectors")]

    async def embed(self, request: Request, body: EmbeddingRequest) -> Response:
        api, record = self._api, request.scope[RECORD]
        record["owner"] = owner = api.keys.owner(request.scope[KEY], body.user)
        api.service.check_open()
        api.check_model(body.model)
        submissions = await api.intake.run(request, submissions_of, body, api.service.engine, owner, api.limits)
        tokens = sum(len(submission.tokens) for submission in submissions)
        record |= {"inputs": len(submissions), "prompt_tokens": tokens}
        if api.log_prompts:
            record["request"] = {"input": body.input}
        parts: list[bytes] = []
        for start in range(0, len(submissions), PORTION):
            results = await api.results(request, submissions[start : start + PORTION])
            parts.append(await asyncio.to_thread(_written, results, start, body.encoding_format or "float"))
        api.metrics.embedded(tokens)
        end = {
            "object": "list",
            "model": api.service.engine.name,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
            "outpace": {
                "pooling": body.pooling or "mean",
                "of": "the model's final hidden states, behind its last norm",
                "normalised": True,
                **({"ignored": body.ignored()} if body.ignored() else {}),
            },
        }
        text = b'{"data":[' + b",".join(parts) + b"]," + json.dumps(end).encode()[1:]
        return Response(text, media_type="application/json")


def submissions_of(body: EmbeddingRequest, engine: ServingEngine, owner: str, limits: Limits) -> list[Submission]:
    """Raises ParameterError for what does not work, CapacityError for a text that is too long."""
    if body.dimensions is not None and body.dimensions != engine.width:
        raise ParameterError(
            f"dimensions={body.dimensions} is not supported: the model was not trained for vectors that can be cut; "
            f"leave it out, or give its width, {engine.width}"
        )
    given: list[Any] = [body.input] if isinstance(body.input, str) else list(body.input)
    if given and isinstance(given[0], int):
        given = [given]
    if not 1 <= len(given) <= MOST_INPUTS:
        raise ParameterError(f"input has {len(given)} texts: it must be from 1 to {MOST_INPUTS}")
    options = RequestOptions(
        owner=owner, priority=body.priority or 0, method="plain", max_draft=0, pooling=body.pooling or "mean"
    )
    submissions = []
    for place, text in enumerate(given):
        if isinstance(text, str):
            if not text:
                raise ParameterError(f"input[{place}] is empty: give a text")
            check_fits([text], engine, limits)
            text = engine.tokenizer.prompt(text)
        check_prompt(text, engine, limits)
        submissions.append(Submission(text, _ONE, options=options))
    return submissions


def _written(results: Sequence[Result], start: int, form: str) -> bytes:
    """Items of the list, parted by commas. A portion at a time, since writing numbers holds up everybody."""
    found = []
    for index, result in enumerate(results, start):
        assert result.prompt is not None and result.prompt.embedding is not None
        vector = result.prompt.embedding
        if form == "base64":
            shown: Any = base64.b64encode(vector.astype(np.dtype("<f4")).tobytes()).decode()
        else:
            shown = vector.tolist()
        found.append(json.dumps({"object": "embedding", "index": index, "embedding": shown}).encode())
    return b",".join(found)
