"""Drafting in the background, over decoders that check what the cache gives them to see."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable

import numpy as np
import pytest
from drafting import NO_OUTPUTS, PARAMS, FakeDecoder, V, outputs_of, plain, propose, step
from hashing import HashDecoder
from toy import toy_checkpoint

from outpace import LLM
from outpace.decoding.contracts import DrafterContext, Observation, Sequence
from outpace.decoding.drafters.branch import BranchDraft, BranchSource
from outpace.decoding.methods import make_drafter
from outpace.decoding.verify.coupled import CoupledVerifier
from outpace.engine.load import LoadedModel
from outpace.errors import DownloadError, MethodError, ParameterError
from outpace.models.native import NativeDecoder
from outpace.models.tokenizer import Tokenizer
from outpace.types import Accepted, SamplingParams


def branch(decoder: FakeDecoder, pages: int = 64, **options: float) -> BranchDraft:
    return BranchDraft(BranchSource(decoder, pages, V), **options)  # type: ignore[arg-type]


def patient(drafter: BranchDraft) -> BranchDraft:
    """The background always comes to its end: what it drafts does not hang on the machine's speed."""
    join = drafter._join

    def wait() -> None:
        if drafter._running is not None:
            drafter._running[0].exception()
        join()

    drafter._join = wait  # type: ignore[method-assign]
    return drafter


def hurried(drafter: BranchDraft) -> BranchDraft:
    """The background never gets further than its first forward."""
    start = drafter._start

    def once(growing: list, stop: float) -> None:
        start(growing, stop)
        drafter._stop.set()

    drafter._start = once  # type: ignore[method-assign]
    return drafter


def as_it_comes(drafter: BranchDraft) -> BranchDraft:
    return drafter


PACES = [patient, hurried, as_it_comes]


@pytest.mark.parametrize("pace", PACES)
@pytest.mark.parametrize("params", PARAMS)
@pytest.mark.parametrize("salt", [0, 1])
def test_a_ragged_batch_decodes_as_plain(
    pace: Callable[[BranchDraft], BranchDraft], params: SamplingParams, salt: int
) -> None:
    """salt 0: the draft model is the target; 1: it knows nothing."""
    drafter = pace(branch(FakeDecoder(salt), hedges=2, min_reach=0.0))
    prompts = [[1, 2, 3], [4] * 20, list(range(10)) * 4]
    sequences = [Sequence(i, list(p), len(p), params) for i, p in enumerate(prompts)]
    for sequence in sequences:
        drafter.begin(sequence)
    total = 0
    for round_ in range(12):
        budgets = [(round_ + 3 * i) % 8 for i in range(3)]
        total += step(drafter, sequences, budgets)[0]
        drafter._join()
        drafter.source.cache.check_integrity()
    for sequence, prompt in zip(sequences, prompts, strict=True):
        assert sequence.tokens == plain(prompt, params, len(sequence.output))
    if salt == 0:
        assert total > 36 * 2
    for sequence in sequences:
        drafter.end(sequence)
        drafter.end(sequence)
    assert drafter.source.cache.pages_in_use == 0 and not drafter._trees and drafter._running is None


def test_a_perfect_draft_model_is_always_ready() -> None:
    decoder = FakeDecoder()
    drafter = patient(branch(decoder, min_reach=0.0, max_tokens=4))
    sequence = Sequence(0, [3, 1], 2, SamplingParams())
    drafter.begin(sequence)
    assert step(drafter, [sequence], [4])[0] == 5
    foreground: list[int] = []
    extend = drafter.source.extend
    drafter.source.extend = lambda grown: (  # type: ignore[method-assign]
        foreground.append(threading.current_thread() is threading.main_thread()),
        extend(grown),
    )[1]
    for _ in range(6):
        assert step(drafter, [sequence], [4])[0] == 5
    overlap = drafter.overlap
    assert overlap.hits == 6 and overlap.ready == overlap.tokens - 4 == 24
    assert foreground and not any(foreground)
    assert sequence.tokens == plain([3, 1], SamplingParams(), len(sequence.output))
    drafter.end(sequence)


def test_a_hedge_is_taken_after_a_rejection() -> None:
    """The target always says the draft model's second choice at the least certain node."""
    drafter = patient(branch(FakeDecoder(), min_reach=0.0, max_tokens=3, hedges=3))
    sequence = Sequence(0, [3, 1], 2, SamplingParams())
    drafter.begin(sequence)
    hits = 0
    for _ in range(8):
        [draft] = propose(drafter, [sequence], [3])
        tree = drafter._trees[0]
        drafter._join()
        hedge = next((n for n in range(3, len(tree.tokens)) if tree.parents[n] < 2 and tree.rows[n] >= 0), None)
        assert hedge is not None
        new = tree.path(hedge)
        sequence.tokens += new
        drafter.observe(sequence, Observation(Accepted([], new), draft, NO_OUTPUTS, "prefill"))
        ready = drafter._trees[0]
        hits += 1
        assert ready.root == len(sequence.tokens)
        # what was drafted below the hedge is what the model says there
        expected = plain(sequence.tokens, SamplingParams(), len(ready.tokens))
        assert ready.tokens == expected[len(sequence.tokens) :]
        drafter.source.cache.check_integrity()
    assert drafter.overlap.hits == hits - 1  # the last one was not asked for
    drafter.end(sequence)


def test_steps_that_were_not_observed_are_caught_up_with() -> None:
    drafter = patient(branch(FakeDecoder(), min_reach=0.0))
    text = plain([3, 1], SamplingParams(), 60)
    sequence = Sequence(0, text[:2], 2, SamplingParams())
    drafter.begin(sequence)
    for stop in (2, 5, 5, 17, 40, 41):
        sequence.tokens += text[len(sequence.tokens) : stop]
        [draft] = propose(drafter, [sequence], [4])
        assert draft.tokens.tolist() == text[stop : stop + 4]
        drafter._join()
        drafter.source.cache.check_integrity()
    drafter.end(sequence)


@pytest.mark.parametrize("moment", ["end", "begin", "propose"])
def test_life_goes_on_while_the_background_runs(moment: str) -> None:
    decoder = FakeDecoder()
    gate, forward = threading.Event(), decoder.forward

    def slow(*args):  # type: ignore[no-untyped-def]
        if threading.current_thread() is not threading.main_thread():
            gate.wait(5)
        return forward(*args)

    decoder.forward = slow  # type: ignore[method-assign]
    drafter = branch(decoder, min_reach=0.0)
    sequences = [Sequence(i, [1, 2, 3 + i], 3, SamplingParams()) for i in range(2)]
    drafter.begin(sequences[0])
    [draft] = propose(drafter, sequences[:1], [4])
    assert drafter._running is not None
    threading.Timer(0.05, gate.set).start()
    if moment == "end":
        drafter.end(sequences[0])
        assert drafter.source.cache.pages_in_use == 0
    elif moment == "begin":
        drafter.begin(sequences[1])
        assert len(propose(drafter, sequences[1:], [4])[0]) == 4
        drafter.end(sequences[1])
    else:
        assert propose(drafter, sequences[:1], [4])[0].tokens.tolist() == draft.tokens.tolist()
    drafter.end(sequences[0])
    drafter.source.cache.check_integrity()
    assert drafter._running is None and drafter.source.decoder is drafter.source.foreground


def test_what_fails_in_the_background_is_raised_by_the_next_propose() -> None:
    decoder = FakeDecoder()
    drafter = patient(branch(decoder, min_reach=0.0))
    sequence = Sequence(0, [1, 2, 3], 3, SamplingParams())
    drafter.begin(sequence)
    step(drafter, [sequence], [4])
    [draft] = propose(drafter, [sequence], [4])
    drafter._join()
    decoder.fail = True
    drafter._start([drafter._trees[0]], 0.0)
    outputs = outputs_of(sequence.tokens, draft)
    accepted = CoupledVerifier().verify(sequence, draft, outputs)
    sequence.tokens += accepted.tokens
    drafter.observe(sequence, Observation(accepted, draft, outputs))
    decoder.fail = False
    with pytest.raises(RuntimeError, match="draft model broke"):
        propose(drafter, [sequence], [4])
    drafter.source.cache.check_integrity()
    for _ in range(4):
        step(drafter, [sequence], [4])
    assert sequence.tokens == plain([1, 2, 3], SamplingParams(), len(sequence.output))
    decoder.fail = True
    drafter.end(sequence)
    other = Sequence(1, [1, 2, 3], 3, SamplingParams())
    drafter.begin(other)
    with pytest.raises(RuntimeError, match="draft model broke"):
        propose(drafter, [other], [4])
    drafter.end(other)
    assert drafter.source.cache.pages_in_use == 0


def test_penalties_and_a_full_cache_go_without_branches() -> None:
    drafter = branch(FakeDecoder())
    sequence = Sequence(0, [1, 2, 3], 3, SamplingParams(repetition_penalty=1.2))
    drafter.begin(sequence)
    assert len(propose(drafter, [sequence], [4])[0]) and drafter._running is None
    small = branch(FakeDecoder(), pages=1, max_tokens=6, min_reach=0.0)
    sequence = Sequence(0, [1, 2, 3, 4, 5], 5, SamplingParams())
    small.begin(sequence)
    assert len(propose(small, [sequence], [6])[0]) == 6 and small._running is None
    short = branch(FakeDecoder(max_position=12), max_tokens=6, min_reach=0.0)
    short.begin(sequence)
    assert len(propose(short, [sequence], [6])[0]) == 6 and short._running is None


def test_under_rejection_sampling_it_proposes_outright() -> None:
    drafter = make_drafter("branch", DrafterContext(V, FakeDecoder(1), 64, sampled=True))
    assert isinstance(drafter, BranchDraft)
    sequence = Sequence(0, [1, 2, 3], 3, SamplingParams(temperature=0.9, seed=1))
    drafter.begin(sequence)
    [draft] = propose(drafter, [sequence], [4])
    assert draft.q is None and len(draft)
    drafter.end(sequence)


def test_options() -> None:
    context = DrafterContext(V, FakeDecoder(), 64)
    drafter = make_drafter("branch:max_tokens=3,hedges=0,min_reach=0.5,threads=2", context)
    assert isinstance(drafter, BranchDraft) and (drafter.max_tokens, drafter.hedges) == (3, 0)
    for spec in ("hedges=9", "hedges=-1", "threads=-1", "max_tokens=0", "min_reach=2"):
        with pytest.raises(ParameterError, match=spec.split("=")[0]):
            make_drafter(f"branch:{spec}", context)
    with pytest.raises(MethodError, match="draft model"):
        make_drafter("branch", DrafterContext(V))


# -- in the engine -------------------------------------------------------------------------------------------


def toy_llm(method: str, draft: LoadedModel | None = None) -> LLM:
    """Toy models with real arithmetic on real threads; the draft model is the target in another precision."""
    checkpoint, _ = toy_checkpoint("llama")
    tokenizer = Tokenizer(checkpoint.tokenizer_files())
    target = LoadedModel("target", NativeDecoder.from_checkpoint(checkpoint, "float32", threads=1), tokenizer)
    if draft is None:
        draft = LoadedModel("draft", NativeDecoder.from_checkpoint(checkpoint, "bfloat16", threads=2), tokenizer)
    return LLM(target, draft_model=draft, method=method, planner="fixed", kv_tokens=1024)


def drafter_of(llm: LLM) -> BranchDraft:
    found = getattr(llm._drafter, "drafters", [llm._drafter])[0]
    assert isinstance(found, BranchDraft)
    return found


@pytest.mark.parametrize("pace", [patient, as_it_comes])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_threads_on_one_machine_give_the_tokens_of_plain_decoding(
    temperature: float, pace: Callable[[BranchDraft], BranchDraft]
) -> None:
    prompts = [np.random.default_rng(seed).integers(0, 256, 4 + 9 * seed).tolist() for seed in range(3)]
    params = SamplingParams(max_tokens=40, temperature=temperature, seed=5, ignore_eos=True)
    with toy_llm("branch:threads=1,min_reach=0.0") as llm:
        found = pace(drafter_of(llm))
        results = llm.generate(prompts, params)
        with llm.with_method("plain") as reference:
            for prompt, result in zip(prompts, results, strict=True):
                assert result.token_ids == reference.generate(prompt, params)[0].token_ids
        if pace is patient:
            assert found.overlap.hits and found.overlap.ready
        assert found.source.background is not found.source.foreground
        assert found.source.cache.pages_in_use == 0
        llm.check_integrity()


def test_leaving_a_stream_early_and_closing() -> None:
    llm = toy_llm("branch")
    drafter = drafter_of(llm)
    for i, _ in enumerate(llm.stream([1, 2, 3], SamplingParams(max_tokens=100, ignore_eos=True))):
        if i == 4:
            break
    gc.collect()
    llm.check_integrity()
    assert drafter.source.cache.pages_in_use == 0
    stream = iter(llm.stream([1, 2, 3], SamplingParams(max_tokens=100, ignore_eos=True)))
    for _ in range(4):
        next(stream)
    llm.close()
    assert drafter._running is None
    pool, ref = drafter._pool, weakref.ref(drafter)
    threads = set(pool._threads)
    del stream, llm, drafter, pool
    gc.collect()
    assert ref() is None
    for thread in threads:
        thread.join(5)
        assert not thread.is_alive()


def test_a_broken_draft_model_in_the_engine() -> None:
    """The request that meets it fails; later ones are served."""

    class Breaking(HashDecoder):
        fail = False

        def forward(self, *args):  # type: ignore[no-untyped-def]
            if self.fail and threading.current_thread() is not threading.main_thread():
                raise RuntimeError("the draft model broke")
            return super().forward(*args)

    from hashing import toy_loaded

    draft = toy_loaded("draft")
    breaking = Breaking(vocab=draft.decoder.config.vocab_size, speakable=94, eos=draft.decoder.config.eos_ids[0])
    with LLM(
        toy_loaded(), draft_model=LoadedModel("draft", breaking, draft.tokenizer), method="branch", planner="fixed"
    ) as llm:
        patient(drafter_of(llm))
        params = SamplingParams(max_tokens=20)
        first = llm.generate("the tide", params)[0]
        breaking.fail = True
        with pytest.raises(RuntimeError, match="broke"):
            llm.generate("the tide", params)
        breaking.fail = False
        llm.check_integrity()
        assert llm.generate("the tide", params)[0].token_ids == first.token_ids
        assert first.stats.mean_accepted > 3


def test_real_text() -> None:
    """The default model drafts for itself."""
    try:
        llm = LLM(
            "smollm2-135m",
            draft_model="smollm2-135m",
            method="branch",
            planner="fixed",
            threads=1,
            max_batch=1,
            kv_tokens=512,
        )
    except DownloadError as e:
        pytest.skip(f"the default model is neither in the cache nor to be had: {e}")
    with llm, llm.with_method("plain") as reference:
        drafter = patient(drafter_of(llm))
        for temperature in (0.0, 0.8):
            params = SamplingParams(max_tokens=48, temperature=temperature, seed=2)
            result = llm.chat("List the planets of the solar system.", params)
            assert result.token_ids == reference.chat("List the planets of the solar system.", params).token_ids
            assert result.stats.mean_accepted > 2.5
        assert drafter.overlap.hits > 0
