"""What the tests do on the playground's page, and read from it."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest

expect = pytest.importorskip("playwright.sync_api", reason="pip install playwright").expect


def send(page: Any, prompt: str = "Write a pangram.", ended: str = "Answered") -> None:
    page.fill("#prompt", prompt)
    page.keyboard.press("Enter")
    expect(page.locator("#status")).to_have_text(re.compile(f"^{ended}"), timeout=60_000)


def style(locator: Any, name: str) -> str:
    return locator.evaluate("(element, name) => getComputedStyle(element)[name]", name)


def token(page: Any, text: str) -> Any:
    return page.locator("#log .words .tok").get_by_text(text, exact=True).first


def picture(page: Any, name: str) -> None:
    if folder := os.environ.get("OUTPACE_SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"playground-{name}.png")


def racing(page: Any, prompt: str = "Write a pangram.") -> Any:
    page.click("#to-race")
    page.fill("#prompt", prompt)
    page.keyboard.press("Enter")
    return page.locator("#verdict h2")
