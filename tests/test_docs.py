"""The documentation: commands parse, links lead somewhere, the site and the packages build."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import click
import pytest

from outpace.cli import HABITS, main
from outpace.decoding.methods import parse_spec
from outpace.errors import OutpaceError

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")]
PAGES += sorted((ROOT / "docs").glob("*.md"))
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.M | re.S)
METHODS = ("--method", "--methods")


def commands(text: str) -> list[list[str]]:
    """The words of the `outpace ...` commands of a page: lines of its blocks, and whole commands in its sentences."""
    lines = [line for _, block in FENCE.findall(text) for line in block.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"`(outpace [^`\n]+)`", FENCE.sub("", text))
    return [words[1:] for line in lines if "outpace " in line for words in simple(line) if words[:1] == ["outpace"]]


def simple(line: str) -> list[list[str]]:
    """The simple commands of a line of shell, without redirections; what a reader is to fill in has no brackets."""
    lexer = shlex.shlex(line.removeprefix("$ "), posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    found: list[list[str]] = [[]]
    redirected = False
    for word in lexer:
        if set(word) <= set("|&;"):
            found.append([])
        elif set(word) <= set("<>"):
            redirected = True
        elif redirected:
            redirected = False
        else:
            found[-1].append(word.strip("[]") if word[:1] == "[" else word)
    return found


def check(words: list[str]) -> None:
    """Raises click.UsageError for a command, option or value that there is not. Files need not be there."""
    name, *args = words
    if name in ("COMMAND", "--help", "--version"):
        return
    name, *args = (*HABITS.get(name, (name,)), *args)
    context = main.make_context("outpace", ["--help-not-run"], resilient_parsing=True)
    command = main.get_command(context, name)
    if command is None:
        raise click.UsageError(f"no command {name!r}")
    inner = click.Context(command, parent=context, info_name=name)
    while isinstance(command, click.Group) and args and args[0][:1] != "-":
        name, *args = args
        command = command.get_command(inner, name)
        if command is None:
            raise click.UsageError(f"no command {name!r}")
        inner = click.Context(command, parent=inner, info_name=name)
    try:
        values, rest, order = command.make_parser(inner).parse_args(args=list(args))
    except click.BadOptionUsage as error:
        if error.option_name != args[-1]:  # a sentence may name an option without its value
            raise
        values, rest, order = command.make_parser(inner).parse_args(args=args[:-1])
    for param in dict.fromkeys(order):
        value = values.get(param.name or "")
        if isinstance(value, str | list | tuple) and not isinstance(param.type, click.Path | click.File):
            param.type_cast_value(inner, value)
    if rest and not any(isinstance(param, click.Argument) for param in command.params):
        raise click.UsageError(f"{name} takes no arguments: {rest}")
    for i, word in enumerate(args[:-1]):
        if word in METHODS:
            for spec in args[i + 1].split(",") if word == "--methods" else [args[i + 1]]:
                if spec not in ("auto", "NAME", "A", "B", "a+b", "a:option=value"):
                    parse_spec(spec)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_parse(page: Path) -> None:
    for command in commands(page.read_text("utf-8")):
        try:
            check(command)
        except Exception as error:
            raise AssertionError(f"{page.name}: outpace {shlex.join(command)}: {error}") from error


def test_commands_are_found_and_checked() -> None:
    text = '```\n$ outpace run -n 3 "a | b" # words\ncat x | outpace chat\n```\nSay `outpace models` or `outpace`.\n'
    assert len(commands((ROOT / "docs" / "start-users.md").read_text("utf-8"))) >= 8
    assert commands(text) == [["run", "-n", "3", "a | b"], ["chat"], ["models"]]
    for wrong in ("rnu hello", "run --colour x", "run -n many x", "compare x y", "audit --method nothing"):
        with pytest.raises((click.UsageError, OutpaceError)):
            check(shlex.split(wrong))


@pytest.mark.parametrize(
    "page", [*PAGES, *sorted((ROOT / "benchmarks" / "results").glob("*.md"))], ids=lambda p: p.name
)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text("utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-c", "docs", "-d", str(tmp_path / "trees")]
    built = subprocess.run([*command, ".", str(tmp_path / "site")], cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    for page in ("index.html", "docs/index.html", "docs/start-users.html", "CONTRIBUTING.html"):
        assert (tmp_path / "site" / page).exists(), page
    assert "http" not in re.sub(r"https?://(www\.w3\.org|github\.com|pradyunsg\.me|www\.sphinx-doc\.org)\S*", "",
                                (tmp_path / "site" / "docs" / "index.html").read_text("utf-8"))  # fmt: skip


def test_every_page_is_in_the_site() -> None:
    index = (ROOT / "docs" / "index.md").read_text("utf-8")
    for page in (ROOT / "docs").glob("*.md"):
        assert page.stem == "index" or re.search(rf"(^|<){re.escape(page.stem)}>?$", index, re.M), page.name


def test_make_has_a_command_for_each_habit() -> None:
    text = (ROOT / "Makefile").read_text("utf-8")
    targets = set(re.findall(r"^(\w+):.*##", text, re.M))
    assert {"test", "lint", "fix", "docs", "bench", "dist"} <= targets
    table = re.findall(r"^\| `make (\w+)`", (ROOT / "CONTRIBUTING.md").read_text("utf-8"), re.M)
    assert set(table) <= targets


@pytest.mark.slow
def test_packages_hold_the_engine_and_nothing_else(tmp_path: Path) -> None:
    """Builds both, and runs the command from the wheel alone."""
    built = subprocess.run(
        [sys.executable, "-m", "build", "-o", str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr + built.stdout
    (wheel,), (archive,) = tmp_path.glob("*.whl"), tmp_path.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as opened:
        names = opened.namelist()
        opened.extractall(tmp_path / "wheel")
    assert all(name.startswith("outpace") for name in names)
    here = {p.relative_to(ROOT / "src").as_posix() for p in (ROOT / "src" / "outpace").rglob("*") if p.is_file()}
    assert {n for n in here if "__pycache__" not in n} == {n for n in names if n.startswith("outpace/")}
    with tarfile.open(archive) as opened_archive:
        inside = {name.split("/")[1] for name in opened_archive.getnames() if "/" in name}
    assert not inside & {"tests", "benchmarks", "docs", "tools"} and {"src", "LICENSE", "constraints.txt"} <= inside
    helped = subprocess.run(
        [sys.executable, "-c", "import sys; sys.path[0] = sys.argv.pop(1); from outpace.cli import main; main()",
         str(tmp_path / "wheel"), "--help"], cwd=tmp_path, env={}, capture_output=True, text=True)  # fmt: skip
    assert helped.returncode == 0 and "compare" in helped.stdout, helped.stderr
