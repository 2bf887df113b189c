"""Superposed Decoding: several continuations from one autoregressive pass.

Shapes: `k` drafts, `D` model width, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from math import exp, inf, log

import numpy as np

from ...errors import ParameterError
from ...models.decoder import Decoder
from ...models.tokenizer import Tokenizer
from ...ops.select import row_topk
from ...registry import register
from ...types import Accepted, DecodingStats, Exactness, FloatArray, Result, SamplingParams
from ..advance import Advance, Outcome, Work
from ..contracts import Sequence
from ..ngram_model import NgramModel
from ..outputs import TargetOutputs
from ..planners.planner import StepBudget
from ..sampling import History, host_row, process

MOST_DRAFTS = 16


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
    """The likeliest drafts per token first."""

    drafts: list[Suggestion]
    method: str
    exactness: Exactness
    stats: DecodingStats  # its steps are the forwards after the prompt's


@register(
    kind="mode",
    family="SPEC",
    title="Superposed Decoding: several suggestions from one pass",
    paper="https://arxiv.org/abs/2405.18400",
    exactness="approximate",
    claim="at least 2.44x for three drafts or more",
)
class Superposed(Advance):
    """Keeps the `k` likeliest drafts of one request. Each step feeds the mean of the embeddings of their last tokens,
    weighted by their probabilities, through the model once; its answer, mixed with what n-gram models say of each
    draft's own end, gives every draft its next candidates, and of those of all drafts the `k` likeliest go on.

    Shen et al., "Superposed Decoding: Multiple Generations from a Single Autoregressive Inference Pass", section 3. The
    paper's n-gram models come from a large corpus; here they are counted from the prompt and from texts that the caller
    names, and rest on the model's own answer where those say nothing. Drafts are approximate: past the first token the
    model never sees one of them alone. With k = 1 nothing is mixed and the draft is that of greedy decoding.

    Parameters: `k` drafts; `texts` are counted into the n-gram models beside the prompt; `stop` strings, which are the
    drafts' and not the request's; `ngram_weight` exponent of the n-gram models against the model's own probability, the
    paper's alpha; `ngram_order` longest n-grams counted. Raises ParameterError for a value out of range.
    """

    name = "superposed"
    paper = "https://arxiv.org/abs/2405.18400"
    shares_output = False

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: Tokenizer,
        k: int = 3,
        texts: Seq[str] = (),
        stop: tuple[str, ...] = (),
        ngram_weight: float = 0.54,
        ngram_order: int = 4,
    ) -> None:
        if not 1 <= k <= min(MOST_DRAFTS, decoder.config.vocab_size // 2):
            raise ParameterError(f"k={k!r} drafts are out of range: it must be from 1 to {MOST_DRAFTS}")
        if not 0 <= ngram_weight < 1:
            raise ParameterError(f"ngram_weight={ngram_weight!r} is out of range: it must be from 0 to below 1")
        if not 2 <= ngram_order <= 16:
            raise ParameterError(f"ngram_order={ngram_order!r} is out of range: it must be from 2 to 16")
        self.decoder, self.tokenizer, self.k, self.stop = decoder, tokenizer, k, stop
        self.texts, self.ngram_weight = [tokenizer.encode(text) for text in texts], ngram_weight
        self.ngrams = NgramModel(order=ngram_order)
        self._id: int | None = None
        self._stop_ids: frozenset[int] = frozenset()
        self._alive = [Suggestion([], 0.0)]
        self._finished: list[Suggestion] = []
        self._vectors: list[FloatArray] = []  # f32[D] of each position of the output

    @property
    def exactness(self) -> Exactness:
        return "approximate"

    def check(self, params: SamplingParams) -> None:
        if params.constraint is not None:
            raise ParameterError(f"superposed decoding cannot keep drafts to {params.constraint[0]}: leave it out")
        if not params.greedy or params.logprobs is not None:
            raise ParameterError(
                "superposed decoding keeps the likeliest drafts and draws none: it takes temperature=0 and no "
                "logprobs; for several sampled answers generate the prompt several times with different seeds"
            )

    def begin(self, sequence: Sequence) -> None:
        assert self._id in (None, sequence.id), "one for each request"
        if self._id is None:
            self._id, self._stop_ids = sequence.id, sequence.stop_ids
            for text in (sequence.tokens, *self.texts):
                self.ngrams.read(text)

    def read(self, sequence: Sequence, start: int, n: int) -> Work:
        work, first = Advance.read(self, sequence, start, n), start - sequence.prompt_length
        if first + n > 0:
            work.embeddings = self.decoder.embedding(np.array(work.tokens, dtype=np.int64))
            work.embeddings[max(-first, 0) :] = self._vectors[max(first, 0) : first + n]
        return work

    def spans(self, sequences: Seq[Sequence], budget: StepBudget) -> list[Work]:
        return [self.read(sequence, len(sequence.tokens) - 1, 1) for sequence in sequences]

    def judge(self, sequence: Sequence, work: Work, outputs: TargetOutputs) -> Outcome:
        """The token that it gives is the last one of the likeliest draft: it stands in its place for all of them."""
        alive = self._alive = self._grow(sequence, host_row(outputs.logits(0)))
        if not alive or not self._open():
            return Outcome(Accepted([], []), finished=True)
        self._vectors.append(self._superpose())
        return Outcome(Accepted([], alive[0].token_ids[-1:]))

    def found(self, result: Result) -> Suggestions:
        """The `k` best drafts whose texts differ, cut before stop strings; `result` is that of the request."""
        kept: dict[str, Suggestion] = {}
        for draft in sorted([*self._finished, *self._alive], key=lambda draft: -draft.mean_score):
            text = self._text(draft.token_ids)
            draft.text = text[: min((at for stop in self.stop if (at := text.find(stop)) >= 0), default=len(text))]
            kept.setdefault(draft.text, draft)
        return Suggestions(list(kept.values())[: self.k], self.name, self.exactness, result.stats)

    def _text(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens[:-1] if tokens and tokens[-1] in self._stop_ids else tokens)

    def _superpose(self) -> FloatArray:
        """Mean of the drafts' last embeddings, weighted by the drafts' probabilities. f32[D]"""
        last = np.array([draft.token_ids[-1] for draft in self._alive], dtype=np.int64)
        scores = [draft.score for draft in self._alive]
        weights = np.exp(np.array(scores) - max(scores))
        weights /= weights.sum()
        mean: FloatArray = (weights[:, None] * self.decoder.embedding(last)).sum(axis=0)
        return mean.astype(np.float32)

    def _grow(self, sequence: Sequence, row: FloatArray) -> list[Suggestion]:
        """The likeliest k of all drafts and their candidates. A draft that ends leaves its place to the next."""
        grown: list[Suggestion] = []
        for draft in self._alive:
            for token, p in self._candidates(sequence, draft, row):
                grown.append(Suggestion([*draft.token_ids, token], draft.score + log(p) if p > 0 else -inf))
        grown.sort(key=lambda draft: -draft.score)  # stable: of equals the earlier
        going: list[Suggestion] = []
        for draft in grown:
            if len(going) == self.k:
                break
            if draft.token_ids[-1] in self._stop_ids or (self.stop and self._stops(draft.token_ids)):
                self._finished.append(replace(draft, finished=True))
                if self.k == 1:
                    return []
            else:
                going.append(draft)
        return going

    def _stops(self, tokens: list[int]) -> bool:
        text = self._text(tokens)
        return any(stop in text for stop in self.stop)

    def _candidates(self, sequence: Sequence, draft: Suggestion, row: FloatArray) -> list[tuple[int, float]]:
        """The draft's likeliest next tokens with their probabilities, k of them."""
        k, weight, params = self.k, self.ngram_weight, sequence.params
        prompt = sequence.tokens[: sequence.prompt_length]
        if params.edits_logits:
            so_far = History([*prompt, *draft.token_ids], len(prompt), stop_ids=self._stop_ids)
            row = process(row, params, so_far)
        values, ids = _top(row, 2 * k)
        highest = float(values[0])
        norm = highest + log(float(np.exp(row - values[0]).sum(dtype=np.float64)))
        base = {token: exp(value - norm) for token, value in zip(ids.tolist(), values.tolist(), strict=True)}
        if k > 1 and weight > 0:
            # Where no n-gram speaks the order is the model's own: nothing else can be among the likeliest.
            context = [*prompt[-self.ngrams.order :], *draft.token_ids]
            for token in self.ngrams.continuations(context):
                base.setdefault(token, exp(float(row[token]) - norm))
            base = {
                token: p ** (1 - weight) * self.ngrams.probability(context, token, p) ** weight
                for token, p in base.items()
            }
        return sorted(base.items(), key=lambda item: -item[1])[:k]

    def _open(self) -> bool:
        """Whether going on may still change the result: some draft that goes on is likelier than the k-th finished."""
        done = sorted((draft.score for draft in self._finished), reverse=True)
        return len(done) < self.k or self._alive[0].score > done[self.k - 1]


def _top(row: FloatArray, k: int) -> tuple[FloatArray, np.ndarray]:
    values, ids = row_topk(row[None], min(k, len(row)))
    return values[0], ids[0]
