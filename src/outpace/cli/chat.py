"""`outpace chat`: a conversation in the terminal."""

from __future__ import annotations

import sys
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from ..errors import CapacityError, ParameterError
from ..types import Result, SamplingParams
from .common import cancel_on_interrupt, model_options, open_llm, sampling_options, sampling_params, say, summary

if TYPE_CHECKING:
    from ..engine.llm import LLM

HELP = """\
/help    this list
/reset   forget the conversation
/stats   figures of the last answer and of the conversation
/exit    leave (so does Ctrl-D)
Ctrl-C stops an answer. Anything else is said to the model."""


@click.command(short_help="Talk to a model in the terminal.")
@model_options
@sampling_options
def chat(**options: Any) -> None:
    """Talk to a model. The conversation is kept until /reset; /help lists the commands.

    Ctrl-C stops an answer, Ctrl-D leaves.
    """
    params = sampling_params(options)
    with open_llm(options, max_batch=1) as llm:
        if not llm.tokenizer.has_chat_template:
            raise ParameterError(f"{llm.name} has no chat template; use `outpace run --raw` or another model")
        if sys.stdin.isatty():
            with suppress(ImportError):
                import readline  # noqa: F401  line editing and history of `input`
            say(f"{llm.name}, {llm.method}, {llm.precision}. /help lists the commands, Ctrl-D leaves.")
        Conversation(llm, params, options["system"], options["max_tokens"] is None).loop()


class Conversation:
    """Messages so far and the loop over what is typed."""

    def __init__(self, llm: LLM, params: SamplingParams, system: str | None, fit: bool) -> None:
        self.llm, self.params, self.fit = llm, params, fit
        self.start = [{"role": "system", "content": system}] if system else []
        self.messages = list(self.start)
        self.results: list[Result] = []

    def loop(self) -> None:
        prompt = "> " if sys.stdin.isatty() else ""
        while True:
            try:
                line = input(prompt).strip()
            except EOFError:
                if prompt:
                    click.echo()
                return
            except KeyboardInterrupt:
                say("\n(Ctrl-D or /exit leaves)")
                continue
            if line.startswith("/"):
                if line in ("/exit", "/quit"):
                    return
                self.command(line)
            elif line:
                self.say_to_model(line)

    def command(self, line: str) -> None:
        if line == "/help":
            click.echo(HELP)
        elif line == "/reset":
            self.messages = list(self.start)
            self.results.clear()
            say("(a new conversation)")
        elif line == "/stats":
            self.stats()
        else:
            say(f"no command {line.split()[0]}; /help lists them")

    def stats(self) -> None:
        if not self.results:
            say("nothing has been said yet")
            return
        say(f"last answer: {summary(self.results[-1], self.llm.precision)}")
        tokens = sum(r.stats.tokens - 1 for r in self.results if r.stats.tokens)
        steps, seconds = sum(r.stats.steps for r in self.results), sum(r.stats.decode_s for r in self.results)
        if steps and seconds:
            say(
                f"conversation: {len(self.results)} answers, {tokens / seconds:.1f} tokens/s, "
                f"mean_accepted {tokens / steps:.2f}"
            )

    def say_to_model(self, line: str) -> None:
        """Stream one answer. What was said stays in the conversation; an answer that cannot start does not."""
        messages = [*self.messages, {"role": "user", "content": line}]
        params = self.params
        try:
            if self.fit:
                params = replace(params, max_tokens=min(params.max_tokens, self.llm.room(messages)))
            stream = self.llm.stream(messages, params)
        except CapacityError as error:
            say(f"outpace: {error}. /reset starts anew.")
            return
        with cancel_on_interrupt(stream):
            for event in stream:
                click.echo(event.text, nl=False)
        click.echo()
        assert stream.result is not None
        self.results.append(stream.result)
        self.messages = [*messages, {"role": "assistant", "content": stream.result.text}]
