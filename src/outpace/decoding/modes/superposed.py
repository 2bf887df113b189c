"""Superposed Decoding: several continuations from one autoregressive pass.

Shapes: `k` drafts, `D` model width, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from math import exp, inf, log
from time import perf_counter
from typing import Any

import numpy as np

from ...cache.pages import PAGE_SIZE, PagedKVCache
from ...errors import CapacityError, ParameterError
from ...models.batch import Span, pack
from ...models.decoder import Decoder
from ...models.tokenizer import Tokenizer
from ...ops.select import row_topk
from ...registry import register
from ...types import Exactness, FloatArray, SamplingParams
from ..ngram_model import NgramModel
from ..sampling import History, host_row, process

MOST_DRAFTS = 16
_CHUNK = 512  # rows of one forward while the prompt is read


@dataclass(slots=True)
class Suggestion:
    """One of the drafts. `score` is the logarithm of its probability under the mixture that chose it."""

    token_ids: list[int]
    score: float
    finished: bool = False  # a stop token or a stop string ended it
    text: str = ""

    @property
    def mean_score(self) -> float:
        """Per token, so that drafts of different lengths can be ranked."""
        return self.score / max(len(self.token_ids), 1)


@dataclass(slots=True)
class Suggestions:
    """The likeliest drafts per token first. `forwards` are those after the prompt's."""

    drafts: list[Suggestion]
    method: str
    exactness: Exactness
    prompt_tokens: int = 0
    forwards: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0


@register(
    kind="mode",
    family="SPEC",
    title="Superposed Decoding: several suggestions from one pass",
    paper="https://arxiv.org/abs/2405.18400",
    exactness="approximate",
    claim="at least 2.44x for three drafts or more",
)
class Superposed:
    """Keeps the `k` likeliest drafts. Each step feeds the mean of the embeddings of their last tokens, weighted by
    their probabilities, through the model once; its answer, mixed with what n-gram models say of each draft's own end,
    gives every draft its next candidates, and of those of all drafts the `k` likeliest go on.

    Shen et al., "Superposed Decoding: Multiple Generations from a Single Autoregressive Inference Pass", section 3. The
    paper's n-gram models come from a large corpus; here they are counted from the prompt and from texts that the caller
    names, and rest on the model's own answer where those say nothing. Drafts are approximate: past the first token the
    model never sees one of them alone. With k = 1 nothing is mixed and the draft is that of greedy decoding.

    Parameters: `k` drafts; `ngram_weight` exponent of the n-gram models against the model's own probability, the
    paper's alpha; `ngram_order` longest n-grams counted.
    Raises ParameterError for a value out of range.
    """

    name = "superposed"
    paper = "https://arxiv.org/abs/2405.18400"

    def __init__(self, decoder: Decoder, k: int = 3, ngram_weight: float = 0.54, ngram_order: int = 4) -> None:
        if not 1 <= k <= min(MOST_DRAFTS, decoder.config.vocab_size // 2):
            raise ParameterError(f"k={k!r} drafts are out of range: it must be from 1 to {MOST_DRAFTS}")
        if not 0 <= ngram_weight < 1:
            raise ParameterError(f"ngram_weight={ngram_weight!r} is out of range: it must be from 0 to below 1")
        if not 2 <= ngram_order <= 16:
            raise ParameterError(f"ngram_order={ngram_order!r} is out of range: it must be from 2 to 16")
        self.decoder, self.k, self.ngram_weight, self.ngram_order = decoder, k, ngram_weight, ngram_order

    def run(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        stop_ids: frozenset[int] = frozenset(),
        texts: Sequence[Sequence[int]] = (),
        ended: Callable[[list[int]], bool] | None = None,
    ) -> Suggestions:
        """At least `k` drafts if there are so many: those that ended and those that might go on. `texts` are counted
        into the n-gram models beside the prompt; `ended` says whether a draft's tokens complete a stop string. Raises
        ParameterError for parameters that this mode cannot follow, CapacityError if prompt and drafts are longer than
        the model's context.
        """
        self._check(prompt, params)
        round_ = _Round(self, list(prompt), params, stop_ids, NgramModel([prompt, *texts], self.ngram_order), ended)
        began = perf_counter()
        pages = -(-(len(prompt) + params.max_tokens) // PAGE_SIZE)
        cache = PagedKVCache(self.decoder.new_storage(pages))
        kv = cache.new()
        for start in range(0, len(prompt), _CHUNK):
            row = self._forward(cache, kv, prompt[start : start + _CHUNK])
        prefilled = perf_counter()
        alive = round_.advance([Suggestion([], 0.0)], row)
        forwards = 0
        while alive and len(alive[0].token_ids) < params.max_tokens and round_.open(alive):
            last = np.array([draft.token_ids[-1] for draft in alive], dtype=np.int64)
            row = self._forward(cache, kv, last[:1], self._superpose(last, [draft.score for draft in alive]))
            alive = round_.advance(alive, row)
            forwards += 1
        drafts = round_.best(alive)
        times = {"prefill_s": prefilled - began, "decode_s": perf_counter() - prefilled}
        return Suggestions(drafts, self.name, "approximate", len(prompt), forwards, **times)

    def _check(self, prompt: Sequence[int], params: SamplingParams) -> None:
        if params.constraint is not None:
            raise ParameterError(f"superposed decoding cannot keep drafts to {params.constraint[0]}: leave it out")
        if not params.greedy or params.logprobs is not None:
            raise ParameterError(
                "superposed decoding keeps the likeliest drafts and draws none: it takes temperature=0 and no "
                "logprobs; for several sampled answers generate the prompt several times with different seeds"
            )
        if not len(prompt):
            raise ParameterError("the prompt is empty: give at least one token (a start-of-text token will do)")
        most = self.decoder.config.max_position
        if len(prompt) + params.max_tokens > most:
            raise CapacityError(
                f"the prompt has {len(prompt)} tokens and max_tokens is {params.max_tokens}, but the context is "
                f"{most}; shorten the prompt or request fewer tokens"
            )

    def _superpose(self, last: np.ndarray, scores: list[float]) -> FloatArray:
        """Mean of the drafts' last embeddings, weighted by the drafts' probabilities. f32[1, D]"""
        weights = np.exp(np.array(scores) - max(scores))
        weights /= weights.sum()
        mean: FloatArray = (weights[:, None] * self.decoder.embedding(last)).sum(axis=0, keepdims=True)
        return mean.astype(np.float32)

    def _forward(
        self, cache: PagedKVCache, kv: int, tokens: Sequence[int] | np.ndarray, embeddings: FloatArray | None = None
    ) -> FloatArray:
        """Read tokens, or one vector in the place of one. Returns the last row's logits, f32[V]; a view."""
        cache.reserve(kv, len(tokens))
        span = Span(np.asarray(tokens, dtype=np.int64), cache.length(kv), logits="last")
        batch = pack([span], cache.page_tables([kv]))
        if embeddings is not None:
            batch.embeddings = embeddings
        logits = self.decoder.forward(batch, cache.storage).rows
        cache.commit(kv, range(len(tokens)))
        return host_row(logits[0])


@dataclass(slots=True, eq=False)
class _Round:
    """One call of `run`: how drafts grow, and those that are over."""

    mode: Superposed
    prompt: list[int]
    params: SamplingParams
    stop_ids: frozenset[int]
    ngrams: NgramModel
    ended: Callable[[list[int]], bool] | None
    finished: list[Suggestion] = field(default_factory=list)

    def advance(self, alive: list[Suggestion], row: FloatArray) -> list[Suggestion]:
        """The likeliest k of all drafts and their candidates. A draft that ends leaves its place to the next."""
        grown: list[Suggestion] = []
        for draft in alive:
            for token, p in self._candidates(draft, row):
                grown.append(Suggestion([*draft.token_ids, token], draft.score + log(p) if p > 0 else -inf))
        grown.sort(key=lambda draft: -draft.score)  # stable: of equals the earlier
        going: list[Suggestion] = []
        for draft in grown:
            if len(going) == self.mode.k:
                break
            if draft.token_ids[-1] in self.stop_ids or (self.ended is not None and self.ended(draft.token_ids)):
                self.finished.append(replace(draft, finished=True))
                if self.mode.k == 1:
                    return []
            else:
                going.append(draft)
        return going

    def _candidates(self, draft: Suggestion, row: FloatArray) -> list[tuple[int, float]]:
        """The draft's likeliest next tokens with their probabilities, k of them."""
        k, weight, params = self.mode.k, self.mode.ngram_weight, self.params
        if params.edits_logits:
            so_far = History([*self.prompt, *draft.token_ids], len(self.prompt), stop_ids=self.stop_ids)
            row = process(row, params, so_far)
        values, ids = _top(row, 2 * k)
        highest = float(values[0])
        norm = highest + log(float(np.exp(row - values[0]).sum(dtype=np.float64)))
        base = {token: exp(value - norm) for token, value in zip(ids.tolist(), values.tolist(), strict=True)}
        if k > 1 and weight > 0:
            # Where no n-gram speaks the order is the model's own: nothing else can be among the likeliest.
            context = [*self.prompt[-self.ngrams.order :], *draft.token_ids]
            for token in self.ngrams.continuations(context):
                base.setdefault(token, exp(float(row[token]) - norm))
            base = {
                token: p ** (1 - weight) * self.ngrams.probability(context, token, p) ** weight
                for token, p in base.items()
            }
        return sorted(base.items(), key=lambda item: -item[1])[:k]

    def open(self, alive: list[Suggestion]) -> bool:
        """Whether going on may still change the result: some draft that goes on is likelier than the k-th finished."""
        done = sorted((draft.score for draft in self.finished), reverse=True)
        return len(done) < self.mode.k or alive[0].score > done[self.mode.k - 1]

    def best(self, alive: list[Suggestion]) -> list[Suggestion]:
        return sorted([*self.finished, *alive], key=lambda draft: -draft.mean_score)


def _top(row: FloatArray, k: int) -> tuple[FloatArray, np.ndarray]:
    values, ids = row_topk(row[None], min(k, len(row)))
    return values[0], ids[0]


def suggest(
    decoder: Decoder,
    tokenizer: Tokenizer,
    prompt: Sequence[int],
    params: SamplingParams,
    texts: Sequence[str] = (),
    **options: Any,
) -> Suggestions:
    """`Superposed.run` with text: `k` drafts whose texts differ, cut before stop strings. `options` are parameters of
    Superposed. Raises what it raises."""
    mode = Superposed(decoder, **options)
    stop_ids = frozenset(params.stop_token_ids)
    if not params.ignore_eos:
        stop_ids |= tokenizer.eos_ids | frozenset(decoder.config.eos_ids)

    def text_of(tokens: list[int]) -> str:
        return tokenizer.decode(tokens[:-1] if tokens and tokens[-1] in stop_ids else tokens)

    def ended(tokens: list[int]) -> bool:
        text = text_of(tokens)
        return any(stop in text for stop in params.stop)

    read = [tokenizer.encode(text) for text in texts]
    found = mode.run(prompt, params, stop_ids, read, ended if params.stop else None)
    kept: dict[str, Suggestion] = {}
    for draft in found.drafts:
        text = text_of(draft.token_ids)
        draft.text = text[: min((at for stop in params.stop if (at := text.find(stop)) >= 0), default=len(text))]
        kept.setdefault(draft.text, draft)
    found.drafts = list(kept.values())[: mode.k]
    return found
