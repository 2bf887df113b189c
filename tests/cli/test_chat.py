"""`outpace chat` over a decoder whose logits are a hash."""

from __future__ import annotations

import json
import os
import signal
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from outpace.engine.engine import Engine


def test_a_conversation(outpace: Callable[..., Result]) -> None:
    said = "hello\n/stats\n\n/help\n/walk\nhello\n/reset\nhello\n/exit\nnot said\n"
    result = outpace("chat", "--max-tokens", "10", input=said)
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    answers = [line for line in lines if len(line) == 10 and line[0] != "/" and " " not in line]
    assert len(answers) == 3
    assert any(line.startswith("/clear") for line in lines)  # /help
    assert "last answer: 10 tokens in" in result.stderr and "no command /walk" in result.stderr
    assert "a new conversation" in result.stderr
    assert "not said" not in result.stdout


def test_history_is_part_of_the_prompt(outpace: Callable[..., Result], monkeypatch) -> None:
    from outpace.models.tokenizer import Tokenizer

    seen = []
    chat = Tokenizer.chat
    monkeypatch.setattr(Tokenizer, "chat", lambda self, m, **k: (seen.append([dict(x) for x in m]), chat(self, m))[1])
    assert outpace("chat", "-n", "3", "--system", "be brief", input="one\ntwo\n").exit_code == 0
    last = seen[-1]
    assert [m["role"] for m in last] == ["system", "user", "assistant", "user"]
    assert last[0]["content"] == "be brief" and last[3]["content"] == "two"


def test_a_conversation_that_no_longer_fits_says_so(outpace: Callable[..., Result]) -> None:
    result = outpace("chat", "-n", "3", input="x" * 5000 + "\nshort\n")
    assert result.exit_code == 0
    assert "/clear starts anew" in result.stderr and len(result.stdout) == 4


def test_chat_needs_a_template(outpace: Callable[..., Result]) -> None:
    result = outpace("chat", "-m", "base", input="hi\n")
    assert result.exit_code == 2 and "no chat template" in result.stderr


def test_answers_are_sampled_as_the_model_recommends_unless_told_otherwise(outpace: Callable[..., Result]) -> None:
    def shown(*args: str) -> dict[str, str]:
        lines = outpace("chat", *args, input="/set\n").stdout.splitlines()
        return dict(line.split(maxsplit=1) for line in lines)

    settings = shown()
    assert settings["temperature"] == "0.5" and settings["top_p"] == "0.9"  # of conftest's model
    assert settings["max_tokens"] == "until the model ends the answer"
    chosen = shown("--top-p", "0.3", "--seed", "7")
    assert (chosen["temperature"], chosen["top_p"], chosen["seed"]) == ("0.5", "0.3", "7")
    greedy = shown("--temperature", "0")
    assert (greedy["temperature"], greedy["top_p"]) == ("0.0", "1.0")


def test_an_answer_goes_on_beyond_256_tokens(outpace: Callable[..., Result]) -> None:
    result = outpace("chat", "--temperature", "0", "--seed", "1", input="hello\n")
    assert result.exit_code == 0
    assert len(result.stdout.strip()) > 4000 and "the context is full: /clear starts anew" in result.stderr


def test_settings_are_changed_and_checked(outpace: Callable[..., Result]) -> None:
    said = [
        *("/set temperature 0", "/set max_tokens 4", "hello", "/set temp 0.9", "/set temperature hot", "/set top_p 3"),
        *("/set tempreature 1", "/set system x", "/set seed", "/set max_tokens default", "/set"),
    ]
    result = outpace("chat", "--seed", "3", input="\n".join(said) + "\n")
    errors = result.stderr
    assert "(cut after 4 tokens; /set max_tokens 8 allows more)" in errors
    assert "temperature 'hot': it must be a number" in errors and "top_p=3.0" in errors
    assert "no setting 'tempreature'; did you mean 'temperature'?" in errors and "use /system for that" in errors
    assert "write /set seed VALUE" in errors
    assert "temperature          0.9" in result.stdout and "until the model ends the answer" in result.stdout


def test_every_answer_has_a_seed_of_its_own_and_a_session_can_be_repeated(outpace: Callable[..., Result]) -> None:
    def answers(seed: str) -> list[str]:
        args = ("chat", "-n", "12", "--temperature", "1.5", "--seed", seed)
        return outpace(*args, input="hello\n/retry\n").stdout.splitlines()

    first, again = answers("5")
    assert first != again  # /retry draws anew
    assert answers("5") == [first, again]


def test_save_load_system_and_clear(outpace: Callable[..., Result], tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    said = ["/system be brief", "hello", f"/save {path}", f"/save {path}", f"/save -f {path}", "/clear", "/system"]
    said += [f"/load {path}", "/system none", "/system"]
    result = outpace("chat", "-n", "3", input="\n".join(said) + "\n")
    assert "exists; /save -f" in result.stderr and "1 question with answer" in result.stderr
    assert "\nbe brief\n" in result.stderr and "(no system message; " in result.stderr
    record = json.loads(path.read_text())
    assert [m["role"] for m in record["messages"]] == ["system", "user", "assistant"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize(
    ("said", "answer"),
    [
        ("/rety", "no command /rety; did you mean '/retry'?"),
        ("/retry", "nothing has been asked yet"),
        ("/clear now", "/clear stands alone"),
        ("/load", "write /load FILE"),
        ("/load /no/such/file", "cannot be read: No such file"),
        ("/stats", "nothing has been said yet"),
    ],
)
def test_mistakes_are_said_and_end_nothing(outpace: Callable[..., Result], said: str, answer: str) -> None:
    result = outpace("chat", "-n", "3", input=f"{said}\nhello\n")
    assert result.exit_code == 0 and answer in result.stderr and len(result.stdout) == 4


def test_several_lines(outpace: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, own_folders: Path) -> None:
    said = '"""\na\nb\n"""\nc \\\nd\n /not a command\n"""/quoted"""\n'
    assert outpace("chat", "-n", "2", input=said).exit_code == 0
    kept = json.loads((own_folders / "state/outpace/last-conversation.json").read_text())
    asked = [m["content"] for m in kept["messages"] if m["role"] == "user"]
    assert asked == ["a\nb", "c \nd", "/not a command", "/quoted"]


def test_ctrl_c_shows_nothing_of_the_step_that_was_under_way(
    outpace: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, own_folders: Path
) -> None:
    step, steps = Engine.step, []

    def interrupted(self: Engine) -> object:
        steps.append(1)
        events = step(self)
        if len(steps) == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return events

    monkeypatch.setattr(Engine, "step", interrupted)
    result = outpace("chat", "--method", "plain", "--temperature", "0", input="hello\n")
    assert result.exit_code == 0 and result.stderr.endswith("(stopped)\n")
    assert len(result.stdout) == 5  # four steps and the end of the line
    kept = json.loads((own_folders / "state/outpace/last-conversation.json").read_text())
    assert kept["messages"][-1]["content"] == result.stdout.rstrip("\n")  # what was seen, no more
