"""The layers of the package: imports go downward only, and the top stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import outpace

ROOT = Path(outpace.__file__).parent
LAYERS = [
    {"types", "config", "errors", "fields", "json_text", "paths", "registry"},
    {"ops", "parallel"},
    {"models", "cache"},
    {"decoding"},
    {"engine"},
    {"server", "training", "simulate", "bench"},
    {"cli"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
FILES = sorted(p for p in ROOT.rglob("*.py") if p.parent != ROOT or p.stem not in ("__init__", "__main__"))


def imported(path: Path) -> set[str]:
    """Modules of the package that a file imports, at any depth of its code, as dotted names below `outpace`."""
    here = ["outpace", *path.relative_to(ROOT).with_suffix("").parts]
    package = here[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{module}.{alias.name}" for alias in node.names}
    return {name.removeprefix("outpace.") for name in found if name.startswith("outpace.")}


def top(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[0]


def test_every_module_has_a_layer():
    assert {top(p) for p in FILES} <= set(LEVEL)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_downward_only(path):
    level = LEVEL[top(path)]
    wrong = [name for name in imported(path) if LEVEL.get(name.split(".")[0], 0) > level]
    assert not wrong, f"{path.relative_to(ROOT)} (layer {level}) imports {wrong}"
    if level == 0:  # the words of the engine know nothing of what is above but the registry's search
        assert all(LEVEL.get(name.split(".")[0], 0) == 0 for name in imported(path))


def test_the_rule_sees_relative_and_lazy_imports():
    assert "ops.masks.Mask" in imported(ROOT / "models" / "batch.py")
    assert "models.hf_config.parse" in imported(ROOT / "models" / "config.py")  # inside a function
    assert "cache.storage.PAGE_SIZE" in imported(ROOT / "cache" / "pages.py")


@pytest.mark.parametrize(
    "code", ["import outpace", "import outpace.types, outpace.registry, outpace.errors, outpace.cli"]
)
def test_the_top_loads_no_heavy_module(code):
    check = f"{code}\nimport sys\nprint([m for m in ('torch', 'transformers', 'numba') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_public_names_are_sorted_and_there():
    assert list(outpace.__all__) == sorted(outpace.__all__)
    for name in outpace.__all__:
        assert getattr(outpace, name) is not None
    with pytest.raises(AttributeError):
        outpace.no_such_name  # noqa: B018
