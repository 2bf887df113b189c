"""Start-up: from the start of the process `outpace run` to the first character of the answer, the model cached.

    python benchmarks/startup.py --model smollm2-135m

Every trial is a fresh process. The first one is apart: the file system may still have to read the model's file.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from time import perf_counter
from typing import Any

import click
from common import note, public_name, save, show_spread, spread, table

QUESTION = "How long does a person wait for the first token of `outpace run`, counted from the start of the process?"
PROMPT = "Name three rivers."


def first_output(command: list[str]) -> tuple[float, float]:
    """Seconds to the first byte on stdout, and to the end. Raises RuntimeError when the command fails."""
    began = perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL) as process:
        assert process.stdout is not None and process.stderr is not None
        got = os.read(process.stdout.fileno(), 1)
        first = perf_counter() - began
        process.stdout.read()
        errors = process.stderr.read().decode(errors="replace")
        code = process.wait()
        last = perf_counter() - began
    if code or not got:
        raise RuntimeError(f"{' '.join(command)} ended with exit code {code}: {errors}")
    return first, last


@click.command()
@click.option("--model", default="smollm2-135m", show_default=True)
@click.option("--precision", default="auto", show_default=True)
@click.option("--threads", type=int, default=2, show_default=True)
@click.option("--trials", type=int, default=7, show_default=True)
@click.option("--name", help="Of the result file.  [default: startup-MODEL]")
def main(**options: Any) -> None:
    outpace = [str(Path(sys.executable).with_name("outpace"))]
    answer = [*outpace, "run", "-m", options["model"], "--precision", options["precision"]]
    answer += ["--threads", str(options["threads"]), "--max-tokens", "16", PROMPT]
    note("first run, which fetches and prepares the model if it must")
    first_output(answer)
    runs = []
    for trial in range(options["trials"]):
        runs.append(first_output(answer))
        note(f"trial {trial + 1}/{options['trials']}: {runs[-1][0]:.2f} s")
    version = [first_output([*outpace, "--version"])[1] for _ in range(options["trials"])]
    results = {
        "first_token_s": spread([first for first, _ in runs]),
        "whole_run_s": spread([last for _, last in runs]),
        "version_s": spread(version),
    }
    rows = [
        ["first token of `outpace run`", show_spread(results["first_token_s"], 2)],
        ["the whole run, 16 tokens", show_spread(results["whole_run_s"], 2)],
        ["`outpace --version`", show_spread(results["version_s"], 2)],
    ]
    config = {
        "model": public_name(options["model"]),
        "precision": options["precision"],
        "threads": options["threads"],
        "trials": options["trials"],
        "prompt": PROMPT,
    }
    save(
        options["name"] or f"startup-{public_name(options['model'])}",
        QUESTION,
        config,
        results,
        table(["", "seconds"], rows),
    )


if __name__ == "__main__":
    main()
