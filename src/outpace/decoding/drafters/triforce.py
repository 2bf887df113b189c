"""TriForce: a tiny drafter drafts for the target with a few retrieved pages, and that drafts for the whole cache."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...cache.native_storage import NativeStorage
from ...cache.pages import PagedKVCache
from ...errors import ParameterError
from ...models.batch import PAGE_SIZE, ForwardBatch
from ...models.decoder import Taps
from ...models.native import NativeDecoder
from ...registry import register
from ...types import FloatArray, IntArray, Logits
from ..contracts import DrafterContext, Market, Observation, Sequence
from ..sampling import host_row
from .draft_model import DraftChain
from .grown import Draws, Growth
from .guessers import Guesser, LookupGuesser, ModelGuesser
from .sources import ModelSource, Rows, SelfSource
from .sparse import Streaming, keep_pages, pages_of, require_cpu, require_whole_attention


@dataclass(slots=True)
class _Chosen:
    """What one sequence's view holds: `pages` of those before `recent`, and all from there on."""

    tokens: int  # when it was chosen
    pages: IntArray
    recent: int
    means: FloatArray  # [pages, Hkv, C] of its full pages


class Retrieval:
    """A KVView of the pages whose keys answer the last query best, chosen anew every `rebuild` tokens.

    A page's score is the share of attention that its mean key would get, over all pages, averaged over the heads of the
    last layer. The first page and the `window` last ones are always in. The forward before a choice reads everything.
    """

    def __init__(self, layer: int, cache: PagedKVCache, budget: int, window: int, rebuild: int) -> None:
        self.layer, self.cache, self.budget, self.window, self.rebuild = layer, cache, budget, window, rebuild
        self._chosen: dict[int, _Chosen] = {}

    def __call__(self, batch: ForwardBatch, sequences: Seq[Sequence]) -> ForwardBatch:
        return keep_pages(
            batch, [self.pages(s, int(n) // PAGE_SIZE) for s, n in zip(sequences, batch.committed, strict=True)]
        )

    def pages(self, sequence: Sequence, full: int) -> IntArray:
        """Which of the `full` pages are read now, ascending."""
        if self.stale(sequence):
            return np.arange(full)
        chosen = self._chosen[sequence.id]
        return np.concatenate((chosen.pages, np.arange(chosen.recent, full)))

    def stale(self, sequence: Sequence) -> bool:
        chosen = self._chosen.get(sequence.id)
        return chosen is None or len(sequence.tokens) - chosen.tokens >= self.rebuild

    def choose(self, sequence: Sequence, queries: FloatArray) -> None:
        """By the queries of the last token. f32[Hq, C]"""
        storage = self.cache.storage
        assert isinstance(storage, NativeStorage)
        full = self.cache.length(sequence.kv) // PAGE_SIZE
        table = self.cache.page_table(sequence.kv)
        old = self._chosen.get(sequence.id)
        fresh = storage.page_means(self.layer, table[0 if old is None else len(old.means) : full])
        means = fresh if old is None else np.concatenate((old.means, fresh))
        recent = max(full - self.window, 0)
        pages = np.arange(recent)
        if recent > self.budget:
            shares = self._shares(queries, means)[:recent]
            best = np.argsort(-shares, kind="stable")
            pages = np.union1d(best[best > 0][: self.budget - 1], [0])
        self._chosen[sequence.id] = _Chosen(len(sequence.tokens), pages, recent, means)

    @staticmethod
    def _shares(queries: FloatArray, means: FloatArray) -> FloatArray:
        """Of attention, in the mean over heads. [Hq, C], [P, Hkv, C] -> [P]"""
        grouped = queries.reshape(means.shape[1], -1, queries.shape[1])
        scores = np.einsum("hgc,phc->hgp", grouped, means).reshape(-1, len(means))
        shares = np.exp(scores - scores.max(axis=1, keepdims=True))
        mean: FloatArray = (shares / shares.sum(axis=1, keepdims=True)).mean(axis=0)
        return mean

    def forget(self, sequence: Sequence) -> None:
        self._chosen.pop(sequence.id, None)


@register(
    family="SPEC",
    title="Hierarchical self-drafting with retrieved pages (TriForce)",
    paper="https://arxiv.org/abs/2404.11912",
    exactness="identical",
    needs=("CPU target, full attention in every layer", "draft model (optional)"),
    claim="up to 2.31x (Llama2-7B, 128K context, A100)",
)
class TriForce(DraftChain):
    """Three levels. A third drafter guesses a few tokens: the draft model if one is given, with a streaming window over
    its own cache, else a lookup of what followed the same tokens before. The target, reading only the pages of its
    cache that the current query selects, checks the guesses and adds a token of its own, several times over; what it
    says is the draft. The target with its whole cache verifies. It pays for texts so long that reading keys and values
    costs more than reading weights.

    Sun et al., "TriForce: Lossless Acceleration of Long Sequence Generation with Hierarchical Speculative Decoding",
    section 4 (retrieval by the query against chunks' mean keys; hierarchy). The paper chooses chunks for each layer and
    head; here a page of 16 tokens is read by all of them or by none, and the last layer's queries choose.

    Parameters: `budget` tokens retrieved, `window` last tokens always read, both rounded up to pages of 16; `rebuild`
    tokens after which pages are chosen anew; `guesses` of the third drafter at a time; `third_window` tokens that a
    draft model reads; those of the chain (see DraftChain). Raises MethodError for a model with sliding-window layers or
    on CUDA, ParameterError out of range.
    """

    source: SelfSource

    name = "triforce"
    paper = "https://arxiv.org/abs/2404.11912"

    def __init__(
        self,
        source: SelfSource,
        decoder: NativeDecoder,
        third: ModelSource | None = None,
        draws: Draws = Draws.COUPLED,
        max_tokens: int = 12,
        min_reach: float = 0.2,
        budget: int = 512,
        window: int = 64,
        rebuild: int = 64,
        guesses: int = 4,
        third_window: int = 256,
    ) -> None:
        super().__init__(source, draws, max_tokens, min_reach)
        for name, value in (("budget", budget), ("window", window), ("rebuild", rebuild), ("guesses", guesses)):
            if value < 1:
                raise ParameterError(f"{self.name}:{name}={value} is out of range: it must be at least 1")
        require_whole_attention(decoder, self.name)
        self.guesses = guesses
        last = decoder.config.num_layers - 1
        source.taps = Taps(queries=(last,))
        source.view = self.retrieval = Retrieval(last, source.cache, pages_of(budget), pages_of(window), rebuild)
        self.third: Guesser = LookupGuesser()
        if third is not None:
            require_whole_attention(third.decoder, self.name)
            third.view = Streaming(self.name, PAGE_SIZE, third_window)
            self.third = ModelGuesser(third, draws is Draws.COUPLED)

    @classmethod
    def create(cls, context: DrafterContext, **options: Any) -> TriForce:  # type: ignore[override]
        source, decoder = SelfSource.of(context, cls.name), require_cpu(context, cls.name)
        third = None
        if context.draft is not None:
            third = ModelSource(context.draft, context.draft_pages, context.vocab_size)
        return cls(source, decoder, third, Draws.of(context), **options)

    def begin(self, sequence: Sequence) -> None:
        super().begin(sequence)
        self.third.begin(sequence)

    def end(self, sequence: Sequence) -> None:
        super().end(sequence)
        self.retrieval.forget(sequence)
        self.third.end(sequence)

    def observe(self, sequence: Sequence, seen: Observation) -> None:
        one = self._growths.get(sequence.id)
        if one is not None:
            said = sequence.tokens[one.root :]
            wrong = (i for i, (a, b) in enumerate(zip(one.tokens, said, strict=False)) if a != b)
            self.third.observe(sequence, next(wrong, min(len(said), len(one.tokens))))
        super().observe(sequence, seen)

    def _rows(self, budget: int) -> int:
        """Every forward runs a node and the guesses behind it, and gives one node at least."""
        return (min(budget, self.max_tokens) - 1) * (1 + self.guesses)

    def _grow(self, growing: list[Growth], logits: Logits, market: Market) -> None:
        queries = self.source.output.queries[self.retrieval.layer]
        for row, one in enumerate(growing):
            if self.retrieval.stale(one.sequence):
                self.retrieval.choose(one.sequence, host_row(queries[row]))
            self.third.rollback(one.sequence)  # of a round that was abandoned
        self._lengthen(growing, logits)
        stop, active = max(self.min_reach, market.forward_floor, market.floor), self._unfinished(growing, 0.0)
        if active:
            self.third.start(active, 1 + self.guesses)
        active = self._unfinished(active, stop)
        while active:
            self._check(active, self.third.guess(active, [min(self.guesses, self._left(one) - 1) for one in active]))
            active = self._unfinished(active, stop)
        for one in growing:
            one.finish(self.name, market.floor)

    def _left(self, one: Growth) -> int:
        return min(one.budget, self.max_tokens) - len(one.tokens)

    def _unfinished(self, growing: list[Growth], stop: float) -> list[Growth]:
        return [one for one in growing if self._left(one) > 0 and one.reach[-1] >= stop]

    def _check(self, growing: list[Growth], guesses: list[list[int]]) -> None:
        """Run the last node of each and the guesses behind it; the middle's own choices become nodes up to the first
        one that was not guessed, that one included."""
        logits = self.source.extend([self._guessed(one, tokens) for one, tokens in zip(growing, guesses, strict=True)])
        row = 0
        for one, tokens in zip(growing, guesses, strict=True):
            for i in range(1 + len(tokens)):
                self._lengthen([one], logits[row + i : row + i + 1])
                if i == len(tokens) or one.tokens[-1] != tokens[i]:
                    break
            kept = range(len(one.tokens) - 1 - i, len(one.tokens) - 1)  # nodes that were guessed, whose rows were run
            for node in kept:
                one.rows[node] = one.rows[node - 1] + 1
            row += 1 + len(tokens)

    @staticmethod
    def _guessed(one: Growth, tokens: list[int]) -> Rows:
        """Rows of the last node and, as a chain below it, of guesses, which are no nodes yet."""
        rows = one.run([len(one.tokens) - 1])
        for _ in tokens:
            one.row_parents.append(len(one.row_parents) - 1)
        return Rows(one.sequence, [*rows.tokens, *tokens], one.row_parents)
