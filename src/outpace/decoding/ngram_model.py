"""An interpolated n-gram model, counted from whatever text there is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import islice


class NgramModel:
    """Which token follows the last ones in the texts that were read, resting on a wider model where they say nothing.

    Contexts of one to `order` - 1 tokens are mixed by Witten and Bell's rule ("The zero-frequency problem", 1991): a
    context seen `n` times with `d` different successors gives its own frequencies the weight n / (n + d) and the
    shorter context the rest. Below the shortest lies the base, the probability that the caller's model gives the token.
    """

    def __init__(self, texts: Iterable[Sequence[int]] = (), order: int = 4) -> None:
        assert order >= 2, f"an n-gram model of order {order} has no context"
        self.order = order
        self._after: dict[tuple[int, ...], Counter[int]] = {}
        self._seen: Counter[tuple[int, ...]] = Counter()
        for text in texts:
            self.read(text)

    def read(self, text: Sequence[int]) -> None:
        tokens = tuple(text)
        for i, token in enumerate(tokens):
            for n in range(1, min(self.order, i + 1)):
                context = tokens[i - n : i]
                self._after.setdefault(context, Counter())[token] += 1
                self._seen[context] += 1

    def probability(self, context: Sequence[int], token: int, base: float) -> float:
        """Of `token` after `context`, where the wider model gives it `base`."""
        p = base
        for n in range(1, self.order):
            after = self._after.get(tuple(context[-n:])) if n <= len(context) else None
            if after is None:
                break
            seen = self._seen[tuple(context[-n:])]
            p = (after[token] + len(after) * p) / (seen + len(after))
        return p

    def continuations(self, context: Sequence[int], most: int = 64) -> list[int]:
        """Tokens that were seen after the end of `context`, after longer contexts first; at most `most`."""
        found: dict[int, None] = {}
        for n in range(min(self.order - 1, len(context)), 0, -1):
            after = self._after.get(tuple(context[-n:]))
            if after is not None:
                found |= dict.fromkeys(token for token, _ in after.most_common(most))
        return list(islice(found, most))
