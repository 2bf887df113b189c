"""`outpace models`: what is known, what is cached, fetching and removing."""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import click

from ..errors import CorruptModel, ModelNotFound, did_you_mean
from ..models.catalog import CATALOG, DEFAULT_MODEL, HUB_NAMES, KnownModel

if TYPE_CHECKING:
    from ..models.copies import Copy
    from ..models.prepared import PreparedFolder

F = TypeVar("F", bound=Callable[..., Any])


def _json_option(function: F) -> F:
    return click.option("--json", "as_json", is_flag=True, help="JSON on stdout.")(function)


class _Models(click.Group):
    """Its commands under the names that other tools have for them, too."""

    HABITS: ClassVar[dict[str, str]] = {
        "pull": "fetch",
        "download": "fetch",
        "rm": "remove",
        "delete": "remove",
        "ls": "list",
    }

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if name in self.HABITS:
            args = [self.HABITS[name], *args[1:]]
        elif not name.startswith("-") and name not in self.commands:
            near = did_you_mean(name, [*self.commands, *self.HABITS])
            ctx.fail(f"no command {name!r} of models; {near}there are: {', '.join(self.commands)}")
        return super().resolve_command(ctx, args)


@click.group(cls=_Models, invoke_without_command=True, short_help="List, fetch and remove models.")
@_json_option
@click.option("--verify", is_flag=True, help="Read all that is kept and check its digests; damage ends with an error.")
@click.option("--repair", is_flag=True, help="With --verify: remove what is damaged; it is made anew at its next use.")
@click.option(
    "--prune",
    is_flag=True,
    help="Remove packed weights that nothing reads any more, or that were not used for 30 days; they are made anew at "
    "their next use.",
)
@click.pass_context
def models(ctx: click.Context, as_json: bool, verify: bool, repair: bool, prune: bool) -> None:
    """List the known models and what is kept of models on this machine, or fetch and remove them.

    Models are fetched by themselves when they are first used.
    """
    ctx.obj = as_json
    if (verify or repair or prune) and ctx.invoked_subcommand:
        raise click.UsageError(
            f"--verify, --repair and --prune go without a command, not with {ctx.invoked_subcommand!r}"
        )
    if repair and not verify:
        raise click.UsageError("--repair goes with --verify")
    if prune and verify:
        raise click.UsageError("--prune and --verify go one after the other")
    if verify:
        _verify(as_json, repair)
    elif prune:
        _prune(as_json)
    elif ctx.invoked_subcommand is None:
        _show_list(as_json)


@models.command("list")
@_json_option
@click.pass_obj
def list_models(outer: bool, as_json: bool) -> None:
    """Known models, and what is kept on this machine."""
    _show_list(as_json or outer)


@models.command("fetch")
@click.argument("name")
@_json_option
@click.pass_obj
def fetch_model(outer: bool, name: str, as_json: bool) -> None:
    """Fetch NAME: a known model, or one of the hub (owner/name, owner/name:Q4_K_M).

    Prints where it is. A damaged file is replaced.
    """
    from ..models import fetch, hub
    from ..models.source import find

    if known := CATALOG.get(name):
        try:
            path = fetch.fetch(known)
        except CorruptModel as e:
            if not fetch.model_path(known).exists():  # what was just downloaded is wrong: said once
                raise
            click.echo(f"{e}\nfetching it again", err=True)
            fetch.remove(known)
            path = fetch.fetch(known)
    else:
        there = find(name)
        if isinstance(there, KnownModel):
            path = fetch.fetch(there)
        elif isinstance(there, Path):
            path = there
        else:
            path = hub.fetch_hub(there, refresh=True)
    click.echo(json.dumps({"name": name, "path": str(path)}) if as_json or outer else str(path))


@models.command("remove")
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@_json_option
@click.pass_obj
def remove_model(outer: bool, names: tuple[str, ...], as_json: bool) -> None:
    """Remove models by the names that `outpace models` shows.

    Your own files and the hub's cache are not touched.
    """
    from ..models import fetch
    from ..models.prepared import prepared_folders, remove_prepared

    entries = prepared_folders()
    matching = {name: [e for e in entries if _belongs(e, name)] for name in names}
    if unknown := [name for name in names if name not in CATALOG and not matching[name]]:
        there = ", ".join([*CATALOG, *(e.key for e in _others(entries))])
        near = did_you_mean(unknown[0], [*CATALOG, *(e.key for e in _others(entries))])
        raise ModelNotFound(f"nothing is kept of {unknown[0]!r}; {near}there are: {there}")
    removed: list[dict[str, Any]] = []
    for name in dict.fromkeys(names):
        freed = fetch.remove(CATALOG[name]) if name in CATALOG else 0
        for entry in matching[name]:
            remove_prepared(entry)
            freed += entry.size
        removed.append({"name": name, "bytes": freed})
    if as_json or outer:
        click.echo(json.dumps(removed))
        return
    for item in removed:
        click.echo(f"{item['name']}: {_size(item['bytes'])} freed" if item["bytes"] else f"{item['name']}: not cached")


def _verify(as_json: bool, repair: bool) -> None:
    """Raises CorruptModel when something is damaged and stays so."""
    from ..models.verify import Kept, everything

    damaged: list[Kept] = []
    report: list[dict[str, Any]] = []
    for kept in everything():
        if not as_json:
            click.echo(f"{kept.name:<48} {_size(kept.size):>8}  ", nl=False)
        try:
            kept.check()
            problem = None
        except CorruptModel as error:
            problem = str(error)
            damaged.append(kept)
        report.append({"name": kept.name, "path": str(kept.path), "bytes": kept.size, "problem": problem})
        if not as_json:
            click.echo("sound" if problem is None else f"DAMAGED\n  {problem}")
    if damaged and not repair and not as_json and sys.stdin.isatty() and sys.stdout.isatty():
        repair = click.confirm("Remove what is damaged? It is made or fetched anew at its next use")
    if repair:
        for kept in damaged:
            kept.remove()
    if as_json:
        click.echo(json.dumps({"checked": report, "removed": [k.name for k in damaged] if repair else []}, indent=1))
    elif not damaged:
        click.echo(f"all {len(report)} are sound" if report else "nothing is kept on this machine")
    elif repair:
        click.echo("removed: " + "; ".join(k.name for k in damaged))
    if damaged and not repair:
        names = "; ".join(k.name for k in damaged)
        raise CorruptModel(
            f"damaged: {names}; `outpace models --verify --repair` removes it, to be made anew when used"
        )


def _prune(as_json: bool) -> None:
    from ..models.copies import prune

    gone = prune()
    if as_json:
        click.echo(json.dumps([_copy(copy) for copy in gone], indent=1))
        return
    for copy in gone:
        click.echo(f"{copy.model}, {copy.precision}: {_size(copy.size)} freed ({copy.reason})")
    if not gone:
        click.echo("nothing to remove: all packed weights are of this version and were used within 30 days")


def _copy(copy: Copy) -> dict[str, Any]:
    return {
        "model": copy.model,
        "precision": copy.precision,
        "path": str(copy.path),
        "bytes": copy.size,
        "unused_days": copy.days,
        "can_go": copy.reason or None,
    }


def _belongs(entry: PreparedFolder, name: str) -> bool:
    """Whether the folder is the one that the list shows under `name`."""
    return entry.key == f"{name}-{CATALOG[name].sha256[:16]}" if name in CATALOG else name in (entry.key, entry.model)


def _others(entries: list[PreparedFolder]) -> list[PreparedFolder]:
    return [e for e in entries if not any(_belongs(e, name) for name in CATALOG)]


def _show_list(as_json: bool) -> None:
    from ..models.copies import copies
    from ..models.prepared import prepared_folders

    entries, packed = prepared_folders(), copies()
    known = [_known(model, entries) for model in CATALOG.values()]
    others: list[dict[str, Any]] = [{"name": e.key, "path": e.path, "prepared_bytes": e.size} for e in _others(entries)]
    if as_json:
        listed = {"models": known, "others": others, "packed": [_copy(copy) for copy in packed], "hub": HUB_NAMES}
        click.echo(json.dumps(listed, indent=1))
        return
    for model in known:
        default = " (default)" if model["default"] else ""
        click.echo(f"{model['name'] + default:<24} {_size(model['size']):>8}  {_state(model)}")
        click.echo(f"{'':<35}{model['description']}, {model['licence']}")
    click.echo("\nfrom the Hugging Face hub, by short name:")
    click.echo(textwrap.fill(", ".join(HUB_NAMES), 100, initial_indent="  ", subsequent_indent="  "))
    click.echo("  any other: -m owner/repo, -m owner/repo:Q4_K_M; files of your own: -m FILE.gguf")
    if others:
        click.echo("\nprepared on this machine:")
    for other in others:
        path = other["path"] or "unreadable"
        click.echo(f"{other['name']}\n{'':<24} {_size(other['prepared_bytes']):>8}  prepared from {path}")
    if packed:
        click.echo("\npacked weights, which save time at a start (`outpace models --prune` removes what can go):")
    for copy in packed:
        used = "used today" if not copy.days else f"used {copy.days} day{'s' if copy.days > 1 else ''} ago"
        state = f"can go: {copy.reason}" if copy.reason else used
        click.echo(f"{f'{copy.model}, {copy.precision}':<24} {_size(copy.size):>8}  {state}")


def _known(model: KnownModel, entries: list[PreparedFolder]) -> dict[str, Any]:
    from ..models.fetch import model_path

    path = model_path(model)
    found = path.stat().st_size if path.is_file() else 0
    return {
        "name": model.name,
        "default": model.name == DEFAULT_MODEL,
        "description": model.description,
        "licence": model.licence,
        "size": model.size,
        "state": "cached" if found == model.size else "damaged" if found else "not fetched",
        "path": str(path) if found else None,
        "prepared_bytes": sum(e.size for e in entries if _belongs(e, model.name)),
    }


def _state(model: dict[str, Any]) -> str:
    prepared = f", {_size(model['prepared_bytes'])} prepared" if model["prepared_bytes"] else ""
    return f"{model['state']}{prepared}"


def _size(n: int) -> str:
    """Decimal units, as shops and disks count."""
    for unit, one in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if n >= one:
            return f"{n / one:.1f} {unit}"
    return f"{n} B"
