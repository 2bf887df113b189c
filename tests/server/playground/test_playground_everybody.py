"""For everybody: keyboard, names, phone width, dark and light; and the pictures of docs/images."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from itertools import combinations
from typing import Any

import numpy as np
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


def linear(colour: str) -> np.ndarray:
    """`rgb(r, g, b)` without the curve of sRGB."""
    values = np.array([float(part) for part in re.findall(r"[\d.]+", colour)[:3]]) / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def luminance(colour: str) -> float:
    return float(np.array([0.2126, 0.7152, 0.0722]) @ linear(colour))


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


# What people see of a linear RGB colour: all of it, or as in full protanopia, deuteranopia and tritanopia (Machado,
# Oliveira and Fernandes 2009, table for severity 1).
SIGHTS = [
    np.eye(3),
    np.array([[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]),
    np.array([[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]),
    np.array([[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]),
]


def oklab(rgb: np.ndarray) -> np.ndarray:
    """A space in which equal distances look about equally different (Ottosson 2020)."""
    cones = [[0.4122215, 0.5363325, 0.0514460], [0.2119035, 0.6806995, 0.1073970], [0.0883025, 0.2817188, 0.6299787]]
    axes = [[0.2104543, 0.7936178, -0.0040720], [1.9779985, -2.4285922, 0.4505937], [0.0259040, 0.7827718, -0.8086758]]
    return np.array(axes) @ np.cbrt(np.array(cones) @ rgb)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_looks_of_drafters_are_told_apart(visit: Callable[..., Any], fake: FakeServer, scheme: str) -> None:
    names = ["recycling", "suffix", *(f"drafter{i}" for i in range(6))]
    fake.reply = lambda body: [Step([("x", "target")]), *(chain(" y", source=name, own=" z") for name in names)]
    page = visit(scheme)
    send(page)
    ground = style(page.locator("body"), "backgroundColor")
    looks, colours = [], []
    for name in names:
        sample = page.locator("#log .legend .tok", has_text=name)
        colour = style(sample, "textDecorationColor")
        assert contrast(colour, ground) >= 3, name
        looks.append((style(sample, "textDecorationStyle"), style(sample, "textDecorationThickness")))
        assert style(sample, "color") == style(page.locator("body"), "color")  # the text itself stays readable
        colours.append(colour)
    assert len(set(looks)) == 8  # without any colour
    for sight in SIGHTS:
        for number, least in ((4, 0.2), (8, 0.09)):  # colours are given out in order, few drafters are the rule
            seen = [oklab(np.clip(sight @ linear(colour), 0, 1)) for colour in colours[:number]]
            assert min(np.linalg.norm(a - b) for a, b in combinations(seen, 2)) > least


@pytest.mark.parametrize(("scheme", "width"), [("light", 1100), ("dark", 1100), ("light", 360)])
def test_pictures(visit: Callable[..., Any], fake: FakeServer, scheme: str, width: int) -> None:
    """OUTPACE_SCREENSHOTS=docs/images keeps them, OUTPACE_PLAYGROUND=http://... takes them of a server with a model."""
    page = visit(scheme, width, 820, url=os.environ.get("OUTPACE_PLAYGROUND", fake.url))
    page.set_default_timeout(120_000)
    kind = "phone" if width < 500 else scheme
    prompt = "Write a Python class for a stack with push, pop, peek and len, with docstrings."
    send(page, prompt)
    for step in reversed(page.locator("#log .step:has([class*=' s'])").all()[-40:]):
        step.click()
        if page.locator("#step .accepted").count() and page.locator("#step .rejected").count():
            break
    expect(page.locator("#step .accepted .node").first).to_be_visible()
    expect(page.locator("#step .rejected .node").first).to_be_visible()
    picture(page, kind)
    page.keyboard.press("Escape")
    expect(racing(page, prompt)).to_be_visible(timeout=120_000)
    picture(page, f"race-{kind}")
