"""Grammars: what compiles, what is refused and how, and where a matcher is after any walk."""

from __future__ import annotations

import builtins
import json
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import Any

import numpy as np
import pytest
from hashing import HashDecoder, toy_loaded
from hypothesis import given, settings
from hypothesis import strategies as st

from outpace import LLM, SamplingParams
from outpace.decoding.drafters.plain import Plain
from outpace.decoding.grammar import Grammars, Matcher, grammars_of
from outpace.decoding.sampling import History, process
from outpace.decoding.verify.coupled import CoupledVerifier
from outpace.engine.engine import Engine
from outpace.errors import GrammarError, OutpaceError, ParameterError

pytest.importorskip("llguidance")

LOADED = toy_loaded()
TOKENIZER, V = LOADED.tokenizer, LOADED.config.vocab_size
GRAMMARS = grammars_of(TOKENIZER, V)
STOP = sorted(TOKENIZER.eos_ids)


DEAD_END = 'start: "a" B | "xy"\nB: /b+c/ & /b+d/'


def matcher(**constraint: Any) -> Matcher:
    return GRAMMARS.matcher(SamplingParams(**constraint), STOP)


def follow(text: str, found: Matcher) -> Matcher:
    for token in TOKENIZER.encode(text):
        found.advance(token)
    return found


def may_follow(found: Matcher) -> str:
    """The characters that may follow; "$" for the stop token. Off the grammar: "*"."""
    allowed = found.allowed()
    if allowed is None:
        return "*"
    assert allowed.shape == (V,) and allowed.any()
    return "".join("$" if i in STOP else TOKENIZER.decode([i]) for i in np.flatnonzero(allowed).tolist())


@pytest.mark.parametrize(
    "constraint, text, then",
    [
        ({"regex": "ab?c"}, "", "a"),
        ({"regex": "ab?c"}, "a", "bc"),
        ({"regex": "ab?c"}, "ac", "$"),
        ({"regex": "ab*"}, "abb", "$b"),
        ({"regex": "a/b"}, "a", "/"),
        ({"regex": r"\\"}, "", "\\"),
        ({"regex": "ab"}, "x", "*"),
        ({"regex": "ab"}, "abc", "*"),
        ({"grammar": 'start: "x" | "(" start ")"'}, "((x", ")"),
        ({"grammar": 'start: "x" | "(" start ")"'}, "((x))", "$"),
        ({"grammar": 'root ::= "a" root | "b"'}, "aa", "ab"),
        ({"json_schema": {"enum": ["on", "off"]}}, '"o', "fn"),
        ({"json_schema": '{"const": 12}'}, "1", "2"),
        ({"json_schema": "true"}, "tru", "e"),
        ({"grammar": DEAD_END}, "", "ax"),
        ({"grammar": DEAD_END}, "a", "$"),  # nothing can complete it: let it end
        ({"grammar": DEAD_END}, "ab", "*"),
    ],
)
def test_what_may_follow(constraint: dict[str, Any], text: str, then: str) -> None:
    assert sorted(may_follow(follow(text, matcher(**constraint)))) == sorted(then)


def test_a_dead_end_is_left_like_any_place() -> None:
    found = follow("a", matcher(grammar=DEAD_END))
    assert may_follow(found) == "$"
    found.retreat()
    assert may_follow(found) == "ax" and may_follow(follow("xy", found)) == "$"


def test_a_dead_end_forgets_what_was_taken_back_before_it() -> None:
    """Behind one the library's matcher is made anew from the tokens of the text: those that still stand."""
    grammar = 'start: "x" "y" | "z" "a" B\nB: /b+c/ & /b+d/'
    found = follow("xy", matcher(grammar=grammar))
    found.retreat(2)
    assert may_follow(follow("za", found)) == "$"  # nothing can complete it
    found.retreat()
    assert may_follow(found) == "a"
    found.retreat()
    assert sorted(may_follow(found)) == ["x", "z"]


@settings(max_examples=60)
@given(st.lists(st.one_of(st.sampled_from([*TOKENIZER.encode("ab(),1"), *STOP]), st.integers(1, 4).map(lambda n: -n))))
def test_a_matcher_that_went_back_is_as_if_it_had_not_gone(moves: list[int]) -> None:
    grammar = 'start: item ("," item)*\nitem: /[ab]+/ | "(" start ")" | "1"'
    walked, tokens = matcher(grammar=grammar), list[int]()
    history = History(prompt_length=2, matcher=walked)
    for token in (5, 6):
        history.append(token)  # the prompt is no part of the output
    for move in moves:
        if move >= 0:
            history.append(move)
            tokens.append(move)
        else:
            tokens = tokens[: max(0, len(tokens) + move)]
            history.truncate(2 + len(tokens))
        fresh = matcher(grammar=grammar)
        for token in tokens:
            fresh.advance(token)
        assert may_follow(walked) == may_follow(fresh)


def test_the_grammar_rules_over_bias_and_shorter_rows() -> None:
    params = SamplingParams(regex="ab", logit_bias={3: 100.0})
    history = History(prompt_length=0, matcher=GRAMMARS.matcher(params, STOP))
    row = np.linspace(0, 1, V, dtype=np.float32)
    (a,) = TOKENIZER.encode("a")
    assert np.flatnonzero(np.isfinite(process(row, params, history))).tolist() == [a]
    assert np.flatnonzero(np.isfinite(process(row[: a + 1], params, history))).tolist() == [a]
    assert np.isfinite(process(row[:a], params, history)).all()  # a drafter without the one token that is allowed
    assert (row == np.linspace(0, 1, V, dtype=np.float32)).all()


def test_a_stop_token_of_the_request_ends_a_complete_output_only() -> None:
    (z,) = TOKENIZER.encode("z")
    found = GRAMMARS.matcher(SamplingParams(regex="ab"), [*STOP, z])
    assert may_follow(found) == "a" and may_follow(follow("ab", found)) == "z$"
    text = GRAMMARS.matcher(SamplingParams(regex="az+"), [*STOP, z])
    assert may_follow(follow("azz", text)) == "z$"


def test_each_grammar_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    grammars, compiled = Grammars(TOKENIZER, V), []
    whole = grammars._compile
    monkeypatch.setattr(grammars, "_compile", lambda kind, text: compiled.append(text) or whole(kind, text))
    for text in ("a+", "b+", "a+"):
        grammars.matcher(SamplingParams(regex=text), STOP)
    assert compiled == ["a+", "b+"]
    for i in range(40):
        grammars.matcher(SamplingParams(regex=f"x{i}"), STOP)
    assert len(grammars._compiled) == 32
    assert grammars_of(TOKENIZER, V) is GRAMMARS


def test_who_finds_its_grammar_waits_for_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    grammars, begun, go_on = Grammars(TOKENIZER, V), Event(), Event()
    whole = grammars._compile
    grammars.prepare(("regex", "a+"))

    def slowly(kind: str, text: str) -> Any:
        begun.set()
        assert go_on.wait(30)
        return whole(kind, text)

    monkeypatch.setattr(grammars, "_compile", slowly)
    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(grammars.prepare, ("regex", "b+")) for _ in range(2)]
        assert begun.wait(30)
        assert may_follow(grammars.matcher(SamplingParams(regex="a+"), STOP)) == "a"
        go_on.set()
        assert both[0].result() is both[1].result(), "compiled once"


def test_a_schema_may_be_text_or_an_object() -> None:
    schema = {"type": "object", "properties": {"a": {"enum": ("x", "y")}}}
    params = SamplingParams(json_schema=schema)
    assert json.loads(params.json_schema or "") == {"type": "object", "properties": {"a": {"enum": ["x", "y"]}}}
    assert SamplingParams(json_schema=params.json_schema) == params


@pytest.mark.parametrize(
    "constraint, says",
    [
        ({"regex": "a(b"}, "unclosed group"),
        ({"regex": "a{5,2}"}, "invalid repetition"),
        ({"regex": "(?=a)b"}, "look-around"),
        ({"regex": "ab\\"}, "backslash that escapes nothing"),
        ({"regex": r"[^\s\S]"}, "no token of the model can follow"),
        ({"grammar": "start: foo"}, 'unknown name: "foo"'),
        ({"grammar": 'start: "a'}, r"1\(10\)"),
        ({"grammar": 'root ::= ("a"'}, "line 1"),
        ({"grammar": "nonsense"}, "line 1"),
        ({"grammar": ""}, "root"),
        ({"json_schema": {"not": {"type": "string"}}}, 'Unimplemented keys: \\["not"\\]'),
        ({"json_schema": {"type": "string", "pattern": "("}}, "unclosed group"),
        ({"json_schema": {"$ref": "https://example.com/schema"}}, "not present|retriev"),
        ({"json_schema": {"type": "integer", "minimum": 5, "maximum": 3}}, "greater than maximum"),
        ({"json_schema": "[1]"}, "must be an object or boolean"),
    ],
)
def test_what_does_not_compile_is_refused_with_the_reason(constraint: dict[str, Any], says: str) -> None:
    with pytest.raises(GrammarError, match=says) as refusal:
        matcher(**constraint)
    assert str(refusal.value).startswith(next(iter(constraint)) + "=")


@pytest.mark.parametrize(
    "given_, says",
    [
        ({"regex": "a", "json_schema": {}}, "json_schema and regex cannot go together"),
        ({"regex": "a", "grammar": "b"}, "regex and grammar cannot go together"),
        ({"regex": "a", "ignore_eos": True}, "drop one of them"),
        ({"json_schema": '{"a": '}, "no JSON: Expecting value at line 1, column 7"),
        ({"json_schema": {"a": {1, 2}}}, "cannot be written as JSON"),
        ({"regex": 5}, "must be a regular expression"),
        ({"grammar": ["x"]}, "must be the text"),
        ({"json_schema": 5}, "a schema as text or as an object"),
    ],
)
def test_what_makes_no_sense_is_refused_at_once(given_: dict[str, Any], says: str) -> None:
    with pytest.raises(ParameterError, match=says):
        SamplingParams(**given_)


def test_a_refused_grammar_leaves_nothing_behind() -> None:
    with LLM(LOADED, method="plain", kv_tokens=256) as llm:
        with pytest.raises(GrammarError):
            llm.generate(["a", "b"], [SamplingParams(max_tokens=3), SamplingParams(regex="(")])
        llm.check_integrity()
        assert llm.generate("a", SamplingParams(max_tokens=9, regex="yes|no"))[0].text in ("yes", "no")


def test_without_a_tokenizer_or_an_end_it_is_refused() -> None:
    engine = Engine(HashDecoder(), Plain(), CoupledVerifier())
    with pytest.raises(ParameterError, match="regex needs a tokenizer"):
        engine.add([1], SamplingParams(regex="a"))
    assert engine.idle


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **more: Any) -> Any:
        if name == "llguidance":
            raise ImportError(name)
        return real(name, *args, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ParameterError, match=r"outpace\[grammar\]"):
        Grammars(TOKENIZER, V).matcher(SamplingParams(regex="a"), STOP)


# -- whatever is asked for: an answer or an OutpaceError ------------------------------------------------------------

_anything = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.lists(st.integers(), max_size=2),
    st.just(10**400), st.just(np.float32("nan")), st.just(1j), st.binary(max_size=2),
    st.dictionaries(st.one_of(st.integers(), st.text(max_size=2)), st.one_of(st.floats(), st.none()), max_size=2),
)  # fmt: skip
_names = st.sampled_from([name for name in SamplingParams.__slots__ if name != "ignore_eos"])


@settings(max_examples=400)
@given(st.dictionaries(_names, _anything, min_size=1, max_size=3))
def test_any_sampling_parameters_are_taken_or_refused(values: dict[str, Any]) -> None:
    try:
        params = SamplingParams(**values)
    except OutpaceError:
        return
    assert 0 <= params.temperature <= 100 and 0 < params.top_p <= 1 and params.max_tokens >= 1
    row = np.zeros(V, dtype=np.float32)
    try:
        history = History([1], 1, GRAMMARS.matcher(params, STOP) if params.constraint else None)
        assert not np.isnan(process(row, params, history)).any()
    except OutpaceError:
        pass


def pieces(*some: str) -> st.SearchStrategy[str]:
    return st.lists(st.one_of(st.sampled_from(some), st.text(max_size=2)), max_size=8).map("".join)


_schemas = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-3, 3), st.sampled_from(["string", "object", "integer", "^a+$"])),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.sampled_from(
                ["type", "properties", "items", "enum", "const", "anyOf", "allOf", "$ref", "pattern", "required",
                 "minLength", "maxLength", "minimum", "maxItems", "additionalProperties", "format", "$defs", "a"]
            ),
            inner, max_size=4,
        ),
    ),
    max_leaves=8,
)  # fmt: skip
_constraints: st.SearchStrategy[dict[str, Any]] = st.one_of(
    st.builds(lambda text: {"regex": text}, pieces("a", "(", ")", "[", "]", "*", "{2,3}", "|", "\\", "/", "^", "\n")),
    st.builds(
        lambda text: {"grammar": text},
        pieces("start: ", "root ::= ", '"a"', "/b+/", "(", ")", "|", "*", "\n", "x", "[a-c]", "%json {", "%ignore"),
    ),
    st.builds(lambda text: {"json_schema": text}, pieces("{", "}", '"type"', ":", '"string"', "[", "]", ",", "1e999")),
    st.builds(lambda schema: {"json_schema": schema}, st.dictionaries(st.sampled_from(["type", "items"]), _schemas)),
    st.builds(lambda schema: {"json_schema": schema}, _schemas.filter(lambda s: isinstance(s, dict))),
)


@settings(max_examples=300)
@given(_constraints)
def test_any_grammar_is_followed_or_refused(constraint: dict[str, Any]) -> None:
    try:
        found = matcher(**constraint)
        for _ in range(4):
            allowed = found.allowed()
            if allowed is None:
                break
            found.advance(int(np.flatnonzero(allowed)[-1]))
        found.retreat(3)
        assert may_follow(found)
    except OutpaceError:
        pass
