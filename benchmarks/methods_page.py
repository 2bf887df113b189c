"""Write docs/methods.md: every published method that the project knows, what is here of it, and what it gave here.

    python benchmarks/methods_page.py            write it
    python benchmarks/methods_page.py --check    exit code 1 when it is not up to date

Its sources are `docs/methods.tsv` (a row for each method), the registry, `results/compare-*.json` and
`results/audit-*.json`. For each model, temperature and contestant the newest result of one sequence at a time counts.
Rows and registry must agree (`problems`), or nothing is written.

Columns of the table of methods: `name`, `family`, `title` of the paper ("-": there is none), `paper` (address; empty if
not known here), `year`, `mechanism`, `claim` (what the authors report; empty where the registry has it, or if they give
no figure), `status`, `methods` (registered names, by commas), `where` (files that hold what is not a registered method,
by commas), `note` (what is left out or different here).
"""

from __future__ import annotations

import csv
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any
from urllib.parse import quote_plus

from common import table
from compared import AUTO, RANDOM, groups, overall, why_slower
from tables import Record, link, records

from outpace.registry import Method
from outpace.registry import methods as registered_methods

ROOT = Path(__file__).parent.parent
ROWS = ROOT / "docs" / "methods.tsv"
PAGE = ROOT / "docs" / "methods.md"
IMPLEMENTED, IN_PART = "implemented", "in part"
#: In the order of the page
STATUSES = {
    IMPLEMENTED: "what the paper describes is here",
    IN_PART: "a part is here; the row says which",
    "not yet": "nothing of it is here, and no lack of weights or hardware is the reason",
    "needs trained weights": "runs only with weights that were trained for it, and none are here",
    "needs other hardware": "made for GPUs, networks or devices that it has not been tried on here",
    "study": "a benchmark, survey or analysis: nothing to run",
}
FAMILIES = {
    "SPEC": "Draft and verify",
    "SERVE": "Serving",
    "KVR": "Reuse and management of the KV cache",
    "KVC": "Compression of the KV cache",
    "ATTN": "Attention",
    "DLLM": "Diffusion language models",
    "GENMM": "Images, video and speech",
    "MODEL": "Architecture",
    "RECUR": "Recurrent models and fixed points",
    "REASON": "Reasoning and constraints",
    "SEQPAR": "Sequence parallelism",
    "WCOMP": "Compression of weights",
    "PIPE": "Training over many devices",
    "OTHER": "Other",
}
LOSSLESS = {"identical": "lossless, the same tokens", "distribution": "lossless, the same distribution",
            "approximate": "**not lossless**"}  # fmt: skip
AUTO_PLANNER = "goodput"  # what the contestant `auto` plans with


@dataclass(frozen=True, slots=True)
class Row:
    name: str
    family: str
    title: str
    paper: str
    year: str
    mechanism: str
    claim: str
    status: str
    methods: str
    where: str
    note: str

    @property
    def here(self) -> bool:
        return self.status in (IMPLEMENTED, IN_PART)


def names_in(cell: str) -> list[str]:
    return [part.strip() for part in cell.split(",") if part.strip()]


def read_rows(path: Path) -> list[Row]:
    """Raises ValueError for a wrong header or a row with too few or too many cells."""
    head, *lines = csv.reader(path.read_text("utf-8").splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE)
    columns = [f.name for f in fields(Row)]
    if head != columns:
        raise ValueError(f"{path.name}: the columns are {head}, must be {columns}")
    for number, cells in enumerate(lines, 2):
        if len(cells) != len(columns):
            raise ValueError(f"{path.name}, line {number}: {len(cells)} cells, must be {len(columns)}")
    return [Row(*(cell.strip() for cell in cells)) for cells in lines]


def problems(rows: Sequence[Row], registered: Sequence[Method], root: Path = ROOT) -> list[str]:
    """What is wrong with the rows by themselves and beside the registry, a sentence each."""
    by_name = {m.name: m for m in registered}
    found = [f"{name}: {n} rows" for name, n in Counter(r.name for r in rows).items() if n > 1]
    for row in rows:
        found += [f"{row.name}: {wrong}" for wrong in _wrong_with(row, by_name, root)]
    for m in registered:
        of_it = [r for r in rows if m.name in names_in(r.methods)]
        if not of_it:
            found.append(f"the registered {m.kind} {m.name!r} is in no row's `methods`")
        elif m.paper and m.paper not in {r.paper for r in of_it}:
            found.append(f"the registered {m.kind} {m.name!r} has paper {m.paper}, its rows another")
    return found


def _wrong_with(row: Row, by_name: dict[str, Method], root: Path) -> Iterable[str]:
    for column in ("name", "family", "title", "mechanism", "status"):
        if not getattr(row, column):
            yield f"no {column}"
    if row.family not in FAMILIES:
        yield f"unknown family {row.family!r}, there are {', '.join(FAMILIES)}"
    if row.status not in STATUSES:
        yield f"unknown status {row.status!r}, there are {', '.join(STATUSES)}"
    if row.paper and not row.paper.startswith("https://"):
        yield f"{row.paper!r} is no address"
    if row.year and not (row.year.isdigit() and len(row.year) == 4):
        yield f"{row.year!r} is no year"
    if row.here and not row.methods and not row.where:
        yield f"{row.status}, but neither `methods` nor `where` says by what"
    if not row.here and (row.methods or row.where):
        yield f"{row.status}, but `methods` or `where` names something"
    if row.status == IN_PART and not row.note:
        yield "in part, but no note says which part"
    for name in names_in(row.methods):
        if name not in by_name:
            yield f"no registered method {name!r}"
    for file in names_in(row.where):
        if not (root / file).is_file():
            yield f"no file {file}"
    if row.claim and registry_claims(row, by_name):
        yield "the registry has a claim as well: leave the row's empty"


def registry_claims(row: Row, by_name: dict[str, Method]) -> list[str]:
    """Of the row's registered methods, as far as they come from the row's paper."""
    of_paper = [m for name in names_in(row.methods) if (m := by_name.get(name)) and m.paper == row.paper]
    return list(dict.fromkeys(m.claim for m in of_paper if m.claim))


@dataclass(frozen=True, slots=True)
class Figure:
    """One contestant on one model at one temperature, over all kinds of text but random tokens."""

    record: Record
    temperature: str
    speedup: float
    tokens_per_s: float
    mean_accepted: float
    differing: int
    why: str

    def words(self) -> str:
        how = "greedy" if float(self.temperature) == 0 else f"at temperature {self.temperature}"
        figures = f"{self.tokens_per_s:.1f} tokens/s, {self.mean_accepted:.2f} a step"
        times = f"{self.speedup:.2f} x" if self.speedup >= 1 else f"**loses: {self.speedup:.2f} x**"
        reason = f"; {self.why}" if self.why and self.speedup < 1 else ""
        return f"{how} {times} ({figures}{reason})" + (f", **{self.differing} differ**" if self.differing else "")


Figures = dict[tuple[str, str, str, str], Figure]  # by contestant, model, precision, temperature


def figures() -> Figures:
    """The newest result of each contestant, model, precision and temperature."""
    found: Figures = {}
    for r in sorted(records("compare"), key=lambda r: r["environment"]["date"]):
        ours = [row for row in r["results"]["runs"][0] if row["method"] not in r["results"]["peers"]]
        for (model, temperature, batch), rows in groups(ours).items():
            if batch > 1:
                continue
            for name, f in overall(rows).items():
                why = "" if name in ("plain", AUTO) else why_slower(f)
                differing = f["differing"] if f["declared"] == "identical" else 0
                key = (name, model, r["results"]["models"][model]["precision"], f"{temperature:g}")
                tau = f["tokens_per_step"]
                found[key] = Figure(r, key[3], f["x_plain"], f["tokens_per_s"], tau, differing, why)
    return found


def audits() -> dict[str, tuple[int, int]]:
    """By method: sequences that were promised to be plain decoding's, and how many were not."""
    found: dict[str, tuple[int, int]] = {}
    for r in records("audit"):
        for row in (row for section in r["sections"] for row in section["rows"]):
            if row["exactness"] == "identical" and not row["reference"]:
                compared, differing = found.get(row["method"], (0, 0))
                found[row["method"]] = (compared + row["sequences"], differing + row["differing"])
    return found


def losses() -> dict[str, list[str]]:
    """By approximate verifier: right answers beside those of plain decoding."""
    found: dict[str, list[str]] = {}
    for r in records("audit"):
        scores = r.get("quality", {"scores": []})["scores"]
        plain = {(s["suite"], s["precision"]): s["right"] for s in scores if s["method"] == "plain"}
        for s in scores:
            if s["exactness"] == "approximate" and s["right"] is not None and s["method"] != "plain":
                words = f"{s['suite']}: {s['right']} of {s['questions']} right, plain decoding "
                words += f"{plain[s['suite'], s['precision']]} ({from_docs(r, r['config']['model'])})"
                found.setdefault(s["verifier"], []).append(words)
    return found


def contestants(row: Row, by_name: dict[str, Method], names: Iterable[str]) -> list[str]:
    """Which contestants of the benchmarks show what the row's methods give: a verifier with the row's drafters, or with
    any if the row has none."""
    of_row = [by_name[name] for name in names_in(row.methods)]
    drafters = [m.name for m in of_row if m.kind == "drafter"]
    verifiers = [m.name for m in of_row if m.kind == "verifier"]
    planned = any(m.kind == "planner" and m.name == AUTO_PLANNER for m in of_row)
    pairs_of = (n.partition("/") for n in sorted(names))
    pairs = ["".join(p) for p in pairs_of if p[2] in verifiers and (p[0] in drafters or not drafters)]
    return drafters + pairs + [AUTO] * planned


def measured_cell(row: Row, by_name: dict[str, Method], found: Figures) -> str:
    lines = []
    for name in contestants(row, by_name, {key[0] for key in found}):
        by_model: dict[tuple[str, str], list[Figure]] = {}
        for (contestant, model, precision, _), figure in found.items():
            if contestant == name:
                by_model.setdefault((model, precision), []).append(figure)
        for (model, precision), of_model in sorted(by_model.items()):
            shown = sorted(of_model, key=lambda f: float(f.temperature))
            linked = list(dict.fromkeys(from_docs(f.record, f"{model}, {precision}") for f in shown))
            lines.append(f"`{name}` on {' and '.join(linked)}: {'; '.join(f.words() for f in shown)}")
    return "<br>".join(lines) or ("no result file yet" if row.here else "-")


def from_docs(record: Record, text: str) -> str:
    """A link to a result file's page, from the folder docs."""
    return link(record, text).replace("](", "](../")


def here_cell(
    row: Row, by_name: dict[str, Method], audited: dict[str, tuple[int, int]], lost: dict[str, list[str]]
) -> str:
    lines = [f"**{row.status}**" + (f": {row.note}" if row.note else "")]
    for name in names_in(row.methods):
        m = by_name[name]
        needs = f"; needs {', '.join(m.needs)}" if m.needs else ""
        words = f"{m.kind} `{name}` ({m.title}): {LOSSLESS[m.exactness]}{needs}"
        if name in audited:
            compared, differing = audited[name]
            words += f"; audit: {differing} of {compared} sequences differ"
        if m.kind == "verifier":
            words += "".join(f"; {each}" for each in lost.get(name, ()))
        lines.append(words)
    lines += [f"[{Path(file).name}](../{file})" for file in names_in(row.where)]
    return "<br>".join(lines)


def name_cell(row: Row) -> str:
    address = row.paper
    if not address and row.title != "-":
        address = f"https://arxiv.org/search/?searchtype=title&query={quote_plus(row.title)}"
    linked = f"[{row.name}]({address})" if address else row.name
    return f"{linked}, {row.year}" if row.year else linked


def section(family: str, rows: Sequence[Row], by_name: dict[str, Method], found: Figures) -> str:
    order = list(STATUSES)
    audited, lost = audits(), losses()
    cells: list[list[Any]] = []
    for row in sorted(rows, key=lambda r: (order.index(r.status), r.name.lower())):
        claim = row.claim or "; ".join(registry_claims(row, by_name)) or "-"
        here, measured = here_cell(row, by_name, audited, lost), measured_cell(row, by_name, found)
        cells.append([cell.replace("|", "\\|") for cell in (name_cell(row), row.mechanism, claim, here, measured)])
    return f"## {FAMILIES[family]}\n\n" + table(
        ["method", "what it does", "its authors report", "here", "measured here"], cells
    )


def overview(rows: Sequence[Row], families: Sequence[str]) -> str:
    counts = Counter((r.family, r.status) for r in rows)
    lines = [
        [FAMILIES[f], *(counts[f, s] or "" for s in STATUSES), sum(counts[f, s] for s in STATUSES)] for f in families
    ]
    sums = Counter(r.status for r in rows)
    return table(["family", *STATUSES, "all"], [*lines, ["**all**", *(sums[s] for s in STATUSES), len(rows)]])


def sources(found: Figures) -> str:
    """The result files that the figures come from."""
    used = {(f.record["file"], model): f.record for (_, model, *_), f in found.items()}
    rows = []
    for (_, name), r in sorted(used.items(), key=lambda item: item[0]):
        m, e = r["results"]["models"][name], r["environment"]
        machine = f"{e['gpu'] or e['cpu']}, {m['threads']} threads on {e['cores']} cores, {e['memory_gb']} GB"
        texts = dict.fromkeys(row["workload"] for row in r["results"]["runs"][0] if row["workload"] != RANDOM)
        model = f"{name}, {m['precision']}"
        rows.append([from_docs(r, r["file"]), model, m["draft_model"] or "none", machine, ", ".join(texts), e["date"]])
    return table(["result file", "model", "draft model", "machine", "texts", "date"], rows)


def page(rows: Sequence[Row], registered: Sequence[Method], found: Figures) -> str:
    by_name = {m.name: m for m in registered}
    present = Counter(r.family for r in rows if r.here)
    order = list(FAMILIES)
    families = sorted({r.family for r in rows}, key=lambda f: (-present[f], order.index(f)))
    head = (
        "# Methods\n\n"
        "Every published method that the project knows: what it does, what its authors report, whether it is here, and "
        "what it gave here. Generated by `python benchmarks/methods_page.py` from `docs/methods.tsv`, the registry and "
        "the newest result files; do not edit it.\n\n"
        "- A claim is the authors' figure on their model and hardware; `-`: no figure is known here.\n"
        "- Measured: times plain decoding of the same prompts in turns, one sequence at a time; then tokens/s and "
        "tokens a step. A method that is slower than plain decoding here is shown as losing, with the reason.\n"
        "- Lossless, *the same tokens*: as plain decoding with the same seed, compared token for token in every "
        "benchmark and by `outpace audit`; *the same distribution*: tokens of the same distribution.\n"
        "- Where a paper's address is not known here, its link searches arXiv for the title. A year is that of the "
        "first version.\n\n"
    )
    words = "\n".join(f"- **{status}**: {meaning}." for status, meaning in STATUSES.items())
    parts = [f"{head}{words}", overview(rows, families), f"## Where the figures come from\n\n{sources(found)}"]
    parts += [section(f, [r for r in rows if r.family == f], by_name, found) for f in families]
    return "\n\n".join(parts) + "\n"


def make() -> str:
    """The page as it must be. Exits with what is wrong when rows and registry do not agree."""
    rows, registered = read_rows(ROWS), registered_methods()
    if wrong := problems(rows, registered):
        sys.exit("docs/methods.tsv and the registry do not agree:\n" + "\n".join(f"- {line}" for line in wrong))
    return page(rows, registered, figures())


def main() -> None:
    new = make()
    if "--check" in sys.argv[1:]:
        if not PAGE.exists() or PAGE.read_text("utf-8") != new:
            sys.exit("docs/methods.md is out of date: run  python benchmarks/methods_page.py")
        return
    PAGE.write_text(new, "utf-8")


if __name__ == "__main__":
    main()
