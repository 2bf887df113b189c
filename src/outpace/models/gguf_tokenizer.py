"""Builds a `tokenizer.json` from the vocabulary inside a GGUF file.

Two kinds of vocabulary: `gpt2` (byte-level BPE with stored merges; `tokenizer.ggml.pre` names the way text is cut
before merging) and `llama` (SentencePiece BPE, whose merges follow from the pieces' scores). The result is the
`tokenizers` library's own format, so that later starts read it without the GGUF.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NoReturn

from ..errors import CorruptModel, UnsupportedModel
from .checkpoint import TokenizerFiles
from .config import ModelConfig

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _regex(pattern: str) -> list[dict[str, Any]]:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return [split, _byte_level(use_regex=False)]


def _byte_level(use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": use_regex}


_QWEN2 = _regex(_CONTRACTIONS + r"\p{N}" + _TAIL)
_LLAMA3 = _regex(_CONTRACTIONS + r"\p{N}{1,3}" + _TAIL)
_SINGLE_DIGITS = [{"type": "Digits", "individual_digits": True}, _byte_level(use_regex=True)]

#: `tokenizer.ggml.pre` -> (pre-tokenizers, normalise to NFC, a piece in the vocabulary needs no merges)
_PRE: dict[str, tuple[list[dict[str, Any]], bool, bool]] = {
    "gpt-2": ([_byte_level(use_regex=True)], False, False),
    "smollm": (_SINGLE_DIGITS, False, False),
    "starcoder": (_SINGLE_DIGITS, False, False),
    "qwen2": (_QWEN2, True, False),
    "deepseek-r1-qwen": (_QWEN2, True, False),
    "llama-bpe": (_LLAMA3, False, True),
    "llama3": (_LLAMA3, False, True),
    "llama-v3": (_LLAMA3, False, True),
    "tekken": (_regex(_TEKKEN), False, True),
}


def build(source: str, metadata: Mapping[str, Any], config: ModelConfig) -> TokenizerFiles:
    """`source` names the file in messages. Raises CorruptModel, or UnsupportedModel for another kind of vocabulary."""
    v = _Vocabulary(source, metadata, config)
    kind = v.get("model")
    if kind == "gpt2":
        tokenizer = _byte_level_bpe(v)
    elif kind == "llama":
        tokenizer = _sentencepiece_bpe(v)
    else:
        raise UnsupportedModel(
            f"{source}: tokenizer {kind!r}; supported: gpt2 (byte-level BPE) and llama (SentencePiece)"
        )
    tokenizer_config = {f"{name}_token": v.tokens[i] for name, i in v.special_ids.items()}
    if template := metadata.get("tokenizer.chat_template"):
        tokenizer_config["chat_template"] = str(template)
    return TokenizerFiles(json.dumps(tokenizer, ensure_ascii=False), tokenizer_config)


class _Vocabulary:
    """Typed, checked access to the `tokenizer.ggml.*` entries."""

    def __init__(self, source: str, metadata: Mapping[str, Any], config: ModelConfig) -> None:
        self.source, self.metadata = source, metadata
        self.tokens: list[str] = self.list_of("tokens", str)
        n = len(self.tokens)
        self.types: list[int] = self.list_of("token_type", int) if "token_type" in self else [_NORMAL] * n
        if len(self.types) != n or n > config.vocab_size:
            self.corrupt(f"{n} tokens, {len(self.types)} token types, {config.vocab_size} embedding rows")
        self.special_ids = self._special_ids()

    def __contains__(self, key: str) -> bool:
        return f"tokenizer.ggml.{key}" in self.metadata

    def get(self, key: str, default: Any = None) -> Any:
        return self.metadata.get(f"tokenizer.ggml.{key}", default)

    def corrupt(self, what: str) -> NoReturn:
        raise CorruptModel(f"{self.source}: damaged vocabulary: {what}; fetch or copy the file again")

    def list_of(self, key: str, kind: type | tuple[type, ...]) -> list[Any]:
        values = self.get(key)
        if not isinstance(values, list) or not values or not all(isinstance(x, kind) for x in values):
            self.corrupt(f"tokenizer.ggml.{key} is missing or of the wrong type")
        return values

    def _special_ids(self) -> dict[str, int]:
        keys = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
        ids = {name: self.get(f"{key}_token_id") for name, key in keys.items()}
        for name, i in ids.items():
            if i is not None and not (isinstance(i, int) and 0 <= i < len(self.tokens)):
                self.corrupt(f"{name} token id {i!r}")
        return {name: i for name, i in ids.items() if i is not None}

    def vocabulary(self, tokens: list[str]) -> dict[str, int]:
        """Token -> id, without the unused tail that only rounds the embedding up."""
        used = len(tokens)
        while used and self.types[used - 1] == _UNUSED:
            used -= 1
        vocab = {token: i for i, token in enumerate(tokens[:used])}
        if len(vocab) != used:
            self.corrupt("a token occurs twice")
        return vocab

    def added(self, i: int) -> dict[str, Any]:
        return {
            "id": i,
            "content": self.tokens[i],
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": self.types[i] in (_CONTROL, _UNKNOWN),
        }

    def post_processor(self, default_bos: bool) -> dict[str, Any] | None:
        """Beginning and end tokens of a raw text, where the model wants them."""
        ids = self.special_ids
        wanted = [("bos", self.get("add_bos_token", default_bos)), ("eos", self.get("add_eos_token", False))]
        bos, eos = (ids.get(name) if on else None for name, on in wanted)
        if bos is None and eos is None:
            return None
        text = [{"Sequence": {"id": "A", "type_id": 0}}]
        before, after = ([{"SpecialToken": {"id": str(i), "type_id": 0}}] if i is not None else [] for i in (bos, eos))
        used = {str(i): {"id": str(i), "ids": [i], "tokens": [self.tokens[i]]} for i in (bos, eos) if i is not None}
        return {
            "type": "TemplateProcessing",
            "single": [*before, *text, *after],
            "pair": [*before, *text, {"Sequence": {"id": "B", "type_id": 1}}, *after],
            "special_tokens": used,
        }


def _tokenizer(**parts: Any) -> dict[str, Any]:
    empty = dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder"))
    return {"version": "1.0"} | empty | {"added_tokens": []} | parts


def _bpe(vocab: dict[str, int], merges: list[tuple[str, str]], **more: Any) -> dict[str, Any]:
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
    }
    return model | more | {"vocab": vocab, "merges": merges}


def _byte_level_bpe(v: _Vocabulary) -> dict[str, Any]:
    pre = v.get("pre", "default")
    if pre not in _PRE:
        raise UnsupportedModel(f"{v.source}: text splitting {pre!r} (tokenizer.ggml.pre); supported: {', '.join(_PRE)}")
    splitters, nfc, ignore_merges = _PRE[pre]
    vocab = v.vocabulary(v.tokens)
    merges: list[tuple[str, str]] = []
    for merge in v.list_of("merges", str):
        left, _, right = merge.partition(" ")
        if left not in vocab or right not in vocab or left + right not in vocab:
            v.corrupt(f"merge {merge!r} of pieces that do not exist")
        merges.append((left, right))
    added = [v.added(i) for i, kind in enumerate(v.types) if kind in (_CONTROL, _USER_DEFINED)]
    return _tokenizer(
        added_tokens=added,
        normalizer={"type": "NFC"} if nfc else None,
        pre_tokenizer={"type": "Sequence", "pretokenizers": splitters},
        post_processor=v.post_processor(default_bos=ignore_merges),  # llama 3 and tekken begin with bos
        decoder={"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        model=_bpe(vocab, merges, ignore_merges=ignore_merges),
    )


def _sentencepiece_bpe(v: _Vocabulary) -> dict[str, Any]:
    scores = v.list_of("scores", (int, float))
    if len(scores) != len(v.tokens):
        v.corrupt(f"{len(v.tokens)} tokens and {len(scores)} scores")
    # Writers turn the "▁" of user-defined pieces into spaces; text reaches the model with "▁" again.
    tokens = [
        t.replace(" ", "▁") if kind == _USER_DEFINED and not t.strip(" ") else t
        for t, kind in zip(v.tokens, v.types, strict=True)
    ]
    vocab = v.vocabulary(tokens)
    added = [
        v.added(i)
        for i, kind in enumerate(v.types)
        if kind in (_CONTROL, _UNKNOWN) or (kind == _USER_DEFINED and v.tokens[i].strip(" "))
    ]
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    prefix = v.get("add_space_prefix", True)
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    unk = v.special_ids.get("unk")
    return _tokenizer(
        added_tokens=added,
        normalizer={"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, space]}
        if prefix
        else space,
        post_processor=v.post_processor(default_bos=True),
        decoder={"type": "Sequence", "decoders": decoders},
        model=_bpe(
            vocab,
            _merges_from_scores(v, tokens, vocab, scores),
            unk_token=None if unk is None else v.tokens[unk],
            fuse_unk=True,
            byte_fallback=_BYTE in v.types,
        ),
    )


def _merges_from_scores(
    v: _Vocabulary, tokens: list[str], vocab: dict[str, int], scores: list[float]
) -> list[tuple[str, str]]:
    """SentencePiece merges the adjacent pair whose union scores highest: every way to split a piece in two is a
    merge, ordered by the piece's score. Runs of spaces are user-defined whole, so they come first, longest last.
    """
    mergeable = {
        i for i, kind in enumerate(v.types) if kind == _NORMAL or (kind == _USER_DEFINED and tokens[i] != v.tokens[i])
    }
    ranked = sorted(
        (i for i in mergeable if len(tokens[i]) > 1),
        key=lambda i: (v.types[i] == _NORMAL, -scores[i] if v.types[i] == _NORMAL else 0.0, i),
    )
    merges: list[tuple[str, str]] = []
    for i in ranked:
        piece = tokens[i]
        halves = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
        pairs = [(a, b) for a, b in halves if vocab.get(a) in mergeable and vocab.get(b) in mergeable]
        merges += sorted(pairs, key=lambda p: (vocab[p[0]], vocab[p[1]]))
    return merges
