"""What can be typed in `outpace chat` beside messages: /help, /set, /save and the like."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import ParameterError, did_you_mean
from .common import say
from .conversation import load, save
from .wording import closing_line

if TYPE_CHECKING:
    from .chat import Talk

#: what /set changes, and how a value is read
SETTINGS: dict[str, type] = {
    "temperature": float,
    "top_k": int,
    "top_p": float,
    "min_p": float,
    "repetition_penalty": float,
    "presence_penalty": float,
    "frequency_penalty": float,
    "seed": int,
    "max_tokens": int,
}
_HABITS = {
    "temp": "temperature",
    "num_predict": "max_tokens",
    "n_predict": "max_tokens",
    "repeat_penalty": "repetition_penalty",
}
_KINDS = {int: "a whole number", float: "a number"}


class Left(Exception):
    """/exit."""


def run_command(talk: Talk, line: str) -> bool:
    """Do what a line that begins with / says; False to leave. Mistakes are said, and change nothing."""
    name, _, rest = line.partition(" ")
    name = _OTHER_NAMES.get(name.lower(), name.lower())
    if name not in COMMANDS:
        near = did_you_mean(name, [*COMMANDS, *_OTHER_NAMES])
        say(f"no command {name}; {near}/help lists them. A message that begins with / needs a space before it.")
        return True
    try:
        COMMANDS[name][1](talk, rest.strip())
    except Left:
        return False
    except ParameterError as error:
        say(f"outpace: {error}")
    return True


def _help(talk: Talk, rest: str) -> None:
    _takes_nothing("/help", rest)
    width = max(len(usage) for usage, _, _ in COMMANDS.values())
    for usage, _, text in COMMANDS.values():
        click.echo(f"{usage:<{width}}  {text}")
    click.echo('''Several lines: """ begins and ends them, or a backslash at the end of a line goes on.''')
    click.echo("Ctrl-C stops an answer, Ctrl-D leaves. Everything else is sent to the model.")


def _set(talk: Talk, rest: str) -> None:
    words = rest.replace("=", " ").split()
    if not words:
        for name in SETTINGS:
            value = getattr(talk.params, name)
            if name == "max_tokens" and not talk.limited:
                value = "until the model ends the answer"
            click.echo(f"{name:<20} {value}")
        return
    name = words[0].lower().replace("-", "_")
    name = _HABITS.get(name, name)
    if name not in SETTINGS:
        hint = "use /system for that; " if name == "system" else did_you_mean(name, SETTINGS)
        raise ParameterError(f"no setting {words[0]!r}; {hint}there are: {', '.join(SETTINGS)}")
    if len(words) != 2:
        raise ParameterError(f"write /set {name} VALUE, or /set {name} default")
    if words[1] == "default":
        talk.params = replace(talk.params, **{name: getattr(talk.start, name)})
        talk.limited = talk.limited and name != "max_tokens"
    else:
        talk.params = replace(talk.params, **{name: _number(name, words[1])})
        talk.limited = talk.limited or name == "max_tokens"
    say(f"({name}: {words[1] if words[1] == 'default' else getattr(talk.params, name)})")


def _number(name: str, text: str) -> Any:
    try:
        return SETTINGS[name](text)
    except ValueError:
        raise ParameterError(f"{name} {text!r}: it must be {_KINDS[SETTINGS[name]]}") from None


def _system(talk: Talk, rest: str) -> None:
    if not rest:
        say(talk.conversation.system or "(no system message; /system TEXT sets one, /system none takes it away)")
        return
    talk.conversation.set_system("" if rest == "none" else rest)
    say("(no system message)" if rest == "none" else "(system message set; it holds from the next answer on)")


def _save(talk: Talk, rest: str) -> None:
    force, name = (True, rest[3:].strip()) if rest.startswith("-f ") else (False, rest)
    path = _file("/save", name)
    if path.exists() and not force:
        raise ParameterError(f"{path} exists; /save -f {name} replaces it")
    save(talk.conversation, path)
    say(f"(saved to {path}; /load reads it)")


def _load(talk: Talk, rest: str) -> None:
    found = load(_file("/load", rest))
    other = f"; it was held with {found.model}" if found.model != talk.conversation.model else ""
    found.model = talk.conversation.model
    talk.conversation = found
    count = len(found.messages) // 2
    say(f"({count} question{'s' * (count != 1)} with answer{'s' * (count != 1)}{other})")


def _file(command: str, name: str) -> Path:
    if not name:
        raise ParameterError(f"write {command} FILE")
    return Path(name).expanduser()


def _clear(talk: Talk, rest: str) -> None:
    _takes_nothing("/clear", rest)
    talk.conversation.clear()
    talk.results.clear()
    say("(a new conversation)")


def _retry(talk: Talk, rest: str) -> None:
    _takes_nothing("/retry", rest)
    question = talk.conversation.drop_answer()
    if question is None:
        raise ParameterError("/retry: nothing has been asked yet")
    talk.ask(question)


def _stats(talk: Talk, rest: str) -> None:
    _takes_nothing("/stats", rest)
    if not talk.results:
        say("nothing has been said yet")
        return
    say(f"last answer: {closing_line(talk.results[-1], talk.llm.arithmetic)}")
    tokens = sum(r.stats.tokens - 1 for r in talk.results if r.stats.tokens)
    steps, seconds = sum(r.stats.steps for r in talk.results), sum(r.stats.decode_s for r in talk.results)
    if steps and seconds:
        say(
            f"conversation: {len(talk.results)} answers, {tokens / seconds:.0f} tokens/s, "
            f"{tokens / steps:.1f} tokens per step"
        )


def _takes_nothing(command: str, rest: str) -> None:
    if rest:
        raise ParameterError(f"{command} stands alone: leave out {rest!r}")


def _leave(talk: Talk, rest: str) -> None:
    _takes_nothing("/exit", rest)
    raise Left


#: name -> usage, what does it, one line of help
COMMANDS: dict[str, tuple[str, Callable[[Talk, str], None], str]] = {
    "/help": ("/help", _help, "this list"),
    "/set": (
        "/set [NAME VALUE]",
        _set,
        "change temperature, top_p, max_tokens, …; alone: show them",
    ),
    "/system": ("/system [TEXT]", _system, "the system message; /system none takes it away"),
    "/retry": ("/retry", _retry, "answer the last question again"),
    "/clear": ("/clear", _clear, "forget the conversation, keep the system message"),
    "/save": ("/save FILE", _save, "write the conversation to a file"),
    "/load": ("/load FILE", _load, "go on with a saved conversation"),
    "/stats": ("/stats", _stats, "speed of the last answer and of the conversation"),
    "/exit": ("/exit", _leave, "leave (so does Ctrl-D)"),
}
_OTHER_NAMES = {
    "/reset": "/clear",
    "/new": "/clear",
    "/quit": "/exit",
    "/bye": "/exit",
    "/?": "/help",
    "/regen": "/retry",
}
