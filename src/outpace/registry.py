"""Every decoding method, found in one place. A method's own file registers it; nothing else needs to know.

    @register(family="SPEC", title="…", paper="https://…", exactness="identical", needs=("draft model",))
    class DraftChain(Drafter):
        name = "draft"

`methods()` imports the packages in METHOD_PACKAGES at the first call, so `import outpace` stays light.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Literal, TypeVar

from .errors import MethodError, did_you_mean
from .types import Exactness

Kind = Literal["drafter", "verifier", "planner", "mode", "policy"]
METHOD_PACKAGES = tuple(f"outpace.decoding.{part}" for part in ("drafters", "verify", "planners", "modes", "policies"))

T = TypeVar("T", bound=type)


@dataclass(frozen=True, slots=True)
class Method:
    """`exactness` of a drafter is what it reaches with the verifier that the engine pairs it with by default."""

    name: str
    kind: Kind
    family: str  # as in the table of methods: SPEC, DLLM, KVC, ...
    title: str
    paper: str  # address, or "" for plain decoding
    exactness: Exactness
    needs: tuple[str, ...]
    claim: str  # what its authors report, with their model or task; "" if they give no figure
    cls: type


_methods: dict[str, Method] = {}


def register(
    *,
    kind: Kind = "drafter",
    family: str,
    title: str,
    paper: str,
    exactness: Exactness,
    needs: tuple[str, ...] = (),
    claim: str = "",
) -> Callable[[T], T]:
    """Class decorator. The class carries its own `name`."""

    def add(cls: T) -> T:
        name: str = cls.name  # type: ignore[attr-defined]
        known = _methods.get(name)
        assert known is None or known.cls.__qualname__ == cls.__qualname__, f"two methods are called {name!r}"
        _methods[name] = Method(name, kind, family, title, paper, exactness, needs, claim, cls)
        return cls

    return add


@cache
def _discover() -> None:
    for package_name in METHOD_PACKAGES:
        package = importlib.import_module(package_name)
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{package_name}.{module.name}")


def methods(kind: Kind | None = None) -> list[Method]:
    """All registered methods, by kind and name."""
    _discover()
    return sorted((m for m in _methods.values() if kind in (None, m.kind)), key=lambda m: (m.kind, m.name))


def method(name: str, kind: Kind) -> Method:
    """Look one up. Raises MethodError naming what there is."""
    _discover()
    found = _methods.get(name)
    if found is None or found.kind != kind:
        known = [m.name for m in methods(kind)]
        raise MethodError(f"no {kind} {name!r}; {did_you_mean(name, known)}there are: {', '.join(known)}")
    return found
