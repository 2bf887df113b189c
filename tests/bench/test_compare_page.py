"""The page of a comparison in headless Chromium: a phone and a desk, light and dark."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from outpace.bench.compare import ceilings
from outpace.bench.compare.findings import Report
from outpace.bench.compare.report import html

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
METHODS = ("plain", "auto", "suffix+recycling", "draft-tree:a-very-long-option=12345", "ngram")
WORKLOADS = ("writing", "code", "summarization", "code-edit", "a-file-with-a-long-name")
#: What reaches beyond the screen, but for what is inside a scroller of its own
OVERFLOWING = """() => {
  const width = document.documentElement.clientWidth, found = [];
  for (const el of document.querySelectorAll("body *")) {
    if (el.closest(".scroll") && !el.matches(".scroll")) continue;
    const box = el.getBoundingClientRect();
    if (box.width && (box.right > width + 0.5 || box.left < -0.5)) found.push(el.outerHTML.slice(0, 120));
  }
  return [document.documentElement.scrollWidth - width, found];
}"""
#: Sizes of the letters that are shown in plots, in pixels of the screen
LETTERS = """() => [...document.querySelectorAll("svg text")].filter(t => t.getBoundingClientRect().width > 0).map(t =>
  parseFloat(getComputedStyle(t).fontSize) * t.ownerSVGElement.getBoundingClientRect().width
  / t.ownerSVGElement.viewBox.baseVal.width)"""
CONTRAST = """() => {
  const light = c => { const v = c.match(/[\\d.]+/g).slice(0, 3).map(x => x / 255).map(
    x => x <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
    return 0.2126 * v[0] + 0.7152 * v[1] + 0.0722 * v[2]; };
  const page = light(getComputedStyle(document.body).backgroundColor);
  return [...document.querySelectorAll(".answer p, .lead, .good, td, svg text")].filter(
    el => el.getBoundingClientRect().width > 0).map(el => {
    const style = getComputedStyle(el), ink = light(el.closest("svg") ? style.fill : style.color);
    return (Math.max(ink, page) + 0.05) / (Math.min(ink, page) + 0.05); });
}"""


def report() -> Report:
    cells = [{"workload": w, "batch": b, "temperature": 0.0} for b in (1, 8) for w in WORKLOADS]
    where = {"cpu": "A CPU", "cores": 2, "cpu_features": ["avx2"], "memory_gb": 8, "system": "Linux", "python": "3.12",
             "versions": {"outpace": "0"}, "commit": "0", "date": "today"}  # fmt: skip
    model = {"kind": "model", "model": "a-model-of-some-size-instruct-q8_0.gguf", "cells": cells, "methods": METHODS,
             "peers": [], "skipped": [["branch", "needs a draft model"]], "left_out": [], "budget_s": 60.0, "units": 1,
             "ceilings": ceilings.Ceilings(10**8, 10, 10**8, 1e10, 1e12, "a product").to_json(), "workloads": [],
             "precision": "int8", "device": "cpu", "threads": 2}  # fmt: skip
    lines: list[dict[str, Any]] = [
        {"kind": "comparison", "identity": {"max_tokens": 64}, "environment": where, "command": "outpace compare"},
        model,
    ]
    for round in range(3):
        for number, cell in enumerate(cells):
            for place, method in enumerate(METHODS):
                seconds = (1 + 0.02 * round) / (1 + place * (0.1 + 0.1 * (number % 5)))
                lines.append({
                    "kind": "measurement", "model": model["model"], **cell, "round": round, "unit": 0, "heat": 0,
                    "heat_size": len(METHODS), "place": place, "method": method, "prompts": ["p"], "error": None,
                    "tokens": 64, "total_s": seconds + 1, "first_s": 1.0, "decode_tokens": 63, "decode_s": seconds,
                    "steps": 30, "turns": 30, "rows": 60, "draft_s": seconds / 9, "verify_s": seconds / 2,
                    "sample_s": seconds / 9, "drafted": 60, "accepted": 20, "all_turns": 30, "tested": [30, 20],
                    "right": [20, 10], "kv_bytes": 10**7, "memory_bytes": 10**8, "context": 100.0,
                    "exactness": "identical", "notes": [], "digests": ["d"],
                })  # fmt: skip
    return Report.of(lines)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    if CHROMIUM is None:
        pytest.skip("no Chromium on this system: apt-get install chromium")
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(html(report()), "utf-8")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        )
        opened = browser.new_page()
        opened.goto(path.as_uri())
        yield opened
        browser.close()


@pytest.mark.browser
@pytest.mark.parametrize("width", [320, 390, 1280])
def test_nothing_overflows_but_a_table_in_its_scroller(page: Any, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 844})
    page.evaluate("() => document.querySelectorAll('details').forEach(d => d.open = true)")
    assert page.evaluate(OVERFLOWING) == [0, []]
    wide = page.evaluate(
        "() => [...document.querySelectorAll('.scroll')].filter(s => s.scrollWidth > s.clientWidth).length"
    )
    assert wide > 0 or width > 1000  # and there it can be scrolled
    page.evaluate("() => document.querySelector('.scroll').scrollTo(500, 0)")
    assert page.evaluate("() => document.querySelector('.scroll').scrollLeft > 0")  # this table is wide


@pytest.mark.browser
@pytest.mark.parametrize("width", [390, 1280])
def test_the_letters_of_plots_can_be_read(page: Any, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 844})
    sizes = page.evaluate(LETTERS)
    assert len(sizes) > 50 and min(sizes) > 9.5


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_the_page(page: Any, scheme: str) -> None:
    page.emulate_media(color_scheme=scheme)
    assert min(page.evaluate(CONTRAST)) > 4.0


@pytest.mark.browser
def test_the_first_thing_is_what_to_use(page: Any) -> None:
    page.set_viewport_size({"width": 390, "height": 844})
    answer = page.locator(".answer")
    assert answer.bounding_box()["y"] + answer.bounding_box()["height"] < 844
    assert "times as fast as plain decoding" in answer.inner_text() and "outpace run -m" in answer.inner_text()


def test_axes_are_in_doublings_and_whiskers_need_three_pairs() -> None:
    text = html(report())
    assert all(f">{tick}x</text>" in text for tick in ("0.5", "1", "2")) and "0.7x" not in text and "1.5x" not in text
    assert text.count('class="whisker') == 2 * 2 * 4 * len(WORKLOADS)  # wide and narrow, two batches, all but plain
    few = report()
    assert "whisker c" not in html(Report.of([x for x in few.lines if x.get("round", 0) < 2]))
