"""By which names others may call: the names of the model, and the pages of other servers."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ..errors import ParameterError

_MODEL = re.compile(r"[!-~]{1,200}")
_ORIGIN = re.compile(r"(https?|chrome-extension|moz-extension|tauri|app)://[a-z0-9.\-\[\]:]{1,255}")
ANY = "*"


def model_names(names: Sequence[str]) -> list[str]:
    """Names under which a model is served, each once. ParameterError for what no client could send."""
    for name in names:
        if not _MODEL.fullmatch(name):
            raise ParameterError(
                f"--served-model-name {name[:200]!r}: a name is 1 to 200 visible characters of ASCII, without spaces"
            )
    return list(dict.fromkeys(names))


def origins(texts: Sequence[str]) -> list[str]:
    """Origins of pages as browsers send them. ParameterError for what is none.

    >>> origins(["https://Chat.example/", "http://localhost:3000"])
    ['https://chat.example', 'http://localhost:3000']
    """
    found = [text.rstrip("/").lower() for text in texts]
    for text, origin in zip(texts, found, strict=True):
        if origin != ANY and not _ORIGIN.fullmatch(origin):
            raise ParameterError(
                f"--cors-origin {text[:200]!r}: an origin is a scheme, a host and perhaps a port, without a path, as "
                "in https://chat.example or http://localhost:3000; * is any"
            )
    return list(dict.fromkeys(found))
