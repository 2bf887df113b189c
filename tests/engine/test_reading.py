"""What reading a prompt tells, against plain reads: log-probabilities of its tokens, and a vector of the text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hashing import HashDecoder, engine_options, oracle, plain_tokens
from hashing import Scripted as ScriptedDrafter
from toy import ARCHITECTURES, random_tokens, toy_checkpoint

from outpace.decoding.drafters.plain import Plain
from outpace.decoding.verify.coupled import CoupledVerifier
from outpace.engine.engine import Engine
from outpace.errors import ParameterError
from outpace.models.decoder import Decoder
from outpace.models.native import NativeDecoder
from outpace.models.torch_decoder import TorchDecoder
from outpace.types import PromptReading, RequestOptions, Result, SamplingParams

PROMPTS = [list(range(30)), [7], [5, 6] * 25, [3, 1, 4, 1, 5, 9, 2, 6] * 6]


def engine_of(decoder: Decoder, drafter: object = None, **limits: object) -> Engine:
    return Engine(decoder, drafter or Plain(), CoupledVerifier(), options=engine_options(**limits))  # type: ignore[arg-type]


def finish(engine: Engine, ids: list[int]) -> list[Result]:
    results: dict[int, Result] = {}
    while not engine.idle:
        for event in engine.step():
            assert event.error is None, event.error
            if event.result is not None:
                results[event.id] = event.result
        engine.check_integrity()
    return [results[id] for id in ids]


def plain_logprobs(decoder: HashDecoder, prompt: list[int]) -> np.ndarray:
    """[T - 1, V] by definition: what each beginning of the prompt says of the next token."""
    seen = [np.array([[t, i] for i, t in enumerate(prompt[:n])]) for n in range(1, len(prompt))]
    rows = torch.from_numpy(np.array([decoder.logits(s) for s in seen]).reshape(-1, decoder.config.vocab_size))
    return torch.log_softmax(rows.double(), dim=1).numpy()


def check(decoder: HashDecoder, prompt: list[int], k: int, reading: PromptReading | None) -> None:
    assert reading is not None and reading.logprobs is not None and reading.top_logprobs is not None
    rows = plain_logprobs(decoder, prompt)
    expected = rows[np.arange(len(prompt) - 1), prompt[1:]]
    np.testing.assert_allclose(reading.logprobs, expected, atol=1e-5)
    assert len(reading.top_logprobs) == len(prompt) - 1
    for row, top in zip(rows, reading.top_logprobs, strict=True):
        best = np.argsort(-row)[:k]
        assert [t for t, _ in top] == best.tolist()
        np.testing.assert_allclose([p for _, p in top], row[best], atol=1e-5)


@pytest.mark.parametrize("limits", [{}, {"prefill_rows": 7}, {"max_batch": 2, "prefill_rows": 40}])
def test_log_probabilities_of_a_prompt_are_those_of_plain_reads(limits: dict[str, int]) -> None:
    decoder = HashDecoder()
    engine = engine_of(decoder, ScriptedDrafter(oracle(decoder, right=0.7)), prefix_cache=True, **limits)
    wanted = [3, 0, None, 2]
    ids = [
        engine.add(prompt, SamplingParams(max_tokens=9, temperature=0.7, seed=4, prompt_logprobs=k))
        for prompt, k in zip(PROMPTS, wanted, strict=True)
    ]
    for prompt, k, result in zip(PROMPTS, wanted, finish(engine, ids), strict=True):
        if k is None:
            assert result.prompt is None
        else:
            check(decoder, prompt, k, result.prompt)
            assert result.prompt is not None and result.prompt.embedding is None


def test_log_probabilities_do_not_depend_on_what_follows() -> None:
    """Nor on how the prompt was cut into chunks: the same bits."""
    native = decoders("llama")[0]
    tokens = random_tokens(60, seed=5).tolist()

    def scored(n: int, **limits: int) -> Sequence[float]:
        engine = engine_of(native, **limits)
        (result,) = finish(engine, [engine.add(tokens[:n], SamplingParams(max_tokens=1, prompt_logprobs=2))])
        assert result.prompt is not None and result.prompt.logprobs is not None
        return result.prompt.logprobs

    whole = scored(60)
    assert scored(17) == whole[:16] and scored(60, prefill_rows=7) == whole


def test_what_is_written_does_not_depend_on_whether_the_prompt_is_scored() -> None:
    decoder = HashDecoder()
    engine = engine_of(decoder, prefix_cache=True)
    ids = [engine.add(p, SamplingParams(max_tokens=12, prompt_logprobs=1)) for p in PROMPTS]
    for prompt, result in zip(PROMPTS, finish(engine, ids), strict=True):
        assert result.token_ids == plain_tokens(decoder, prompt, 12)


def test_a_cached_prompt_is_read_again_when_it_is_scored_and_only_then() -> None:
    decoder, prompt = HashDecoder(), PROMPTS[3]
    engine = engine_of(decoder, prefix_cache=True)
    for k, cached in ((None, 0), (2, 0), (None, len(prompt) - 1)):
        (result,) = finish(engine, [engine.add(prompt, SamplingParams(max_tokens=1, prompt_logprobs=k))])
        assert result.stats.cached_tokens == cached
        if k is not None:
            check(decoder, prompt, k, result.prompt)


def test_rows_with_logits_are_few_in_a_step() -> None:
    decoder = HashDecoder()
    engine = engine_of(decoder, kv_tokens=2048)
    shapes: list[int] = []
    forward = decoder.forward

    def counting(batch, storage, taps):  # type: ignore[no-untyped-def]
        shapes.append(len(batch.logit_rows))
        return forward(batch, storage, taps)

    decoder.forward = counting  # type: ignore[method-assign]
    prompts = [random_tokens(n, seed=n) % 39 for n in (200, 90, 60)]
    ids = [engine.add(p.tolist(), SamplingParams(max_tokens=1, prompt_logprobs=0)) for p in prompts]
    for prompt, result in zip(prompts, finish(engine, ids), strict=True):
        check(decoder, prompt.tolist(), 0, result.prompt)
    assert max(shapes) <= 128 and sum(shapes) == 350


def test_a_preempted_prompt_is_scored_once() -> None:
    decoder = HashDecoder()
    engine = engine_of(decoder, kv_tokens=96, prefill_rows=16, max_batch=3, prefix_cache=True)
    low = engine.add(PROMPTS[2], SamplingParams(max_tokens=20, prompt_logprobs=2), options=RequestOptions(priority=5))
    engine.step()
    high = engine.add(PROMPTS[3], SamplingParams(max_tokens=20, prompt_logprobs=2), options=RequestOptions(priority=-5))
    results = finish(engine, [low, high])
    assert results[0].stats.preemptions, "the first one made room while its prompt was read"
    for prompt, result in zip((PROMPTS[2], PROMPTS[3]), results, strict=True):
        check(decoder, prompt, 2, result.prompt)
        assert result.token_ids == plain_tokens(decoder, prompt, 20)


def decoders(architecture: str) -> list[Decoder]:
    checkpoint, _ = toy_checkpoint(architecture)
    return [NativeDecoder.from_checkpoint(checkpoint, "float32", threads=1), TorchDecoder.from_checkpoint(checkpoint)]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_vectors_are_pooled_from_the_final_hidden_states(architecture: str) -> None:
    _, model = toy_checkpoint(architecture)
    texts = [random_tokens(n, seed=n).tolist() for n in (41, 3, 24)]
    hidden = [model.model(torch.tensor([t]), use_cache=False).last_hidden_state[0].double().numpy() for t in texts]
    for decoder in decoders(architecture):
        for pooling in ("mean", "last"):
            engine = engine_of(decoder, prefix_cache=True, prefill_rows=16)
            options = RequestOptions(method="plain", pooling=pooling)  # type: ignore[arg-type]
            ids = [engine.add(t, SamplingParams(max_tokens=1), options=options) for t in texts]
            ids.append(engine.add(texts[0], SamplingParams(max_tokens=5)))  # somebody writes beside them
            results = finish(engine, ids)
            for states, result in zip(hidden, results, strict=False):
                pooled = states.mean(axis=0) if pooling == "mean" else states[-1]
                assert result.prompt is not None and result.prompt.embedding is not None
                assert result.prompt.logprobs is None
                np.testing.assert_allclose(result.prompt.embedding, pooled / np.linalg.norm(pooled), atol=2e-4)
            assert results[-1].prompt is None


def test_a_text_that_was_embedded_is_not_in_the_prefix_cache() -> None:
    checkpoint, _ = toy_checkpoint("llama")
    engine = engine_of(NativeDecoder.from_checkpoint(checkpoint, "float32", threads=1), prefix_cache=True)
    text = random_tokens(50).tolist()
    finish(engine, [engine.add(text, SamplingParams(max_tokens=1), options=RequestOptions(pooling="mean"))])
    (result,) = finish(engine, [engine.add(text, SamplingParams(max_tokens=1))])
    assert result.stats.cached_tokens == 0


def test_what_cannot_be_read_is_refused_by_name() -> None:
    with pytest.raises(ParameterError, match=r"prompt_logprobs=21 is out of range"):
        SamplingParams(prompt_logprobs=21)
    with pytest.raises(ParameterError, match=r"pooling='max' is unknown: it must be one of mean, last"):
        RequestOptions(pooling="max")  # type: ignore[arg-type]


def test_the_cpu_decoder_pools_and_scores_without_torch() -> None:
    """To import it takes a second, in which the streams of others would stand still."""
    checkpoint, _ = toy_checkpoint("llama")
    engine = engine_of(NativeDecoder.from_checkpoint(checkpoint, "float32", threads=1))
    given: dict[str, object] = {}
    forward = engine.decoder.forward

    def keep(batch, storage, taps):  # type: ignore[no-untyped-def]
        out = forward(batch, storage, taps)
        given.update(rows=out.rows, hidden=out.hidden[engine.decoder.config.num_layers - 1])
        return out

    engine.decoder.forward = keep  # type: ignore[method-assign]
    options = RequestOptions(pooling="mean")
    finish(engine, [engine.add(PROMPTS[0], SamplingParams(max_tokens=1, prompt_logprobs=1), options=options)])
    assert isinstance(given["rows"], np.ndarray) and isinstance(given["hidden"], np.ndarray)
    assert isinstance(engine.decoder.final_norm(given["hidden"]), np.ndarray)
