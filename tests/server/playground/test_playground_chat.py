"""One answer: its colours, its figures, the tree of each step, and what is sent for it."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any

import pytest
from playground_fake import (
    FOX_TEXT,
    SLOW,
    FakeServer,
    Refusal,
    Step,
    chain,
)
from playground_page import expect, racing, send, style, token

pytestmark = pytest.mark.browser

SCRIPT = "<img src=x onerror=\"document.title='taken'\">"


def test_tokens_are_coloured_by_who_drafted_them(visit: Callable[..., Any]) -> None:
    page = visit()
    send(page)
    assert page.locator("#log .words").text_content() == FOX_TEXT
    lines = {name: style(token(page, name), "textDecorationLine") for name in ("quick", "over", "dog", "fox", "The")}
    assert lines == {"quick": "underline", "over": "underline", "dog": "underline", "fox": "none", "The": "none"}
    looks = {
        (style(token(page, t), "textDecorationColor"), style(token(page, t), "textDecorationStyle"))
        for t in ("quick", "over", "dog")
    }
    assert len({colour for colour, _ in looks}) == len({line for _, line in looks}) == 3
    assert style(token(page, "quick"), "backgroundColor") != style(token(page, "over"), "backgroundColor")
    assert style(token(page, "fox"), "backgroundColor") == "rgba(0, 0, 0, 0)"
    assert style(token(page, "quick"), "textDecorationColor") == style(token(page, "brown"), "textDecorationColor")
    assert page.locator("#log .legend li").all_text_contents() == ["target 5", "suffix 2", "recycling 2", "ngram 2"]
    assert style(page.locator("#log .legend .tok").nth(1), "textDecorationStyle") == "solid"
    figures = page.locator("#log .figures > div").all_text_contents()
    assert figures[0] == "tokens11" and figures[2:] == ["tokens/step2.50", "accepted60 %"]
    assert (
        page.locator("#log .strip rect:not(.lost)").count() == 11 and page.locator("#log .strip rect.lost").count() == 4
    )


def test_who_drafted_in_vain_is_named(visit: Callable[..., Any], fake: FakeServer) -> None:
    fake.reply = lambda body: [Step([("a", "target")]), Step([(" b", "target")], [(" c", -1, "iad")])]
    page = visit()
    send(page)
    assert page.locator("#log .legend li").all_text_contents() == ["target 2", "iad 0"]


def test_figures_are_live(visit: Callable[..., Any], fake: FakeServer) -> None:
    steady = [chain(" a", " b", source="suffix", own=" c", rejected=(" no",)) for _ in range(60)]
    fake.reply = lambda body: [
        Step([("x", "target")]),
        *(Step(s.tokens, s.draft, s.accepted, pause=0.05) for s in steady),
    ]
    page = visit()
    page.fill("#prompt", "go")
    page.keyboard.press("Enter")
    expect(page.locator("#log .figures")).to_contain_text("tokens/step3.00")
    expect(page.locator("#log .figures")).to_contain_text("accepted67 %")
    shown = float(re.search(r"tokens/s([\d.]+)", page.locator("#log .figures").text_content())[1])
    assert 20 < shown < 61  # three tokens each 50 ms or a little more
    assert page.locator("#log .answer").get_attribute("aria-busy") == "true"
    assert not page.locator("#send").is_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#log .answer")).not_to_have_attribute("aria-busy", "true")


def test_the_tree_of_a_step(visit: Callable[..., Any]) -> None:
    page = visit()
    send(page)
    expect(page.locator("#step")).to_be_hidden()
    token(page, "brown").click()
    panel = page.locator("#step")
    expect(panel).to_contain_text("Step 2 of 5")
    expect(panel).to_contain_text("4 tokens drafted, 2 accepted")
    runs = [
        (r.locator(".node").all_text_contents(), r.locator(".by").text_content()) for r in panel.locator(".run").all()
    ]
    assert runs == [
        (["·quick", "·brown"], "suffix, accepted"),
        (["·fox"], "the model's own"),
        (["·cat"], "suffix, rejected"),
        (["·slow"], "recycling, rejected"),
    ]
    below = panel.locator("li", has=page.locator("> .run.accepted")).locator("> ul > li")
    assert below.locator("> .run .node").all_text_contents() == ["·fox", "·cat"]  # branches of the accepted path
    assert "line-through" in style(panel.locator(".rejected .node").first, "textDecorationLine")
    assert "line-through" not in style(panel.locator(".accepted .node").first, "textDecorationLine")
    assert page.locator("#log .step.chosen").text_content() == " quick brown fox"
    page.keyboard.press("Escape")
    expect(panel).to_be_hidden()
    assert page.locator("#log .step.chosen").count() == 0


def test_steps_by_keyboard(visit: Callable[..., Any]) -> None:
    page = visit()
    send(page)
    slider = page.get_by_role("slider", name="Steps of answer 1")
    slider.focus()
    expect(page.locator("#step-title")).to_have_text("Step 5 of 5")
    page.keyboard.press("Home")
    expect(page.locator("#step-body")).to_contain_text("Nothing was drafted for it")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#step .rejected .node")).to_have_text(["·cat", "·slow"])
    assert slider.get_attribute("aria-valuetext") == "Step 2 of 5: 2 of 4 drafted tokens accepted"
    page.keyboard.press("ArrowRight")
    expect(page.locator("#step-body")).to_contain_text("a plain step")
    page.locator("#step-close").focus()
    page.keyboard.press("Enter")
    expect(page.locator("#step")).to_be_hidden()
    expect(slider).to_be_focused()


@pytest.mark.parametrize("stop", ["Escape", "button"])
def test_an_answer_can_be_stopped(visit: Callable[..., Any], fake: FakeServer, stop: str) -> None:
    fake.reply = lambda body: SLOW
    page = visit()
    page.fill("#prompt", "go on and on")
    page.click("#send")
    expect(page.get_by_role("button", name="Stop")).to_be_focused()
    expect(page.locator("#log .step").nth(3)).to_be_visible()
    page.keyboard.press("Escape") if stop == "Escape" else page.click("#stop")
    expect(page.locator("#status")).to_have_text("Stopped. What came is kept.")
    expect(page.locator("#send")).to_be_visible()
    expect(page.locator("#prompt")).to_be_focused()
    assert 3 < page.locator("#log .step").count() < 150
    until = time.monotonic() + 5
    while not fake.gone and time.monotonic() < until:
        time.sleep(0.02)
    assert len(fake.gone) == 1  # the server was told


def test_settings_and_history_are_sent(visit: Callable[..., Any], fake: FakeServer) -> None:
    page = visit()
    page.click("#settings summary")
    for field, value in {"temperature": "0.7", "seed": "12", "max-tokens": "99", "system": "Be brief."}.items():
        page.fill(f"#{field}", value)
    page.select_option("#method", "suffix")
    assert page.locator("#method option").all_text_contents()[1:] == ["plain", "suffix", "ngram"]
    send(page, "one")
    send(page, "two")
    body = fake.bodies[-1]
    assert (body["temperature"], body["seed"], body["max_tokens"], body["stream"]) == (0.7, 12, 99, True)
    assert body["outpace"] == {"trace": True, "method": "suffix"} and body["model"] == "toy"
    assert [m["role"] for m in body["messages"]] == ["system", "user", "assistant", "user"]
    assert [m["content"] for m in body["messages"]] == ["Be brief.", "one", FOX_TEXT, "two"]
    page.reload()
    assert page.input_value("#temperature") == "0.7" and page.input_value("#system") == "Be brief."
    expect(page.locator("#method")).to_have_value("suffix")
    page.click("#settings summary")
    page.fill("#temperature", "9")
    page.fill("#prompt", "three")
    page.keyboard.press("Enter")
    expect(page.locator("#temperature")).to_be_focused()  # refused here, with the browser's own words
    assert len(fake.bodies) == 2


def test_text_is_never_markup(visit: Callable[..., Any], fake: FakeServer) -> None:
    node = Step([(SCRIPT, "ngram"), (" b", "target")], [(SCRIPT, -1, "ngram"), (SCRIPT, -1, SCRIPT)], [0])
    fake.reply = lambda body: [Step([(SCRIPT, "target")]), node]
    page = visit()
    send(page, SCRIPT)
    assert page.locator("#log .words").text_content() == f"{SCRIPT}{SCRIPT} b"
    page.get_by_role("slider").focus()
    expect(page.locator("#step .run.rejected")).to_contain_text(f"{SCRIPT}, rejected")
    fake.reply = lambda body: Refusal(400, SCRIPT)
    page.fill("#prompt", SCRIPT)
    page.keyboard.press("Enter")
    expect(page.locator("#error")).to_contain_text(SCRIPT)
    assert page.locator("img").count() == 0 and page.title() == "Outpace playground"


def test_text_that_lags_behind_its_tokens(visit: Callable[..., Any], fake: FakeServer) -> None:
    half = "\ufffd"
    fake.reply = lambda body: [
        Step([("Caf", "target")]),
        Step([(half, "suffix"), (half, "target")], [(half, -1, "suffix")], [0], content="é"),
        Step([("\n", "target")], [], content=""),  # held back: it could begin a stop string
        Step([("<b>", "ngram"), (" au", "target")], [("<b>", -1, "ngram")], [0], content="\n<b> au"),
        Step([("lait", "target")], [], content=" lait"),  # its own text lacks the space
    ]
    page = visit()
    send(page)
    assert page.locator("#log .words").text_content() == "Café\n<b> au lait"
    expect(token(page, "<b>")).to_have_attribute("title", "drafted by ngram")


def test_code_keeps_its_columns(visit: Callable[..., Any], fake: FakeServer) -> None:
    words = ["Like", " this:", "\n```", "\nx", "   =", " 1\n", "```\n", "and"]
    fake.reply = lambda body: [Step([(w, "target")], [] if i else None) for i, w in enumerate(words)]
    page = visit()
    send(page)
    assert "".join(page.locator("#log .words .code").all_text_contents()) == "\nx   = 1\n```\n"
    assert "mono" in style(page.locator("#log .words .code").first, "fontFamily").lower()


def test_a_server_that_tells_nothing(visit: Callable[..., Any], fake: FakeServer) -> None:
    fake.traced = False
    page = visit()
    send(page)
    assert page.locator("#log .words").text_content() == FOX_TEXT
    expect(page.locator("#log .notes")).to_contain_text("does not say who drafted what")
    assert page.locator("#log .legend li").count() == 0 and page.locator("#log .words [class*=' s']").count() == 0
    expect(racing(page)).to_have_text(re.compile("^Identical"))
    expect(page.locator("#verdict")).to_contain_text(f"{len(FOX_TEXT)} characters, the same text.")
