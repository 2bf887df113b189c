"""What can go wrong for a user.

    OutpaceError
    ├── ParameterError        a value out of range, or a combination that does not work
    │   └── GrammarError      a JSON schema, regular expression or grammar cannot be used
    ├── ModelError            a model cannot be found, read or run
    │   ├── ModelNotFound     no such name, path or file in the cache (and no network)
    │   ├── DownloadError     the file could not be fetched whole
    │   ├── CorruptModel      damaged, truncated, wrong digest
    │   └── UnsupportedModel  unknown architecture, quantisation or file format
    ├── CapacityError         the request does not fit the KV cache or the context
    │   └── QueueFull         too many requests wait already: try again later
    └── MethodError           a decoding method is unknown, or its needs are not met

Every message says what was wrong, what is allowed and what to do. Broken invariants are assertions, not these.
"""

from __future__ import annotations

from collections.abc import Iterable


class OutpaceError(Exception):
    """Base of every error that a user can cause and mend."""


class ParameterError(OutpaceError, ValueError):
    """A parameter is out of range, or a combination of parameters does not work."""


class GrammarError(ParameterError):
    """A JSON schema, regular expression or grammar does not compile, or exceeds the grammar library's limits."""


class ModelError(OutpaceError):
    """A model cannot be found, read or run."""


class ModelNotFound(ModelError):
    """No model of that name, or no file at that path."""


class DownloadError(ModelError):
    """A model file could not be fetched whole."""


class CorruptModel(ModelError):
    """A model file is damaged, truncated or has the wrong digest."""


class UnsupportedModel(ModelError):
    """The file is sound but its architecture, quantisation or format is not supported."""


class CapacityError(OutpaceError):
    """The request does not fit into the KV cache or the model's context."""


class QueueFull(CapacityError):
    """Too many requests wait already. `retry_after_s`: when a place should be free, in seconds."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class MethodError(OutpaceError):
    """A decoding method is unknown, or what it needs is not there."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`did you mean 'x'? ` for the nearest known word, or "" when none is near. For the front of a list of all."""
    from difflib import get_close_matches

    names = list(dict.fromkeys(known))
    near = get_close_matches(word.lower(), [name.lower() for name in names], n=1, cutoff=0.6)
    found = next((name for name in names if near and name.lower() == near[0]), "")
    return f"did you mean {found!r}? " if found and found != word else ""
