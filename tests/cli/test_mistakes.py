"""A mistake on the command line is one line on stderr: what was wrong, what is allowed, where to read on."""

from __future__ import annotations

import click
import pytest
from click.testing import CliRunner

from outpace.cli import main
from outpace.cli.exits import USAGE
from outpace.cli.mistakes import plain


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (("--foo",), "no option '--foo'. See outpace --help"),
        (("rum", "hi"), "no command 'rum'; did you mean 'run'? there are: run, chat,"),
        (("run", "--metod", "auto", "hi"), "no option '--metod'; did you mean '--method'? See outpace run --help"),
        (("run", "--n", "3", "hi"), "no option '--n'; did you mean '-n'?"),
        (("run", "-n", "abc", "hi"), "-n/--max-tokens: 'abc' is not a whole number. See outpace run --help"),
        (("run", "-n", "0", "hi"), "-n/--max-tokens: 0 is out of range: it must be at least 1."),
        (("run", "--precision", "int7", "hi"), "--precision: 'int7' is not one of 'auto',"),
        (("run", "--method", "autp", "hi"), "no decoding method 'autp'; did you mean 'auto'? there are: auto,"),
        (("run", "--method", "auto+suffix", "hi"), "'auto+suffix': auto stands alone"),
        (("run", "-m"), "'-m' requires an argument"),
        (("batch", "in.jsonl"), "OUTPUT is missing. See outpace batch --help"),
        (("suggest", ""), "the prompt is empty: write one, as in  outpace suggest Why is the sky blue"),
        (("completion",), "{bash|zsh|fish} is missing. See outpace completion --help"),
        (("chat", "hello"), "unexpected argument (hello). See outpace chat --help"),
        (("models", "remov"), "no command 'remov' of models; did you mean 'remove'? there are: list, fetch, remove."),
        (("methods", "ngrm"), "no method 'ngrm'; did you mean 'ngram'?"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_one_line(args: tuple[str, ...], line: str) -> None:
    result = CliRunner().invoke(main, args, prog_name="outpace")
    assert result.exit_code == USAGE and result.stdout == ""
    assert result.stderr.startswith("outpace: error: ") and result.stderr.count("\n") == 1
    assert line in result.stderr


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("0 is not in the range 1<=x<=1024.", "0 is out of range: it must be from 1 to 1024"),
        ("0.0 is not in the range x>0.", "0.0 is out of range: it must be above 0"),
        ("2 is not in the range 0<x<=1.", "2 is out of range: it must be above 0, at most 1"),
        ("9 is not in the range x<=3.", "9 is out of range: it must be at most 3"),
        ("'hot' is not a valid float range.", "'hot' is not a number"),
        ("'x' is no time; write 90s", "'x' is no time; write 90s"),
    ],
)
def test_ranges_in_words(said: str, words: str) -> None:
    assert plain(said) == words


def test_help_lists_every_option_once_in_its_section() -> None:
    from outpace.cli.run import run
    from outpace.cli.sections import SECTIONS

    named = [name for names in SECTIONS.values() for name in names]
    options = [p for p in run.params if isinstance(p, click.Option)]
    assert len(set(named)) == len(named) and {*named} <= {p.name for p in options}
    text = CliRunner().invoke(main, ["run", "--help"]).stdout
    starts = [line.split("  ")[0].replace(",", " ").split() for line in text.replace("\n  ", "\n").splitlines()]
    for option in options:
        assert sum(option.opts[-1] in words for words in starts if words and words[0][0] == "-") == 1, option.opts
    assert text.index("Prompt:") < text.index("\n  --continue") < text.index("Model:") < text.index("--threads")
    assert text.index("Output:") < text.index("--explain")
