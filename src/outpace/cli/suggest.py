"""`outpace suggest`: several continuations of one text, in about the time of one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import ParameterError
from ..types import SamplingParams
from .common import open_llm, say, weights_options
from .run import read_prompt

if TYPE_CHECKING:
    from ..decoding.modes.superposed import Suggestions
    from ..engine.llm import LLM

MAX_TOKENS = 16


@click.command(short_help="Continue a text in several ways at once.")
@click.argument("words", nargs=-1, metavar="[PROMPT...]")
@click.option("-k", "--drafts", type=int, default=3, show_default=True, help="How many suggestions.")
@click.option("-n", "--max-tokens", type=int, default=MAX_TOKENS, show_default=True, help="Longest suggestion.")
@click.option("--stop", multiple=True, metavar="TEXT", help="End before this text; may be repeated.")
@click.option(
    "--like",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    multiple=True,
    metavar="FILE",
    help="A text of the same kind; its n-grams help to choose. May be repeated.",
)
@click.option(
    "--ngram-weight",
    type=float,
    help="How much n-grams of the prompt and of --like count against the model, from 0 to below 1.  [default: 0.54]",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
@weights_options
def suggest(words: tuple[str, ...], **options: Any) -> None:
    """Continue PROMPT in several ways, as an editor offers completions. Piped text is appended to it, or is the prompt.

    \b
      outpace suggest "The weather in London is"
      outpace suggest -k 5 -n 8 --stop . "Dear Sir or Madam,"
      head -20 main.py | outpace suggest --like main.py

    All suggestions come from one pass over the text that is written, by Superposed Decoding: a step costs what it costs
    for one of them. They are approximate: after its first token no suggestion is read by the model alone. For answers
    that are exact use `outpace run`, with several --seed if you want several.

    Suggestions go to stdout, the likeliest first, one line of figures to stderr.
    """
    text = read_prompt(" ".join(words) if words else None)
    params = SamplingParams(max_tokens=options["max_tokens"], stop=options["stop"])
    like = [read_text(path) for path in options["like"]]
    weight = {} if options["ngram_weight"] is None else {"ngram_weight": options["ngram_weight"]}
    with open_llm(options, method="plain", max_batch=1) as llm:
        found = llm.superposed(text, options["drafts"], params, like, **weight)
        if options["as_json"]:
            click.echo(json.dumps(json_object(llm, found), ensure_ascii=False))
            return
        for number, draft in enumerate(found.drafts, 1):
            click.echo(f"{number}  " + draft.text.strip("\n").replace("\n", "\n   "))
        say(summary(llm, found))


def read_text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ParameterError(f"{path} is not text in UTF-8 ({error.reason} at byte {error.start})") from error


def summary(llm: LLM, found: Suggestions) -> str:
    """The one line after a run."""
    n = len(found.drafts)
    written = sum(len(draft.token_ids) for draft in found.drafts)
    return " · ".join(
        [
            f"{n} suggestion{'s' if n != 1 else ''}",
            f"{written} tokens in {found.stats.steps + 1} steps",
            f"{found.stats.prefill_s + found.stats.decode_s:.2f} s",
            f"{found.exactness} ({found.method}, {llm.arithmetic})",
        ]
    )


def json_object(llm: LLM, found: Suggestions) -> dict[str, Any]:
    return {
        "drafts": [
            {
                "text": draft.text,
                "token_ids": draft.token_ids,
                "score": round(draft.score, 5),
                "mean_score": round(draft.mean_score, 5),
                "finished": draft.finished,
            }
            for draft in found.drafts
        ],
        "model": llm.name,
        "precision": llm.precision,
        "method": found.method,
        "exactness": found.exactness,
        "prompt_tokens": found.stats.prompt_tokens,
        "forwards": found.stats.steps,
        "prefill_s": round(found.stats.prefill_s, 5),
        "decode_s": round(found.stats.decode_s, 5),
    }
