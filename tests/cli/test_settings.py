"""Defaults from a file and from the environment, `outpace config`, and options as other tools call them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import click
import pytest
from click.testing import Result

from outpace.cli import COMMANDS, HABITS, command_of
from outpace.cli.exits import BUG, CAPACITY, CUT, INTERRUPTED, MEANINGS, MODEL, USAGE, code_of
from outpace.cli.habits import ALIASES, REFUSED, translate
from outpace.cli.settings import ANSWERING, EVERYWHERE, SHARED, options_of
from outpace.errors import CapacityError, CorruptModel, GrammarError, MethodError, ModelNotFound

Run = Callable[..., Result]


@pytest.fixture
def settings(own_folders: Path) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        path = own_folders / "config" / "outpace" / "config.toml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return write


def in_force(outpace: Run, command: str = "run") -> dict[str, tuple[object, str]]:
    rows = json.loads(outpace("config", command, "--json").stdout)["settings"]
    return {row["name"]: (row["value"], row["from"]) for row in rows}


def test_the_narrower_wins(outpace: Run, settings: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    settings('model = "toy"\ntop_k = 5\ntop-p = 0.5\nseed = 1\n[run]\ntop_k = 6\n[serve]\nport = 9000\n')
    monkeypatch.setenv("OUTPACE_SEED", "2")
    monkeypatch.setenv("OUTPACE_TOP_P", "0.25")
    monkeypatch.setenv("OUTPACE_RUN_SEED", "3")
    found = in_force(outpace)
    assert found["model"] == ("toy", "config.toml") and found["top_k"] == (6, "config.toml [run]")
    assert found["seed"] == (3, "OUTPACE_RUN_SEED") and found["top_p"] == (0.25, "OUTPACE_TOP_P")
    assert found["min_p"] == (0.0, "default")
    assert in_force(outpace, "chat")["seed"] == (2, "OUTPACE_SEED")
    assert in_force(outpace, "chat")["temperature"] == (None, "as the model's makers recommend")
    assert in_force(outpace, "serve")["port"] == (9000, "config.toml [serve]")
    record = json.loads(outpace("run", "hi", "-n", "2", "--json").stdout)
    assert record["model"] == "toy"


def test_what_is_set_is_what_runs(
    outpace: Run, settings: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = outpace("run", "hello", "-n", "20").stdout
    sampled = outpace("run", "hello", "-n", "20", "--temperature", "1.5", "--seed", "4").stdout
    assert plain != sampled
    settings("temperature = 1.5\nseed = 4\nmax_tokens = 20\n")
    assert outpace("run", "hello").stdout == sampled
    assert outpace("run", "hello", "--temperature", "0").stdout == plain  # the command line comes first
    monkeypatch.setenv("OUTPACE_TEMPERATURE", "0")
    assert outpace("run", "hello").stdout == plain


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("modle = 'x'", "no setting 'modle'; did you mean 'model'?"),
        ("[rum]\nseed = 1", "there is no command [rum]; did you mean 'run'?"),
        ("[run]\nsede = 1", "[run] has no option 'sede'; did you mean 'seed'?"),
        ("threads = true", "threads = True: it must be"),
        ("threads = 1.5", "it must be a whole number"),
        ("threads = 0", "threads = 0: 0 is out of range: it must be from 1 to 1024"),
        ("model = 3", "it must be a text"),
        ("[run]\nstop = 'x'", "it must be a list"),
        ("[run]\nraw = 1", "it must be true or false"),
        ("precision = 'int3'", "precision = 'int3': "),
        ("= 1", "is not TOML"),
    ],
)
def test_a_wrong_file_is_refused_by_name(outpace: Run, settings: Callable[[str], Path], text: str, says: str) -> None:
    path = settings(text)
    for command in (("run", "hi"), ("config",)):
        result = outpace(*command)
        assert result.exit_code == USAGE, result.output
        assert str(path) in result.stderr and says in result.stderr and result.stdout == ""
    assert outpace("run", "--help").exit_code == 0  # help is to be had all the same


def test_a_wrong_variable_is_refused_by_its_name(outpace: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUTPACE_TEMPERATURE", "hot")
    for command in (("run", "hi"), ("config",)):
        result = outpace(*command)
        assert result.exit_code == USAGE and "OUTPACE_TEMPERATURE: 'hot' is not a number" in result.stderr


def test_help_of_chat_says_no_default_that_it_does_not_have(outpace: Run) -> None:
    text = " ".join(outpace("chat", "--help").stdout.split())
    assert text.count("[default: (as the model's makers recommend)]") == 5 and "(another one each time)" in text


def test_a_misspelt_variable_is_said(outpace: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUTPACE_MODLE", "x")
    result = outpace("run", "hi", "-n", "2")
    assert result.exit_code == 0
    assert "OUTPACE_MODLE is no setting and has no effect; did you mean 'OUTPACE_MODEL'?" in result.stderr


def test_a_file_that_is_named_must_be_there(outpace: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUTPACE_CONFIG", "/no/such/file.toml")
    result = outpace("run", "hi")
    assert result.exit_code == USAGE and "/no/such/file.toml" in result.stderr


def test_shared_settings_are_options_of_the_commands_that_answer() -> None:
    assert set(SHARED) <= options_of(command_of("run")).keys()
    for name in ANSWERING:
        assert set(EVERYWHERE) - options_of(command_of(name)).keys() <= {"draft_model"}


@pytest.mark.parametrize("typed", sorted(ALIASES))
def test_habits_lead_to_options_that_are_there(typed: str) -> None:
    run = command_of("run")
    value = [] if ALIASES[typed] == "--raw" else ["1"]
    assert translate(run, [typed, *value]) == ([ALIASES[typed], *value], [f"{typed} is called {ALIASES[typed]} here"])


def test_habits_hide_no_option_of_ours() -> None:
    own = {flag for name in ("run", "chat") for p in command_of(name).params for flag in p.opts}
    assert not own & ALIASES.keys() and not own & REFUSED.keys()
    assert not HABITS.keys() & COMMANDS.keys()


def test_values_of_options_are_left_alone() -> None:
    run = command_of("run")
    args = ["--stop", "--temp", "--stop=-t", "-n", "3", "--", "-t", "--temp"]
    assert translate(run, args) == (args, [])
    assert translate(run, ["--top_k=3"]) == (["--top-k=3"], ["--top_k is called --top-k here"])


def test_what_has_no_counterpart_says_what_does_the_same(outpace: Run) -> None:
    result = outpace("run", "hi", "-ngl", "99")
    assert (
        result.exit_code == USAGE and "there is no option -ngl here: " in result.stderr and "--device" in result.stderr
    )
    hinted = outpace("run", "hi", "--n-predict", "3")
    assert hinted.exit_code == 0 and len(hinted.stdout) == 4 and "is called --max-tokens here" in hinted.stderr


def test_commands_of_other_tools(outpace: Run) -> None:
    listed = outpace("list")
    assert listed.exit_code == 0 and "smollm2-135m" in listed.stdout and "outpace models list" in listed.stderr
    assert outpace("rm", "no-such-model").exit_code == MODEL
    assert outpace("models", "rm", "no-such-model").exit_code == MODEL
    wrong = outpace("models", "fetsch", "x")
    assert wrong.exit_code == USAGE and "did you mean 'fetch'?" in wrong.stderr
    assert "did you mean 'chat'?" in outpace("chta").stderr


def test_words_need_no_quotes_and_files_stand_before_them(outpace: Run, tmp_path: Path) -> None:
    def ids(*args: str, input: str = "") -> list[int]:
        found: list[int] = json.loads(outpace("run", "-n", "9", "--json", *args, input=input).stdout)["token_ids"]
        return found

    one, two = tmp_path / "one", tmp_path / "two"
    one.write_text("text one\n")
    two.write_text("text two\n")
    assert ids("write", "a", "poem") == ids("write a poem")
    assert ids("-f", str(one), "-f", str(two), "what", "is it", input="piped\n") == ids(
        "text one\n\ntext two\n\nwhat is it\n\npiped"
    )
    assert ids("-f", str(one)) == ids("text one")
    missing = outpace("run", "-f", str(tmp_path / "none"), "hi")
    assert missing.exit_code == USAGE and "--file" in missing.stderr


def test_json_that_the_limit_cut_is_an_error(outpace: Run) -> None:
    pytest.importorskip("llguidance")
    result = outpace("run", "hi", "-n", "3", "--regex", "[a-z]{40}")
    assert result.exit_code == CUT and len(result.stdout) == 4
    assert "the answer was cut after 3 tokens, before it was what --regex asks for: -n 12 allows more" in result.stderr
    whole = outpace("run", "hi", "-n", "50", "--regex", "[a-z]{4}")
    assert whole.exit_code == 0, whole.stderr


def test_without_arguments_the_next_step_is_shown(outpace: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUTPACE_MODEL", "my-own.gguf")
    result = outpace()
    assert result.exit_code == 0 and result.stderr == ""
    for word in ("outpace run", "outpace chat", "outpace models", "--help", "my-own.gguf"):
        assert word in result.stdout
    assert len(result.stdout.splitlines()) < 20


def test_wrong_settings_are_said_there_too(outpace: Run, settings: Callable[[str], Path]) -> None:
    settings("modle = 'x'\n")
    result = outpace()
    assert result.exit_code == 0 and "The settings are wrong: " in result.stdout and "'modle'" in result.stdout


def test_one_exit_code_for_one_kind() -> None:
    assert [code_of(kind("x")) for kind in (MethodError, GrammarError, ModelNotFound, CorruptModel, CapacityError)] == [
        *(USAGE, USAGE, MODEL, MODEL, CAPACITY)
    ]
    assert code_of(ZeroDivisionError()) == BUG and INTERRUPTED == 130


def test_exit_codes_stand_in_the_help_and_in_the_docs(outpace: Run) -> None:
    page = (Path(__file__).parents[2] / "docs" / "cli.md").read_text()
    help = " ".join(outpace("--help").stdout.split())
    for code, meaning in MEANINGS.items():
        assert f"| {code} | {meaning} |" in page
        assert f"{code} {meaning}" in help


@pytest.mark.parametrize("command", ["run", "chat", "batch", "suggest", "compare", "audit", "tune", "serve"])
def test_every_command_ends_alike_for_a_model_that_is_not_there(outpace: Run, command: str, tmp_path: Path) -> None:
    request = tmp_path / "in.jsonl"
    body = {"messages": [{"role": "user", "content": "hi"}]}
    line = {"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": body}
    request.write_text(json.dumps(line) + "\n")
    more = {
        "run": ["hi"],
        "suggest": ["hi"],
        "batch": [str(request), str(tmp_path / "out.jsonl")],
        "compare": ["--out", str(tmp_path / "out")],
        "serve": ["--port", "0"],
    }.get(command, [])
    result = outpace(command, *more, "-m", "missing")
    assert result.exit_code == MODEL and "'missing'" in result.stderr
    wrong = outpace(command, *more, "--no-such-option")
    assert wrong.exit_code == USAGE


def test_the_shell_gets_its_script_and_its_words(outpace: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for shell in ("bash", "zsh", "fish"):
        assert "_OUTPACE_COMPLETE" in outpace("completion", shell).stdout
    from click.shell_completion import BashComplete

    from outpace.cli import main

    def words(*args: str) -> list[str]:
        complete = BashComplete(main, {}, "outpace", "_OUTPACE_COMPLETE")
        return [item.value for item in complete.get_completions(list(args[:-1]), args[-1])]

    assert words("ch") == ["chat"] and "--temperature" in words("run", "--te")
    assert words("run", "-m", "smollm2-1") == ["smollm2-135m", "smollm2-1.7b"]
    assert words("run", "--method", "suffix+recy") == ["suffix+recycling"]


def test_options_are_named_alike_by_all_commands_that_share_them() -> None:
    """A shared setting is of one type wherever it stands, or one variable could not set it."""
    kinds: dict[str, set[str]] = {}
    for name in ANSWERING:
        for option, parameter in options_of(command_of(name)).items():
            if option in SHARED and isinstance(parameter, click.Option):
                kinds.setdefault(option, set()).add(f"{parameter.type.name}{parameter.multiple}{parameter.is_flag}")
    several = {option: found for option, found in kinds.items() if len(found) > 1}
    assert several.keys() <= {"max_tokens"}, several
