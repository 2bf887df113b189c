"""`outpace chat` over a decoder whose logits are a hash."""

from __future__ import annotations

from collections.abc import Callable

from click.testing import Result


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
