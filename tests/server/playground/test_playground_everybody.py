"""For everybody: keyboard, names, phone width, dark and light; and the pictures of docs/images."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
from playground_fake import (
    FOX,
    FakeServer,
    Step,
    chain,
    is_plain,
    plainly,
)
from playground_page import expect, picture, racing, send, style, token

pytestmark = pytest.mark.browser


def test_everything_is_reached_by_keyboard(visit: Callable[..., Any]) -> None:
    page = visit()
    send(page)
    page.click("#settings summary")
    token(page, "brown").click()
    wanted = page.evaluate(
        """() => [...document.querySelectorAll("a, button, input, select, textarea, summary")]
            .filter((e) => e.checkVisibility() && !e.disabled)
            .map((e) => (e.dataset.nr = String(document.querySelectorAll("[data-nr]").length)))"""
    )
    page.locator(".skip").focus()
    page.keyboard.press("Tab")
    page.keyboard.press("Shift+Tab")  # now it is the keyboard that moves the focus
    reached, plain = [], []
    for _ in range(len(wanted) + 8):
        nr, seen = page.evaluate(
            """() => {
              const e = document.activeElement;
              const s = getComputedStyle(e);
              return [e.dataset.nr ?? e.id, s.outlineStyle !== "none" && parseFloat(s.outlineWidth) >= 2];
            }"""
        )
        reached.append(nr)
        if nr and not seen:
            plain.append(nr)
        page.keyboard.press("Tab")
    assert len(wanted) > 12 and set(wanted) <= set(reached)
    assert plain == []  # focus can be seen everywhere
    first = list(dict.fromkeys(nr for nr in reached if nr in wanted))
    assert first == wanted  # in the order of the page


def test_skip_link_and_names(visit: Callable[..., Any]) -> None:
    page = visit()
    send(page)
    unnamed = page.locator("button:visible, a:visible, input:visible, select:visible, textarea:visible").evaluate_all(
        "all => all.filter((e) => !(e.textContent.trim() || e.ariaLabel || e.labels?.length)).map((e) => e.outerHTML)"
    )
    assert unnamed == []
    assert page.get_by_role("status").count() == 1 and page.get_by_role("textbox", name="Prompt").count() == 1
    page.locator(".skip").focus()
    page.keyboard.press("Enter")
    expect(page.locator("#prompt")).to_be_focused()


def too_wide(page: Any) -> list[str]:
    """Visible elements that stick out of the window; a scroll bar could be hidden by a parent that clips."""
    return page.evaluate(
        """() => [...document.body.querySelectorAll("*")]
            .filter((e) => e.checkVisibility() && !e.matches(".skip, .hidden") && !e.closest("svg"))
            .filter((e) => e.getBoundingClientRect().right > innerWidth + 0.5 || e.getBoundingClientRect().left < -0.5)
            .map((e) => e.outerHTML.slice(0, 80))
            .concat(document.documentElement.scrollWidth > innerWidth ? ["the page"] : [])"""
    )


def test_phone_width_needs_no_sideways_scrolling(visit: Callable[..., Any], fake: FakeServer) -> None:
    long = "averylongword" * 12
    many = tuple(f" {'w' * (i % 9)}{i}" for i in range(12))
    wide = [*FOX, chain(long, *many, source="suffix", own=long, rejected=(long, *many))]
    fake.reply = lambda body: plainly(wide) if is_plain(body) else wide
    page = visit(width=360, height=740)
    assert too_wide(page) == []
    send(page, long)
    assert too_wide(page) == []
    page.get_by_role("slider").focus()
    expect(page.locator("#step .rejected .node").first).to_be_visible()
    assert too_wide(page) == []
    page.click("#settings summary")
    assert too_wide(page) == []
    expect(racing(page)).to_have_text(re.compile("^Identical"))
    assert too_wide(page) == []


def luminance(colour: str) -> float:
    parts = [int(float(part)) / 255 for part in re.findall(r"[\d.]+", colour)[:3]]
    r, g, b = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def contrast(one: str, other: str) -> float:
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_dark_and_light(visit: Callable[..., Any]) -> None:
    grounds = {}
    for scheme in ("light", "dark"):
        page = visit(scheme)
        grounds[scheme] = style(page.locator("body"), "backgroundColor")
        assert contrast(grounds[scheme], style(page.locator("body"), "color")) > 7
        assert contrast(grounds[scheme], style(page.locator("#keys"), "color")) > 4.5
    assert luminance(grounds["light"]) > 0.8 and luminance(grounds["dark"]) < 0.05
    page.get_by_role("button", name="Light theme").click()
    assert style(page.locator("body"), "backgroundColor") == grounds["light"]
    page.reload()
    assert style(page.locator("body"), "backgroundColor") == grounds["light"]
    page.get_by_role("button", name="Dark theme").click()
    assert style(page.locator("body"), "backgroundColor") == grounds["dark"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_looks_of_drafters_are_told_apart(visit: Callable[..., Any], fake: FakeServer, scheme: str) -> None:
    names = [f"drafter{i}" for i in range(8)]
    fake.reply = lambda body: [Step([("x", "target")]), *(chain(" y", source=name, own=" z") for name in names)]
    page = visit(scheme)
    send(page)
    ground = style(page.locator("body"), "backgroundColor")
    looks = []
    for name in names:
        sample = page.locator("#log .legend .tok", has_text=name)
        colour = style(sample, "textDecorationColor")
        assert contrast(colour, ground) >= 3, name
        looks.append((style(sample, "textDecorationStyle"), style(sample, "textDecorationThickness")))
        assert style(sample, "color") == style(page.locator("body"), "color")  # the text itself stays readable
    assert len(set(looks)) == 8  # without any colour


@pytest.mark.parametrize(("scheme", "width"), [("light", 1100), ("dark", 1100), ("light", 360)])
def test_pictures(visit: Callable[..., Any], scheme: str, width: int) -> None:
    page = visit(scheme, width, 740)
    send(page)
    token(page, "brown").click()
    expect(page.locator("#step")).to_be_visible()
    kind = "phone" if width < 500 else scheme
    picture(page, kind)
    page.keyboard.press("Escape")
    expect(racing(page)).to_be_visible()
    picture(page, f"race-{kind}")
