"""Errors of the server, in words and with what to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from playground_fake import (
    BREAK,
    FOX,
    FakeServer,
    Refusal,
    fox,
    serving,
)
from playground_page import expect, send

pytestmark = pytest.mark.browser


@pytest.mark.parametrize(
    ("refusal", "words"),
    [
        (Refusal(429, "40 requests wait", {"Retry-After": "7"}), ["is full", "40 requests wait.", "in 7 seconds"]),
        (Refusal(400, "max_tokens=9: too many"), ["refused", "max_tokens=9: too many.", "Change the settings"]),
        (Refusal(404, "no model toy"), ["does not know", "no model toy.", "Reload"]),
        (Refusal(413, "too large"), ["larger than the server takes", "Shorten it"]),
        (Refusal(500, "oops"), ["failed (status 500)", "try again"]),
        (Refusal(503, "stopping", {"Retry-After": "2"}), ["not ready or is stopping", "in 2 seconds"]),
    ],
    ids=lambda value: str(value.status) if isinstance(value, Refusal) else "",
)
def test_refusals_in_words(visit: Callable[..., Any], fake: FakeServer, refusal: Refusal, words: list[str]) -> None:
    fake.reply = lambda body: refusal
    page = visit()
    page.fill("#prompt", "hello")
    page.keyboard.press("Enter")
    for part in words:
        expect(page.get_by_role("alert")).to_contain_text(part)
    assert page.input_value("#prompt") == "hello"  # to send again
    fake.reply = fox
    send(page, "hello")
    expect(page.locator("#error")).to_be_hidden()
    assert [m["content"] for m in fake.bodies[-1]["messages"]] == ["hello"]


@pytest.mark.parametrize(
    ("end", "words"),
    [(Refusal(500, "a worker died"), "broke off: a worker died."), (BREAK, "ended before the server said")],
)
def test_answers_that_break_off(visit: Callable[..., Any], fake: FakeServer, end: Refusal, words: str) -> None:
    fake.reply = lambda body: [*FOX[:2], end]
    page = visit()
    page.fill("#prompt", "hello")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_contain_text(words)
    assert page.locator("#log .words").text_content() == "The quick brown fox"


def test_a_server_that_is_gone(browser: Any) -> None:
    with serving() as fake:
        page = browser.new_page()
        page.goto(f"{fake.url}/playground/")
        expect(page.locator("#status")).to_have_text("Ready: toy")
    page.fill("#prompt", "hello")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_contain_text(
        "The server does not answer. See whether outpace serve still runs"
    )
    page.close()


def test_an_api_key(visit: Callable[..., Any], fake: FakeServer) -> None:
    fake.key = "sesame"
    page = visit()
    expect(page.get_by_role("alert")).to_contain_text("asks for an API key")
    page.fill("#api-key", "sesame")  # the settings are open now
    page.keyboard.press("Tab")
    expect(page.locator("#status")).to_have_text("Ready: toy")
    expect(page.locator("#error")).to_be_hidden()
    send(page)
    assert page.evaluate("sessionStorage.getItem('outpace.api-key')") == "sesame"
    assert "sesame" not in page.evaluate("JSON.stringify(localStorage)")
