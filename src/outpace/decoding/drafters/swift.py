"""SWIFT: the target with some of its sublayers skipped drafts for itself; which ones is found while it runs."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...cache.pages import PagedKVCache
from ...errors import MethodError, ParameterError
from ...models.batch import PAGE_SIZE, Span, pack
from ...models.decoder import Decoder
from ...models.views import View, skip_sublayers
from ...ops.select import row_argmax
from ...registry import register
from ..contracts import DrafterContext, Market, Proposal, Sequence
from .draft_model import DraftChain
from .grown import Draws
from .sources import SelfSource

_FEWEST_LAYERS = 8
_CANDIDATES = 4  # tried on one stretch of text, after the set in use
_PATIENCE = 24  # candidates in a row that were no better: the search is over
_LONGEST = 8  # draft for which a set is valued

Skips = tuple[frozenset[int], frozenset[int]]  # layers whose attention, layers whose MLP is left out


def uniform_skips(layers: int, ratio: float) -> Skips:
    """`ratio` of the attention and of the MLP sublayers, evenly spread, none of the first layer or the last."""
    middle = layers - 2
    n = min(round(ratio * layers), middle)
    spread = [[1 + int((i + shift) * middle / n) for i in range(n)] for shift in (0.25, 0.75)]
    return frozenset(spread[0]), frozenset(spread[1])


def speedup(matchness: float, cost: float) -> float:
    """Tokens per time of a plain step, for the best length of draft, if each token is right with probability
    `matchness` and drafting one costs `cost` steps. Below 1: it does not pay, but is comparable."""
    tokens, best = 1.0, 0.0
    for n in range(1, _LONGEST + 1):
        tokens += matchness**n
        best = max(best, tokens / (1 + n * cost))
    return best


class SkipSearch:
    """Looks for the skipped sublayers with which drafting would be fastest, by random changes to the best so far.

    Candidates are compared on the same stretch of text: `best` first, then `_CANDIDATES` others.
    """

    def __init__(self, layers: int, ratio: float, trials: int) -> None:
        self._layers, self.trials = layers, trials
        self.best, self.value = uniform_skips(layers, ratio), 0.0
        self.matchness = 0.0  # of the best, when it was last measured
        self._rng = np.random.default_rng(0)
        self._starts = [uniform_skips(layers, ratio * part) for part in (0.75, 0.5, 0.25)]  # small models tolerate less
        self._stale = 0
        self.tried = 0

    @property
    def over(self) -> bool:
        return self.tried >= self.trials or self._stale >= _PATIENCE

    def candidate(self) -> Skips:
        if self._starts:
            return self._starts.pop(0)
        sets = [set(part) for part in self.best]
        for _ in range(1 + int(self._rng.integers(3))):
            part, layer = sets[self._rng.integers(2)], 1 + int(self._rng.integers(self._layers - 2))
            part.symmetric_difference_update({layer})
        return frozenset(sets[0]), frozenset(sets[1])

    def rate(self, matchness: float, cost: float) -> None:
        """Measure the best itself, on new text."""
        self.matchness, self.value = matchness, speedup(matchness, cost)

    def offer(self, skips: Skips, matchness: float, cost: float) -> None:
        self.tried += 1
        self._stale += 1
        if speedup(matchness, cost) > self.value:
            self.best, self._stale = skips, 0
            self.rate(matchness, cost)


@dataclass(slots=True)
class _Stretch:
    """Text of one sequence, tokens first..stop-1, that candidates are tried on."""

    sequence: Sequence
    first: int
    stop: int
    left: int = _CANDIDATES


@register(
    family="SPEC",
    title="Self-drafting with skipped sublayers (SWIFT)",
    paper="https://arxiv.org/abs/2410.06916",
    exactness="identical",
    needs=(f"target of at least {_FEWEST_LAYERS} layers",),
    claim="1.3x to 1.6x",
)
class Swift(DraftChain):
    """The draft is the target without some of its attention and MLP sublayers, in the target's own KV cache.

    Which ones is optimised on the text at hand: in every step a changed set is tried by one parallel forward over the
    last `window` tokens, which the target has said already, and kept if drafting with it would be faster: if it agrees
    more often (the paper's matchness), or as often with fewer sublayers. The search starts from `skip` of all
    sublayers, spread evenly, and three smaller sets, never touches the first layer and the last, and ends after
    `trials` candidates or 24 in a row that were no better. The paper adds Bayesian optimisation to the random search
    and keeps the ratio fixed. One set serves all sequences. A draft ends when its confidence falls (`min_reach`).

    Xia et al., "SWIFT: On-the-Fly Self-Speculative Decoding for LLM Inference Acceleration", sections 4.1 and 4.2.

    Parameters: `skip` share of sublayers to start from; `trials`; `window` tokens; those of the chain (see DraftChain).
    Raises MethodError for a target with fewer than 8 layers, ParameterError out of range.
    """

    name = "swift"
    paper = "https://arxiv.org/abs/2410.06916"

    def __init__(
        self,
        source: SelfSource,
        target: Decoder,
        draws: Draws = Draws.COUPLED,
        max_tokens: int = 8,
        min_reach: float = 0.35,
        skip: float = 0.45,
        trials: int = 200,
        window: int = 32,
    ) -> None:
        super().__init__(source, draws, max_tokens, min_reach)
        for name, value, ok, allowed in (
            ("skip", skip, 0 <= skip < 1, "from 0 to below 1"),
            ("trials", trials, trials >= 0, "0 (keep the first set) or more"),
            ("window", window, 8 <= window <= 512, "from 8 to 512"),
        ):
            if not ok:
                raise ParameterError(f"{self.name}:{name}={value} is out of range: it must be {allowed}")
        self.search = SkipSearch(target.config.num_layers, skip, trials)
        self.window, self._target = window, target
        self._view: View = skip_sublayers(target, *self.search.best)
        self._cache: PagedKVCache = source.cache
        source.decoder = self._view
        self._stretch: _Stretch | None = None

    @classmethod
    def create(cls, context: DrafterContext, **options: Any) -> Swift:  # type: ignore[override]
        source = SelfSource.of(context, cls.name)
        layers = source.decoder.config.num_layers
        if layers < _FEWEST_LAYERS:
            raise MethodError(
                f"method {cls.name!r} skips sublayers of the target, which takes at least {_FEWEST_LAYERS} layers, and "
                f"this one has {layers}; use another method, such as suffix+recycling"
            )
        return cls(source, source.decoder, Draws.of(context), **options)

    def propose(self, sequences: Seq[Sequence], budgets: Seq[int], market: Market) -> Proposal:
        if not self.search.over and any(budgets):
            self._improve(sequences)
        return super().propose(sequences, budgets, market)

    def end(self, sequence: Sequence) -> None:
        if self._stretch is not None and self._stretch.sequence is sequence:
            self._stretch = None
        super().end(sequence)

    def explain(self) -> list[str]:
        attention, mlp = (sorted(part) for part in self.search.best)
        return [
            f"skips attention of layers {attention} and MLP of {mlp}: {self._cost():.2f} of a step's weights; tried "
            f"{self.search.tried} sets, the best agreed on {self.search.matchness:.0%} of the last stretch"
        ]

    def _improve(self, sequences: Seq[Sequence]) -> None:
        """Try one set: the best, at the beginning of a stretch of text, then a candidate each time."""
        search, stretch = self.search, self._stretch
        if stretch is None or not stretch.left or stretch.sequence not in sequences:
            self._stretch = stretch = self._new_stretch(sequences)
            if stretch is not None:
                matchness = self._matchness(stretch)
                if matchness is not None:
                    search.rate(matchness, self._cost())
            return
        skips = search.candidate()
        self._view.skip(*skips)
        matchness = self._matchness(stretch)
        stretch.left -= 1
        if matchness is not None:
            search.offer(skips, matchness, self._cost())
        self._view.skip(*search.best)

    def _cost(self) -> float:
        return self._view.weight_bytes / self._target.weight_bytes

    def _new_stretch(self, sequences: Seq[Sequence]) -> _Stretch | None:
        """The end of the longest output, if that is long enough."""
        longest = max(sequences, key=lambda s: len(s.tokens) - s.prompt_length)
        if len(longest.tokens) - longest.prompt_length < self.window:
            return None
        last = len(longest.tokens) - 1
        return _Stretch(longest, max(last - self.window, 0) // PAGE_SIZE * PAGE_SIZE, last)

    def _matchness(self, stretch: _Stretch) -> float | None:
        """How often the view's likeliest token is the target's own; None without space in the cache.

        The view reads the stretch with keys and values of its own: they go to whole pages behind the text, and the page
        table names these after the pages of what stands before the stretch.
        """
        sequence, first, stop = stretch.sequence, stretch.first, stretch.stop
        cache, kv = self._cache, sequence.kv
        begin = -(-cache.length(kv) // PAGE_SIZE)  # first page that holds nothing of the text
        places = (begin + -(-(stop - first) // PAGE_SIZE)) * PAGE_SIZE - cache.length(kv)
        if cache.pages_needed(kv, places) > cache.available_pages:
            return None
        try:
            cache.reserve(kv, places)
            table = cache.page_table(kv)
            pages = np.concatenate((table[: first // PAGE_SIZE], table[begin:]))
            batch = pack([Span(sequence.tokens[first:stop], first)], pages[None])
            said = row_argmax(self._view.forward(batch, cache.storage).rows)
        finally:
            cache.rollback(kv)
        own = slice(max(sequence.prompt_length - 1 - first, 0), None)  # rows that predict output
        return float((said == np.array(sequence.tokens[first + 1 : stop + 1]))[own].mean())
