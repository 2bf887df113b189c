"""What several commands share: options, opening a model, Ctrl-C between steps, the line after a run."""

from __future__ import annotations

import math
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import Field, fields
from pathlib import Path
from types import FrameType, MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ..engine.options import EngineOptions
from ..errors import ParameterError
from ..fields import Choice, Each, Flag, Number, Whole
from ..models.catalog import DEFAULT_MODEL
from ..types import Result, SamplingParams
from . import complete

if TYPE_CHECKING:
    from ..engine.inboxes import Stream
    from ..engine.llm import LLM

F = TypeVar("F", bound=Callable[..., Any])
#: Of SamplingParams, those whose option is the field
SAMPLING = (
    *("temperature", "top_k", "top_p", "min_p"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty", "seed"),
)
NO_WORDS: Mapping[str, str] = MappingProxyType({})


def _apply(options: list[Callable[[Any], Any]], function: F) -> F:
    for option in reversed(options):
        function = option(function)
    return function


def engine_options(*names: str, **defaults: Any) -> Callable[[F], F]:
    """Options made from the fields of EngineOptions: of these names, or all. `defaults`: where a command has others."""
    options = [_option(field, defaults) for field in _fields(EngineOptions, names)]
    return lambda function: _apply(options, function)


def _fields(record: type[Any], names: Sequence[str]) -> list[Field[Any]]:
    known = {field.name: field for field in fields(record)}
    return [known[name] for name in names or known]


def _option(
    field: Field[Any], defaults: dict[str, Any], ranges: bool = True, shown: str | None = None
) -> Callable[[Any], Any]:
    """`ranges`: refused by the command line; else by the record, in its own words. `shown`: for the default."""
    rule, about = field.metadata["rule"], field.metadata
    flag = about.get("flag", "--" + field.name.replace("_", "-"))
    scale = about.get("scale", 1.0)
    default = defaults.get(field.name, field.default)
    kind: Any = str
    if isinstance(rule, Flag):
        return click.option(f"{flag}/--no-{flag[2:]}", default=default, show_default=True, help=about["help"])
    if not ranges and isinstance(rule, Whole | Number):
        kind = int if isinstance(rule, Whole) else float
    elif isinstance(rule, Whole):
        kind = click.IntRange(rule.low, rule.high)
    elif isinstance(rule, Number):
        most = None if rule.high == math.inf else rule.high * scale
        kind = click.FloatRange(rule.low * scale, most, min_open=rule.above, max_open=rule.below)
    elif isinstance(rule, Choice):
        kind = click.Choice(rule.values)
    elif isinstance(rule, Each):
        kind = _Methods()
    help = about["help"] + (f"  [default: {about['unset']}]" if default is None and "unset" in about else "")
    return click.option(
        flag,
        field.name,
        type=kind,
        default=default,
        show_default=shown or default not in (None, ()),
        metavar=about.get("metavar"),
        shell_complete=complete.OF_OPTION.get(field.name),
        callback=None if scale == 1 else lambda _, __, value: None if value is None else value / scale,
        help=help,
    )


class _Methods(click.ParamType):
    """Methods joined by commas, which join the options of one method as well."""

    name = "methods"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        if isinstance(value, tuple):
            return value
        found: list[str] = []
        for part in filter(None, (part.strip() for part in value.split(","))):
            if found and ":" in found[-1] and ":" not in part.partition("=")[0] and "=" in part:
                found[-1] += f",{part}"
            else:
                found.append(part)
        return tuple(found)


def weights_options(function: F) -> F:
    """Which model, and with what arithmetic."""
    model = click.option(
        "-m",
        "--model",
        default=DEFAULT_MODEL,
        show_default=True,
        shell_complete=complete.models,
        help="A known name (see `outpace models`), a GGUF file, a folder, or of the hub owner/repo[:Q4_K_M].",
    )
    return model(engine_options("precision", "threads", "device")(function))


def model_options(function: F) -> F:
    """Which model, with what arithmetic, and how it decodes."""
    decoding = ("draft_model", "draft_precision", "head", "kv", "method", "verifier", "planner", "max_rows")
    return weights_options(engine_options(*decoding)(function))


def sampling_options(function: F, shown: Mapping[str, str] = NO_WORDS) -> F:
    """How tokens are chosen, from the fields of SamplingParams. `shown`: of an option whose default the command chooses
    itself, what help says of it."""
    options = [
        click.option(
            "-n",
            "--max-tokens",
            type=click.IntRange(min=1),
            help="Longest answer.  [default: until the model ends it, as far as the context goes; at most 1024 tokens, "
            "in a chat 4096]",
        ),
        *(_option(field, {}, ranges=False, shown=shown.get(field.name)) for field in _fields(SamplingParams, SAMPLING)),
        click.option(
            "--logit-bias", multiple=True, metavar="TOKEN=BIAS", help="Added to a token id's logit; may be repeated."
        ),
        click.option("--json-schema", metavar="FILE|JSON", help="The answer is JSON that this schema describes."),
        click.option("--regex", metavar="REGEX", help="The whole answer matches this regular expression."),
        click.option("--grammar", metavar="FILE", help="The answer is a sentence of this grammar (Lark or GBNF)."),
        click.option("--stop", multiple=True, metavar="TEXT", help="End before this text; may be repeated."),
        click.option("--system", metavar="TEXT", help="System message of the chat."),
    ]
    return _apply(options, function)


def sampling_params(options: dict[str, Any]) -> SamplingParams:
    """From the options of `sampling_options`; ParameterError for a value out of range."""
    limit, schema, grammar = options["max_tokens"], options["json_schema"], options["grammar"]
    most = {} if limit is None else {"max_tokens": limit}
    return SamplingParams(
        **{name: options[name] for name in (*SAMPLING, "stop", "regex")},
        **most,
        logit_bias=dict(map(_bias, options["logit_bias"])),
        logprobs=options.get("logprobs"),
        json_schema=schema if schema is None or schema.lstrip().startswith("{") else read_file(schema, "--json-schema"),
        grammar=None if grammar is None else read_file(grammar, "--grammar"),
    )


def _bias(text: str) -> tuple[int, float]:
    token, _, bias = text.partition("=")
    try:
        return int(token), float(bias)
    except ValueError:
        raise ParameterError(f"--logit-bias {text!r}: write a token id and a number, as in 198=-5") from None


def read_file(path: str, option: str) -> str:
    """The text of a file that an option names."""
    try:
        return Path(path).read_text("utf-8")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text in UTF-8"
        raise ParameterError(f"{option} {path!r} cannot be read: {reason}") from None


def open_llm(options: dict[str, Any], **more: Any) -> LLM:
    """The model of `model_options` and `engine_options`, with progress on a terminal. `more` comes before `options`."""
    from ..models.source import find

    for name in (options["model"], options.get("draft_model")):
        if isinstance(name, str):
            find(name)  # a misspelt one is refused before anything is read
    from ..engine.llm import LLM

    given = {field.name: options[field.name] for field in fields(EngineOptions) if field.name in options} | more
    with loading_progress() as progress:
        return LLM(options["model"], options=EngineOptions(**given), progress=progress)


@contextmanager
def loading_progress() -> Iterator[Callable[[str, int, int], None] | None]:
    """A bar on stderr for what takes long at first use; nothing where stderr is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"))
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bar:
        tasks: dict[str, TaskID] = {}

        def progress(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done, total=total)

        yield progress


@contextmanager
def progress_bar(unit: str = "") -> Iterator[Callable[[str, float, float], None]]:
    """For long work: call it with what runs, how much is done, and of how much. A bar on stderr where that is a
    terminal; elsewhere a line whenever something else runs, by what stands before ": "."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        last = ""

        def tell(what: str, done: float, total: float) -> None:
            nonlocal last
            begun = what.split(": ")[0]
            if begun and begun != last:
                last = begun
                say(f"{begun} ({done:.0f} of {total:.0f}{unit})")

        yield tell
        return
    columns = (BarColumn(), TextColumn("{task.completed:.0f} of {task.total:.0f}" + unit), TimeRemainingColumn())
    with Progress(TextColumn("{task.description}"), *columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=1.0)
        yield lambda what, done, total: bar.update(task, description=what, completed=min(done, total), total=total)


def say(text: str = "") -> None:
    """To the person, on stderr: stdout carries the answer alone."""
    click.echo(text, err=True)


def read_stdin() -> str:
    """What is piped in; "" when stdin is a terminal or closed."""
    if sys.stdin is None or sys.stdin.closed or sys.stdin.isatty():
        return ""
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise ParameterError(f"stdin is not text in UTF-8 ({error.reason} at byte {error.start})") from error


@contextmanager
def cancel_on_interrupt(stream: Stream) -> Iterator[None]:
    """Ctrl-C ends the stream after the current step, with what it has; a second one ends at once."""

    def handler(signum: int, frame: FrameType | None) -> None:
        if stream.cancelled:
            raise KeyboardInterrupt
        stream.cancel()

    try:
        before = signal.signal(signal.SIGINT, handler)
    except ValueError:  # not the main thread: the caller has its own way to stop
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def stats_object(result: Result) -> dict[str, Any]:
    """`stats` of `--json`. Times in seconds."""
    s = result.stats
    return {
        "prompt_tokens": s.prompt_tokens,
        "tokens": s.tokens,
        "steps": s.steps,
        "mean_accepted": round(s.mean_accepted, 4),
        "tokens_per_s": round(s.tokens_per_s, 3),
        "prefill_tokens_per_s": round(s.prefill_tokens_per_s, 3),
        "time_to_first_token_s": round(s.time_to_first_token_s, 5),
        "acceptance_rate": round(s.acceptance_rate, 4),
        "drafted": s.drafted,
        "accepted": s.accepted,
        "sources": {
            name: {
                "proposed": source.proposed,
                "accepted": source.accepted,
                "accepted_by_depth": [
                    round(right / tested, 4) for tested, right in zip(source.tested, source.right, strict=True)
                ],
                "draft_s": round(source.draft_s, 5),
            }
            for name, source in s.sources.items()
        },
        "prefill_s": round(s.prefill_s, 5),
        "decode_s": round(s.decode_s, 5),
        "draft_s": round(s.draft_s, 5),
        "verify_s": round(s.verify_s, 5),
        "predicted_speedup": None if s.predicted_speedup is None else round(s.predicted_speedup, 3),
        "realised_speedup": None if s.realised_speedup is None else round(s.realised_speedup, 3),
    }
