"""One exit code for one kind of failure, over all commands."""

from __future__ import annotations

from ..errors import CapacityError, MethodError, ModelError, OutpaceError, ParameterError

DONE = 0
FAILED = 1  # the command ran, and what it had to do or to prove did not come out
USAGE = 2
MODEL = 3
CAPACITY = 4
CUT = 5
BUG = 70
INTERRUPTED = 130

MEANINGS = {
    DONE: "done",
    FAILED: "it ran, but something failed: a request of a batch, a check of the audit, a comparison, a port in use",
    USAGE: "a command, option, value, method, setting or file on the command line is wrong",
    MODEL: "a model cannot be found, fetched or read",
    CAPACITY: "prompt and answer do not fit the model's context or the memory",
    CUT: "an answer that had to keep to a JSON schema, regex or grammar was cut by the limit of tokens",
    BUG: "a bug in Outpace",
    INTERRUPTED: "stopped by Ctrl-C",
}


def code_of(error: Exception) -> int:
    """The exit code that an exception ends a command with."""
    kinds: tuple[tuple[type[Exception], int], ...] = (
        (ParameterError, USAGE),
        (MethodError, USAGE),
        (ModelError, MODEL),
        (CapacityError, CAPACITY),
        (OutpaceError, FAILED),
    )
    return next((code for kind, code in kinds if isinstance(error, kind)), BUG)
