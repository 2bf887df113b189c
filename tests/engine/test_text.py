"""Stop strings and streaming text: the same however the tokens are cut into steps."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from hashing import HashDecoder, Scripted, oracle, plain_tokens
from hypothesis import given
from hypothesis import strategies as st

from outpace.decoding.drafters.plain import Plain
from outpace.decoding.verify.coupled import CoupledVerifier
from outpace.engine.engine import Engine
from outpace.engine.text import TextStream
from outpace.types import Result, SamplingParams

PIECES = ["a", "b", "ab", "ba", " ", "", "\u00e9", "abc", "\n"]


class Pieces:
    """Token i is PIECES[i]; token 6 needs the next token before its character shows, as a cut character does."""

    def __init__(self) -> None:
        self._cut = ""

    def add(self, ids: Iterable[int]) -> str:
        text = ""
        for id in ids:
            piece = PIECES[id % len(PIECES)]
            text += self._cut + (piece if piece != "\u00e9" else "")
            self._cut = piece if piece == "\u00e9" else ""
        return text

    def finish(self) -> str:
        text, self._cut = self._cut, ""
        return text


def cut(text: str, stops: tuple[str, ...]) -> str:
    found = [text.find(s) for s in stops if s in text]
    return text[: min(found)] if found else text


tokens_ = st.lists(st.integers(0, len(PIECES) - 1), max_size=30)
stops_ = st.lists(st.text("ab \u00e9\n", min_size=1, max_size=4), max_size=3).map(tuple)


@given(tokens_, stops_, st.randoms(use_true_random=False))
def test_text_is_what_stands_before_the_first_stop_string(tokens: list[int], stops: tuple[str, ...], rng) -> None:
    whole = Pieces()
    text = whole.add(tokens) + whole.finish()
    single, stepped = TextStream(Pieces(), stops), TextStream(Pieces(), stops)
    used = 0
    for token in tokens:
        if single.stopped:
            break
        used += single.push([token])[1]
    single.flush()
    shown, stepped_used, at = "", 0, 0
    while at < len(tokens) and not stepped.stopped:
        n = rng.randint(1, 5)
        more, taken = stepped.push(tokens[at : at + n])
        shown += more
        stepped_used += taken
        at += n
        assert not any(s in shown for s in stops)
    shown += stepped.flush()
    assert shown == stepped.text == single.text == cut(text, stops)
    assert stepped_used == used
    assert stepped.stopped == single.stopped == (cut(text, stops) != text)


def test_text_that_may_become_a_stop_string_is_held_back() -> None:
    stream = TextStream(Pieces(), ("abba",))
    assert stream.push([4, 2]) == (" ", 2)  # "ab" may go on
    assert stream.push([1]) == ("", 1)
    assert stream.push([1]) == ("abbb", 1)  # it does not, and nothing of it begins one
    assert stream.push([2]) == ("", 1)
    assert stream.flush() == "ab"


def finish(engine: Engine, params: SamplingParams) -> tuple[Result, str]:
    engine.add([1, 2, 3], params)
    shown, result = "", None
    while not engine.idle:
        for event in engine.step():
            shown += event.text
            result = event.result
    engine.check_integrity()
    assert result is not None
    return result, shown


def test_speculation_ends_at_the_same_stop_string_and_token_as_plain() -> None:
    decoder = HashDecoder()
    whole = Pieces()
    text = whole.add(plain_tokens(decoder, [1, 2, 3], 40))
    stops = {text[i : i + n] for i in range(3, 40, 3) for n in (1, 2, 3, 5)}
    for stop in sorted(stops):
        params = SamplingParams(max_tokens=40, stop=(stop,))
        outcomes = []
        for drafter in (Plain(), Scripted(oracle(decoder)), Scripted(oracle(decoder, right=0.8, tree=True))):
            result, shown = finish(Engine(decoder, drafter, CoupledVerifier(), detokenizer=Pieces), params)
            assert shown == result.text == cut(text, (stop,))
            assert result.finish_reason == "stop"
            assert result.stats.tokens == len(result.token_ids) == len(result.sources)
            outcomes.append(result.token_ids)
        assert outcomes[0] == outcomes[1] == outcomes[2]


@pytest.mark.parametrize("stop", ["zzz", "\n\n\n\n\n\n"])
def test_a_stop_string_that_never_comes_changes_nothing(stop: str) -> None:
    decoder = HashDecoder()
    with_stop, shown = finish(
        Engine(decoder, Plain(), CoupledVerifier(), detokenizer=Pieces), SamplingParams(max_tokens=40, stop=(stop,))
    )
    without, _ = finish(Engine(decoder, Plain(), CoupledVerifier(), detokenizer=Pieces), SamplingParams(max_tokens=40))
    assert with_stop.text == without.text == shown and with_stop.finish_reason == "length"
