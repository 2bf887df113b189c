"""Who may ask, and whose a request is. Keys are kept and compared as digests only."""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Iterable
from pathlib import Path

from ..errors import ParameterError

VARIABLE = "OUTPACE_API_KEYS"


class Keys:
    """The keys that open the server; without any it is open to everybody. `share`: all requests are one owner's."""

    def __init__(self, keys: Iterable[str] = (), share: bool = False) -> None:
        self._digests = [_digest(key) for key in keys]
        self._share = share

    @property
    def needed(self) -> bool:
        return bool(self._digests)

    def check(self, authorization: str | None, api_key: str | None = None) -> str | None:
        """The key of an `Authorization: Bearer` header, or else of an `x-api-key` header, if it opens the server, "" if
        none is needed, else None. Every key is compared, in constant time."""
        if not self._digests:
            return ""
        scheme, _, key = (authorization or f"Bearer {api_key or ''}").partition(" ")
        given = _digest(key.strip())
        same = [hmac.compare_digest(given, known) for known in self._digests]
        return key.strip() if any(same) and scheme.lower() == "bearer" else None

    def owner(self, key: str, user: str | None) -> str:
        """Whose a request is in the engine: all are one owner's if they share."""
        return "" if self._share else self.person(key, user)

    @staticmethod
    def person(key: str, user: str | None) -> str:
        """A name for the pair of key and user that tells neither. What people are told is kept apart by it, whatever
        their requests share."""
        if not key and not user:
            return ""
        return hashlib.sha256(_digest(key) + (user or "").encode("utf-8", "surrogatepass")).hexdigest()[:24]


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def read_keys(file: Path | None) -> list[str]:
    """Keys from a file, one in a line (`#` begins a comment), and from OUTPACE_API_KEYS, parted by commas.

    Raises ParameterError for a file that cannot be read or has none, and for keys that are too short to be secret.
    """
    keys = [key.strip() for key in os.environ.get(VARIABLE, "").split(",")]
    if file is not None:
        try:
            lines = file.read_text("utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ParameterError(f"--api-key-file {str(file)!r} cannot be read: {error}") from None
        found = [line.partition("#")[0].strip() for line in lines]
        if not any(found):
            raise ParameterError(f"--api-key-file {str(file)!r} has no key: write one in a line")
        keys += found
    keys = [key for key in keys if key]
    if any(len(key) < 8 or not key.isascii() or not key.isprintable() or " " in key for key in keys):
        raise ParameterError("an API key must be at least 8 visible ASCII characters; python -c 'import secrets; "
                             "print(secrets.token_urlsafe())' makes one")  # fmt: skip
    return keys
