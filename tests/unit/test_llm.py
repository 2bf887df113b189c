"""The Python API over a decoder whose logits are a hash: prompts of every kind, batches, streams, refusals."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest
from hashing import HashDecoder, toy_loaded
from toy import MemoryCheckpoint

import outpace
from outpace import LLM, CapacityError, MethodError, OutpaceError, ParameterError, SamplingParams
from outpace.engine.load import LoadedModel, choose_device, choose_precision, size_of_cache
from outpace.models.checkpoint import TokenizerFiles
from outpace.models.tokenizer import Tokenizer


@pytest.fixture
def llm() -> Iterator[LLM]:
    with LLM(toy_loaded(), kv_tokens=4096) as made:
        yield made
        made.check_integrity()


def test_default_method_is_lossless_speculation(llm: LLM) -> None:
    assert llm.method == "suffix+recycling"
    assert [m.name for m in llm.method_info] == ["suffix", "recycling"]
    assert llm.verifier == "coupled" and llm.precision == "float32" and llm.name == "toy"
    with LLM(toy_loaded(row_invariant=False), kv_tokens=64) as other:
        assert other.method == "plain"


def test_prompts_of_every_kind_in_one_batch(llm: LLM) -> None:
    messages = [{"role": "user", "content": "hi"}]
    prompts = ["hello", llm.tokenizer.prompt("hello"), messages, "hello"]
    results = llm.generate(prompts, SamplingParams(max_tokens=20))
    assert results[0].token_ids == results[1].token_ids == results[3].token_ids != results[2].token_ids
    assert all(r.exactness == "identical" and r.method == "suffix+recycling" for r in results)
    assert results[2].token_ids == llm.chat("hi", SamplingParams(max_tokens=20)).token_ids
    assert results[2].token_ids == llm.generate("user: hi\n", SamplingParams(max_tokens=20))[0].token_ids
    assert results[0].text == llm.tokenizer.decode(results[0].token_ids)
    assert llm.generate([]) == []


def test_each_prompt_may_have_its_own_parameters(llm: LLM) -> None:
    params = [SamplingParams(max_tokens=3), SamplingParams(max_tokens=9, temperature=1.0, seed=4)]
    results = llm.generate(["a", "b"], params)
    assert [len(r.token_ids) for r in results] == [3, 9]
    with pytest.raises(ParameterError, match="2 prompts but 1 SamplingParams"):
        llm.generate(["a", "b"], params[:1])


@pytest.mark.parametrize("method", ["plain", "ngram", "suffix", "recycling", "ngram+recycling"])
def test_every_method_gives_the_tokens_of_plain(llm: LLM, method: str) -> None:
    prompts = ["abcabcabc", "xyz", "the same, the same, the"] * 4
    params = [SamplingParams(max_tokens=30, temperature=t, seed=i) for i, t in enumerate([0, 0.8, 1.2] * 4)]
    with llm.with_method("plain", max_batch=1) as plain, llm.with_method(method) as other:
        expected, got = plain.generate(prompts, params), other.generate(prompts, params)
    assert [r.token_ids for r in got] == [r.token_ids for r in expected]
    assert {r.method for r in got} == {method}


@pytest.mark.parametrize("method", ["draft", "draft-tree", "suffix+draft"])
def test_a_draft_model_drafts(llm: LLM, method: str) -> None:
    params = SamplingParams(max_tokens=40)
    plain = llm.generate(["abc", "def"], params)
    with LLM(llm.loaded, draft_model=toy_loaded("small"), method=method, kv_tokens=1024) as drafted:
        results = drafted.generate(["abc", "def"], params)
        assert [r.token_ids for r in results] == [r.token_ids for r in plain]
        assert results[0].stats.accepted >= 15  # the same weights: it knows
        drafted.check_integrity()
        with drafted.with_method("plain") as other:
            assert other.draft_loaded is None and other.loaded is llm.loaded
    with LLM(llm.loaded, draft_model=toy_loaded("small"), kv_tokens=1024) as best:
        assert best.method.startswith("suffix+recycling+draft-tree") and best.planner == "goodput"


def test_needs_that_are_not_met_are_refused(llm: LLM) -> None:
    with pytest.raises(MethodError, match=r"needs a draft model.*--draft-model"):
        LLM(llm.loaded, method="draft")
    with pytest.raises(MethodError, match="no use for a draft model"):
        LLM(llm.loaded, draft_model=toy_loaded(), method="ngram")
    with pytest.raises(MethodError, match=r"'nothing'.*plain"):
        LLM(llm.loaded, method="nothing")
    with pytest.raises(MethodError, match=r"'maybe'.*coupled"):
        LLM(llm.loaded, verifier="maybe")
    files = MemoryCheckpoint(llm.config, {}).tokenizer_files()
    renamed = TokenizerFiles(files.tokenizer_json.replace('"a":', '"zz":'), files.tokenizer_config)
    foreign = LoadedModel("foreign", llm.decoder, Tokenizer(renamed))
    with pytest.raises(MethodError, match=r"foreign cannot draft for toy.*vocabularies"):
        LLM(llm.loaded, draft_model=foreign, method="draft")
    with pytest.raises(ParameterError, match="max_rows=0"):
        LLM(llm.loaded, max_rows=0)


def test_unknown_names_are_refused_before_anything_is_loaded() -> None:
    with pytest.raises(MethodError):
        LLM("no such model", method="nothing")
    with pytest.raises(MethodError):
        LLM("no such model", verifier="nothing")
    with pytest.raises(ParameterError):
        LLM("no such model", kv_tokens=0)


def test_stream_gives_the_same_as_generate(llm: LLM) -> None:
    params = SamplingParams(max_tokens=40, stop=("qq",))
    (whole,) = llm.generate("abc", params)
    stream = llm.stream("abc", params)
    events = list(stream)
    assert stream.result is not None
    assert "".join(e.text for e in events) == whole.text == stream.result.text
    assert [t for e in events for t in e.token_ids] == whole.token_ids
    assert [s for e in events for s in e.sources] == stream.result.sources
    assert list(stream) == []


def test_streams_can_be_read_in_turns(llm: LLM) -> None:
    params = SamplingParams(max_tokens=25)
    expected = [r.token_ids for r in llm.generate(["one", "two"], params)]
    streams = [llm.stream("one", params), llm.stream("two", params)]
    got: list[list[int]] = [[], []]
    iterators = [iter(s) for s in streams]
    other = llm.generate("three", params)  # steps the streams too; nothing of theirs is lost
    while any(s.result is None for s in streams):
        for i, iterator in enumerate(iterators):
            event = next(iterator, None)
            got[i] += event.token_ids if event is not None else []
    for i, iterator in enumerate(iterators):
        got[i] += [t for event in iterator for t in event.token_ids]
    assert got == expected and len(other[0].token_ids) == 25


def test_a_stream_can_be_cancelled_or_left(llm: LLM) -> None:
    stream = llm.stream("abc", SamplingParams(max_tokens=200, stop=("!?",)))
    text = ""
    for i, event in enumerate(stream):
        text += event.text
        if i == 3:
            stream.cancel()
    assert stream.result is not None and stream.result.finish_reason == "cancelled"
    assert text == stream.result.text and 4 <= len(stream.result.token_ids) < 200
    left = llm.stream("abc", SamplingParams(max_tokens=200))
    for _ in left:
        break
    llm.generate("x", SamplingParams(max_tokens=2))
    llm.check_integrity()
    assert llm._engine.idle


def test_refusals_leave_nothing_behind(llm: LLM) -> None:
    with pytest.raises(CapacityError):
        llm.generate(["fits", "x" * 5000])
    with pytest.raises(ParameterError, match="empty"):
        llm.generate(["fits", ""])
    for bad in (3, [3.5], ["fits", 3], [{"role": "user"}, "text"]):
        with pytest.raises(ParameterError, match="a prompt is"):
            llm.generate(bad)  # type: ignore[arg-type]
    with pytest.raises(ParameterError):
        llm.chat([{"content": "no role"}])
    assert llm._engine.idle
    with LLM(toy_loaded(template=None), kv_tokens=64) as base, pytest.raises(ParameterError, match="chat template"):
        base.chat("hi")


def test_room_is_what_fits(llm: LLM) -> None:
    room = llm.max_new_tokens("abc")
    assert room == 4096 - len(llm.tokens("abc"))
    assert llm.stream("abc", SamplingParams(max_tokens=room)).result is None
    with pytest.raises(CapacityError):
        llm.stream("abc", SamplingParams(max_tokens=room + 1))


def test_a_closed_llm_says_so() -> None:
    llm = LLM(toy_loaded(), kv_tokens=64)
    llm.close()
    llm.close()
    with pytest.raises(ParameterError, match="closed"):
        llm.generate("x")
    with pytest.raises(ParameterError, match="closed"):
        llm.max_new_tokens("x")
    with pytest.raises(ParameterError, match="closed"):
        llm.superposed("x")


def test_a_stream_that_outlives_its_llm_says_so() -> None:
    llm = LLM(toy_loaded(), kv_tokens=64)
    begun, waiting = (llm.stream("x", SamplingParams(max_tokens=8)) for _ in range(2))
    steps = iter(begun)
    next(steps)
    llm.close()
    for stream in (steps, iter(waiting)):
        with pytest.raises(ParameterError, match="closed"):
            list(stream)
    assert begun.result is None and waiting.result is None


def test_devices_and_precisions() -> None:
    cpu = choose_device("cpu")
    assert choose_precision("auto", cpu) is None and choose_precision("int4", cpu) == "int4"
    with pytest.raises(ParameterError, match=r"'int3' does not work on cpu.*int8"):
        choose_precision("int3", cpu)
    for wrong in ("tpu", "meta", "cuda:99"):
        with pytest.raises(ParameterError, match=wrong):
            choose_device(wrong)
    decoder = HashDecoder(max_position=100)
    assert size_of_cache(decoder, 7, 8) == 7
    assert size_of_cache(decoder, None, 2) == 224  # two contexts of seven pages


def test_public_names() -> None:
    assert outpace.__all__ == sorted(outpace.__all__)
    assert all(getattr(outpace, name) is not None for name in outpace.__all__)
    assert issubclass(CapacityError, OutpaceError)
    with pytest.raises(AttributeError, match="nothing"):
        outpace.nothing  # noqa: B018


def test_import_is_light() -> None:
    code = "import outpace, sys; outpace.SamplingParams; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def test_rejection_sampling_is_named_as_what_it_is(llm: LLM) -> None:
    params = SamplingParams(max_tokens=40, temperature=1.0, seed=2)
    with LLM(llm.loaded, draft_model=toy_loaded("small"), method="draft", verifier="rejection", kv_tokens=1024) as made:
        (result,) = made.generate("abc", params)
        (again,) = made.generate("abc", params)
        made.check_integrity()
        with made.with_method("plain") as same, made.with_method("plain", verifier="coupled") as other:
            assert same.verifier == other.verifier == "coupled"  # plain decoding leaves nothing to verify
            assert same.generate("abc", params)[0].exactness == "identical"
    assert result.exactness == "distribution" and len(result.token_ids) == 40
    assert result.stats.accepted > 20  # q is the target's own distribution
    assert len(again.token_ids) == 40


def test_choices_without_effect_are_refused(llm: LLM) -> None:
    with pytest.raises(MethodError, match="nothing to plan"):
        LLM(llm.loaded, method="plain", planner="goodput")
    with pytest.raises(MethodError, match="there is no draft model"):
        LLM(llm.loaded, draft_precision="int4")
    with pytest.raises(ParameterError, match=r"draft_precision='int8' contradicts small.*float32"):
        LLM(llm.loaded, draft_model=toy_loaded("small"), draft_precision="int8")
    for wrong, why in (
        ({"verifier": "rejection"}, "nothing to verify"),
        ({"max_rows": 4}, "max_rows=4 has no use"),
        ({"max_step_rows": 9}, "max_step_rows=9 has no use"),
    ):
        with pytest.raises(MethodError, match=why):
            LLM(llm.loaded, method="plain", **wrong)
        LLM(llm.loaded, method="plain", methods=["ngram"], kv_tokens=64, **wrong).close()  # requests may draft


TOOL_TEMPLATE = (
    "{% for m in messages %}{{ m.role }}{% if m.name %}({{ m.name }}){% endif %}: {{ m.content }}"
    "{% for call in m.tool_calls or [] %}{{ call.function.name }}{{ call.function.arguments | tojson }}{% endfor %}"
    "{% if m.tool_call_id %} [{{ m.tool_call_id }}]{% endif %} | {% endfor %}"
)


def test_messages_are_what_the_template_reads() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "be "}, {"type": "text", "text": "brief"}]},
        {"role": "user", "name": "Ann", "content": "1 + 1?", "tool_calls": []},
        {"role": "assistant", "content": "", "tool_calls": [call], "name": None},
        {"role": "tool", "tool_call_id": "1", "content": "2"},
    ]
    with LLM(toy_loaded(template=TOOL_TEMPLATE), method="plain", kv_tokens=64) as llm:
        text = 'system: be brief | user(Ann): 1 + 1? | assistant: add{"a": 1} | tool: 2 [1] | '
        assert llm.tokenizer.decode(llm.tokens(messages), False) == llm.tokenizer.decode(llm.tokens(text), False)


@pytest.mark.parametrize(
    ("message", "why"),
    [
        ({"role": "asistant", "content": "x"}, r"messages\[1\].role='asistant' must be one of .*did you mean 'assist"),
        ({"role": 3, "content": "x"}, "role=3 must be one of"),
        ({"content": "x"}, "role=None must be"),
        ({"role": "user", "contnt": "x"}, "unknown field 'contnt'; there are: .*did you mean 'content'"),
        ({"role": "user", "content": "x", "colour": "red"}, "unknown field 'colour'"),
        ({"role": "user", "content": "x", 5: "red"}, "unknown field 5"),
        ({"role": "user", "content": "x", "name": "Ann"}, "chat template has no place for name: leave it out"),
        ({"role": "user"}, "has no content"),
        ({"role": "user", "content": b"x"}, "content=b'x' must be text"),
        ({"role": "user", "content": 1.5}, "content=1.5 must be text"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, "only text is understood"),
        ("hello", "must be an object with a role and a content, not 'hello'"),
    ],
    ids=str,
)
def test_messages_that_are_none_are_refused(llm: LLM, message: object, why: str) -> None:
    with pytest.raises(ParameterError, match=why):
        llm.generate([[{"role": "user", "content": "hi"}, message]])  # type: ignore[list-item]
    with pytest.raises(ParameterError):
        llm.chat([message])  # type: ignore[list-item]


@pytest.mark.parametrize(
    "call",
    [
        5,
        {"id": "1"},
        {"function": {"name": 3}},
        {"function": {"name": "f", "arguments": "[1]"}},
        {"function": {"name": "f", "arguments": "{"}},
        {"function": {"name": "f", "arguments": '{"a": 1, "a": 2}'}},
    ],
    ids=str,
)
def test_calls_that_are_none_are_refused(call: object) -> None:
    asked = [{"role": "assistant", "content": None, "tool_calls": [call]}]
    wrong = pytest.raises(ParameterError, match=r"messages\[0\].tool_calls\[0\]")
    with LLM(toy_loaded(template=TOOL_TEMPLATE), method="plain", kv_tokens=64) as llm, wrong:
        llm.tokens(asked)


@pytest.mark.parametrize(
    "prompt",
    [b"abc", [b"abc"], [1.5, 2.0], [[1.5, 2.0]], [[1, True]], [True, 1], [["a", 1]], [[np.int64(-1)]], 5, {1}, [None]],
    ids=str,
)  # fmt: skip
def test_prompts_that_are_none_are_refused(llm: LLM, prompt: object) -> None:
    with pytest.raises(ParameterError, match="prompt"):
        llm.generate(prompt)  # type: ignore[arg-type]
    with pytest.raises(ParameterError, match="prompt"):
        llm.stream(prompt)  # type: ignore[arg-type]
    assert llm.idle


def test_arguments_of_other_types_are_refused(llm: LLM) -> None:
    with pytest.raises(ParameterError, match=r"params={'max_tokens': 3} is of the wrong .* be SamplingParams"):
        llm.generate("x", {"max_tokens": 3})  # type: ignore[arg-type]
    with pytest.raises(ParameterError, match="prediction=b'x' is of the wrong type: it must be text or token ids"):
        llm.stream("x", prediction=b"x")  # type: ignore[arg-type]
    with pytest.raises(ParameterError, match="options='' is of the wrong type: it must be RequestOptions"):
        llm.submit("x", options="")  # type: ignore[arg-type]
    assert llm.tokens([np.int64(3), 4]) == [3, 4]
