"""Names of the model, pages of other servers, and HEAD."""

from __future__ import annotations

from collections.abc import Callable

import httpx
import openai
import pytest
from click.testing import CliRunner
from fake import FakeEngine
from live import Live

from outpace.cli.serve import serve as command
from outpace.errors import ParameterError
from outpace.server.keys import Keys
from outpace.server.names import model_names, origins

PAGE = {"origin": "https://chat.example"}
HELLO = {"messages": [{"role": "user", "content": "Hello"}]}


def test_a_model_may_have_several_names(serve: Callable[..., Live]) -> None:
    live = serve(FakeEngine(), aliases=["gpt-4o-mini", "local"])
    client = openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0)
    assert [model.id for model in client.models.list().data] == ["fake", "gpt-4o-mini", "local"]
    assert client.models.retrieve("local").id == "local"
    for name in ("fake", "gpt-4o-mini", "local"):
        answer = client.chat.completions.create(model=name, messages=[{"role": "user", "content": "x"}])
        assert answer.model == "fake", "responses have the first name"
    with pytest.raises(openai.NotFoundError, match="served is 'fake' or 'gpt-4o-mini' or 'local'"):
        client.chat.completions.create(model="gpt-4", messages=[{"role": "user", "content": "x"}])


def test_pages_of_named_origins_may_call(serve: Callable[..., Live]) -> None:
    live = serve(FakeEngine(), origins=["https://chat.example"], keys=Keys(["secret"]))
    asks = {
        **PAGE,
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type,x-stainless-os",
    }
    url = f"{live.url}/v1/chat/completions"
    preflight = httpx.options(url, headers=asks)
    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-origin"] == "https://chat.example"
    assert "x-stainless-os" in preflight.headers["access-control-allow-headers"]
    refused = httpx.post(url, json=HELLO, headers=PAGE)
    assert refused.status_code == 401, "a key is needed all the same"
    assert refused.headers["access-control-allow-origin"] == "https://chat.example"
    for stream in (False, True):
        answer = httpx.post(url, json=HELLO | {"stream": stream}, headers=PAGE | {"authorization": "Bearer secret"})
        assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == "https://chat.example"
        assert "x-request-id" in answer.headers["access-control-expose-headers"]
    other = {**asks, "origin": "https://evil.example"}
    assert httpx.options(url, headers=other).status_code == 400
    assert "access-control-allow-origin" not in httpx.post(url, json=HELLO, headers={**other}).headers


def test_without_origins_no_page_may_read(serve: Callable[..., Live]) -> None:
    live = serve(FakeEngine())
    assert "access-control-allow-origin" not in httpx.get(f"{live.url}/health", headers=PAGE).headers


def test_every_page_may_where_all_may(serve: Callable[..., Live]) -> None:
    live = serve(FakeEngine(), origins=["*"])
    assert httpx.get(f"{live.url}/health", headers=PAGE).headers["access-control-allow-origin"] == "*"


def test_head_is_get_without_a_body(serve: Callable[..., Live]) -> None:
    live = serve(FakeEngine())
    for path in ("/health", "/v1/models", "/v1/models/fake", "/metrics"):
        answer = httpx.head(f"{live.url}{path}")
        assert answer.status_code == 200 and answer.content == b""
        assert answer.headers["content-type"] == httpx.get(f"{live.url}{path}").headers["content-type"]
    assert httpx.head(f"{live.url}/v1/models/other").status_code == 404
    live.service.drain()
    assert httpx.head(f"{live.url}/health").status_code == 503


def test_names_and_origins_are_checked() -> None:
    assert model_names(["a/b:7B", "c", "c"]) == ["a/b:7B", "c"]
    assert origins(["*", "HTTP://[::1]:3000/"]) == ["*", "http://[::1]:3000"]
    for name in ("", "a b", "é", "x" * 201):
        with pytest.raises(ParameterError, match="--served-model-name"):
            model_names([name])
    for origin in ("", "chat.example", "https://chat.example/page", "null", "https://*.example", "https://"):
        with pytest.raises(ParameterError, match="--cors-origin"):
            origins([origin])


def test_the_command_refuses_them_before_it_loads_anything() -> None:
    found = CliRunner().invoke(command, ["--cors-origin", "chat.example", "-m", "no-such-model"])
    assert isinstance(found.exception, ParameterError) and "--cors-origin 'chat.example'" in str(found.exception)
    found = CliRunner().invoke(command, ["--alias", "a b", "-m", "no-such-model"])
    assert isinstance(found.exception, ParameterError) and "--served-model-name 'a b'" in str(found.exception)
