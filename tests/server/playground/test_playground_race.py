"""Accelerated and plain on one prompt: the verdict, and the replay."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any

import pytest
from playground_fake import (
    FOX,
    FOX_TEXT,
    SLOW,
    FakeServer,
    Step,
    chain,
    fox,
    is_plain,
    plainly,
)
from playground_page import expect, racing

pytestmark = pytest.mark.browser


def test_a_race_that_ends_identical(visit: Callable[..., Any], fake: FakeServer) -> None:
    page = visit()
    expect(racing(page)).to_have_text(re.compile(r"^Identical, [\d.]+ . as fast as plain$"))
    assert float(re.search(r"[\d.]+", page.locator("#verdict h2").text_content())[0]) > 1.3
    expect(page.locator("#verdict")).to_contain_text("11 tokens, the same ids and the same text.")
    assert "one after the other, so that each has the machine to itself" in page.locator("#race-view").inner_text()
    warm, fast, plain = fake.bodies
    assert warm["max_tokens"] == 1 and fast["max_tokens"] == plain["max_tokens"] == 256
    assert is_plain(plain) and not is_plain(fast) and plain["seed"] == fast["seed"]
    assert plain["messages"] == fast["messages"]
    assert warm["user"] == fast["user"] == plain["user"]  # one prefix cache for all three
    page.click("#send")
    expect(page.locator("#status")).to_have_text(re.compile("^First accelerated"))
    assert fake.bodies[-1]["user"] != plain["user"]  # and nothing remembered from the race before
    expect(page.locator("#status")).to_have_text(re.compile("^Identical"))
    for lane in ("#lane-plain", "#lane-fast"):
        assert page.locator(f"{lane} .words").text_content() == FOX_TEXT
        assert re.fullmatch(r"0\.[0-9]{2} s", page.locator(f"{lane} .timer").text_content())
    assert page.locator("#lane-plain .words [class*=' s']").count() == 0


def test_lanes_run_one_after_the_other_with_live_timers(visit: Callable[..., Any], fake: FakeServer) -> None:
    fake.reply = lambda body: plainly(FOX, pause=0.15)[: 1 if body["max_tokens"] == 1 else None]
    page = visit()
    page.click("#to-race")
    page.fill("#prompt", "go")
    page.keyboard.press("Enter")
    expect(page.locator("#status")).to_have_text("First accelerated, alone on the machine.")
    expect(page.locator("#lane-fast .step").nth(2)).to_be_visible()
    assert page.locator("#lane-fast .timer").text_content() != "0.00 s"
    assert page.locator("#lane-plain .timer").text_content() == "0.00 s" and len(fake.bodies) == 2
    expect(page.locator("#lane-plain .step").nth(2)).to_be_visible()
    assert page.locator("#lane-fast .words").text_content() == FOX_TEXT and len(fake.bodies) == 3


def test_a_race_whose_lanes_part(visit: Callable[..., Any], fake: FakeServer) -> None:
    other = [*FOX[:3], chain(" over", source="recycling", own=" a"), Step([(" fence", "target")], [])]
    fake.reply = lambda body: fox(body) if is_plain(body) else other
    page = visit()
    expect(racing(page)).to_have_text("They part at token 7")
    verdict = page.locator("#verdict")
    expect(verdict).to_contain_text("Both begin “The quick brown fox jumps over”.")
    expect(verdict).to_contain_text("Plain goes on with “ the lazy dog.”, accelerated with “ a fence”.")
    expect(verdict).to_contain_text("declared the result identical, so this is a fault")
    assert page.locator("#lane-plain .parts").text_content() == " the"
    assert page.locator("#lane-fast .parts").text_content() == " a"


def test_a_race_where_one_ends_first(visit: Callable[..., Any], fake: FakeServer) -> None:
    fake.reply = lambda body: fox(body) if is_plain(body) else FOX[:3]
    page = visit()
    expect(racing(page)).to_have_text("They part at token 6")
    expect(page.locator("#verdict")).to_contain_text("accelerated with nothing (it ends there)")


def test_replay_shows_both_at_their_speed(visit: Callable[..., Any], fake: FakeServer) -> None:
    fake.reply = lambda body: plainly(FOX, 0.2)[: 1 if body["max_tokens"] == 1 else None] if is_plain(body) else FOX
    page = visit()
    expect(racing(page)).to_be_visible()
    asked = len(fake.bodies)
    began = time.monotonic()
    page.click("#replay")
    expect(page.locator("#lane-fast .words")).to_have_text(FOX_TEXT)
    expect(page.locator("#lane-plain .step").first).to_be_visible()
    assert page.locator("#lane-plain .step").count() < 9  # it still runs
    expect(page.locator("#status")).to_have_text("Replay over.")
    assert time.monotonic() - began > 11 * 0.2 and len(fake.bodies) == asked
    assert page.locator("#lane-plain .words").text_content() == FOX_TEXT
    page.set_viewport_size({"width": 360, "height": 740})
    page.click("#replay")
    fast, plain = (page.locator(lane).bounding_box() for lane in ("#lane-fast", "#lane-plain"))
    assert fast["y"] == plain["y"] and fast["x"] < plain["x"]  # beside each other, also on a phone
    page.keyboard.press("Escape")
    expect(page.locator("#status")).to_have_text("Replay stopped; both answers are shown whole.")
    assert page.locator("#lane-plain .words").text_content() == FOX_TEXT


def test_a_race_against_itself_is_refused_and_one_can_be_stopped(visit: Callable[..., Any], fake: FakeServer) -> None:
    page = visit(at="#race")
    page.click("#settings summary")
    page.select_option("#method", "plain")
    page.fill("#prompt", "go")
    page.click("#send")
    expect(page.get_by_role("alert")).to_contain_text("Both lanes would be plain. Choose another method")
    assert fake.bodies == []
    fake.reply = lambda body: SLOW[:1] if body["max_tokens"] == 1 else SLOW
    page.select_option("#method", "suffix")
    page.click("#send")
    expect(page.locator("#lane-fast .step").nth(2)).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#status")).to_have_text("Stopped. What came is kept.")
    assert len(fake.bodies) == 2 and page.locator("#verdict h2").count() == 0
