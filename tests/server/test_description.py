"""The server against its own OpenAPI description, by schemathesis."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from fake import TOOL_TEMPLATE, FakeEngine
from hypothesis import HealthCheck, given, settings
from live import Live
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from outpace.server.submissions import Limits

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    negative_data_rejection,
    unsupported_method,
]


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    with Live(FakeEngine(template=TOOL_TEMPLATE, step_s=0.0), limits=Limits(answer_tokens=8)) as server:
        yield server


@pytest.fixture(scope="module")
def description(live: Live) -> Any:
    return schemathesis.openapi.from_url(f"{live.url}/openapi.json")


OPERATIONS = [
    ("/v1/chat/completions", "POST"),
    ("/v1/completions", "POST"),
    ("/v1/responses", "POST"),
    ("/v1/messages", "POST"),
    ("/v1/messages/count_tokens", "POST"),
    ("/v1/embeddings", "POST"),
    ("/tokenize", "POST"),
    ("/detokenize", "POST"),
    ("/v1/responses/{response_id}/cancel", "POST"),
    ("/v1/responses/{response_id}", "GET"),
    ("/v1/responses/{response_id}", "DELETE"),
    ("/v1/responses/{response_id}/input_items", "GET"),
    ("/tokenizer_info", "GET"),
    ("/v1/models", "GET"),
    ("/v1/models/{name}", "GET"),
    ("/health", "GET"),
    ("/metrics", "GET"),
]


def hold(description: Any, path: str, verb: str, mode: GenerationMode, examples: int) -> None:
    """Requests made from the description, right or wrong ones, and whether the answers are as it says."""
    operation = description[path][verb]

    @settings(max_examples=examples, suppress_health_check=list(HealthCheck), database=None)
    @given(case=operation.as_strategy(generation_mode=mode))
    def run(case: Any) -> None:
        case.call_and_validate(checks=CHECKS)

    run()


RIGHT, WRONG = GenerationMode.POSITIVE, GenerationMode.NEGATIVE
BODIES = OPERATIONS[:8]
STREAMS = OPERATIONS[:4]


@pytest.mark.parametrize(("path", "verb"), OPERATIONS)
def test_what_is_described_holds_of_right_requests(description: Any, path: str, verb: str) -> None:
    hold(description, path, verb, RIGHT, 15)


@pytest.mark.parametrize(("path", "verb"), BODIES)
def test_what_is_described_holds_of_wrong_requests(description: Any, path: str, verb: str) -> None:
    hold(description, path, verb, WRONG, 15)


@pytest.mark.slow
@pytest.mark.parametrize("mode", [RIGHT, WRONG])
@pytest.mark.parametrize(("path", "verb"), BODIES)
def test_what_is_described_holds_for_many(description: Any, path: str, verb: str, mode: GenerationMode) -> None:
    hold(description, path, verb, mode, 1000)


def test_the_description_has_every_route(live: Live) -> None:
    paths = httpx.get(f"{live.url}/openapi.json").json()["paths"]
    assert {(path, verb.upper()) for path in paths for verb in paths[path]} == set(OPERATIONS)
    for route, verb in BODIES:
        answers = paths[route][verb.lower()]["responses"]
        assert "422" not in answers and {"200", "400", "401", "404", "413", "429", "500", "503"} <= set(answers)
        kinds = {"application/json", "text/event-stream"} if (route, verb) in STREAMS else {"application/json"}
        assert set(answers["200"]["content"]) == kinds
