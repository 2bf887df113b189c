"""The playground before Outpace's own server, over an engine without a model: both speak of the same stream."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="pip install outpace[serve]")
from fake import FakeEngine
from live import Live
from playground_page import expect, racing, send, style, token

from outpace.server.keys import Keys

pytestmark = pytest.mark.browser

TEXT = "Ça va, 日本?\n<b>oui</b>"  # a token is a byte: most characters here take several


def test_an_answer(visit: Callable[..., Any]) -> None:
    with Live(FakeEngine(lambda asked: TEXT), playground=True) as live:
        page = visit(url=live.url)
        send(page)
        assert page.locator("#log .words").text_content() == TEXT
        sources = {t: style(token(page, t), "textDecorationLine") for t in ("o", "u")}
        assert set(sources.values()) == {"underline", "none"}  # every step has one of either
        n = len(TEXT.encode()) + 1  # and the token that ends it
        expect(page.locator("#log .figures")).to_contain_text(f"tokens{n}")
        assert page.locator("#log .legend li").all_text_contents()[1].startswith("suffix ")
        page.get_by_role("slider").focus()
        page.keyboard.press("Home")
        page.keyboard.press("ArrowRight")
        expect(page.locator("#step .rejected .node")).to_have_text([live.engine.tokenizer.decode([65])])
        assert page.locator("#method option").all_text_contents()[1:] == ["plain", "suffix"]


def test_a_race(visit: Callable[..., Any]) -> None:
    engine = FakeEngine(lambda asked: TEXT, step_s=0.01)
    with Live(engine, playground=True) as live:
        page = visit(url=live.url)
        page.click("#settings summary")
        page.select_option("#method", "suffix")
        expect(racing(page)).to_have_text(re.compile("^Identical"))
        assert [(a.params.max_tokens, a.options.method) for a in engine.asked] == [
            (1, "plain"),
            (256, "suffix"),
            (256, "plain"),
        ]
        engine.answer = lambda asked: TEXT if asked.options.method == "plain" else TEXT[:8] + "!"
        expect(racing(page)).to_have_text(f"They part at token {len(TEXT[:8].encode()) + 1}")


def test_stopping_and_failing(visit: Callable[..., Any]) -> None:
    engine = FakeEngine(lambda asked: "x" * 2000, step_s=0.02)
    with Live(engine, playground=True) as live:
        page = visit(url=live.url)
        page.fill("#prompt", "go on and on")
        page.keyboard.press("Enter")
        expect(page.locator("#log .step").nth(3)).to_be_visible()
        page.keyboard.press("Escape")
        expect(page.locator("#status")).to_have_text("Stopped. What came is kept.")
        until = time.monotonic() + 5
        while not engine.cancelled and time.monotonic() < until:
            time.sleep(0.02)
        assert engine.cancelled == [1]
        page.fill("#prompt", "again")
        page.keyboard.press("Enter")
        expect(page.locator("#log .answer").nth(1).locator(".step").nth(3)).to_be_visible()
        engine.fail = RuntimeError("injected")
        expect(page.get_by_role("alert")).to_contain_text("The server broke off")


def test_keys_and_limits(visit: Callable[..., Any]) -> None:
    with Live(FakeEngine(context=300), playground=True, keys=Keys({"sesame"}, False)) as live:
        page = visit(url=live.url)
        expect(page.get_by_role("alert")).to_contain_text("asks for an API key")
        page.fill("#api-key", "sesame")
        page.fill("#max-tokens", "50")
        page.keyboard.press("Tab")
        expect(page.locator("#status")).to_have_text("Ready: fake")
        send(page)
        page.fill("#max-tokens", "1000000")
        page.fill("#prompt", "more")
        page.keyboard.press("Enter")
        expect(page.get_by_role("alert")).to_contain_text("The server says")
