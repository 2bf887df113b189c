"""`outpace run`: answer one prompt."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from ..errors import ParameterError
from ..types import Result, SamplingParams
from .common import (
    cancel_on_interrupt,
    model_options,
    open_llm,
    read_file,
    read_stdin,
    sampling_options,
    sampling_params,
    say,
    stats_object,
)
from .conversation import Conversation, load_last, save_last
from .exits import CUT, INTERRUPTED
from .sections import InSections
from .wording import closing_line, ending, explained

if TYPE_CHECKING:
    from ..engine.inboxes import Stream
    from ..engine.llm import LLM
    from ..engine.prompts import Prompt

LONGEST = 1024  # tokens of an answer where nobody set a limit and the context has more room
PALETTE = ("green", "cyan", "magenta", "yellow", "blue", "bright_red")


@click.command(cls=InSections, short_help="Answer one prompt.")
@click.argument("words", nargs=-1, metavar="[PROMPT...]")
@model_options
@sampling_options
@click.option(
    "-f", "--file", "files", multiple=True, metavar="FILE", help="Put this text before the prompt; may be repeated."
)
@click.option("--continue", "go_on", is_flag=True, help="Go on with the last conversation.")
@click.option("--history/--no-history", default=True, help="Keep the conversation for --continue.  [default: history]")
@click.option("--raw", is_flag=True, help="Continue the text as it is, without the model's chat template.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
@click.option("--logprobs", type=int, metavar="K", help="With --json: log-probabilities, and those of the K likeliest.")
@click.option("--no-stream", is_flag=True, help="Print the answer when it is complete.")
@click.option("--show-draft", is_flag=True, help="Colour tokens by who drafted them.")
@click.option(
    "--prediction",
    metavar="FILE",
    help="Text that the answer will largely repeat, such as the code to be edited: it is drafted from.",
)
@click.option("--explain", is_flag=True, help="Say afterwards how the answer was made, and why so.")
@click.option("--against-plain", is_flag=True, help="Run plain decoding afterwards and compare speed and tokens.")
@click.pass_context
def run(
    ctx: click.Context, words: tuple[str, ...], as_json: bool, no_stream: bool, show_draft: bool, **options: Any
) -> None:
    """Answer PROMPT; several words need no quotes. Text of --file stands before it, piped text behind it; either may be
    the prompt.

    \b
      outpace run Why is the sky blue
      cat main.py | outpace run Explain this code
      outpace run -f main.py -f test_main.py Which test is missing
      outpace run --continue And at night

    The answer goes to stdout, one line of figures to stderr.
    """
    text = read_prompt(" ".join(words) if words else None, options["files"])
    params = sampling_params(options)
    prediction = read_file(options["prediction"], "--prediction") if options["prediction"] else ""
    if options["raw"] and options["system"]:
        raise ParameterError("--system needs the chat template that --raw leaves out: drop one of them")
    if as_json and show_draft:
        raise ParameterError("--json and --show-draft cannot go together: drop one of them")
    if options["logprobs"] is not None and not as_json:
        raise ParameterError("--logprobs are part of the object that --json prints: add it, or drop --logprobs")
    before = _before(ctx, options)
    with open_llm(options, max_batch=1) as llm:
        ask, params = prepare(llm, text, params, options, before)
        stream = llm.stream(ask, params, prediction)
        if as_json or no_stream:
            result = collect(stream)
            if not as_json:
                click.echo(result.text)
        else:
            result = show(llm, stream, params, show_draft)
        if options["history"] and not isinstance(ask, str):
            _keep(options["model"], [m for m in ask if isinstance(m, Mapping)], result)
        explanation = explained(llm, result) if options["explain"] else []
        cancelled = result.finish_reason == "cancelled"
        compared = compare(llm, ask, params, result) if options["against_plain"] and not cancelled else None
        if as_json:
            record = json_object(llm, result, compared)
            if explanation:
                record["explanation"] = explanation
            click.echo(json.dumps(record, ensure_ascii=False))
        else:
            figures(result, llm.arithmetic, compared, show_draft)
            for line in explanation:
                say(line)
    if cancelled:
        sys.exit(INTERRUPTED)
    if result.finish_reason == "length" and params.constraint is not None:
        option = f"--{params.constraint[0].replace('_', '-')}"
        say(
            f"outpace: error: the answer was cut after {result.stats.tokens} tokens, before it was what {option} asks "
            f"for: -n {4 * result.stats.tokens} allows more"
        )
        sys.exit(CUT)


def _before(ctx: click.Context, options: dict[str, Any]) -> Conversation | None:
    """The conversation that --continue goes on with, whose model is taken where none was named."""
    if not options["go_on"]:
        return None
    if options["raw"]:
        raise ParameterError("--continue needs the chat template that --raw leaves out: drop one of them")
    before = load_last()
    if ctx.get_parameter_source("model") is ParameterSource.DEFAULT:
        options["model"] = before.model
    if options["system"]:
        before.set_system(options["system"])
    asked = len(before.messages) // 2
    say(f"(going on with {options['model']}, {asked} question{'s' if asked != 1 else ''} so far)")
    return before


def _keep(model: str, messages: Sequence[Mapping[str, Any]], result: Result) -> None:
    """For --continue. That it cannot be kept ends no run."""
    said = [{name: str(m[name]) for name in ("role", "content")} for m in messages]
    try:
        save_last(Conversation(model, [*said, {"role": "assistant", "content": result.text}]))
    except ParameterError as error:
        say(f"outpace: {error} (--no-history keeps nothing)")


def read_prompt(prompt: str | None, files: Sequence[str] = ()) -> str:
    """Files, PROMPT and stdin together; ParameterError when there is none of them."""
    ctx = click.get_current_context(silent=True)
    example = f"outpace {ctx.info_name if ctx else 'run'} Why is the sky blue"
    if prompt is None and not files and sys.stdin is not None and sys.stdin.isatty():
        raise ParameterError(f"no prompt: write one, as in  {example}  or pipe text in")
    before = [read_file(path, "--file").rstrip("\n") for path in files]
    piped = read_stdin().rstrip("\n")
    text = "\n\n".join(part for part in (*before, prompt or "", piped) if part.strip())
    if not text:
        raise ParameterError(f"the prompt is empty: write one, as in  {example}  or pipe text in")
    return text


def prepare(
    llm: LLM, text: str, params: SamplingParams, options: dict[str, Any], before: Conversation | None = None
) -> tuple[Prompt, SamplingParams]:
    """The prompt as the model wants it, behind what was said `before`, and max_tokens that fits when the user named
    none."""
    from dataclasses import replace

    ask: Prompt = text
    if not options["raw"]:
        if llm.tokenizer.has_chat_template:
            system = [{"role": "system", "content": options["system"]}] if options["system"] else []
            ask = [*(before.messages if before else system), {"role": "user", "content": text}]
        elif options["system"] or before:
            option = "--system" if options["system"] else "--continue"
            raise ParameterError(f"{llm.name} has no chat template, so {option} cannot be used")
        else:
            say(f"({llm.name} has no chat template: the text is continued as it is)")
    if options["max_tokens"] is None:
        params = replace(params, max_tokens=min(LONGEST, llm.max_new_tokens(ask)))
    return ask, params


def collect(stream: Stream) -> Result:
    with cancel_on_interrupt(stream):
        for _ in stream:
            pass
    assert stream.result is not None
    return stream.result


def show(llm: LLM, stream: Stream, params: SamplingParams, show_draft: bool) -> Result:
    """Print the answer as it comes; ends with a newline whatever happens."""
    write = _coloured(llm, params) if show_draft else None
    ended_line = True
    with cancel_on_interrupt(stream):
        for event in stream:
            if write is not None:
                write(event.token_ids, event.sources)
            elif event.text:
                click.echo(event.text, nl=False)
                ended_line = event.text.endswith("\n")
    assert stream.result is not None
    if write is not None:
        write([], [])
        ended_line = False
    if not ended_line:
        click.echo()
    return stream.result


def _coloured(llm: LLM, params: SamplingParams) -> Any:
    """A writer of tokens in their drafter's colour. It cuts the text into tokens, and ends it where the engine did."""
    from rich.console import Console
    from rich.text import Text

    from ..engine.text import TextStream

    console = Console(highlight=False, soft_wrap=True)
    text = TextStream(llm.tokenizer.detokenizer(), params.stop, params.min_tokens)
    stop_ids = {*params.stop_token_ids, *llm.tokenizer.eos_ids, *llm.config.eos_ids}
    colours: dict[str, str] = {}

    def write(token_ids: list[int], sources: list[str]) -> None:
        """No tokens: the end."""
        for token, source in zip(token_ids, sources, strict=True):
            if token in stop_ids or text.stopped:
                continue
            piece, _ = text.push([token])
            if source != "target":
                colours.setdefault(source, PALETTE[len(colours) % len(PALETTE)])
            console.print(Text(piece, style=colours.get(source, "")), end="")
        if not token_ids:
            console.print(Text(text.flush()), end="")
            legend = Text.assemble("\n", "■ target", *((f"  ■ {s}", colour) for s, colour in colours.items()))
            Console(stderr=True, highlight=False).print(legend)

    return write


def compare(llm: LLM, ask: Prompt, params: SamplingParams, result: Result) -> dict[str, Any]:
    """Plain decoding of the same prompt, on the same loaded model, after the run it is compared with."""
    with llm.with_method("plain", verifier="auto") as plain:
        other = collect(plain.stream(ask, params))
    pairs = enumerate(zip(result.token_ids, other.token_ids, strict=False))
    differs = next((i for i, (a, b) in pairs if a != b), None)
    if differs is None and len(result.token_ids) != len(other.token_ids) and other.finish_reason != "cancelled":
        differs = min(len(result.token_ids), len(other.token_ids))
    speed, base = result.stats.tokens_per_s, other.stats.tokens_per_s
    return {
        "tokens_per_s": round(base, 3),
        "time_to_first_token_s": round(other.stats.time_to_first_token_s, 5),
        "speedup": round(speed / base, 4) if base else None,
        "identical": differs is None,
        "first_difference": differs,
        "complete": other.finish_reason != "cancelled",
        "order": "plain ran second, on the warm model",
    }


def figures(result: Result, arithmetic: str, compared: dict[str, Any] | None, show_draft: bool) -> None:
    """One line about the run, and one for each further thing that was asked for or must be said."""
    extra = f"{compared['speedup']:.2f} times as fast as plain decoding" if compared and compared["speedup"] else ""
    cut = ending(result, f"-n {4 * result.stats.tokens} allows more")
    say(", ".join(part for part in (closing_line(result, arithmetic, extra), cut) if part))
    for note in result.notes:
        say(f"note: {note}")
    if compared:
        same = (
            "the same tokens"
            if compared["identical"]
            else f"DIFFERENT from token {compared['first_difference'] + 1} on"
        )
        stopped = "" if compared["complete"] else " (stopped early)"
        say(f"plain decoding{stopped}: {compared['tokens_per_s']:.1f} tokens/s, {same}; {compared['order']}")
    if show_draft and result.stats.drafted:
        kept = result.stats.accepted_by_source
        each = ", ".join(f"{kept.get(s, 0)} of {n} by {s}" for s, n in result.stats.drafted_by_source.items())
        say(f"drafted tokens accepted: {each}")


def json_object(llm: LLM, result: Result, compared: dict[str, Any] | None) -> dict[str, Any]:
    record: dict[str, Any] = {
        "text": result.text,
        "token_ids": result.token_ids,
        "finish_reason": result.finish_reason,
        "model": llm.name,
        "precision": llm.precision,
        "formats": list(llm.loaded.formats),
        "method": result.method,
        "verifier": llm.verifier,
        "exactness": result.exactness,
        "notes": result.notes,
        "stats": stats_object(result),
    }
    if result.logprobs is not None:
        record |= {"logprobs": result.logprobs, "top_logprobs": result.top_logprobs}
    if compared is not None:
        record["against_plain"] = compared
    return record
