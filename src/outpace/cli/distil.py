"""`outpace distil` and `outpace train-head`: a model's own texts, and a head that drafts for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from .common import open_llm, progress_bar, say, weights_options

_FILES = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command(short_help="Let a model write the texts that a head is trained on.")
@weights_options
@click.argument("out", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--tokens", type=click.IntRange(1), default=1_000_000, show_default=True, help="Of answers, in all.")
@click.option("--from", "files", type=_FILES, multiple=True, help="A .jsonl file of more prompts.  Repeatable.")
@click.option("--keep-out", type=_FILES, multiple=True, help="Questions that must not be trained on.  Repeatable.")
@click.option("-t", "--max-tokens", type=click.IntRange(16), default=256, show_default=True, help="Of each answer.")
@click.option("--batch", type=click.IntRange(1), default=48, show_default=True, help="Answers at once.")
@click.option("--seed", type=click.IntRange(0, 2**30), default=0, show_default=True)
def distil(out: Path, **options: Any) -> None:
    """Let a model answer questions of its own, about code of Python's library, things to write, and --from files.

    \b
      outpace distil own.jsonl --tokens 200000
      outpace distil own.jsonl --from prompts.jsonl --keep-out benchmark.jsonl

    A head drafts best what its target would write, so it is trained on that: `outpace train-head`. What has thirteen
    words in a row from --keep-out is left out. The same command goes on where it was stopped.
    """
    from ..training.distil import Distil
    from ..training.distil import distil as run

    wanted = Distil(
        tokens=options["tokens"],
        longest=options["max_tokens"],
        seed=options["seed"],
        files=options["files"],
        keep_out=options["keep_out"],
    )
    with (
        open_llm({**options, "method": "plain", "methods": (), "planner": "auto"}, max_batch=options["batch"]) as llm,
        progress_bar(" tokens") as progress,
    ):
        count = run(llm, wanted, out, progress)
    say(f"{out}: {count:,} tokens of answers; now: outpace train-head {out} FOLDER -m {options['model']}")


@click.command("train-head", short_help="Train a head that drafts for a model.")
@click.argument("texts", type=_FILES)
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.option("-m", "--model", default="smollm2-135m", show_default=True, help="As for `outpace run`.")
@click.option("--kind", type=click.Choice(["spark"]), default="spark", show_default=True, help="Of head.")
@click.option("--visits", type=click.IntRange(1), default=4_000_000, show_default=True, help="Tokens to train on.")
@click.option("--layers", type=click.IntRange(1, 4), default=1, show_default=True)
@click.option("--block", type=click.IntRange(2, 16), default=6, show_default=True, help="Tokens drafted in a pass.")
@click.option("--rank", type=click.IntRange(8, 512), default=128, show_default=True, help="Of the edge between tokens.")
@click.option("--hot", type=click.IntRange(64), default=8192, show_default=True, help="Tokens it can propose.")
@click.option("--rate", type=click.FloatRange(0, 1, min_open=True), default=1e-3, show_default=True)
@click.option("--seed", type=click.IntRange(0, 2**30), default=0, show_default=True)
@click.option("--threads", type=click.IntRange(1, 1024), help="CPU threads.  [default: one per core]")
def train_head(texts: Path, folder: Path, **options: Any) -> None:
    """Train a head on TEXTS that `outpace distil` wrote. FOLDER gets head.safetensors, and what is needed to go on.

    \b
      outpace distil own.jsonl --tokens 200000
      outpace train-head own.jsonl my-head
      outpace run --head my-head/head.safetensors 'Tell me about tea.'

    The bar says how many tokens a step has on texts that were held out. A checkpoint is written every minute; the same
    command goes on where it was stopped. A head never changes the text, only how soon it is there.
    """
    from ..training.head import HeadPlan
    from ..training.head import train_head as run
    from ..training.trainer import Recipe

    recipe = Recipe(visits=options["visits"], rate=options["rate"], seed=options["seed"])
    plan = HeadPlan(recipe=recipe, **{name: options[name] for name in ("layers", "block", "rank", "hot", "threads")})
    with progress_bar() as progress:
        path = run(options["model"], texts, folder, plan, progress)
    from ..models.heads import read

    about = read(path).config.trained
    say(f"{path}: held out, {json.dumps(about['held_out'])}")
    say(f"outpace run -m {options['model']} --head {path} 'Tell me about tea.'")
