"""The playground in headless Chromium, before a server of canned answers; no model runs.

Needs `pip install playwright` and a Chromium of the system (`apt-get install chromium`); no browser is fetched.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from playground_fake import FakeServer, serving

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    if CHROMIUM is None:
        pytest.skip("no Chromium on this system: apt-get install chromium")
    with sync_playwright() as playwright:
        # the sandbox needs rights that a container's root does not have; the pages are our own
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM,
            args=["--no-sandbox", "--disable-background-networking", "--disable-component-update"],
        )
        yield browser
        browser.close()


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    with serving() as server:
        yield server


@pytest.fixture
def visit(browser: Any, fake: FakeServer) -> Iterator[Callable[..., Any]]:
    """Opens the page in a fresh profile. In the end nothing may have failed inside it or gone to another site."""
    from playwright.sync_api import expect

    contexts, wrong, asked = [], [], []

    def open_page(
        scheme: str = "light", width: int = 1100, height: int = 800, at: str = "", url: str = fake.url
    ) -> Any:
        size = {"width": width, "height": height}
        contexts.append(browser.new_context(color_scheme=scheme, viewport=size, reduced_motion="reduce"))
        page = contexts[-1].new_page()
        page.set_default_timeout(10_000)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda m: wrong.append(m.text) if m.type == "error" and "status of" not in m.text else None)
        page.on("request", lambda request: asked.append((url, request.url)))
        page.goto(f"{url}/playground/{at}")
        expect(page.locator("#prompt")).to_be_focused()
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert [text for text in wrong if "ERR_CONNECTION" not in text and "ERR_INCOMPLETE" not in text] == []
    assert [address for url, address in asked if not address.startswith(url)] == []
