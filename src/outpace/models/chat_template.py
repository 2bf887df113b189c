"""Renders chat templates (Jinja) in a sandbox, with the helpers that models' templates expect."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

from ..errors import ParameterError


class _TemplateRefusal(Exception):
    """The template itself called raise_exception."""


def _raise_exception(message: str) -> None:
    raise _TemplateRefusal(message)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


@lru_cache(maxsize=1)
def _environment() -> Any:
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}…{% endgeneration %}` marks what training learns from; rendering passes it through."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    env = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    env.filters["tojson"] = _tojson
    env.globals["raise_exception"] = _raise_exception
    env.globals["strftime_now"] = _strftime_now
    return env


@lru_cache(maxsize=8)
def _compile(template: str) -> Any:
    return _environment().from_string(template)


@lru_cache(maxsize=8)
def variables(template: str) -> frozenset[str]:
    """The values that a template reads. Empty if it cannot be read, which `render` says."""
    import jinja2
    from jinja2.meta import find_undeclared_variables

    try:
        env = _environment()
        return frozenset(find_undeclared_variables(env.parse(template))) - env.globals.keys()
    except jinja2.TemplateError:
        return frozenset()


def render(template: str, messages: Sequence[Mapping[str, Any]], **values: Any) -> str:
    """Raises ParameterError with the reason when the template refuses the messages or fails."""
    import jinja2

    try:
        return str(_compile(template).render(messages=messages, **values))
    except _TemplateRefusal as e:
        raise ParameterError(f"the model's chat template refuses these messages: {e}") from e
    except (
        jinja2.TemplateError,
        TypeError,
        ValueError,
        KeyError,
        AttributeError,
        RecursionError,
        OverflowError,
    ) as e:
        kind = type(e).__name__
        raise ParameterError(f"the model's chat template fails on these messages: {kind}: {e}") from e
