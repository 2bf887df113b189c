"""Text to token ids and back, chat templates included. Uses the `tokenizers` library; imports no torch.

Text of users never becomes a control token: `<|im_end|>` typed into a message is encoded as the letters it is made
of, while the same string written by the chat template becomes the one token.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import groupby
from typing import Any

from ..errors import CorruptModel, ParameterError
from .chat_template import render, variables
from .checkpoint import TokenizerFiles
from .text_length import check_fits, shrinking
from .vocabulary import Vocabulary

#: Tokens that end an answer, whatever the configuration says, if the vocabulary has them as control tokens
_END_TOKENS = ("<|im_end|>", "<end_of_turn>", "<|eot_id|>", "<|eom_id|>", "<|endoftext|>", "<|end_of_text|>")
_ROLE = re.compile(r"[A-Za-z0-9_-]{1,40}")
_NAMED = ("bos_token", "eos_token", "unk_token", "pad_token")
MOST_ID = 2**22  # of a token, ten times the largest vocabulary there is: lists go by ids
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_FEW_LITERALS = 64  # control tokens that are looked for one by one
_WINDOW = 16  # tokens that a detokenizer decodes anew for each piece, at most


class Tokenizer:
    """Raises CorruptModel when the files cannot be read. Safe to use from several threads."""

    def __init__(self, files: TokenizerFiles, eos_ids: Iterable[int] = (), source: str = "tokenizer.json") -> None:
        from tokenizers import Tokenizer as Rust
        from tokenizers.decoders import ByteLevel

        self._source = source
        with self._damage("damaged tokenizer"):
            self._rust = Rust.from_str(files.tokenizer_json)
            self._named = {name: _content(files.tokenizer_config.get(name)) for name in _NAMED}
            ends = [self._rust.token_to_id(t) for t in (*_END_TOKENS, self._named["eos_token"] or "")]
            # One object for each setting: to switch it, one would wait for those that are encoding
            self._plain = _twin(self._rust, files.tokenizer_json)
            self._plain.encode_special_tokens, self._rust.encode_special_tokens = True, False
        added = self._rust.get_added_tokens_decoder()
        self._special_ids = frozenset(i for i, token in added.items() if token.special)
        special = [token for token in added.values() if token.special]
        #: How control tokens are written; None where they may be written in other ways too
        self._literals = None if any(t.normalized for t in special) else tuple(t.content for t in special)
        self._first_characters = {literal[:1] for literal in self._literals or ()}
        self._template = _template(files.tokenizer_config.get("chat_template"))
        self.byte_level = isinstance(self._rust.decoder, ByteLevel)  # text is what the tokens write, byte by byte
        self._pieces: dict[int, str | None] = {}  # of tokens that have been decoded
        self.vocab_size: int = self._rust.get_vocab_size(with_added_tokens=True)
        self.eos_ids: frozenset[int] = frozenset(eos_ids) | {i for i in ends if i in self._special_ids}

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    @property
    def chat_template(self) -> str | None:
        return self._template

    @property
    def named_tokens(self) -> dict[str, str | None]:
        """`bos_token`, `eos_token`, `unk_token` and `pad_token`, as far as the model names them."""
        return dict(self._named)

    @property
    def takes_tools(self) -> bool:
        """Whether the chat template has a place for tools."""
        return self.template_has("tools")

    def template_has(self, text: str) -> bool:
        """Whether a text stands in the chat template."""
        return self._template is not None and text in self._template

    @property
    def template_values(self) -> frozenset[str]:
        """Names of the values that the chat template reads."""
        return frozenset() if self._template is None else variables(self._template)

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Ids of `text` alone. `special`: control tokens written out in it become their ids (trusted text only)."""
        return self._encode(text, special).ids

    def prompt(self, text: str, special: bool = False) -> list[int]:
        """Ids of a raw prompt: `text` as plain text, with the beginning token where the model wants one. `special`: as
        `encode` has it."""
        return self._encode(text, special, wrap=True).ids

    def check_fits(self, texts: Sequence[str], most: int) -> None:
        """Raises CapacityError when the texts together are more than `most` tokens by far, before they are tokenized
        whole. Those that are only a few too many pass: what they become is to be counted."""
        count = lambda text: len(self._encode(text, special=False))  # noqa: E731
        check_fits(texts, most, self._longest, shrinking(self._rust), count)

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        with self._damage("the tokenizer fails on these tokens"):
            return self._rust.decode(list(ids), skip_special_tokens=skip_special)

    def detokenizer(self) -> Detokenizer:
        """For one stream of tokens."""
        return Detokenizer(self)

    def piece(self, id: int) -> str | None:
        """What a token writes wherever it stands. None if that depends on its neighbours, as where its bytes are no
        whole characters, and for every token of a vocabulary that is not written in bytes."""
        try:
            return self._pieces[id]
        except KeyError:
            alone = self.decode([id]) if self.byte_level else _REPLACEMENT
            self._pieces[id] = found = None if _REPLACEMENT in alone else alone
            return found

    def to_json(self) -> str:
        """As the text of a `tokenizer.json`."""
        return self._rust.to_str()

    def token_id(self, token: str) -> int | None:
        return self._rust.token_to_id(token)

    def is_special(self, token: int) -> bool:
        return token in self._special_ids

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        continue_final: bool = False,
        **values: Any,
    ) -> list[int]:
        """Ids of a conversation in the model's own format; each message has a `role` and (mostly) a `content`.

        `continue_final`: they end within the last message, behind its content, which is the beginning of an answer.
        `values` are passed to the template (`tools`, `enable_thinking`, …). Raises ParameterError if the model has
        no chat template, if a message is malformed, or if the template refuses it.
        """
        if self._template is None:
            raise ParameterError("this model has no chat template; give it a raw prompt instead")
        literals: list[str] = []
        mark = _Mark()
        safe = [self._disarm(_checked(m), mark, literals) for m in messages]
        if not safe:
            raise ParameterError("a conversation needs at least one message")
        end = mark.around(MOST_ID)
        if continue_final:
            said = safe[-1].get("content") or ""
            behind = f"{said}{end}" if isinstance(said, str) else [*said, {"type": "text", "text": end}]
            safe[-1] = {**safe[-1], "content": behind}
        values = self._disarm(values, mark, literals)
        named = {name: token or "" for name, token in self._named.items()}
        text = render(
            self._template,
            safe,
            add_generation_prompt=add_generation_prompt,
            **(named | {"tools": None} | values),
        )
        if continue_final:
            text, found, _ = text.partition(end)
            if not found:
                raise ParameterError("the model's chat template leaves the last message out: it cannot be gone on with")
        return self._rearm(text, mark, literals) if literals else self.encode(text, special=True)

    def same_vocabulary(self, other: Tokenizer) -> bool:
        """Whether both give every token the same id, so that one model's drafts are the other's tokens."""
        return self is other or self._fingerprint() == other._fingerprint()

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """What every token writes, as bytes. Computed at the first use."""
        added = {i: (t.content, t.special) for i, t in self._rust.get_added_tokens_decoder().items()}
        decoder = self._rust.decoder
        byte_level = decoder is not None and b'"ByteLevel"' in decoder.__getstate__()
        tokens = self._rust.get_vocab(with_added_tokens=False)
        if (most := max((*tokens.values(), *added), default=0)) > MOST_ID:
            raise CorruptModel(f"{self._source}: damaged tokenizer: a token has the id {most}; ids go up to {MOST_ID}")
        return Vocabulary(tokens, added, byte_level, self.encode)

    @cached_property
    def _longest(self) -> int | None:
        """Bytes of the longest token. None if there is none, as in a vocabulary that is not read."""
        written = max(map(len, self.vocabulary.bytes), default=0)
        return max([written, *(len(text.encode()) for text in self.vocabulary.control.values())]) or None

    def _fingerprint(self) -> bytes:
        vocab = sorted(self._rust.get_vocab(with_added_tokens=True).items(), key=lambda item: item[1])
        return hashlib.sha256("\0".join(f"{i} {token}" for token, i in vocab).encode()).digest()

    @contextmanager
    def _damage(self, what: str) -> Iterator[None]:
        """The library's complaints about its file: it raises plain Exception, and its panics are BaseException."""
        try:
            yield
        except BaseException as e:
            if type(e) not in (Exception, UnicodeEncodeError) and type(e).__name__ != "PanicException":
                raise
            raise CorruptModel(f"{self._source}: {what}: {str(e)[:500]}") from e

    def _encode(self, text: str, special: bool, wrap: bool = False, offsets: bool = False) -> Any:
        try:
            text.encode()
        except UnicodeEncodeError as e:
            raise ParameterError(f"the text is not valid Unicode: {e.reason} at character {e.start}") from e
        rust = self._rust if special else self._plain
        # The library's `encode` keeps the interpreter to itself until it is done; that of batches does not
        encode = rust.encode_batch if offsets else rust.encode_batch_fast
        with self._damage("the tokenizer fails on this text"):
            return encode([text], add_special_tokens=wrap)[0]

    def _special_spans(self, text: str) -> list[tuple[int, int, int]]:
        """(start, end, id) of the control tokens written out in `text`."""
        if self._literals is not None and not self._may_hold(self._literals, text):
            return []
        found = self._encode(text, special=True, offsets=True)
        spans = [(*found.token_to_chars(n), i) for n, i in enumerate(found.ids) if i in self._special_ids]
        return [(a, b, i) for a, b, i in spans if b > a]

    def _may_hold(self, literals: Sequence[str], text: str) -> bool:
        """Whether any of the literals may stand in the text. Of very many only the first characters are looked for."""
        if not any(first in text for first in self._first_characters):
            return False
        return len(literals) > _FEW_LITERALS or any(literal in text for literal in literals)

    def _disarm(self, value: Any, mark: _Mark, literals: list[str]) -> Any:
        """Replace control tokens written out in a user's strings by marks, which no template can mistake."""
        if isinstance(value, str):
            at, pieces = 0, []
            for a, b, _ in self._special_spans(value):
                pieces += [value[at:a], mark.around(len(literals))]
                literals.append(value[a:b])
                at = b
            return "".join([*pieces, value[at:]]) if pieces else value
        if isinstance(value, Mapping):
            return {self._disarm(k, mark, literals): self._disarm(v, mark, literals) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [self._disarm(v, mark, literals) for v in value]
        return value

    def _rearm(self, text: str, mark: _Mark, literals: list[str]) -> list[int]:
        """Encode a rendered text: the template's control tokens as such, everything between as plain text."""
        ids: list[int] = []
        at = 0
        for a, b, token in [*self._special_spans(text), (len(text), len(text), -1)]:
            plain = mark.restore(text[at:a], literals)
            ids += self.encode(plain) if plain else []
            ids += [token] if token >= 0 else []
            at = b
        return ids


class _Mark:
    """Stands for a literal while a template is rendered: its number between two random private-use characters."""

    def __init__(self) -> None:
        self._open, self._close = (chr(first + secrets.randbelow(0xFFFE)) for first in (0xF0000, 0x100000))

    def around(self, number: int) -> str:
        return f"{self._open}{number}{self._close}"

    def restore(self, text: str, literals: Sequence[str]) -> str:
        """Raises ParameterError if the template did not leave every mark whole."""

        def literal(m: re.Match[str]) -> str:
            return literals[int(m[1])] if int(m[1]) < len(literals) else self._open

        plain = re.sub(f"{self._open}([0-9]{{1,9}}){self._close}", literal, text)
        if self._open in plain or self._close in plain:
            raise ParameterError("the chat template cut a message apart at a control token; remove it from the text")
        return plain


class Detokenizer:
    """Turns one sequence's tokens into text as they come; never emits half a character.

    The pieces and `finish()` joined equal `decode` of all tokens.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []  # the last ones: a decoder looks back one piece, so the last emitted one is kept
        self._emitted = 0  # how many of `_ids` have been emitted
        self._known = ""  # what these decode to

    def add(self, ids: Iterable[int]) -> str:
        """The text that has become certain with these tokens; may be empty."""
        if not self._ids:  # as always in a vocabulary of bytes, unless a character is incomplete
            ids, text = list(ids), ""
            for id in ids:
                piece = self._tokenizer.piece(id)
                if piece is None:
                    break
                text += piece
            else:
                return text
        self._ids += ids
        text = self._tokenizer.decode(self._ids)
        piece = text[len(self._known) :]
        if piece.endswith(_REPLACEMENT):
            return ""  # the bytes of a character are still incomplete
        if piece and self._tokenizer.byte_level:
            self._ids, self._emitted, self._known = [], 0, ""
        elif piece:
            if len(self._ids) > _WINDOW:
                self._ids = self._ids[self._emitted :]
                text = self._tokenizer.decode(self._ids)
            self._emitted, self._known = len(self._ids), text
        return piece

    def finish(self) -> str:
        """What is left, incomplete characters included. The stream is over."""
        piece = self._tokenizer.decode(self._ids)[len(self._known) :]
        self._ids, self._emitted, self._known = [], 0, ""
        return piece


def _twin(rust: Any, tokenizer_json: str) -> Any:
    """Another object of the same tokenizer. It has the vocabulary in common with the first, if that can be."""
    from tokenizers import Tokenizer as Rust

    twin = Rust(rust.model)
    for part in ("normalizer", "pre_tokenizer", "decoder", "post_processor"):
        if getattr(rust, part) is not None:
            setattr(twin, part, getattr(rust, part))
    added = rust.get_added_tokens_decoder()
    for special, tokens in groupby((added[i] for i in sorted(added)), key=lambda token: token.special):
        (twin.add_special_tokens if special else twin.add_tokens)(list(tokens))
    same = twin.get_added_tokens_decoder() == added and rust.truncation is None and rust.padding is None
    return twin if same else Rust.from_str(tokenizer_json)


def _content(token: Any) -> str | None:
    """A special token of a tokenizer_config: a string, or an object with its string in `content`."""
    if isinstance(token, Mapping):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _template(value: Any) -> str | None:
    """The chat template: a string, or a list of named ones of which the default is meant."""
    if isinstance(value, list):
        named = {t.get("name"): t.get("template") for t in value if isinstance(t, Mapping)}
        value = named.get("default")
    return value if isinstance(value, str) and value else None


def _checked(message: Any) -> Mapping[str, Any]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise ParameterError(f"a message must be an object with a role and a content, not {message!r}")
    if not _ROLE.fullmatch(message["role"]):
        raise ParameterError(f"role {message['role']!r}: a role is a word such as system, user or assistant")
    return message
