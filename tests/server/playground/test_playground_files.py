"""The playground's files, checked without a browser: all are shipped, none needs another site, none writes markup."""

from __future__ import annotations

import re
import tomllib
from fnmatch import fnmatch
from html.parser import HTMLParser
from pathlib import Path

import pytest
from playground_fake import FOLDER

FILES = sorted(path for path in FOLDER.iterdir() if path.is_file())
SCRIPTS = [path for path in FILES if path.suffix == ".js"]
PYPROJECT = Path(__file__).parents[3] / "pyproject.toml"
NAMESPACE = "http://www.w3.org/2000/svg"  # a name, fetched by nobody


class Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.inline: list[str] = []  # text of scripts and styles that stand in the page itself
        self.feed((FOLDER / "index.html").read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.lasttag in ("script", "style") and data.strip():
            self.inline.append(data)

    def values(self, name: str) -> list[str]:
        return [attrs[name] or "" for _, attrs in self.tags if name in attrs]


def test_every_file_is_in_the_package() -> None:
    globs = tomllib.loads(PYPROJECT.read_text())["tool"]["setuptools"]["package-data"]["outpace"]
    names = [path.relative_to(FOLDER.parents[1]).as_posix() for path in FILES]
    assert {"index.html", "style.css", "app.js"} <= {path.name for path in FILES}
    assert [name for name in names if not any(fnmatch(name, glob) for glob in globs)] == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_nothing_comes_from_another_site(path: Path) -> None:
    text = path.read_text().replace(NAMESPACE, "")
    assert re.findall(r"https?:|wss?:|@import|url\(\s*[\"']?(?:data|//)|[\"'](?:src|href)?//", text) == []


def test_the_page_names_only_files_beside_it() -> None:
    named = [*Page().values("src"), *(href for href in Page().values("href") if not href.startswith("#"))]
    assert {"style.css", "app.js", "theme.js", "icon.svg"} == set(named)
    assert all((FOLDER / name).is_file() for name in named)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_modules_import_only_modules_beside_them(path: Path) -> None:
    for name in re.findall(r"from \"(.*?)\"|import\(", path.read_text()):
        assert name.startswith("./") and (FOLDER / name).is_file()


def test_nothing_stands_in_the_page_that_a_strict_policy_forbids() -> None:
    page = Page()
    assert page.inline == []
    assert [name for _, attrs in page.tags for name in attrs if name == "style" or name.startswith("on")] == []


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_text_never_becomes_markup_or_code(path: Path) -> None:
    forbidden = r"innerHTML|outerHTML|insertAdjacentHTML|setHTML|document\.write|DOMParser|srcdoc|\beval\(|new Function"
    assert re.findall(forbidden, path.read_text()) == []


def test_the_scripts_and_the_page_agree_on_ids() -> None:
    ids = Page().values("id")
    assert len(ids) == len(set(ids))
    source = "\n".join(path.read_text() for path in SCRIPTS)
    used = set(re.findall(r"(?:\bat|getElementById)\(\"([\w-]+)\"\)", source)) | set(
        re.findall(r"\"#([\w-]+)\"", source)
    )
    assert used - {"race"} <= set(ids)  # "#race" is an address


def test_every_field_has_a_label_and_every_reference_a_target() -> None:
    page = Page()
    labelled = set(page.values("for"))
    for tag, attrs in page.tags:
        if tag in ("input", "select", "textarea"):
            assert attrs["id"] in labelled
    ids = set(page.values("id"))
    for name in ("for", "aria-describedby", "aria-labelledby"):
        assert {part for value in page.values(name) for part in value.split()} <= ids


def test_the_key_is_kept_for_the_session_only() -> None:
    app = (FOLDER / "app.js").read_text()
    kept = re.search(r"const KEPT = \[(.*?)\]", app)
    assert kept and "api-key" not in kept[1]
    assert re.findall(r"stored\((\w+), \"api-key\"", app) == ["session", "session"]
