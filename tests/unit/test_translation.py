"""Between two vocabularies: toy tokenizers trained on different texts, and every byte of what they write."""

from __future__ import annotations

import json
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Rust
from tokenizers import decoders, pre_tokenizers, trainers
from tokenizers.models import BPE

from outpace.decoding.translation import NONE, Twin, Words, whole_characters
from outpace.decoding.translation import Translator as Between
from outpace.models.checkpoint import TokenizerFiles
from outpace.models.tokenizer import Tokenizer

PROSE = (
    "The unbelievable tide went out in the morning and left the boats on the sand. In the morning the children went "
    "out to the boats, and when the tide came in the children went home, unbelievably late. Größe, café, 日本語 🤖. "
)
CODE = """def area(shape):
    if shape.kind == "circle":
        return 3.14159 * shape.radius ** 2
    raise ValueError
"""


@cache
def toy_tokenizer(size: int, text: str, names: tuple[str, ...] = ("<s>", "</s>")) -> Tokenizer:
    """Byte-level BPE of `size` tokens, trained on `text`."""
    rust = Rust(BPE())
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    rust.train_from_iterator(
        [text] * 3,
        trainers.BpeTrainer(
            vocab_size=size, initial_alphabet=alphabet, special_tokens=list(names), show_progress=False
        ),
    )
    config = {"bos_token": names[0], "eos_token": names[1]}
    return Tokenizer(TokenizerFiles(json.dumps(json.loads(rust.to_str())), config))


def pair() -> Between:
    """The target's words are longer than the draft's."""
    return Between(toy_tokenizer(300, PROSE).vocabulary, toy_tokenizer(420, PROSE + CODE).vocabulary)


texts = st.text(st.sampled_from("the unbelievable(.)\n 3日🤖é\u0301"), max_size=60)


@given(texts, st.data())
def test_a_vocabulary_writes_what_it_reads(text: str, data: st.DataObject) -> None:
    """Whole, or cut anywhere, in the middle of a character too."""
    written = text.encode()
    cut = data.draw(st.integers(0, len(written)))
    for vocabulary in (pair().draft, pair().target):
        assert vocabulary.text(vocabulary.encode(written)) == written
        assert vocabulary.text(vocabulary.encode(written[:cut]) + vocabulary.encode(written[cut:])) == written


def test_bytes_of_each_token_joined_are_the_decoded_text() -> None:
    tokenizer = toy_tokenizer(420, PROSE + CODE)
    ids = tokenizer.encode(PROSE + CODE)
    assert b"".join(tokenizer.vocabulary.bytes[i] for i in ids).decode() == PROSE + CODE
    assert set(tokenizer.vocabulary.control.values()) == {"<s>", "</s>"}


def test_a_vocabulary_with_a_space_before_every_text() -> None:
    """SentencePiece with its dummy prefix and its byte tokens: the middle of a text gets no space."""
    from outpace.models.gguf_tokenizer import build

    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "\u2581", "a", "b", "\u2581a", "ab"]
    types = [2, 3, 3, *[6] * 256, 1, 1, 1, 1, 1]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.scores": [float(-i) for i in range(len(pieces))],
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    from hashing import HashDecoder

    vocabulary = Tokenizer(build("toy", metadata, HashDecoder(vocab=len(pieces)).config)).vocabulary
    assert vocabulary.encode(b"ab a") == [pieces.index("ab"), pieces.index("\u2581a")]
    assert vocabulary.text(vocabulary.encode("ab\u00e9 \n".encode())) == "ab\u00e9 \n".encode()
    assert vocabulary.ids[b"\n"] == pieces.index("<0x0A>")
    assert vocabulary.encode(b"\xe2") == [pieces.index("<0xE2>")]


def test_whole_characters() -> None:
    text = "a日🤖é".encode()
    for n in range(len(text) + 1):
        whole = whole_characters(text[:n])
        assert whole == text[:n].decode("utf-8", "ignore").encode()
    assert whole_characters(b"a\x80\x80\x80\x80") == b"a\x80\x80\x80\x80"  # no character at all: left as it is


# -- the twin ------------------------------------------------------------------------------------------------


@given(
    st.lists(
        st.sampled_from(["the", " tide", " unbeliev", "able", "\n    ", "if", " 日", "本", "(x)", " "]), max_size=30
    )
)
def test_a_twin_grown_token_by_token_is_the_text_read_at_once(parts: list[str]) -> None:
    between, text = pair(), "".join(parts)
    target = between.target.encode(text.encode())
    twin = Twin(between, Words())
    for token in target:
        before = list(twin.tokens)
        kept = twin.extend([token])
        assert kept <= len(before) and twin.tokens[:kept] == before[:kept]
        assert kept == len(before) or twin.tokens[: len(before)] != before
    assert twin.tokens == between.draft.encode(text.encode())
    assert twin.read == len(target)


@given(st.lists(st.integers(0, 419), max_size=40))
def test_a_twin_of_senseless_tokens_has_their_bytes(tokens: list[int]) -> None:
    between = pair()
    twin = Twin(between, Words())
    for token in tokens:
        twin.extend([token])
    plain = [t for t in twin.tokens if t not in between.draft.control]
    assert between.draft.text(plain) == between.target.text([t for t in tokens if t not in between.target.control])
    control = [between.draft.control[t] for t in twin.tokens if t in between.draft.control]
    assert control == [between.target.control[t] for t in tokens if t in between.target.control]


def test_a_control_token_without_counterpart_is_left_out() -> None:
    between = Between(
        toy_tokenizer(300, PROSE).vocabulary, toy_tokenizer(310, PROSE, ("<s>", "</s>", "<tool>")).vocabulary
    )
    twin = Twin(between, Words())
    ids = {content: i for i, content in between.target.control.items()}
    twin.extend([ids["<s>"], *between.target.encode(b"the"), ids["<tool>"], *between.target.encode(b" tide")])
    assert [between.draft.control.get(t) for t in twin.tokens].count("<s>") == 1
    assert between.draft.text(twin.tokens) == b"the tide"


def test_text_without_words_settles_all_the_same() -> None:
    between = pair()
    twin = Twin(between, Words())
    data = ("日本語" * 400).encode()
    for token in between.target.encode(data):
        twin.extend([token])
    assert between.draft.text(twin.tokens) == data and len(twin.tail) <= 1100


# -- translation ---------------------------------------------------------------------------------------------


def test_words_that_were_read_are_known_afterwards() -> None:
    between, words = pair(), Words()
    Twin(between, words).extend(between.target.encode(PROSE.encode()))
    drafted = between.draft.encode(b" unbelievable tide")
    assert len(drafted) > 2
    found = between.translate(drafted, words)
    assert found.tokens == between.target.encode(b" unbelievable tide")
    assert found.how[0] == "known" and found.last == [False] * (len(found.tokens) - 1) + [True]


def test_unknown_words_are_spelled_and_then_known() -> None:
    between, words = pair(), Words()
    drafted = between.draft.encode(b" boathouse(3) the")
    first = between.translate(drafted, words)
    assert first.tokens == between.target.encode(b" boathouse(3) the") and first.how[0] == "spelled"
    assert between.translate(drafted, words).how[0] == "known"
    assert between.translate(drafted, Words()).how[0] == "spelled"


@given(texts)
def test_translation_writes_the_draft(text: str) -> None:
    """As far as whole characters go."""
    between = pair()
    drafted = between.draft.encode(text.encode())
    for n in range(len(drafted) + 1):
        found = between.translate(drafted[:n], Words())
        data = between.draft.text(drafted[:n])
        assert between.target.text(found.tokens) in (data, whole_characters(data))
        covered = [row for rows in found.rows for row in rows]
        assert covered == list(range(len(covered))) and len(covered) <= n


def test_a_token_that_means_nothing_ends_the_draft() -> None:
    between = Between(
        toy_tokenizer(300, PROSE, ("<s>", "</s>", "<tool>")).vocabulary, toy_tokenizer(420, PROSE + CODE).vocabulary
    )
    tool = next(i for i, content in between.draft.control.items() if content == "<tool>")
    end = next(i for i, content in between.draft.control.items() if content == "</s>")
    drafted = between.draft.encode(b" the tide")
    assert between.exact[tool] == NONE
    assert between.translate([*drafted, tool, *drafted], Words()).tokens == between.target.encode(b" the tide")
    assert between.translate([5000, *drafted], Words()).tokens == []
    assert between.translate([*drafted, 5000], Words()).tokens == between.target.encode(b" the tide")
    found = between.translate([*drafted, end], Words())
    assert between.target.control[found.tokens[-1]] == "</s>" and found.how[-1] == "exact"


def test_words_forget_the_longest_unused() -> None:
    words = Words(most=2)
    words.learn((1,), (10,))
    words.learn((2,), (20,))
    assert words.find((1,)) == (10,)
    words.learn((3,), (30,))
    assert words.find((2,)) is None and words.find((1,)) == (10,) and len(words) == 2
    words.learn(tuple(range(100)), (1,))
    assert words.find(tuple(range(100))) is None


@pytest.mark.parametrize("name", ["smollm2-135m"])
def test_a_real_vocabulary_and_a_toy_one(name: str) -> None:
    from outpace.errors import DownloadError
    from outpace.models.prepared import open_model

    try:
        real = open_model(name).tokenizer.vocabulary
    except DownloadError as e:
        pytest.skip(f"the default model is neither in the cache nor to be had: {e}")
    for between in (Between(real, pair().target), Between(pair().target, real)):
        twin, words = Twin(between, Words()), Words()
        twin.extend(between.target.encode((PROSE + CODE).encode()))
        assert twin.tokens == between.draft.encode((PROSE + CODE).encode())
        assert between.translate(twin.tokens, words).tokens == between.target.encode((PROSE + CODE).encode())
