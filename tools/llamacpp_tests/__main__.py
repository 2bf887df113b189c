"""Runs llama.cpp's own server tests against `outpace serve`, and writes a table of what passed.

    python -m tools.llamacpp_tests [--source FOLDER] [--model NAME] [--tool-model NAME] [--out FOLDER] [PYTEST ARGUMENT]

The tests come from the source archive of `llama-cpp-python`, by pip, and are changed on the way: routes and the names
of fields (translate.py), words and token counts of the tiny model that they were written for, and the beginning of
`system_fingerprint`. What is out by design is in by_design.py with its reason. Needs `requests`, `openai` and
`filelock`. Takes about ten minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
SOURCE = "llama-cpp-python==0.3.36"
INSIDE = "vendor/llama.cpp/tools/server/tests/"
#: What is changed in the tests' text: counts of another vocabulary, and what is said of llama.cpp's own build.
CHANGES = [
    (r"== n_prompt\b", "> 0"),
    (r"== n_cache\b", ">= (n_cache > 0)"),
    (r'startswith\("b"\)', 'startswith("op_")'),
    (r'server_port}"(\)|,)', r'server_port}/v1"\1'),  # OpenAI's clients: our routes stand below /v1 alone
]


def fetch(folder: Path) -> Path:
    """The folder of the tests, from the package index."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:", "-d", str(folder)]
    subprocess.run([*command, SOURCE], check=True)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        wanted = [m for m in tar.getmembers() if f"/{INSIDE}" in m.name]
        tar.extractall(folder / "source", wanted, filter="data")
    (found,) = (folder / "source").glob(f"*/{INSIDE}")
    return found


def run(tests: Path, model: str, tool_model: str, arguments: list[str]) -> list[dict[str, Any]]:
    for file in (tests / "unit").glob("*.py"):
        text = file.read_text("utf-8")
        for pattern, better in CHANGES:
            text = re.sub(pattern, better, text)
        file.write_text(text, "utf-8")
    result = tests / "outcomes.json"
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {
        **os.environ,
        "PYTHONPATH": path,
        "OUTPACE_TEST_MODEL": model,
        "OUTPACE_TEST_TOOL_MODEL": tool_model,
        "OUTPACE_TEST_RESULT": str(result),
    }
    options = ["-p", "tools.llamacpp_tests.plugin", "-p", "no:cacheprovider", "-q", "--rootdir", str(tests)]
    subprocess.run([sys.executable, "-m", "pytest", *options, *(arguments or ["unit"])], cwd=tests, env=env)
    if not result.exists():
        raise SystemExit("the tests did not run; see above")
    return json.loads(result.read_text("utf-8"))


def page(record: dict[str, Any]) -> str:
    """The result as Markdown."""
    rows = record["tests"]
    counts = Counter(row["outcome"] for row in rows)
    reasons = Counter(row["why"] for row in rows if row["outcome"] == "skipped")
    lines = [
        "# llama.cpp's server tests against `outpace serve`",
        "",
        f"{len(rows)} tests of `{record['source']}`, model {record['model']}, Outpace {record['outpace']}. Made by",
        "`python -m tools.llamacpp_tests`; what is changed in the tests is told there.",
        "",
        f"**{counts['passed']} passed, {counts['failed']} failed, {counts['skipped']} out by design.**",
        "",
        "| file | passed | failed | out by design |",
        "| --- | --- | --- | --- |",
    ]
    for file in sorted({row["test"].split("::")[0] for row in rows}):
        own = Counter(row["outcome"] for row in rows if row["test"].startswith(f"{file}::"))
        lines.append(f"| {Path(file).name} | {own['passed']} | {own['failed']} | {own['skipped']} |")
    lines += ["", "Out by design:", "", "| tests | reason |", "| --- | --- |"]
    lines += [f"| {n} | {why} |" for why, n in reasons.most_common()]
    failed = [row for row in rows if row["outcome"] == "failed"]
    if failed:
        lines += ["", "Failed:", ""]
        lines += [f"- `{row['test'].split('/')[-1]}`" for row in failed]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="llama.cpp's server tests against outpace serve")
    parser.add_argument("--source", type=Path, help="tools/server/tests of a llama.cpp checkout; default: by pip")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tool-model", default="qwen2.5-coder-0.5b", help="for the tests of tools")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    known, rest = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as work:
        tests = Path(work) / "tests"
        shutil.copytree(known.source or fetch(Path(work)), tests)
        rows = run(tests, known.model, known.tool_model, rest)
    record = {"source": SOURCE, "model": known.model, "outpace": metadata.version("outpace"), "tests": rows}
    (known.out / "server-tests-of-llamacpp.json").write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    (known.out / "server-tests-of-llamacpp.md").write_text(page(record), "utf-8")
    print(page(record))


if __name__ == "__main__":
    main()
