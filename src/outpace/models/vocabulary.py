"""A tokenizer seen as a set of byte strings: what every token writes, and text that need not be whole characters.

Tokens of byte-level vocabularies may hold half a character. A text cut between two tokens is then no valid UTF-8, so
what translates between vocabularies works on bytes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

_STRAY = re.compile("([\udc80-\udcff]+)")  # bytes that are no UTF-8, as "surrogateescape" shows them
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")  # of SentencePiece vocabularies, for bytes without a token
_SPACE = "\u2581"


class Vocabulary:
    """`tokens` token -> id without the added ones, `added` id -> (content, whether it is a control token), `byte_level`
    whether tokens are written in the byte-level alphabet (else as SentencePiece does), `encode` plain text -> ids.

    `bytes[id]` is what a token writes, b"" for control tokens and for ids that are none; `control` are the control
    tokens, id -> content; `ids` the token of a byte string.
    """

    def __init__(
        self,
        tokens: Mapping[str, int],
        added: Mapping[int, tuple[str, bool]],
        byte_level: bool,
        encode: Callable[[str], list[int]],
    ) -> None:
        self._encode = encode
        self.control = {i: content for i, (content, special) in added.items() if special}
        self.bytes = [b""] * (max((*tokens.values(), *added), default=-1) + 1)
        fallbacks: dict[bytes, int] = {}
        self.ids: dict[bytes, int] = {}
        for token, i in sorted(tokens.items(), key=lambda item: item[1]):
            if i in added:
                continue
            byte = None if byte_level else _BYTE_TOKEN.fullmatch(token)
            if byte is not None:
                self.bytes[i] = bytes.fromhex(byte[1])
                fallbacks[self.bytes[i]] = i
            else:
                self.bytes[i] = token_bytes(token, byte_level)
                self.ids.setdefault(self.bytes[i], i)
        for i, (content, special) in added.items():
            if not special:
                self.bytes[i] = content.encode()
        self.ids = fallbacks | self.ids
        self._lead = self._dummy_prefix()

    def encode(self, data: bytes) -> list[int]:
        """Ids of a part of a text. Bytes that are no UTF-8 become tokens of single bytes, where there are any."""
        ids: list[int] = []
        for i, piece in enumerate(_STRAY.split(data.decode("utf-8", "surrogateescape"))):
            if i % 2:
                stray = (self.ids.get(bytes([ord(c) & 0xFF])) for c in piece)
                ids += [token for token in stray if token is not None]
            elif piece:
                ids += self._encode("\n" + piece)[self._lead :] if self._lead else self._encode(piece)
        return ids

    def text(self, ids: list[int]) -> bytes:
        """What these tokens write."""
        return b"".join([self.bytes[i] if i < len(self.bytes) else b"" for i in ids])

    def _dummy_prefix(self) -> int:
        """Some vocabularies put a space before any text, which is wrong in the middle of one. Then a line end goes
        before what is encoded; returns how many tokens it makes, 0 where nothing is put there.
        """
        if self.text(self._encode("a")) == b"a":
            return 0
        return len(self._encode("\n"))


def token_bytes(token: str, byte_level: bool) -> bytes:
    """What a token of a vocabulary writes."""
    if byte_level:
        try:
            return bytes([_BYTE_OF[c] for c in token])
        except KeyError:  # not in the alphabet: written as it is
            return token.encode()
    return token.replace(_SPACE, " ").encode()


def _byte_alphabet() -> dict[str, int]:
    """Character -> byte of byte-level vocabularies: visible bytes stand for themselves, the others for the characters
    from U+0100 on, in order."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = (b for b in range(256) if b not in visible)
    return {chr(b): b for b in visible} | {chr(0x100 + n): b for n, b in enumerate(hidden)}


_BYTE_OF = _byte_alphabet()
