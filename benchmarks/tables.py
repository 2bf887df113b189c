"""Markdown tables of the registry and of the result files `results/*.json`. A figure without a result file is not
there.

Links are relative to the project's root.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from common import RESULTS, show_spread, table
from compared import AUTO, PLAIN, against_best, full_words, groups, overall

from outpace.registry import methods

Record = dict[str, Any]
LOSSLESS = {"identical": "yes: the same tokens", "distribution": "yes: the same distribution", "approximate": "no"}


def records(kind: str) -> list[Record]:
    """Result files `KIND-*.json`, each with its `file`, by name."""
    found = []
    for path in sorted(RESULTS.glob(f"{kind}-*.json")):
        found.append({"file": path.stem, **json.loads(path.read_text("utf-8"))})
    return found


def link(record: Record, text: str | None = None) -> str:
    page = f"benchmarks/results/{record['file']}"
    suffix = "md" if (RESULTS / f"{record['file']}.md").exists() else "json"
    return f"[{text or record['file']}]({page}.{suffix})"


@dataclass(frozen=True)
class Compared:
    """A comparison's rows of our methods for one model, temperature and batch."""

    record: Record
    model: str
    temperature: float
    batch: int
    rows: list[dict[str, Any]]
    sums: dict[str, dict[str, Any]]  # by method, over all kinds of text

    @property
    def kinds(self) -> int:
        """Of text."""
        return len({row["workload"] for row in self.rows})

    def words(self) -> str:
        m = self.record["results"]["models"][self.model]
        draft = f", draft model {m['draft_model']}" if m["draft_model"] else ""
        return f"{self.model}, {m['precision']}, {m['threads']} threads{draft}"


def comparisons() -> list[Compared]:
    found = []
    for r in records("compare"):
        ours = [row for row in r["results"]["runs"][0] if row["method"] not in r["results"]["peers"]]
        found += [Compared(r, *group, rows, overall(rows)) for group, rows in groups(ours).items()]
    return found


def engine_name(peer: str) -> str:
    """Of a contestant of `outpace compare`; a server by the name that it was given, without its address."""
    return peer.partition("=")[0]


def best(methods_of: Record) -> tuple[str, Record]:
    """The method with the highest speed-up, plain apart (plain when it ran alone)."""
    others = {name: m for name, m in methods_of.items() if name != "plain"} or methods_of
    return max(others.items(), key=lambda item: item[1]["speedup"]["median"])


def method_table() -> str:
    rows = []
    for m in sorted(methods(), key=lambda m: (m.kind, m.name != "plain", m.name)):
        paper = f"[{paper_name(m.paper)}]({m.paper})" if m.paper else ""
        rows.append([f"`{m.name}`", m.kind, m.title, LOSSLESS[m.exactness], ", ".join(m.needs) or "nothing", paper])
    return table(["name", "kind", "what it is", "lossless", "needs", "source"], rows)


def paper_name(address: str) -> str:
    found = re.search(r"arxiv\.org/abs/([\d.]+)", address)
    return f"arXiv {found[1]}" if found else address.removeprefix("https://")


def config_words(r: Record) -> str:
    c = r["config"]
    where = "CUDA" if c.get("device", "cpu") != "cpu" else f"{c['threads']} thread{'s' if c['threads'] != 1 else ''}"
    return f"{c['model']}, {c['precision']}, {where}"


def audit_counts(r: Record) -> tuple[int, int]:
    """Sequences that were promised identical, and how many of them were not."""
    rows = [row for s in r["sections"] for row in s["rows"] if row["exactness"] == "identical" and not row["reference"]]
    return sum(row["sequences"] for row in rows), sum(row["differing"] for row in rows)


def results() -> str:
    parts = [f"## {title}\n\n{make() or 'No result file yet.'}" for title, make in RESULT_TABLES.items()]
    return "\n\n".join([*parts, f"## Machines\n\n{hardware()}"])


def hardware() -> str:
    """Where the figures come from; every result page has the whole list of versions."""
    machines: dict[str, list[str]] = {}
    for kind in ("compare", "decode", "llamacpp", "batches", "load", "perplexity", "startup", "audit"):
        for r in records(kind):
            e = r["environment"]
            gpu = f", {e['gpu']}" if e["gpu"] else ""
            features = ", ".join(e["cpu_features"])
            words = (
                f"{e['cpu']}, {e['cores']} cores ({features}), {e['memory_gb']} GB{gpu}; torch {e['versions']['torch']}"
            )
            machines.setdefault(words, []).append(r["file"])
    if not machines:
        return "Nothing has been measured yet."
    if len(machines) == 1:
        return f"Measured on: {next(iter(machines))}. Spread is median (minimum-maximum) over the trials."
    return "\n".join(f"- {', '.join(files)}: {words}" for words, files in machines.items())


def decode_table() -> str:
    rows = []
    for r in records("decode"):
        race, c = r["results"]["race"]["methods"], r["results"]["ceiling"]
        name, m = best(race)
        edits = r["results"].get("edits")
        edited = show_spread(edits["methods"][name]["speedup"], 2) if edits else ""
        rows.append(
            [
                link(r, f"{r['config']['model']}, {r['config']['precision']}"),
                show_spread(race["plain"]["tokens_per_s"]),
                f"{100 * c['fraction']:.0f} %",
                f"`{name}`",
                show_spread(m["tokens_per_s"]),
                show_spread(m["speedup"], 2),
                edited,
                f"{m['differing_sequences']} of {r['results']['race']['prompts']}",
            ]
        )
    head = ["model", "plain tokens/s", "of the ceiling", "method", "tokens/s", "x plain", "x plain, edits", "differing"]
    return table(head, rows) if rows else ""


def planner_table() -> str:
    rows = []
    for one in comparisons():
        cells = against_best(one.rows)
        rows += [
            [link(one.record, one.model), one.batch, f"{c['temperature']:g}", c["workload"], f"{c['x_plain']:.2f}",
             full_words(c), f"`{c['best']}`", f"{c['of_best']:.2f}"]
            for c in cells
        ]  # fmt: skip
        lossless = {n: f["x_plain"] for n, f in one.sums.items() if n != AUTO and f["declared"] == "identical"}
        if cells and AUTO in one.sums:
            best_of_all, mine = max(lossless, key=lossless.__getitem__), one.sums[AUTO]["x_plain"]
            figures = [
                f"**{mine:.2f}**",
                full_words(one.sums[AUTO]),
                f"`{best_of_all}`",
                f"{mine / lossless[best_of_all]:.2f}",
            ]
            temperature = f"{one.temperature:g}"
            rows.append([link(one.record, one.model), one.batch, temperature, "**all but random**", *figures])
    head = [
        "model",
        "at once",
        "temperature",
        "text",
        "auto, x plain",
        "while all run",
        "fastest other method",
        "auto / that",
    ]
    note = (
        "Others: those that guarantee the same tokens as well. While all run: until the first answer of a batch ends; "
        "all have the same length here, and places of answers that end early stay empty. `random`: prompts of random "
        "tokens, where nothing can be drafted. The fastest of some fifteen methods is chosen after the fact: plain "
        "decoding against itself would come out below 1 here."
    )
    return f"{table(head, rows)}\n\n{note}" if rows else ""


def side_by_side() -> str:
    """Speed-up of every method over plain decoding, by model, batch and temperature."""
    columns = [one for one in comparisons() if len(one.sums) > 3]
    names = sorted(
        {n for one in columns for n in one.sums if n != PLAIN},
        key=lambda n: (-max(one.sums[n]["x_plain"] for one in columns if n in one.sums), n),
    )
    rows = [[f"`{n}`", *(f"{one.sums[n]['x_plain']:.2f}" if n in one.sums else "" for one in columns)] for n in names]
    head = [
        f"{link(one.record, one.model)}, {one.batch} at once, temperature {one.temperature:g}" for one in columns
    ]  # fmt: skip
    note = (
        "Geometric means over the kinds of text. The linked pages have each kind, acceptance, the share of drafting in "
        "the time, what the authors report and why a method loses here. `a/b`: with verifier b."
    )
    return f"{table(['method, x plain', *head], rows)}\n\n{note}" if rows else ""


def peer_table() -> str:
    rows = [
        [
            link(r, f"{r['config']['model']}, {r['config']['precision']}"),
            name,
            show_spread(c["tokens_per_s"]),
            show_spread(c["against_llamacpp"], 2),
            f"{c['prefill_tokens_per_s']:.0f}",
            f"{c['prefill_against_llamacpp']:.2f}",
        ]
        for r in records("llamacpp")
        for name, c in r["results"]["contestants"].items()
    ]
    head = ["model", "engine or method", "tokens/s", "x llama.cpp", "prefill tokens/s", "x llama.cpp"]
    return table(head, rows) if rows else ""


def batches_table() -> str:
    """Many sequences at once, and prefill, beside llama.cpp."""
    rows = []
    for r in records("batches"):
        parts = {f"decoding {n} sequence{'s' if n != '1' else ''}": d for n, d in r["results"]["decode"].items()}
        parts |= {f"prefill of {what}": found for what, found in r["results"]["prefill"].items()}
        for what, found in parts.items():
            (peer,) = (found[name] for name in found if not name.startswith("Outpace"))
            plain, auto = found["Outpace, plain"], found["Outpace, auto"]
            rows.append(
                [
                    link(r, f"{r['config']['model']}, {r['config']['precision']}"),
                    what,
                    f"{peer['tokens_per_s']['median']:.0f}",
                    f"{plain['tokens_per_s']['median']:.0f}",
                    f"{auto['tokens_per_s']['median']:.0f}",
                    f"{plain['against_llamacpp']['median']:.2f}",
                    f"{auto['against_plain']['median']:.2f}",
                ]
            )
    head = ["model", "tokens/s", "llama.cpp", "plain", "auto", "plain, x llama.cpp", "auto, x plain"]
    return table(head, rows) if rows else ""


def load_table() -> str:
    """Requests per second that were answered in time, of those that arrived."""
    rows = [
        [
            link(r, r["config"]["model"]),
            rate,
            server,
            f"{f['requests'] / r['config']['seconds']:.2f}",
            f"{f['goodput']:.2f}",
        ]
        for r in records("load")
        for rate, found in r["results"]["rates"].items()
        for server, f in found.items()
    ]
    limits = {(r["config"]["ttft"], r["config"]["tbt"]) for r in records("load")}
    words = "; ".join(f"first token within {a:g} s, {b:g} s per token on average" for a, b in sorted(limits))
    head = ["model", "rate, requests/s", "server", "arrived, requests/s", "in time, requests/s"]
    return f"{table(head, rows)}\n\nIn time: {words}." if rows else ""


def compare_table() -> str:
    """How far two runs of the same comparison agree, and other engines beside plain decoding."""
    agreements, rows = [], []
    for r in records("compare"):
        if together := r["results"].get("agreement"):
            agreements.append(
                f"{link(r)}: two runs of {' and '.join(f'{s:.0f}' for s in r['results']['seconds'])} s; "
                f"{together['ratios']} ratios to plain decoding, apart by {100 * together['median']:.1f} % in the "
                f"median and {100 * together['largest']:.1f} % at most, {together['beyond_limit']} of them by more "
                f"than {100 * together['limit']:.0f} %."
            )
        peers = r["results"]["peers"]
        shown = sorted(r["results"]["runs"][0], key=lambda row: -(row["tokens_per_s"] or 0.0)) if peers else []
        for row in sorted(shown, key=lambda row: (row["batch"], row["workload"], row["temperature"])):
            speed = f"{row['tokens_per_s']:.1f}" if row["tokens_per_s"] else row["state"]
            x = "1" if row["method"] == PLAIN else f"{row['x_plain']:.2f}" if row["x_plain"] else ""
            name = engine_name(row["method"]) if row["method"] in peers else f"`{row['method']}`"
            rows.append([link(r, row["model"]), row["workload"], row["batch"], name, speed, x])
    parts = ["\n".join(f"- {line}" for line in agreements)] if agreements else []
    if rows:
        parts.append(table(["model", "text", "at once", "method or engine", "tokens/s", "x our plain"], rows))
    return "\n\n".join(parts)


def quality_table() -> str:
    rows = []
    for r in records("perplexity"):
        for precision, p in r["results"].items():
            against = next((f"{100 * v:+.2f} %" for k, v in p.items() if k.startswith("against_")), "")
            rows.append([link(r, r["config"]["model"]), precision, f"{p['perplexity']:.4f}", against])
    return table(["model", "precision", "perplexity", "against bfloat16, or the file"], rows) if rows else ""


def loss_table() -> str:
    """Right answers of approximate decoding beside those of plain decoding."""
    rows = []
    for r in records("audit"):
        quality = r.get("quality", {"scores": []})
        for s in quality["scores"]:
            right = "" if s["right"] is None else f"{s['right']} of {s['questions']}"
            pairs = ["", "", ""] if s["right"] is None else [s["lost"], s["won"], f"{s['p']:.2g}"]
            way = f"`{s['method']}`" + ("" if s["verifier"] == "auto" else f", `{s['verifier']}`")
            rows.append([link(r, r["config"]["model"]), s["precision"], f"{quality['temperature']:g}", s["suite"], way,
                         right, *pairs, s["cut"], f"{s['perplexity']:.3f}", f"{s['mean_accepted']:.2f}"])  # fmt: skip
    head = ["model", "precision", "temperature", "questions", "method, verifier", "right", "lost", "won", "p"]
    head += ["cut", "perplexity of the answers", "tokens/step"]
    words = (
        "Lost: right with plain decoding and wrong now; won: the other way round; p: the probability of so uneven a "
        "split by chance; cut: answers that reached the limit of tokens."
    )
    return f"{table(head, rows)}\n\n{words}" if rows else ""


def audit_table() -> str:
    rows = [
        [
            link(r, s["model"]),
            s["precision"],
            ", ".join(sorted({row["method"] for row in s["rows"]})),
            ", ".join(str(b) for b in sorted({row["batch"] for row in s["rows"]})),
            ", ".join(f"{t:g}" for t in sorted({row["temperature"] for row in s["rows"]})),
            sum(row["sequences"] for row in s["rows"] if not row["reference"]),
            sum(row["differing"] for row in s["rows"] if not row["reference"]),
        ]
        for r in records("audit")
        for s in r["sections"]
    ]
    head = ["model", "precision", "methods", "batch", "temperature", "sequences", "differing"]
    return table(head, rows) if rows else ""


def prefix_table() -> str:
    """How much sooner the first token comes when the prefix is cached."""
    rows = []
    for r in records("prefix"):
        for model, ways in r["results"]["models"].items():
            for name, found in ways.items():
                sooner = found["hit"]["sooner"]
                rows.append([link(r, model), name, r["config"]["prefix"], show_spread(sooner)])
    return table(["model", "through", "shared tokens", "times sooner"], rows) if rows else ""


def startup_table() -> str:
    rows = [[link(r, r["config"]["model"]), show_spread(r["results"]["first_token_s"], 2)] for r in records("startup")]
    return table(["model", "seconds to the first token"], rows) if rows else ""


RESULT_TABLES: dict[str, Callable[[], str]] = {
    "The planner against the best single method": planner_table,
    "Every method, one sequence": side_by_side,
    "Decoding, one sequence, greedy": decode_table,
    "Beside other engines": compare_table,
    "Beside llama.cpp, earlier runs": peer_table,
    "Many sequences at once": batches_table,
    "Goodput of the servers": load_table,
    "The same tokens": audit_table,
    "What approximate methods lose": loss_table,
    "Quality of the arithmetic": quality_table,
    "First token behind a shared prefix": prefix_table,
    "Start-up": startup_table,
}
