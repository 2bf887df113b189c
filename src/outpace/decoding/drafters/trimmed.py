"""A draft model whose head knows only the tokens that the target uses most."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np

from ...errors import ParameterError
from ...models.batch import Span
from ...models.decoder import Decoder
from ...models.views import trim_head
from ...types import FloatArray, IntArray, Logits
from ..contracts import DrafterContext, Sequence
from ..sampling import host_row
from .owners import OwnerOf, PerOwner, one_owner
from .sources import ModelSource, draft_model_of

_PATIENCE = 4  # used tokens outside a head before it is cut anew: a cut costs about as much as two or three forwards
_MAX_OWNERS = 8  # each has a copy of its part of the head


class TokenCounts:
    """How often each token was used, and the head cut to the most used ones. Those never used follow by their id:
    tokenizers number their tokens in the order in which they were merged, the most frequent of all text first.
    """

    def __init__(self, decoder: Decoder, size: int) -> None:
        self._whole, self._size = decoder, size
        self._counts = np.zeros(decoder.config.vocab_size, dtype=np.int64)
        self._counts[list(decoder.config.eos_ids)] = 1  # ends of text are in the vocabulary from the start
        self._missed = 0  # tokens used since the last cut that are outside the head
        self._known = np.zeros(len(self._counts), dtype=np.bool_)
        self._view: Decoder | None = None

    def add(self, tokens: list[int]) -> None:
        ids = np.array(tokens, dtype=np.int64)
        ids = ids[ids < len(self._counts)]
        np.add.at(self._counts, ids, 1)
        self._missed += int((~self._known[ids]).sum())

    def decoder(self) -> Decoder:
        """The trimmed draft model, cut anew if the text has moved away from its head."""
        if self._view is None or self._missed >= _PATIENCE:
            ids = self.ids()
            self._view = trim_head(self._whole, ids)
            self._known[:] = False
            self._known[ids] = True
            self._missed = 0
        return self._view

    def ids(self) -> IntArray:
        """The tokens to keep, ascending."""
        used = np.flatnonzero(self._counts)
        if len(used) >= self._size:
            return np.sort(used[np.argsort(-self._counts[used], kind="stable")[: self._size]])
        unused = np.flatnonzero(self._counts == 0)[: self._size - len(used)]
        return np.sort(np.concatenate((used, unused)))


class TrimmedSource(ModelSource):
    """A draft model that gives logits for `trim` tokens only, all others get none (-inf).

    Which tokens: those that occur most in the prompts and committed outputs of a sequence's owner (`owner_of`), then
    those of the lowest ids. The head is the larger part of a small model with a large vocabulary, so a forward costs
    less; a token outside it is never drafted. Raises ParameterError for a `trim` that leaves nothing to choose from.
    """

    def __init__(
        self, decoder: Decoder, num_pages: int, vocab_size: int, trim: int, owner_of: OwnerOf = one_owner
    ) -> None:
        super().__init__(decoder, num_pages, vocab_size)
        least = max(2, len(decoder.config.eos_ids))
        if trim < least:
            raise ParameterError(
                f"trim={trim} is out of range: it must be at least {least} tokens, or 0 for the whole head"
            )
        self._per_owner = PerOwner(owner_of, lambda: TokenCounts(decoder, trim), _MAX_OWNERS)
        self._counts: dict[int, TokenCounts] = {}  # by sequence id
        self._counted: dict[int, int] = {}  # how many tokens of a sequence

    def begin(self, sequence: Sequence) -> None:
        super().begin(sequence)
        self._counts[sequence.id], self._counted[sequence.id] = self._per_owner.of(sequence), 0

    def end(self, sequence: Sequence) -> None:
        super().end(sequence)
        self._counts.pop(sequence.id, None)
        self._counted.pop(sequence.id, None)

    def catch_up(self, sequences: Seq[Sequence]) -> Logits:
        for sequence in sequences:
            self._counts[sequence.id].add(sequence.tokens[self._counted[sequence.id] :])
            self._counted[sequence.id] = len(sequence.tokens)
        return super().catch_up(sequences)

    def _forward(self, sequences: Seq[Sequence], spans: Seq[Span]) -> Logits:
        """One forward for each owner."""
        groups: dict[TokenCounts, list[int]] = {}
        for i, sequence in enumerate(sequences):
            groups.setdefault(self._counts[sequence.id], []).append(i)
        if len(groups) == 1:
            [counts] = groups
            return self._run(counts.decoder(), sequences, spans)
        parts: list[FloatArray] = [np.empty((0, self.vocab_size), dtype=np.float32)] * len(spans)
        for counts, members in groups.items():
            logits = self._run(counts.decoder(), [sequences[i] for i in members], [spans[i] for i in members])
            ends = np.cumsum([_wanted(spans[i]) for i in members])
            for i, part in zip(members, np.split(host_row(logits).copy(), ends[:-1]), strict=True):
                parts[i] = part
        return np.concatenate(parts)


def _wanted(span: Span) -> int:
    """Rows of a span whose logits are requested."""
    return {"all": len(span.tokens), "last": 1, "none": 0}[span.logits]


def model_source(context: DrafterContext, method: str, trim: int = 0) -> ModelSource:
    """The draft model of `context`, its head cut to `trim` tokens at most (0: never).

    Raises MethodError in the name of `method` if there is none, ParameterError for `trim` out of range.
    """
    decoder = draft_model_of(context, method)
    if trim == 0 or trim >= decoder.config.vocab_size:
        return ModelSource(decoder, context.draft_pages, context.vocab_size)
    return TrimmedSource(decoder, context.draft_pages, context.vocab_size, trim, context.owner_of or one_owner)
