"""Whether a change of the code changed a token: digests of outputs over methods, precisions and batches.

    python tools/digests.py record before.json      # before the change
    python tools/digests.py compare before.json     # after it, on the same machine

More than 500 outputs of a small model: every drafter that needs no other model, greedy and sampled, alone and in
batches, in several precisions. Approximate ways are among them: with fixed budgets they too must write what they wrote.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import click

from outpace.bench.workloads import own_prompts
from outpace.engine.llm import LLM
from outpace.registry import methods
from outpace.types import SamplingParams

PROMPTS, TOKENS = 8, 24
FEW = ("plain", "suffix", "suffix+recycling", "jacobi")  # in all precisions but the first


@click.command(help=__doc__)
@click.argument("action", type=click.Choice(["record", "compare"]))
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--model", default="smollm2-135m", show_default=True)
@click.option("--precision", "precisions", multiple=True, default=["file", "int8", "float32"], show_default=True)
@click.option("--threads", type=int, default=1, show_default=True)
def main(action: str, file: Path, model: str, precisions: tuple[str, ...], threads: int) -> None:
    before = json.loads(file.read_text("utf-8")) if action == "compare" else {}
    found: dict[str, str] = {}
    for name, text in outputs(model, precisions, threads):
        found[name] = hashlib.sha256(text.encode()).hexdigest()[:16]
        if action == "compare" and before.get(name) != found[name]:
            print(f"differs: {name}" if name in before else f"was not recorded: {name}")
    if action == "record":
        file.write_text(json.dumps(found, indent=0), "utf-8")
        print(f"{len(found)} outputs recorded")
        return
    missing = before.keys() - found.keys()
    different = sum(before.get(name) != digest for name, digest in found.items())
    print(f"{len(found)} outputs compared: {different} differ, {len(missing)} are missing {sorted(missing)[:3] or ''}")
    sys.exit(1 if different or missing or not found else 0)


def outputs(model: str, precisions: tuple[str, ...], threads: int) -> Iterator[tuple[str, str]]:
    """Names of outputs, and the token ids of each."""
    prompts = [prompt.turns[0] for prompt in own_prompts()[:: max(len(own_prompts()) // PROMPTS, 1)]][:PROMPTS]
    for place, precision in enumerate(precisions):
        llm = LLM(model, method="plain", precision=precision, threads=threads)
        for method in FEW if place else every_drafter():
            for verifier in ("coupled", "block", "typical") if method == "suffix" else ("coupled",):
                fixed = {} if method == "plain" else {"verifier": verifier, "planner": "fixed"}
                chosen = llm.with_method(method, **fixed)
                for temperature in (0.0, 0.8):
                    for batch in (1, PROMPTS):
                        params = [SamplingParams(TOKENS, temperature=temperature, seed=i) for i in range(PROMPTS)]
                        groups = [range(start, start + batch) for start in range(0, PROMPTS, batch)]
                        results = [
                            result
                            for group in groups
                            for result in chosen.generate([prompts[i] for i in group], [params[i] for i in group])
                        ]
                        label = f"{precision} {method} {verifier} T={temperature} batch={batch}"
                        print(label, file=sys.stderr)
                        for i, result in enumerate(results):
                            yield f"{label} {i}", str(result.token_ids)


def every_drafter() -> list[str]:
    alone = [m.name for m in methods() if m.kind == "drafter" and not {"draft model", "head"} & set(m.needs)]
    return [name for name in alone if name not in ("omnidraft", "rapid")] + ["suffix+recycling"]


if __name__ == "__main__":
    main()
