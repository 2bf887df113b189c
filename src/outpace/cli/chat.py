"""`outpace chat`: a conversation in the terminal."""

from __future__ import annotations

import secrets
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from ..errors import CapacityError, ParameterError
from ..types import Result, SamplingParams
from .chat_commands import COMMANDS, run_command
from .common import cancel_on_interrupt, model_options, open_llm, sampling_options, sampling_params, say
from .conversation import Conversation, load_last, save_last
from .editor import Interrupted, Lines, lines_of_stdin, read_message
from .sections import InSections
from .wording import ending

if TYPE_CHECKING:
    from ..engine.llm import LLM

LONGEST = 4096  # tokens of an answer where nobody set a limit and the context has more room


def chat_sampling(function: Callable[..., None]) -> Callable[..., None]:
    recommended = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    shown = dict.fromkeys(recommended, "as the model's makers recommend") | {"seed": "another one each time"}
    return sampling_options(function, shown)


@click.command(cls=InSections, short_help="Talk to a model in the terminal.")
@model_options
@chat_sampling
@click.option("--continue", "go_on", is_flag=True, help="Go on with the last conversation.")
@click.option(
    "--history/--no-history",
    default=True,
    help="Keep the conversation for --continue, and what was typed for the arrow keys.  [default: history]",
)
@click.pass_context
def chat(ctx: click.Context, **options: Any) -> None:
    '''Talk to a model. /help lists what else can be typed; Ctrl-C stops an answer, Ctrl-D leaves.

    Answers are sampled as the model's makers recommend, or as --temperature and its like say, and go on until the model
    ends them. A message of several lines stands between """ and """, or is pasted.
    '''
    before = load_last() if options["go_on"] else None
    if before and not _chosen(ctx, "model"):
        options["model"] = before.model
    params, origin = sampling(ctx, options)
    with open_llm(options, max_batch=1) as llm:
        if not llm.tokenizer.has_chat_template:
            raise ParameterError(f"{llm.name} has no chat template; use `outpace run --raw` or another model")
        conversation = before or Conversation(options["model"])
        conversation.model = options["model"]
        if options["system"]:
            conversation.set_system(options["system"])
        lines = lines_of_stdin([*COMMANDS], options["history"])
        talk = Talk(llm, params, conversation, limited=options["max_tokens"] is not None, keep=options["history"])
        if lines.interactive:
            say(greeting(talk, origin))
        with lines.held():
            talk.loop(lines)


def sampling(ctx: click.Context, options: dict[str, Any]) -> tuple[SamplingParams, str]:
    """What was asked for, and else what the model's makers recommend; and in words where the temperature is from."""
    from ..models.recommended import recommended

    params = sampling_params(options)
    seed = params.seed if _chosen(ctx, "seed") else secrets.randbelow(2**31)
    if _chosen(ctx, "temperature"):
        return replace(params, seed=seed), "as you set it"
    advice = recommended(options["model"])
    values = {name: value for name, value in advice.values.items() if not _chosen(ctx, name)}
    return replace(params, seed=seed, **values), advice.source  # type: ignore[arg-type]


def _chosen(ctx: click.Context, name: str) -> bool:
    return ctx.get_parameter_source(name) not in (ParameterSource.DEFAULT, None)


def greeting(talk: Talk, origin: str) -> str:
    temperature = talk.params.temperature
    sampled = f"temperature {temperature:g} ({origin})" if temperature else "always the likeliest token (temperature 0)"
    begun = len(talk.conversation.messages) // 2
    going_on = f"\nGoing on with a conversation of {begun} question{'s' if begun != 1 else ''}." if begun else ""
    return f"{talk.llm.name}, {sampled}. /help lists the commands, Ctrl-D leaves.{going_on}"


class Talk:
    """A conversation, how it is sampled, and the loop over what is typed.

    `limited`: the user set max_tokens; else an answer may fill the context, up to LONGEST. `keep`: the conversation is
    written for --continue after every answer.
    """

    def __init__(
        self, llm: LLM, params: SamplingParams, conversation: Conversation, limited: bool = False, keep: bool = True
    ) -> None:
        self.llm, self.params, self.conversation = llm, params, conversation
        self.start = params  # what /set NAME default goes back to
        self.limited, self.keep = limited, keep
        self.results: list[Result] = []
        self.answers = 0  # so far: each is sampled with a seed of its own

    def loop(self, lines: Lines) -> None:
        while True:
            try:
                text, quoted = read_message(lines)
            except EOFError:
                if lines.interactive:
                    click.echo()
                return
            except Interrupted:
                say("(Ctrl-D or /exit leaves)")
                continue
            if text.startswith("/") and not quoted:
                if not run_command(self, text.strip()):
                    return
            elif text.strip():
                self.ask(text if quoted else text.strip())

    def ask(self, question: str) -> None:
        """Stream one answer. What was shown stays in the conversation; an answer that cannot start does not."""
        messages = [*self.conversation.messages, {"role": "user", "content": question}]
        params = replace(self.params, seed=(self.params.seed + self.answers) % 2**63)
        try:
            if not self.limited:
                params = replace(params, max_tokens=min(LONGEST, self.llm.max_new_tokens(messages)))
            stream = self.llm.stream(messages, params)
        except CapacityError as error:
            say(f"outpace: {error}. /clear starts anew.")
            return
        self.answers += 1
        shown = ""
        with cancel_on_interrupt(stream):
            for event in stream:
                if stream.cancelled:  # a step that was under way when Ctrl-C came
                    continue
                click.echo(event.text, nl=False)
                sys.stdout.flush()
                shown += event.text
        if not shown.endswith("\n"):
            click.echo()
        result = stream.result
        if stream.cancelled:
            say("(stopped)")
        elif result is not None and (why := ending(result, self._advice(params))):
            say(f"({why})")
        if result is not None:
            self.results.append(result)
        self.conversation.messages = [*messages, {"role": "assistant", "content": shown}]
        self.store()

    def _advice(self, params: SamplingParams) -> str:
        if self.limited:
            return f"/set max_tokens {2 * params.max_tokens} allows more"
        return "say: go on" if params.max_tokens >= LONGEST else "the context is full: /clear starts anew"

    def store(self) -> None:
        if not self.keep:
            return
        try:
            save_last(self.conversation)
        except ParameterError as error:
            self.keep = False
            say(f"outpace: {error}. Nothing is kept for --continue.")
