"""Write the generated parts of README.md and of docs/: figures from `results/*.json`, methods from the registry.

    python benchmarks/readme.py            rewrite them
    python benchmarks/readme.py --check    exit code 1 when they are not up to date

A part stands between `<!-- NAME -->` and `<!-- /NAME -->`. A figure without a result file is not there. The parts of
README.md are of one model, MODEL, that people use; what holds for another one says so.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from common import table
from compared import AUTO, PLAIN
from tables import Compared, Record, audit_counts, comparisons, engine_name, link, method_table, records, results

ROOT = Path(__file__).parent.parent
MODEL = "qwen2.5-coder-1.5b"
PEER = "llama.cpp"  # that claims are relative to
SPELLED = {"vllm": "vLLM", "openvino": "OpenVINO"}
MODES = {"draft": "with a draft model", "lookup": "with prompt lookup"}  # of an engine, by its suffix


# -- the model's result files ------------------------------------------------------------------------------------------


def beside_engines() -> list[tuple[Record, str, dict[str, Record]]]:
    """Comparisons with other engines, one answer at a time: (file, kind of text, rows by contestant)."""
    found = []
    for r in records("compare"):
        rows = [row for row in r["results"]["runs"][0] if row["model"] == MODEL and row["batch"] == 1]
        if r["results"]["peers"]:
            for kind in dict.fromkeys(row["workload"] for row in rows):
                found.append((r, kind, {row["method"]: row for row in rows if row["workload"] == kind}))
    return found


def batches() -> list[Record]:
    return [r for r in records("batches") if r["config"]["model"] == MODEL]


def planned() -> tuple[Compared | None, Compared | None]:
    """The comparison with most kinds of text in which `auto` took part, greedy and sampled."""
    found = [one for one in comparisons() if one.model == MODEL and one.batch == 1 and AUTO in one.sums]
    greedy, sampled = ([one for one in found if bool(one.temperature) == hot] for hot in (False, True))
    return max(greedy, key=lambda one: one.kinds, default=None), max(sampled, key=lambda one: one.kinds, default=None)


# -- parts of README.md ------------------------------------------------------------------------------------------------


def engines_table() -> str:
    """Tokens per second of every engine, a column for each comparison; the best of a column is bold."""
    columns: list[tuple[str, dict[str, float]]] = []
    for r, kind, rows in beside_engines():
        speeds = {engine_name(name): row["tokens_per_s"] for name, row in rows.items() if row["tokens_per_s"]}
        kept = {name: speed for name, speed in speeds.items() if name in (AUTO, PLAIN) or name_is_engine(name, r)}
        columns.append((link(r, f"{kind}, {r['config']['max_tokens']} tokens"), kept))
    for r in batches():
        for n, found in r["results"]["decode"].items():
            if n != "1":
                speeds = {name.removeprefix("Outpace, "): f["tokens_per_s"]["median"] for name, f in found.items()}
                columns.append((link(r, f"{n} at once"), speeds))
    names = [*(n for n in (AUTO, PLAIN, PEER) if any(n in c for _, c in columns))]
    names += sorted({n for _, c in columns for n in c} - set(names))
    rows = []
    for name in names:
        cells = [show(c[name], c[name] == max(c.values())) if name in c else "" for _, c in columns]
        rows.append([words(name), *cells])
    return table(["tokens per second", *(head for head, _ in columns)], rows)


def name_is_engine(name: str, r: Record) -> bool:
    return name in {engine_name(peer) for peer in r["results"]["peers"]}


def words(name: str) -> str:
    if name in (AUTO, PLAIN):
        return f"**Outpace**, `{name}`" if name == AUTO else "Outpace, plain decoding"
    engine, _, mode = name.replace("vllm-ngram", "vllm:lookup").partition(":")
    return ", ".join(
        filter(None, (engine.replace("vllm", "vLLM").replace("openvino", "OpenVINO"), MODES.get(mode, mode)))
    )


def show(speed: float, best: bool) -> str:
    return f"**{speed:.1f}**" if best else f"{speed:.1f}"


def claims() -> str:
    """What is measured on MODEL, each line with its result files."""
    lines = []
    greedy, sampled = planned()
    if greedy is not None:
        kinds = {row["workload"]: row["x_plain"] for row in greedy.rows if row["method"] == AUTO and row["x_plain"]}
        each = ", ".join(f"{kind} {x:.2f}" for kind, x in kinds.items() if kind != "random")
        text = f"**{greedy.sums[AUTO]['x_plain']:.2f} times** the tokens per second of plain decoding ({each}"
        links = [link(greedy.record, "result")]
        if sampled is not None:
            text += f"; {sampled.sums[AUTO]['x_plain']:.2f} times when sampling at temperature {sampled.temperature:g}"
            links.append(link(sampled.record, "result"))
        draft = greedy.record["results"]["models"][MODEL]["draft_model"]
        lines.append(
            f"{text}), by `--method auto`{f' with {draft} as draft model' if draft else ''}: {' '.join(links)}."
        )
    if ratios := against_peer():
        ahead = sum(ratio > 1 for ratio in ratios)
        text = f"Against {PEER}: **{min(ratios):.2f} to {max(ratios):.2f} times** its tokens per second for one answer "
        text += f"at a time, faster in {ahead} of {len(ratios)} comparisons"
        for r in batches():
            many = {n: f["Outpace, auto"]["against_llamacpp"]["median"] for n, f in r["results"]["decode"].items()}
            most = [many[n] for n in many if n != "1"]
            sizes = " to ".join(sorted((n for n in many if n != "1"), key=int)[:: len(most) - 1 or 1])
            text += f"; **{min(most):.2f} to {max(most):.2f} times** for {sizes} answers at once"
        lines.append(f"{text} (the table above).")
    promised = [
        row for one in comparisons() if one.model == MODEL for row in one.rows if row["declared"] == "identical"
    ]
    if promised:
        text = (
            f"**{sum(row['differing'] for row in promised)} of {sum(row['compared'] for row in promised)}** answers of "
        )
        text += "lossless methods differ from plain decoding in these comparisons"
        if audits := [r for r in records("audit") if r["sections"]]:
            compared, differing = map(sum, zip(*(audit_counts(r) for r in audits), strict=True))
            models = ", ".join(sorted({s["model"] for r in audits for s in r["sections"]}))
            text += f", and {differing} of {compared} sequences in the audits of {models}"
        lines.append(f"{text}: [results](docs/results.md#the-same-tokens).")
    return "\n".join(f"- {line}" for line in lines) or "- No result files yet: see `benchmarks/`."


def against_peer() -> list[float]:
    """Speed of `auto` over PEER's, one answer at a time, of every comparison of both."""
    found = []
    for _, _, rows in beside_engines():
        if AUTO in rows and PEER in rows and rows[AUTO]["x_plain"] and rows[PEER]["x_plain"]:
            found.append(rows[AUTO]["x_plain"] / rows[PEER]["x_plain"])
    return found


def no_gain() -> str:
    """Where `auto` gains little or nothing, or PEER is faster."""
    lines = []
    for r, kind, rows in beside_engines():
        if AUTO in rows and PEER in rows and rows[PEER]["x_plain"] > rows[AUTO]["x_plain"]:
            lines.append(
                f"One answer of {kind} ({r['config']['max_tokens']} tokens): `auto` is {rows[AUTO]['x_plain']:.2f} "
                f"times our plain decoding, {PEER} {rows[PEER]['x_plain']:.2f} times: {link(r, 'result')}."
            )
    for r in batches():
        gains = {int(n): f["Outpace, auto"]["against_plain"]["median"] for n, f in r["results"]["decode"].items()}
        shown = ", ".join(f"{x:.2f} with {n} at once" for n, x in sorted(gains.items()))
        lines.append(f"Batches: the more answers at once, the less drafting adds (`auto` over plain: {shown}): "
                     f"{link(r, 'result')}.")  # fmt: skip
    for one in comparisons():
        if one.model != MODEL and one.batch == 1 and one.temperature and AUTO in one.sums:
            x = one.sums[AUTO]["x_plain"]
            if x < 1.1:
                lines.append(f"Sampling from a small model ({one.model}, temperature {one.temperature:g}): {x:.2f} "
                             f"times plain decoding: {link(one.record, 'result')}.")  # fmt: skip
    return "\n".join(f"- {line}" for line in lines)


def machine() -> str:
    """The processors on which the table was measured."""
    found: dict[str, None] = {}
    for r in [r for r, _, _ in beside_engines()] + batches():
        e = r["environment"]
        fast = [f for f in e["cpu_features"] if f in ("avx512_vnni", "amx_int8")]
        found[f"{e['cpu']}, {e['cores']} cores ({', '.join(fast)})"] = None
    return f"Measured on: {'; '.join(found)}." if found else ""


# -- pages -------------------------------------------------------------------------------------------------------------

PAGES: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {"engines": engines_table, "machine": machine, "claims": claims, "no-gain": no_gain},
    "docs/results.md": {"results": results},
    "docs/decoding.md": {"methods": method_table},
}


def fill(page: str, text: str) -> str:
    """`text` of a page with its generated parts written anew. Raises ValueError for a part that is missing."""
    for name, make in PAGES[page].items():
        start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        if text.count(start) != 1 or text.count(end) != 1:
            raise ValueError(f"{page} needs {start} and {end} once each")
        head, rest = text.split(start)
        _, tail = rest.split(end)
        made = make().replace("](benchmarks/", "](" + "../" * page.count("/") + "benchmarks/")
        text = f"{head}{start}\n{made}\n{end}{tail}"
    return text


def main() -> None:
    stale = []
    for page in PAGES:
        old = (ROOT / page).read_text("utf-8")
        new = fill(page, old)
        if old != new:
            stale.append(page)
            if "--check" not in sys.argv[1:]:
                (ROOT / page).write_text(new, "utf-8")
    if stale and "--check" in sys.argv[1:]:
        sys.exit(f"{', '.join(stale)}: out of date, run  python benchmarks/readme.py")


if __name__ == "__main__":
    main()
