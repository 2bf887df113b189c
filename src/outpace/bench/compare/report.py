"""One HTML file that says what was compared, on what, and what came out; for people who have never seen the project.

It needs no network and no script: styles and plots are inside.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from html import escape
from importlib import resources
from typing import Any

from .advice import advice
from .charts import NARROW, WIDE, Dot, Frame, Series, bars, dots, lines
from .findings import (
    Report,
    cell_text,
    headline,
    identity,
    number,
    output_text,
    overall,
    ratio_text,
    share,
    shown,
)
from .plan import PLAIN
from .store import Line
from .summary import Summary, cell_of, crossing

NAMED = 6  # lines with a name and a colour in a plot, plain among them
WORDS = {
    "plain": "Plain decoding: the model computes one token, then the next. Everything is compared with this.",
    "method": "A way to guess several next tokens cheaply (to draft) and have the model check them all in one step.",
    "times plain": "Speed over plain decoding on the same prompts, seconds apart. Above 1 is faster. Median of "
    "pairs of runs. Three pairs and more have a 95 % interval, in brackets and as a bar in the plots: what noise of "
    "the machine could make of it. From fewer nothing is concluded.",
    "tokens/s": "Tokens a second, of all sequences of the batch together, once every prompt has been read.",
    "tokens/step": "Tokens that a sequence gets from one step of the model. Plain decoding: exactly 1.",
    "accepted": "Share of the guessed tokens that the model agreed with.",
    "batch": "Sequences that are answered at the same time. With more of them the machine has less time to spare for "
    "checking guesses.",
    "temperature": "0: always the likeliest token (greedy). Above 0: tokens are drawn at random, the likelier the "
    "likelier.",
    "output": "What the method declares. Identical: exactly plain decoding's tokens. Distribution: other tokens, drawn "
    "from the same probabilities. Approximate: neither is promised. Identity was checked token by token.",
    "memory read": "How much of the memory's measured bandwidth the steps of the model used. Plain decoding of one "
    "sequence is limited by this, not by arithmetic.",
    "arithmetic": "How much of the measured speed of multiplications they used.",
    "KV cache": "Memory for what the model remembers of the texts, at its largest.",
}


def html(report: Report) -> str:
    """The page."""
    names = ", ".join(line["model"] for line in report.models) or "no model"
    title = f"What each decoding method gains: {names}"
    parts = [f"<h1>{escape(title)}</h1>", _answer(report), _lead(report), _words()]
    for line in report.models:
        parts.append(_model(report, line))
    parts += [_lost(report), _how(report)]
    template = (resources.files(__package__) / "template.html").read_text("utf-8")
    return template.replace("{{title}}", escape(title)).replace("{{body}}", "\n".join(parts))


# -- words -------------------------------------------------------------------------------------------------------


def _answer(report: Report) -> str:
    """What somebody who has a minute needs."""
    several = len(report.models) > 1
    parts = [
        (f"<p><strong>{escape(found.model)}</strong></p>" if several else "")
        + f"<p>{escape(found.text)}</p><pre><code>{_unbroken(found.command)}</code></pre>"
        for found in advice(report)
    ]
    return f'<section class="answer"><h2>What should I use?</h2>{"".join(parts)}</section>' if parts else ""


def _unbroken(command: str) -> str:
    """Lines end between words alone, not after the hyphens of an option."""
    return " ".join(f"<span>{escape(word)}</span>" for word in command.split(" "))


def _lead(report: Report) -> str:
    where = report.header["environment"]
    machine = f"{where['cpu']}, {where['cores']} cores" + (f", {where['gpu']}" if where.get("gpu") else "")
    found = "".join(f"<li>{escape(line)}</li>" for line in headline(report))
    cls = "bad" if report.broken else "good"
    failures = '<li>Some things were not measured: <a href="#lost">which, and why</a>.</li>' if report.lost else ""
    return (
        f'<p class="lead">Language models write one token after another. Decoding methods try to get several from one '
        f"step of the model. This page compares them on one machine: {escape(machine)}.</p>"
        f'<ul>{found}<li class="{cls}">{escape(identity(report))}</li>{failures}</ul>'
    )


def _words() -> str:
    items = "".join(f"<dt>{escape(word)}</dt><dd>{escape(text)}</dd>" for word, text in WORDS.items())
    return f"<details><summary>The words on this page</summary><dl>{items}</dl></details>"


# -- a model -----------------------------------------------------------------------------------------------------


def _model(report: Report, line: Line) -> str:
    rows = report.of_model(line["model"])
    parts = [f"<h2>{escape(line['model'])}, {escape(line['precision'])}</h2>", _ceilings(line, rows)]
    for temperature in dict.fromkeys(r.cell.temperature for r in rows):
        here = [r for r in rows if r.cell.temperature == temperature]
        if all(r.speed is None for r in here):
            continue
        numbers = colours(here)
        parts.append(f"<h3>Temperature {temperature:g}</h3>")
        for batch in dict.fromkeys(r.cell.batch for r in here):
            at = shown([r for r in here if r.cell.batch == batch])
            if not at:
                continue
            parts += [f"<h3>{_at_once(batch)}</h3>", _speedups(at), _table(at)]
            parts.append(_bars(at, batch))
        parts += [_panels(here, numbers), _crossings(here)]
    parts.append(_everything(rows))
    return "\n".join(parts)


def _at_once(batch: int) -> str:
    return "One answer at a time" if batch == 1 else f"{batch} answers at once"


def colours(rows: Sequence[Summary]) -> dict[str, int]:
    """Methods that get a colour and a name in line plots: plain, auto, and the fastest."""
    best = sorted(
        overall([r for r in rows if r.cell.batch == min(x.cell.batch for x in rows)]).items(), key=lambda i: -i[1]
    )
    wanted = [PLAIN, *(["auto"] if any(name == "auto" for name, _ in best) else []), *(name for name, _ in best)]
    return {name: i for i, name in enumerate(list(dict.fromkeys(wanted))[:NAMED])}


def _ceilings(line: Line, rows: Sequence[Summary]) -> str:
    c, threads = line["ceilings"], line.get("threads")
    facts = [f"{c['weight_bytes'] / 1e6:.0f} MB of weights are read for each step"]
    if c["bandwidth"] and any(r.memory_share is not None for r in rows):
        facts.append(f"the memory was measured to deliver {c['bandwidth'] / 1e9:.1f} GB/s")
        facts.append(f"so no more than {c['bandwidth'] / c['weight_bytes']:.0f} steps a second are possible")
    elif c["bandwidth"]:
        facts.append(
            f"the steps read faster than the {c['bandwidth'] / 1e9:.1f} GB/s that the memory was measured to deliver, "
            "so no share of it is told: other programs used it then, or the weights fit into the processor's cache"
        )
    if c["arithmetic"]:
        facts.append(f"arithmetic reaches {c['arithmetic'] / 1e12:.2f} · 10¹² operations/s (by {c['arithmetic_by']})")
    how = f" on {threads} thread{'s' if threads > 1 else ''}" if threads else ""
    return f'<p class="soft">{escape("; ".join(facts) + how)}.</p>'


def _speedups(rows: Sequence[Summary]) -> str:
    order = sorted(overall(rows).items(), key=lambda item: -item[1])
    names = [name for name, _ in order] + [r.method for r in rows if r.ratio is not None]
    found: dict[str, dict[str, Dot]] = {name: {} for name in dict.fromkeys(names)}
    for r in rows:
        if r.ratio is not None:
            title = f"{r.method}, {r.cell.workload}: {ratio_text(r.ratio)} times plain"
            found[r.method][r.cell.workload] = Dot(r.ratio.value, r.ratio.low, r.ratio.high, title)
    groups = list(dict.fromkeys(r.cell.workload for r in rows))
    label = "Speed of each method against plain decoding, by workload"
    return _for_both(lambda frame: dots(found, groups, label, frame))


def _bars(rows: Sequence[Summary], batch: int) -> str:
    times: dict[str, dict[str, float]] = {}
    for name in dict.fromkeys(r.method for r in rows):
        mine = [r.per_token_ms for r in rows if r.method == name and r.per_token_ms]
        if mine:
            times[name] = {part: sum(m[part] for m in mine) / len(mine) for part in mine[0]}
    ordered = dict(sorted(times.items(), key=lambda item: sum(item[1].values())))
    title = f"Where the time goes: milliseconds a token, {_at_once(batch).lower()}, mean of the workloads"
    text = (
        '<p class="soft">draft: making guesses; verify: the model\'s own steps; sample: choosing tokens and verifying '
        "guesses; other: bookkeeping, text.</p>"
    )
    title_of = {WIDE: title, NARROW: "Milliseconds a token, mean of the workloads"}
    label = "Time a token by what it is spent on"
    return _for_both(lambda frame: bars(ordered, label, title_of[frame], frame)) + (text if ordered else "")


def _panels(rows: Sequence[Summary], numbers: dict[str, int]) -> str:
    """For each workload: speed by batch, ratio by batch, acceptance by depth."""
    speed, ratio, depth = [], [], []
    smallest = min(r.cell.batch for r in rows)
    for workload in dict.fromkeys(r.cell.workload for r in rows):
        mine = [r for r in rows if r.cell.workload == workload]
        by_method = {name: [r for r in mine if r.method == name] for name in dict.fromkeys(r.method for r in mine)}
        speeds, ratios, depths = [], [], []
        for name, found in by_method.items():
            number = numbers.get(name)
            if points := tuple((r.cell.batch, r.speed.value) for r in found if r.speed is not None):
                speeds.append(Series(name, points, number))
            if points := tuple((r.cell.batch, r.ratio.value) for r in found if r.ratio is not None):
                ratios.append(Series(name, points, number))
            alone = next((r.depth for r in found if r.cell.batch == smallest and r.depth), [])
            if alone:
                depths.append(Series(name, tuple((d + 1.0, share) for d, share in enumerate(alone[:16])), number))
        more = len({r.cell.batch for r in mine if r.speed is not None}) > 1
        if more:
            speed.append(lines(speeds, f"{workload}: tokens a second by batch", workload, "batch", log_x=True))
            ratio.append(lines(ratios, f"{workload}: ratio to plain by batch", workload, "batch", log_x=True, one=True))
        depth.append(lines(depths, f"{workload}: acceptance by depth", workload, "guessed tokens", percent=True))
    out = []
    for title, plots in (
        ("Tokens a second, by how many are answered at once", speed),
        ("Where the gain ends: times plain decoding, by batch (dashed: as fast as plain)", ratio),
        (f"Steps that accept at least so many guessed tokens (batch {smallest})", depth),
    ):
        if any(plots):
            framed = "".join(_framed(plot) for plot in plots)
            out.append(f'<h3>{escape(title)}</h3><div class="plots">{framed}</div>')
    if out:
        out.append('<p class="soft">Grey lines are the other methods; rest the pointer on a line to see its name.</p>')
    return "\n".join(out)


def _crossings(rows: Sequence[Summary]) -> str:
    if len({r.cell.batch for r in rows if r.ratio is not None}) < 2:
        return ""
    body = []
    for name in dict.fromkeys(r.method for r in rows if r.ratio is not None):
        for workload in dict.fromkeys(r.cell.workload for r in rows):
            ratios = {
                r.cell.batch: r.ratio.value
                for r in rows
                if (r.method, r.cell.workload) == (name, workload) and r.ratio is not None
            }
            if ratios:
                shown = " · ".join(f"{b}: {ratios[b]:.2f}" for b in sorted(ratios))
                body.append([name, workload, shown, crossing(ratios)])
    table = _html_table(["method", "workload", "times plain by batch", "against plain"], body, wide={3})
    note = '<p class="soft">Between two batch sizes the crossing is interpolated; run more sizes to see it.</p>'
    return f"<details><summary>Where each method crosses plain decoding</summary>{table}{note}</details>"


def _table(rows: Sequence[Summary]) -> str:
    """One line for each method, one column for each workload."""
    groups = list(dict.fromkeys(r.cell.workload for r in rows))
    ranked, full = overall(rows), overall(rows, full=True) if rows and rows[0].cell.batch > 1 else {}
    names = sorted(dict.fromkeys(r.method for r in shown(rows)), key=lambda n: (n != PLAIN, -ranked.get(n, 0.0)))
    body = []
    for name in names:
        mine = {r.cell.workload: r for r in rows if r.method == name}
        mean = "1" if name == PLAIN else f"{ranked[name]:.2f}" if name in ranked else "-"
        running = ["1" if name == PLAIN else f"{full[name]:.2f}" if name in full else "-"] if full else []
        cells = (cell_text(mine.get(g)) for g in groups)
        body.append([name, output_text(list(mine.values())), mean, *running, *cells])
    head = ["method", "output", "times plain, mean", *(["while all run"] if full else []), *groups]
    return _html_table(head, body, left={1})


def _everything(rows: Sequence[Summary]) -> str:
    head = [
        "method", "workload", "batch", "temp.", "tokens/s", "times plain", "while all run", "by prompt", "rounds",
        "first token s",
        "tokens/step", "accepted", "draft", "verify", "sample", "other", "memory read", "arithmetic", "KV cache MB",
        "process MB", "output", "note",
    ]  # fmt: skip
    rows = shown(rows)
    return (
        f"<details><summary>Every figure of {escape(rows[0].model)}</summary>"
        + _html_table(head, [_all_of(r) for r in rows], left={1, 20}, wide={21})
        + "</details>"
        if rows
        else ""
    )


def _all_of(r: Summary) -> list[str]:
    total = sum(r.per_token_ms.values())
    shares = [share(r.per_token_ms[p] / total) if total else "-" for p in ("draft", "verify", "sample", "other")]
    spread = f"{r.ratio.least:.2f} to {r.ratio.most:.2f}" if r.ratio is not None else "-"
    note = [
        *([r.reason] if r.reason else []),
        *(["whole answers, prompts included"] if r.whole and r.speed else []),
        *r.notes,
    ]
    return [
        r.method, r.cell.workload, str(r.cell.batch), f"{r.cell.temperature:g}",
        number(r.speed.value if r.speed else None), ratio_text(r.ratio), ratio_text(r.full), spread,
        str(r.speed.rounds) if r.speed else "0", number(r.first_s, 2), number(r.tau, 2), share(r.alpha),
        *shares, share(r.memory_share), share(r.arithmetic_share), number(r.kv_bytes and r.kv_bytes / 1e6),
        number(r.memory_bytes and r.memory_bytes / 1e6, 0), output_text([r]), "; ".join(note),
    ]  # fmt: skip


def _for_both(draw: Callable[[Frame], str]) -> str:
    """A plot for wide screens and one for phones; the page's style shows one of them."""
    drawn = {"wide": draw(WIDE), "narrow": draw(NARROW)}
    return "".join(f'<div class="plot {name}">{svg}</div>' for name, svg in drawn.items() if svg)


def _framed(svg: str) -> str:
    return f'<div class="plot">{svg}</div>' if svg else ""


def _html_table(
    head: Sequence[str], body: Iterable[Sequence[str]], left: Iterable[int] = (), wide: Iterable[int] = ()
) -> str:
    def cls(i: int, text: str) -> str:
        names = ["left"] * (i in left) + ["wide"] * (i in wide)
        names += ["bad"] * any(mark in text for mark in ("DIFFER", "NOT IDENTICAL", "failed"))
        return f' class="{" ".join(names)}"' if names else ""

    left, wide = set(left), set(wide)
    heads = "".join(f"<th{cls(i, '')}>{escape(text)}</th>" for i, text in enumerate(head))
    lines = "".join(
        "<tr>" + "".join(f"<td{cls(i, text)}>{escape(text)}</td>" for i, text in enumerate(row)) + "</tr>"
        for row in body
    )
    table = f"<table><thead><tr>{heads}</tr></thead><tbody>{lines}</tbody></table>"
    return f'<div class="scroll" tabindex="0" role="group" aria-label="table">{table}</div>'


# -- what was run --------------------------------------------------------------------------------------------------


def _lost(report: Report) -> str:
    lost = report.lost
    if not lost:
        return '<h2 id="lost">What was not measured</h2><p>Nothing: everything requested was measured.</p>'
    return f'<h2 id="lost">What was not measured, and why</h2>{_html_table(["what", "why"], lost, wide={0, 1})}'


def _tokens(report: Report) -> str:
    """Of an answer, in each model's plan."""
    asked = report.header["identity"]["max_tokens"]
    return ", ".join(dict.fromkeys(str(line.get("plan", {}).get("max_tokens", asked)) for line in report.models))


def _how(report: Report) -> str:
    head, where = report.header, report.header["environment"]
    config: dict[str, Any] = head["identity"]
    versions = ", ".join(f"{k} {v}" for k, v in where["versions"].items())
    rows = [
        [
            "machine",
            f"{where['cpu']}, {where['cores']} cores ({', '.join(where['cpu_features'])}), {where['memory_gb']} GB",
        ],
        ["software", f"{where['system']}, Python {where['python']}, {versions}; commit {where['commit']}"],
        ["date", where["date"]],
        ["command", head["command"]],
        [
            "each answer",
            f"{_tokens(report)} tokens, also past the end of the text, so that all have the same work",
        ],
    ]
    rows += [[name, str(value)] for name, value in config.get("options", {}).items() if value is not None]
    for line in report.models:
        measured = [x for x in report.lines if x["kind"] == "measurement" and x["model"] == line["model"]]
        rounds: dict[object, int] = {}
        for x in measured:
            rounds[cell_of(x)] = max(rounds.get(cell_of(x), 0), x["round"] + 1)
        some = " to ".join(map(str, sorted({min(rounds.values(), default=0), max(rounds.values(), default=0)})))
        text = f"{len(measured)} measurements in {some} rounds, {line['units']} prompts (or batches) of each workload"
        loading = (
            f"; loading took {line['loading_s']:.1f} s more, which the budget does not count"
            if "loading_s" in line
            else ""
        )
        rows.append([line["model"], f"{text}; {line['precision']} on {line['device']}{loading}"])
        for w in line["workloads"]:
            size = " / ".join(map(str, w["prompt_tokens"]))
            facts = [w["error"]] if w["error"] else [f"{w['prompts']} prompts of {size} tokens (least / median / most)"]
            rows.append([f"workload {w['name']}", "; ".join([*facts, *w["notes"]])])
        for name, about in line.get("peers_about", {}).items():
            rows.append([f"peer {name}", ", ".join(f"{k}: {v}" for k, v in about.items())])
    text = (
        "<p>Contestants take turns: plain decoding and up to four methods answer the same prompts one after the other "
        "(a heat), in an order that changes, and each ratio is made of two runs of one heat. How fast the machine was "
        "at that moment is seen from the model's own forwards, the same work for every method, and taken out of "
        "the seconds of our methods; what a method slows the machine down by itself stays. Drafters remember "
        "nothing "
        "from one round over the prompts to the next. Text that a prompt expects back (code to be edited) is given to "
        "all methods alike. Speeds leave the reading of prompts out; the time to the first token is shown apart. "
        "The memory of the process is that of all methods of this run together; other engines have processes of their "
        "own. All measurements are in results.jsonl beside this page.</p>"
    )
    return f"<h2>How it was measured</h2>{text}{_html_table(['', ''], rows, wide={1})}"
