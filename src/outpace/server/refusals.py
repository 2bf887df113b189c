"""Errors as OpenAI's API tells them: a status, and {"error": {message, type, param, code}}."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import ceil
from typing import Any

from ..errors import CapacityError, OutpaceError, QueueFull
from .service import ServiceError

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
_ANTHROPIC = _TYPES | {413: "request_too_large", 503: "overloaded_error"}
ANTHROPIC = "/v1/messages"  # where paths of Anthropic's API begin
_NAMED = re.compile(r"([a-z_]{1,40})(?==|: | is out of range)")
_FIELD = re.compile(r"[a-z][a-z_0-9]*|[0-9]+")
_SHOWN = 200  # characters of what was sent
_LONGEST = 2000  # characters of a message, whatever was sent


@dataclass(frozen=True, slots=True)
class Refusal:
    """An answer that is an error."""

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def anthropic_body(self, request_id: str | None) -> dict[str, Any]:
        """The same as Anthropic's API says it."""
        kind = _ANTHROPIC.get(self.status, "invalid_request_error" if self.status < 500 else "api_error")
        return {"type": "error", "error": {"type": kind, "message": self.message}, "request_id": request_id}

    def body_for(self, path: str, request_id: str | None) -> dict[str, Any]:
        """In the form of the API that the path belongs to."""
        return self.anthropic_body(request_id) if path.startswith(ANTHROPIC) else self.body()


class Refused(Exception):
    """Raised where a route has the whole answer."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.message)
        self.refusal = refusal


def refusal_of(error: Exception) -> Refusal:
    """What a client is told of an exception. Of one that nobody foresaw, nothing but that."""
    found = _refusal_of(error)
    half = _LONGEST // 2
    short = f"{found.message[:half]} … {found.message[-half:]}"  # what is allowed stands at the end
    return found if len(found.message) <= _LONGEST else replace(found, message=short)


def _refusal_of(error: Exception) -> Refusal:
    if isinstance(error, Refused):
        return error.refusal
    if isinstance(error, QueueFull):
        seconds = max(1, ceil(error.retry_after_s))
        return Refusal(429, str(error), code="queue_full", headers={"retry-after": str(seconds)})
    if isinstance(error, CapacityError):
        return Refusal(400, str(error), code="context_length_exceeded")
    if isinstance(error, OutpaceError):
        named = _NAMED.match(str(error))
        return Refusal(400, str(error), param=named[1] if named else None, code="invalid_value")
    if isinstance(error, ServiceError):
        later = error.retry_after_s if error.retry_after_s is not None else 5 if error.status == 503 else None
        headers = {} if later is None else {"retry-after": str(max(1, ceil(later)))}
        return Refusal(error.status, str(error), code=error.code, headers=headers)
    return Refusal(500, "an error of the server; its log has the details", code="internal_error")


def refusal_of_body(errors: Sequence[Mapping[str, Any]], fields: Sequence[str], content_type: str) -> Refusal:
    """A body that is no JSON, or not of the form that the route takes. `errors` as pydantic lists them, `fields` of the
    route's body."""
    field = errors[0]["loc"][:2]
    first = max((e for e in errors if e["loc"][:2] == field), key=lambda e: len(e["loc"]))  # where several forms go
    named = [str(part) for part in first["loc"][1:]]
    where = [part for part in named if _FIELD.fullmatch(part) and part not in ("str", "int")]  # no names of types
    path = ".".join(part[:_SHOWN] for part in where)
    kind, message = first["type"], first["msg"]
    if kind == "json_invalid":
        return Refusal(400, f"the body is no JSON: {first.get('ctx', {}).get('error', message)}", code="invalid_json")
    if not path and "json" not in content_type:
        return Refusal(400, "the body must be JSON: send it with Content-Type: application/json", code="no_json")
    if kind == "extra_forbidden":
        near = difflib.get_close_matches(where[-1][:_SHOWN], fields, 1) if len(where) == 1 else []
        hint = f"; did you mean {near[0]!r}?" if near else ""
        message = f"unknown field {path!r}: it would have no effect, so it is refused{hint}"
        return Refusal(400, message[: _SHOWN * 2], param=path[:_SHOWN], code="unknown_parameter")
    if kind == "missing":
        return Refusal(400, f"{path or 'the body'} is missing", param=path or None, code="missing_parameter")
    if kind == "unsupported":
        path = ".".join([*where, first["ctx"]["field"]])
        shown = message if len(where) == 0 else f"{'.'.join(where)}: {message}"
        return Refusal(400, shown[: _SHOWN * 2], param=path[:_SHOWN], code="unsupported_parameter")
    message = message.removeprefix("Value error, ")
    return Refusal(400, f"{path}: {message}" if path else message, param=path[:_SHOWN] or None, code="invalid_type")
