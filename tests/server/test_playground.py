"""The playground in headless Chromium, before a server of canned answers; no model runs.

Needs `pip install playwright` and a Chromium of the system (`apt-get install chromium`); no browser is fetched. With
OUTPACE_SCREENSHOTS set to a folder, the pictures of docs/images are made anew.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playground_fake import (
    BREAK,
    FOX,
    FOX_TEXT,
    FakeServer,
    Refusal,
    Step,
    chain,
    fox,
    is_plain,
    plainly,
    serving,
)

sync_api = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
expect = sync_api.expect
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="apt-get install chromium")]

SLOW = [Step([("word ", "target")], [] if i else None, pause=0.05) for i in range(200)]
SCRIPT = "<img src=x onerror=\"document.title='taken'\">"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        # the sandbox needs rights that a container's root does not have; the pages are our own
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    with serving() as server:
        yield server


@pytest.fixture
def visit(browser: Any, fake: FakeServer) -> Iterator[Callable[..., Any]]:
    """Opens the page in a fresh profile. In the end nothing may have failed inside it or gone to another site."""
    contexts, wrong, asked = [], [], []

    def open_page(scheme: str = "light", width: int = 1100, height: int = 800, at: str = "") -> Any:
        size = {"width": width, "height": height}
        contexts.append(browser.new_context(color_scheme=scheme, viewport=size, reduced_motion="reduce"))
        page = contexts[-1].new_page()
        page.set_default_timeout(10_000)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda m: wrong.append(m.text) if m.type == "error" and "status of" not in m.text else None)
        page.on("request", lambda request: asked.append(request.url))
        page.goto(f"{fake.url}/playground/{at}")
        expect(page.locator("#prompt")).to_be_focused()
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert [text for text in wrong if "ERR_CONNECTION" not in text and "ERR_INCOMPLETE" not in text] == []
    assert [url for url in asked if not url.startswith(fake.url)] == []


def send(page: Any, prompt: str = "Write a pangram.", ended: str = "Answered") -> None:
    page.fill("#prompt", prompt)
    page.keyboard.press("Enter")
    expect(page.locator("#status")).to_have_text(re.compile(f"^{ended}"))


def style(locator: Any, name: str) -> str:
    return locator.evaluate("(element, name) => getComputedStyle(element)[name]", name)


def token(page: Any, text: str) -> Any:
    return page.locator("#log .words .tok").get_by_text(text, exact=True).first


def picture(page: Any, name: str) -> None:
    if folder := os.environ.get("OUTPACE_SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"playground-{name}.png")


# -- chat ----------------------------------------------------------------------------------------------------------


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


# -- race ----------------------------------------------------------------------------------------------------------


def racing(page: Any) -> Any:
    page.click("#to-race")
    page.fill("#prompt", "Write a pangram.")
    page.keyboard.press("Enter")
    return page.locator("#verdict h2")


def test_a_race_that_ends_identical(visit: Callable[..., Any], fake: FakeServer) -> None:
    page = visit()
    expect(racing(page)).to_have_text(re.compile(r"^Identical, [\d.]+ × as fast as plain$"))
    assert float(re.search(r"[\d.]+", page.locator("#verdict h2").text_content())[0]) > 1.3
    expect(page.locator("#verdict")).to_contain_text("11 tokens, the same ids and the same text.")
    assert "one after the other, so that each has the machine to itself" in page.locator("#race-view").inner_text()
    warm, fast, plain = fake.bodies
    assert warm["max_tokens"] == 1 and fast["max_tokens"] == plain["max_tokens"] == 256
    assert is_plain(plain) and not is_plain(fast) and plain["seed"] == fast["seed"]
    assert plain["messages"] == fast["messages"]
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
    page.click("#replay")
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


# -- errors --------------------------------------------------------------------------------------------------------


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


# -- for everybody -------------------------------------------------------------------------------------------------


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


# -- pictures ------------------------------------------------------------------------------------------------------


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
