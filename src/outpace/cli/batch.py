"""`outpace batch`: answer a file of requests."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from ..errors import ParameterError
from . import INTERRUPTED
from .common import engine_options, model_options, open_llm, say

if TYPE_CHECKING:
    from ..server.batchfile import BatchInput, Journal
    from ..server.batchrun import Progress

WINDOW = 4  # requests in the engine for each that decodes: the queue is never empty and never long
TOLD_EVERY_S = 30.0  # a line of progress where stderr is no terminal


@click.command(short_help="Answer a file of requests.")
@click.argument("input", type=click.Path(path_type=Path))
@click.argument("output", type=click.Path(path_type=Path))
@model_options
@engine_options("max_batch", "kv_tokens", "methods", max_batch=16)
@click.option(
    "--order",
    type=click.Choice(["grouped", "as-given"]),
    default="grouped",
    show_default=True,
    help="grouped: requests that begin alike run together, and their common beginning is read once.",
)
@click.option("--ordered", is_flag=True, help="When all is answered, put the answers into the order of the input.")
@click.option("--any-model", is_flag=True, help="Answer requests that name another model, too.")
@click.option(
    "--answer-tokens",
    type=click.IntRange(min=1),
    default=2048,
    show_default=True,
    help="Longest answer of a chat that names no max_tokens.",
)
def batch(input: Path, output: Path, **options: Any) -> None:
    """Answer the requests of INPUT into OUTPUT, both in the format of OpenAI's batches.

    \b
      {"custom_id": "1", "method": "POST", "url": "/v1/chat/completions",
       "body": {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 50}}

    One request in a line; url may be /v1/completions too. Answers are written as they come. After Ctrl-C, a kill or a
    power cut the same command goes on where it was; one with another model, --precision or --answer-tokens, which would
    give other answers, is refused. A request that cannot be answered gets its reason in `error`, and the exit code is
    1 then.
    """
    if find_spec("pydantic") is None:
        raise ParameterError('batches need pydantic: python -m pip install "outpace[serve]"')
    from ..server.batchfile import BatchInput, Journal

    with ExitStack() as stack:
        source = BatchInput(input)
        stack.callback(source.close)
        journal = stack.enter_context(Journal(output, source))
        found = journal.found
        told = f"{found:,} of {len(source):,} are answered already" if found else f"{len(source):,} requests"
        say(told + (f"; a line of {journal.cut:,} bytes was cut short and is made again" if journal.cut else ""))
        if not _answer(source, journal, options):
            kept = f"{journal.found:,} of {len(source):,} are answered and kept"
            say(f"stopped: {kept}; the same command goes on from there")
            sys.exit(INTERRUPTED)
        if options["ordered"]:
            journal.sort()
        if journal.failed:
            journal.close()
            say(
                f"{journal.failed:,} of {len(source):,} requests could not be answered: `error` of their lines says why"
            )
            sys.exit(1)


def _answer(source: BatchInput, journal: Journal, options: dict[str, Any]) -> bool:
    """Run what is not answered yet; False if it was stopped. The model is opened even if everything is answered: only
    then is it known whether it would still give the same answers."""
    from ..server.batchrun import BatchRun, settings
    from ..server.submissions import Limits

    limits = Limits(answer_tokens=options["answer_tokens"])
    with open_llm(options) as llm:
        journal.settle(settings(llm, limits, options["any_model"]))
        if journal.done.all():
            return True
        run = BatchRun(
            llm,
            source,
            journal,
            window=WINDOW * options["max_batch"],
            order=options["order"],
            limits=limits,
            model=None if options["any_model"] else llm.name,
        )
        with _stop_when_asked() as stop, _Bar(len(source)) as bar:
            finished = run.run(bar.tell, lambda: bool(stop))
            bar.end(run.progress)
    return finished


@contextmanager
def _stop_when_asked() -> Iterator[list[int]]:
    """Ctrl-C or SIGTERM fills the list: the run ends after the step; a second one ends at once."""
    asked: list[int] = []

    def handler(signum: int, frame: FrameType | None) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(signum)

    before: dict[signal.Signals, Any] = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, handler)
    except ValueError:  # not the main thread: the caller has its own way to stop
        pass
    try:
        yield asked
    finally:
        for number, was in before.items():
            signal.signal(number, was)


class _Bar:
    """Progress on stderr: a bar on a terminal, else a line now and then; a line of figures at the end."""

    def __init__(self, total: int) -> None:
        self._began = self._told = time.monotonic()
        self._bar: Any = None
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as RichProgress

            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
            self._bar = RichProgress(*columns, console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task("reading the requests", total=total)

    def __enter__(self) -> _Bar:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def tell(self, progress: Progress) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=progress.done, description=self._figures(progress))
        elif time.monotonic() - self._told > TOLD_EVERY_S:
            self._told = time.monotonic()
            say(f"{progress.done:,}/{progress.total:,}, {self._figures(progress)}")

    def end(self, progress: Progress) -> None:
        if self._bar is not None:
            self._bar.stop()
        seconds = time.monotonic() - self._began
        shared = f", {progress.cached_tokens:,} of {progress.prompt_tokens:,} prompt tokens shared"
        say(
            f"{progress.done:,}/{progress.total:,} answered, {progress.done - progress.found:,} of them in "
            f"{seconds:.1f} s, {self._figures(progress)}{shared if progress.prompt_tokens else ''}"
        )

    def _figures(self, progress: Progress) -> str:
        seconds = max(time.monotonic() - self._began, 1e-9)
        failed = f", {progress.failed:,} failed" if progress.failed else ""
        return f"{progress.tokens / seconds:,.1f} tokens/s{failed}"
