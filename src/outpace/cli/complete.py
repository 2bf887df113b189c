"""What a shell completes behind an option: names of models and methods, files."""

from __future__ import annotations

import click
from click.shell_completion import CompletionItem

from ..models.catalog import CATALOG, HUB_NAMES
from ..registry import Kind


def models(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Known models with a word on each; else files."""
    known = {m.name: m.description for m in CATALOG.values()} | HUB_NAMES
    found = [CompletionItem(name, help=text) for name, text in known.items() if name.startswith(incomplete)]
    return found or [CompletionItem(incomplete, type="file")]


def methods(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Drafters; of a+b the last one is completed."""
    before, plus, last = incomplete.rpartition("+")
    return [CompletionItem(before + plus + item.value, help=item.help) for item in _registered("drafter", last)]


def verifiers(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    return _registered("verifier", incomplete)


def planners(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    return _registered("planner", incomplete)


def _registered(kind: Kind, incomplete: str) -> list[CompletionItem]:
    from ..registry import methods as registered

    names = {"auto": "chosen for you"} | {m.name: m.title for m in registered(kind)}
    return [CompletionItem(name, help=text) for name, text in names.items() if name.startswith(incomplete)]


#: option -> what completes it
OF_OPTION = {
    "model": models,
    "draft_model": models,
    "method": methods,
    "verifier": verifiers,
    "planner": planners,
}
