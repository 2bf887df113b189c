"""Whether a text can fit into a number of tokens, found out at a cost that the limit bounds, not the text.

First by bytes: `n` tokens write at most `n` times the bytes of the longest one. Then, for a text that is still many
times longer than the limit, by encoding it in slices until there are too many tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from ..errors import CapacityError

SLICE = 1 << 15  # characters that are encoded at once
_EASY = 8  # bytes for each token of the limit: a text shorter than that is encoded whole
_AT_A_CUT = 8  # tokens that two slices may have more than the whole text
_LARGEST_SHRINKING = {"NFC": 3, "NFD": 1}  # bytes before a normalizer for each byte behind it, at most
_ADDS_ONLY = ("Prepend",)


def shrinking(rust: Any) -> int | None:
    """How many bytes of a text may become one byte of a token of this tokenizer (of the library). None: there is no
    limit, or it is not known."""
    model, normalizer = rust.model, rust.normalizer
    if getattr(model, "unk_token", None) is not None and not getattr(model, "byte_fallback", False):
        return None  # one token for any character, or for a whole run of them
    if any(token.lstrip or token.rstrip for token in rust.get_added_tokens_decoder().values()):
        return None  # it takes the white space beside it along
    return _of_normalizer(None if normalizer is None else json.loads(normalizer.__getstate__()))


def _of_normalizer(normalizer: Any) -> int | None:
    if normalizer is None:
        return 1
    kind = normalizer.get("type")
    if kind == "Sequence":
        factor = 1
        for part in normalizer.get("normalizers") or []:
            one = _of_normalizer(part)
            if one is None:
                return None
            factor *= one
        return factor
    if kind == "Replace":
        one_space = normalizer.get("pattern") == {"String": " "} and normalizer.get("content")
        return 1 if one_space else None
    return 1 if kind in _ADDS_ONLY else _LARGEST_SHRINKING.get(kind)


def check_fits(
    texts: Sequence[str], most: int, longest: int | None, shrinks: int | None, count: Callable[[str], int]
) -> None:
    """Raises CapacityError when all texts together cannot be `most` tokens. `longest`: bytes of the longest token,
    `shrinks` as `shrinking` has it, `count` the tokens of a short text."""
    sizes = [len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass")) for text in texts]
    size = sum(sizes)
    if longest is not None and shrinks is not None:
        plain = all(text.isascii() for text in texts)  # what composes characters leaves these alone
        bound = most * longest * (1 if plain else shrinks)
        if size > bound:
            raise CapacityError(
                f"the prompt has {size} bytes, and the {most} tokens that fit hold at most {bound} (the longest token "
                f"has {longest} bytes); shorten the prompt"
            )
    if size <= _EASY * most:
        return
    found = 0
    for text in texts:
        for at in range(0, len(text), SLICE):
            found += max(count(text[at : at + SLICE]) - _AT_A_CUT, 0)
            if found > most:
                raise CapacityError(
                    f"the prompt has {size} bytes and more than {found} tokens, and {most} fit; shorten the prompt"
                )
