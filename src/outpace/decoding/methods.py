"""From a method's name to a drafter ("plain", "suffix+recycling", "draft:max_tokens=8+suffix") or to a verifier
("coupled", "typical:epsilon=0.1")."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ..errors import MethodError, ParameterError, did_you_mean
from ..registry import Kind, method, methods
from .contracts import Drafter, DrafterContext, Verifier
from .drafters.merged import Merged
from .planners.costs import StepCosts
from .planners.planner import Planner
from .policies.policy import KVPolicy

Option = int | float | bool | str


def split_spec(spec: str) -> list[str]:
    """Names in a spec such as "suffix+recycling". Raises MethodError for an unknown, empty or repeated one."""
    return [name for name, _ in parse_spec(spec)]


def parse_spec(spec: str) -> list[tuple[str, dict[str, Option]]]:
    """Names and options in a spec: methods are joined by '+', options follow a ':' and are joined by ','.

    >>> parse_spec("draft:max_tokens=8,min_reach=0.3+suffix")
    [('draft', {'max_tokens': 8, 'min_reach': 0.3}), ('suffix', {})]

    Raises MethodError for an unknown, empty or repeated name, ParameterError for an option that the method does not
    have or that is not of its type.
    """
    parts = [part.strip().partition(":") for part in spec.split("+")]
    names = [name.strip() for name, _, _ in parts]
    known = [m.name for m in methods("drafter")]
    for name in names:
        if name == "auto":
            raise MethodError(
                f"{spec!r}: auto stands alone and chooses the drafters by itself; write auto, or the others without it"
            )
        if name not in known:
            within = f" in {spec!r}" if spec.strip() != name else ""
            raise MethodError(
                f"no decoding method {name!r}{within}; {did_you_mean(name, ['auto', *known])}there are: auto, "
                f"{', '.join(known)}; join several with '+'"
            )
    if len(set(names)) < len(names):
        raise MethodError(f"{spec!r} names a method twice; name each once")
    if "plain" in names and len(names) > 1:
        raise MethodError(f"{spec!r} joins plain decoding, which drafts nothing, with a drafter; leave 'plain' out")
    return [(name, _options(name, "drafter", text)) for name, (_, _, text) in zip(names, parts, strict=True)]


def options_of(name: str, kind: Kind = "drafter") -> dict[str, Option]:
    """What a user may set of a method, with the defaults: the plain parameters of its constructor and of `create`."""
    cls = method(name, kind).cls
    makers = (cls, cls.create) if kind == "drafter" else (cls,)  # type: ignore[attr-defined]
    parameters = [p for made in makers for p in inspect.signature(made).parameters.values()]
    kinds = (bool, int, float, str)
    hidden = ("sampled", "coupled")  # follow from the verifier
    return {p.name: p.default for p in parameters if isinstance(p.default, kinds) and p.name not in hidden}


def _options(name: str, kind: Kind, text: str) -> dict[str, Option]:
    allowed = options_of(name, kind)
    chosen: dict[str, Option] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        key, _, value = (piece.strip() for piece in part.partition("="))
        if key not in allowed:
            listed = ", ".join(f"{k}={v}" for k, v in allowed.items()) or "none"
            near = did_you_mean(key, allowed)
            raise ParameterError(
                f"{kind} {name!r} has no option {key!r}; {near}its options and their defaults: {listed}"
            )
        chosen[key] = _value(name, key, value, allowed[key])
    return chosen


def _value(name: str, key: str, text: str, default: Option) -> Option:
    if isinstance(default, str):
        return text
    try:
        if isinstance(default, bool):
            return {"true": True, "false": False}[text.lower()]
        if isinstance(default, float) and text.endswith("%"):
            return float(text[:-1]) / 100
        return type(default)(text)
    except (ValueError, KeyError):
        kind = (
            "true or false" if isinstance(default, bool) else {int: "a whole number", float: "a number"}[type(default)]
        )
        raise ParameterError(f"{name}:{key}={text!r} is not {kind}; the default is {default}") from None


def make_drafter(spec: str, context: DrafterContext, planned: bool = False) -> Drafter:
    """Build what `spec` names; several names joined by '+' draft into one tree. `planned`: a planner will choose among
    the nodes and call only the drafters that repay their time; then a single drafter is calibrated and measured as
    well.

    Merged drafts carry no q, so drafters are set not to sample. Raises MethodError for an unknown name or an unmet
    need, ParameterError for an option out of range, each saying what would work.
    """
    named = parse_spec(spec)
    if len(named) > 1:
        context = replace(context, merged=True)
    drafters = [_make(name, context, options) for name, options in named]
    if len(drafters) == 1 and (not planned or named[0][0] == "plain"):
        return drafters[0]
    return Merged(drafters)


def make_planner(name: str, costs: Callable[[], StepCosts]) -> Planner:
    """Raises MethodError for an unknown name. `costs` is called if the planner needs them."""
    cls: type[Planner] = method(name, "planner").cls
    return cls(costs() if cls.needs_costs else None)


def make_policy(spec: str) -> KVPolicy:
    """Build what `spec` names: "snapkv", "knorm:budget=50%,sinks=8". Raises MethodError for an unknown name,
    ParameterError for an option that it does not have or out of range."""
    name, _, text = (part.strip() for part in spec.partition(":"))
    made: KVPolicy = method(name, "policy").cls(**_options(name, "policy", text))
    return made


def _make(name: str, context: DrafterContext, options: dict[str, Any]) -> Drafter:
    made: Drafter = method(name, "drafter").cls.create(context, **options)  # type: ignore[attr-defined]
    return made


def make_verifier(spec: str) -> Verifier:
    """Build what `spec` names, options and all: "rejection", "typical:epsilon=0.1,delta=0.4".

    Raises MethodError for an unknown name, ParameterError for an option that it does not have or out of range.
    """
    name, _, text = (part.strip() for part in spec.partition(":"))
    made: Verifier = method(name, "verifier").cls(**_options(name, "verifier", text))
    return made
