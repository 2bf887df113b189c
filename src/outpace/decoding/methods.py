"""From a method's name to a drafter: "plain", "suffix", "suffix+recycling"."""

from __future__ import annotations

from dataclasses import replace

from ..errors import MethodError
from ..registry import method, methods
from .contracts import Drafter, DrafterContext
from .drafters.merged import Merged


def split_spec(spec: str) -> list[str]:
    """Names in a spec such as "suffix+recycling". Raises MethodError for an unknown, empty or repeated one."""
    names = [name.strip() for name in spec.split("+")]
    known = [m.name for m in methods("drafter")]
    for name in names:
        if name not in known:
            raise MethodError(
                f"no decoding method {name!r} in {spec!r}; there are: {', '.join(known)}; join several with '+'"
            )
    if len(set(names)) < len(names):
        raise MethodError(f"{spec!r} names a method twice; name each once")
    if "plain" in names and len(names) > 1:
        raise MethodError(f"{spec!r} joins plain decoding, which drafts nothing, with a drafter; leave 'plain' out")
    return names


def make_drafter(spec: str, context: DrafterContext) -> Drafter:
    """Build what `spec` names; several names joined by '+' draft into one tree.

    Merged drafts carry no q, so drafters are told not to sample. Raises MethodError for an unknown
    name or an unmet need, saying what would work.
    """
    names = split_spec(spec)
    if len(names) > 1:
        context = replace(context, merged=True)
    drafters = [method(name, "drafter").cls.create(context) for name in names]  # type: ignore[attr-defined]
    return drafters[0] if len(drafters) == 1 else Merged(drafters)
