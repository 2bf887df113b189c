"""Conversations as files, and `--continue`."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from outpace.cli.conversation import MOST_BYTES, Conversation, last_path, load, save, save_last
from outpace.errors import ParameterError

TURN = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def test_round_trip(tmp_path: Path) -> None:
    talk = Conversation("m", [{"role": "system", "content": "s"}, *TURN])
    save(talk, tmp_path / "talk.json")
    assert load(tmp_path / "talk.json") == talk
    assert stat.S_IMODE((tmp_path / "talk.json").stat().st_mode) == 0o600
    assert [p.name for p in tmp_path.iterdir()] == ["talk.json"]  # nothing partial is left


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "no JSON"),
        ("[" * 100_000, "no JSON"),
        ("[]", "object with version"),
        (json.dumps({"version": 2, "model": "m", "messages": []}), "version 2"),
        (json.dumps({"version": True, "model": "m", "messages": []}), "version True"),
        (json.dumps({"version": 1, "model": "m", "messages": {}}), "messages a list"),
        (json.dumps({"version": 1, "model": "m", "messages": [{"role": "user"}]}), "role and content"),
        (json.dumps({"version": 1, "model": "m", "messages": [{"role": "root", "content": ""}]}), "one of the roles"),
        (json.dumps({"version": 1, "model": "m", "messages": [{"role": "user", "content": 1}]}), "and a text"),
        (json.dumps({"version": 1, "model": "m", "messages": TURN[:1]}), "take turns"),
        (json.dumps({"version": 1, "model": "m", "messages": [*TURN, *TURN[1:]]}), "take turns"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, text: str, why: str) -> None:
    path = tmp_path / "talk.json"
    path.write_text(text)
    with pytest.raises(ParameterError, match=why):
        load(path)


def test_a_file_too_long_is_not_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    with path.open("wb") as file:
        file.truncate(MOST_BYTES * 4)
    with pytest.raises(ParameterError, match="which no conversation is"):
        load(path)


def test_a_link_is_replaced_and_not_followed(own_folders: Path) -> None:
    other = own_folders / "precious"
    other.write_text("kept")
    last_path().parent.mkdir(parents=True)
    last_path().symlink_to(other)
    save_last(Conversation("m", TURN))
    assert other.read_text() == "kept" and not last_path().is_symlink()


def test_run_goes_on_with_the_last_conversation(
    outpace: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    from outpace.models.tokenizer import Tokenizer

    seen: list[list[dict[str, str]]] = []
    chat = Tokenizer.chat
    monkeypatch.setattr(Tokenizer, "chat", lambda self, m, **k: (seen.append([dict(x) for x in m]), chat(self, m))[1])
    assert outpace("run", "-n", "3", "-m", "toy", "--system", "be brief", "first", "words").exit_code == 0
    seen.clear()
    result = outpace("run", "-n", "3", "--continue", "second")
    assert result.exit_code == 0 and "(going on with toy, 1 question so far)" in result.stderr
    assert [(m["role"], m["content"]) for m in seen[-1] if m["role"] != "assistant"] == [
        ("system", "be brief"),
        ("user", "first words"),
        ("user", "second"),
    ]
    assert "(going on with other, 2 questions" in outpace("run", "-n", "3", "-m", "other", "--continue", "x").stderr


def test_what_does_not_go_on(outpace: Callable[..., Result]) -> None:
    nothing = outpace("run", "--continue", "more")
    assert nothing.exit_code == 2 and "no conversation yet" in nothing.stderr
    assert outpace("run", "-n", "2", "--no-history", "hi").exit_code == 0 and not last_path().exists()
    assert outpace("run", "-n", "2", "--raw", "hi").exit_code == 0 and not last_path().exists()
    assert outpace("run", "-n", "2", "hi").exit_code == 0 and last_path().exists()
    raw = outpace("run", "--continue", "--raw", "hi")
    assert raw.exit_code == 2 and "--raw" in raw.stderr


def test_a_folder_that_cannot_be_written_ends_no_run(
    outpace: Callable[..., Result], own_folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (own_folders / "file").write_text("")
    monkeypatch.setenv("OUTPACE_STATE", str(own_folders / "file" / "state"))
    result = outpace("run", "-n", "2", "hi")
    assert result.exit_code == 0 and len(result.stdout) == 3 and "set OUTPACE_STATE" in result.stderr
