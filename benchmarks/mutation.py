"""How many planted bugs the tests find: small changes to what must not be wrong, each against the tests of its module.

    python benchmarks/mutation.py                    about 10 seconds a mutant; goes on where it was stopped
    python benchmarks/mutation.py --only scheduler --mutants 100 --again

Mutants are drawn with a seed from all that `mutants.py` makes of a group's modules. Each is written into a copy of the
tree and tested in a process forked from one that has the libraries loaded. A mutant survives if every test passes. One
that takes more than several times the processor time of the tests, or than its memory, is found too. Survivors that
change nothing that anyone could see are listed in `EQUIVALENT`, with the reason.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
from common import note, save, table
from mutants import Mutant, mutants, mutated

ROOT = Path(__file__).parents[1]
PACKAGE = "src/outpace"
QUESTION = "Of small bugs planted into verifiers, sampler, caches, scheduler and batch files, how many do tests find?"
MEMORY = 16 << 30  # bytes of address space
SLACK_S, TIMES = 10.0, 4.0  # processor time of a mutant: SLACK_S more than TIMES that of the tests


@dataclass(frozen=True, slots=True)
class Group:
    """Files or folders below the package, and the quick tests that are theirs."""

    files: tuple[str, ...]
    tests: tuple[str, ...]


GROUPS = {
    "verify": Group(
        ("decoding/verify",),
        ("tests/unit/test_verify_coupled.py", "tests/unit/test_verify_rejection.py",
         "tests/unit/test_verify_approximate.py", "tests/unit/test_verify_distribution.py"),
    ),
    "sampling": Group(
        ("decoding/sampling.py",),
        ("tests/unit/test_sampling.py", "tests/unit/test_outputs.py", "tests/unit/test_grammar.py",
         "tests/engine/test_sampler_paths.py"),
    ),
    "cache": Group(
        ("cache",),
        ("tests/unit/test_pages.py", "tests/unit/test_prefix.py", "tests/unit/test_quantspec_kv.py",
         "tests/engine/test_many_users.py"),
    ),
    "scheduler": Group(("engine/scheduler.py",), ("tests/engine/test_scheduler.py", "tests/engine/test_many_users.py")),
    "batchfile": Group(
        ("server/batchfile.py",), ("tests/server/test_batchfile.py", "tests/cli/test_batch_command.py")
    ),
}  # fmt: skip
LEFT_OUT = {  # tests that compile for minutes, or measure time
    "cache": "not quantspec_kv or within_half_a_step or what_it_cannot_do",
    "batchfile": "not help_loads",
}
#: survivors that nobody can tell from the original: (path, what became what) -> why
EQUIVALENT: dict[tuple[str, str], str] = {}


@click.command()
@click.option("--only", multiple=True, type=click.Choice(list(GROUPS)), help="Groups.  Repeatable.  [default: all]")
@click.option("--mutants", "count", type=click.IntRange(1), default=50, show_default=True, help="Of each group.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--again", is_flag=True, help="Forget what was tested before.")
@click.option("--survivors", is_flag=True, help="Test again those that survived, after tests were added.")
@click.option("--work", type=click.Path(path_type=Path), help="Folder for the copy.  [default: in the system's own]")
def main(only: tuple[str, ...], count: int, seed: int, again: bool, survivors: bool, work: Path | None) -> None:
    work = work or Path(tempfile.gettempdir()) / "outpace-mutation"
    work.mkdir(parents=True, exist_ok=True)
    record = work / "tested.jsonl"
    if again:
        record.unlink(missing_ok=True)
    tested = _read(record)
    tree = work / "tree"
    shutil.rmtree(tree, ignore_errors=True)
    skipped = shutil.ignore_patterns("__pycache__", "results", ".git", "*.pyc", "build")
    for part in ("src", "tests", "benchmarks", "pyproject.toml", "README.md"):
        source = ROOT / part
        shutil.copytree(source, tree / part, ignore=skipped) if source.is_dir() else shutil.copy(source, tree / part)
    _prepare(tree)
    results: dict[str, Any] = {}
    for name in only or GROUPS:
        group = GROUPS[name]
        pool = [m for path in _modules(group) for m in mutants(path, (ROOT / PACKAGE / path).read_text("utf-8"))]
        random.Random(seed).shuffle(pool)  # more mutants are these and others
        chosen = pool[:count]
        ending, baseline_s = _attempt(tree, name, None, None)
        if ending != "survived":
            raise click.ClickException(f"the tests of {name} do not pass as they are ({ending}), see {work / 'log'}")
        found = []
        for i, mutant in enumerate(chosen):
            source = (ROOT / PACKAGE / mutant.path).read_bytes()
            key = json.dumps([name, hashlib.sha256(source).hexdigest()[:12], *asdict(mutant).values()])
            if key not in tested or (survivors and tested[key] == "survived"):
                tested[key], _ = _attempt(tree, name, mutant, SLACK_S + TIMES * baseline_s)
                with record.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"mutant": key, "ending": tested[key]}) + "\n")
            found.append((mutant, tested[key]))
            note(f"{name}: {i + 1}/{len(chosen)}, {sum(ending == 'survived' for _, ending in found)} survived")
        results[name] = _summary(group, len(pool), found)
    config = {"seed": seed, "mutants of a group": count, "groups": ", ".join(results)}
    save("mutation", QUESTION, config, results, page(results))


def _modules(group: Group) -> list[str]:
    base = ROOT / PACKAGE
    found = [f for name in group.files for f in ([base / name] if name.endswith(".py") else (base / name).glob("*.py"))]
    return sorted(str(path.relative_to(base)) for path in found)


def _read(record: Path) -> dict[str, str]:
    lines = record.read_text("utf-8").splitlines() if record.exists() else []
    return {line["mutant"]: line["ending"] for line in map(json.loads, lines)}


def _prepare(tree: Path) -> None:
    """Load what takes long, and nothing of the package itself: it is loaded anew in every process."""
    os.chdir(tree)
    sys.dont_write_bytecode = True
    sys.path[:] = [str(tree / "src"), *(p for p in sys.path if Path(p).resolve() != ROOT / "src")]
    for name in [m for m in sys.modules if m.split(".")[0] == "outpace"]:
        del sys.modules[name]
    os.environ["PYTHONPATH"] = str(tree / "src")
    for name in ("hypothesis.stateful", "llguidance", "numba", "pytest", "tokenizers", "torch", "transformers"):
        importlib.import_module(name)


def _attempt(tree: Path, name: str, mutant: Mutant | None, limit_s: float | None) -> tuple[str, float]:
    """How the tests of a group end with this mutant ("killed", "timeout" or "survived"), and their processor time."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    target, source = None, ""
    if mutant is not None:
        target = tree / PACKAGE / mutant.path
        source = (ROOT / PACKAGE / mutant.path).read_text("utf-8")
        target.write_text(mutated(source, mutant), "utf-8")
    pid = os.fork()
    if pid == 0:
        os.setsid()
        _test(tree, name, limit_s)
    status = _wait(pid, None if limit_s is None else 20 * limit_s)
    if target is not None:
        target.write_text(source, "utf-8")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    code = os.waitstatus_to_exitcode(status)
    if code == 0:
        return "survived", spent
    return "timeout" if code in (-signal.SIGXCPU, -signal.SIGKILL) else "killed", spent


def _wait(pid: int, limit_s: float | None) -> int:
    """The exit status. What waits for ever spends no processor time, so there is a limit on the clock as well."""
    began = time.monotonic()
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            break
        if limit_s is not None and time.monotonic() - began > limit_s:
            os.killpg(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
            break
        time.sleep(0.05)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)  # what the tests left behind
    return status


def _test(tree: Path, name: str, limit_s: float | None) -> None:
    """In a process of its own: run the tests and end."""
    log = os.open(tree.parent / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if limit_s is not None:
        resource.setrlimit(resource.RLIMIT_CPU, (int(limit_s), int(limit_s) + 5))
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    code = 3
    try:
        import hypothesis
        import pytest

        class Quick:
            """No examples from before, the same ones for every mutant, and none made smaller."""

            @pytest.hookimpl(tryfirst=True)
            def pytest_collection(self) -> None:  # after conftest.py, before the tests are imported
                phases = (hypothesis.Phase.explicit, hypothesis.Phase.generate)
                hypothesis.settings.register_profile(
                    "mutation", deadline=None, database=None, derandomize=True, phases=phases
                )
                hypothesis.settings.load_profile("mutation")

        args = ["-x", "-q", "-p", "no:cacheprovider", "--tb=short", *GROUPS[name].tests]
        if name in LEFT_OUT:
            args += ["-k", LEFT_OUT[name]]
        code = int(pytest.main(args, plugins=[Quick()]))
        sys.stdout.flush()
    finally:
        os._exit(code)


def _summary(group: Group, pool: int, found: list[tuple[Mutant, str]]) -> dict[str, Any]:
    survived = [m for m, ending in found if ending == "survived"]
    reasons = {m: EQUIVALENT.get((m.path, f"{m.before} -> {m.after}")) for m in survived}
    equal = [m for m in survived if reasons[m] is not None]
    tested = len(found) - len(equal)
    return {
        "files": list(group.files),
        "tests": list(group.tests),
        "possible": pool,
        "tested": len(found),
        "killed": sum(ending == "killed" for _, ending in found),
        "timeout": sum(ending == "timeout" for _, ending in found),
        "equivalent": len(equal),
        "survived": len(survived) - len(equal),
        "score": round((len(found) - len(survived)) / tested, 4) if tested else None,
        "survivors": [
            {"path": m.path, "line": m.line, "before": m.before, "after": m.after, "why": reasons[m]} for m in survived
        ],
    }


def page(results: dict[str, Any]) -> str:
    head = ["what", "possible", "tested", "found by a test", "out of time", "no change to see", "survived", "score"]
    rows = [
        [name, r["possible"], r["tested"], r["killed"], r["timeout"], r["equivalent"], r["survived"],
         f"{r['score']:.1%}"]
        for name, r in results.items()
    ]  # fmt: skip
    sums: list[Any] = [sum(row[i] for row in rows) for i in range(1, 7)]
    sums.append(f"{(sums[2] + sums[3]) / max(sums[1] - sums[4], 1):.1%}")
    lines = [["**all**", *(f"**{value}**" for value in sums)]]
    survivors = [
        [f"{s['path']}:{s['line']}", f"`{_short(s['before'])}`", f"`{_short(s['after'])}`", s["why"] or ""]
        for r in results.values()
        for s in r["survivors"]
    ]
    text = table(head, [*rows, *lines])
    if survivors:
        text += "\n\n## Survivors\n\n" + table(["where", "was", "became", "why nobody can see it"], survivors)
    return text


def _short(code: str) -> str:
    line = " ".join(code.split()).replace("|", "\\|")
    return line if len(line) <= 70 else line[:69] + "…"


if __name__ == "__main__":
    main()
