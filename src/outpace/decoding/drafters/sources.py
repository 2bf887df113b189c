"""Where the logits come from that a draft is grown from: a second model, or the target itself.

A drafter that grows drafts from logits is two independent things: a *source* (this file) and a *shape* (`grown.py` and
the chain, the trees and the beams that derive from it). One round of a shape over any source:

    rollback   what an abandoned round left
    admit      sequences that the source's cache and context can hold
    catch_up   the logits after each last token; they give the first candidates
    extend     rows of the draft, a few more in each forward; a row sees the text, its ancestors and itself
    rollback   at once if the source keeps nothing, else when the next round begins
    observe    a commit; a source that keeps rows keeps those that turned out right, so nothing is read twice

`ModelSource` is a second model with its own KV cache. `SelfSource` drafts in the target's own cache, with the target
or a view of it (fewer layers, coarser weights, part of the keys and values). A self-drafting method is a view and a
shape:

    class Skipping(DraftChain):
        name = "skipping"

        @classmethod
        def create(cls, context: DrafterContext, skip: int = 8, **options: Any) -> Skipping:
            return cls(SelfSource.of(context, cls.name, some_layers_of(target, skip)), Draws.of(context), **options)

Shapes: `B` sequences of a round, `R` new rows of a forward, `V` vocabulary of the target.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np

from ...cache.pages import PagedKVCache
from ...cache.prefix import PrefixTree
from ...errors import MethodError
from ...models.batch import ForwardBatch, Span, Tree, pack
from ...models.decoder import NO_TAPS, Decoder, DecoderOutput
from ...types import FloatArray, Logits
from ..contracts import DrafterContext, Sequence
from ..sampling import host_row

_CHUNK = 512  # rows of one forward while catching up

#: Rewrites the batch of a forward: page tables and committed lengths of a sparse view of the keys and values.
KVView = Callable[[ForwardBatch, Seq[Sequence]], ForwardBatch]


@dataclass(slots=True, eq=False)
class Rows:
    """Rows to add to the draft of one sequence.

    Rows are numbered in the order in which they were added. `parents` are those of all rows so far, the new ones
    included (NO_PARENT: the row follows the last committed token); `tokens` are those of the new ones, at its end.
    """

    sequence: Sequence
    tokens: list[int]
    parents: list[int]


class Source(ABC):
    """Gives logits for drafts. State per sequence is made in `begin` and dropped in `end`.

    Logits are f32[R, V], valid until the next forward. What fails raises and leaves the round to `rollback`.
    """

    #: Whether `observe` keeps rows. If not, `rollback` must be called before the target's step.
    keeps: bool
    decoder: Decoder  # may be exchanged between rounds for one that reads the same KV storage
    vocab_size: int  # of the target; no logits are given for ids from there on
    view: KVView | None = None  # of its cache, in every forward

    def begin(self, sequence: Sequence) -> None:  # noqa: B027
        """A sequence starts."""

    @abstractmethod
    def admit(self, sequences: Seq[Sequence], rows: Seq[int]) -> list[bool]:
        """Whether each sequence fits if it adds at most `rows[i]` rows. A sequence without rows to add is admitted too:
        the logits after its last token are a draft of one node."""

    @abstractmethod
    def catch_up(self, sequences: Seq[Sequence]) -> Logits:
        """Read what is new of each. Returns the logits after its last token, f32[B, V]."""

    @abstractmethod
    def extend(self, grown: Seq[Rows]) -> Logits:
        """Run new rows of some of the sequences that were caught up with. Logits of all of them in order, f32[R, V]."""

    @abstractmethod
    def rollback(self, sequence: Sequence) -> None:
        """Drop the rows of a sequence. Safe without any."""

    def observe(self, sequence: Sequence, rows: list[int]) -> None:  # noqa: B027
        """Tokens were committed. Those right behind the round's last token are in `rows`, ascending, if rows were run
        for them; the others of the round are wrong."""

    def end(self, sequence: Sequence) -> None:  # noqa: B027
        """The sequence is over. Safe to call twice."""


class ModelSource(Source):
    """A second model of the target's vocabulary (the caller checks that), with its own KV cache of `num_pages`.

    It commits every token that it has read, and rows of a draft are provisional until `observe`. Sequences that its
    cache or context cannot hold are not admitted. Override `text` to let it read something else than all of a sequence;
    `view` rewrites each batch before its forward, as in SelfSource. With `prefix_cache` it keeps what it read, as far
    as there is space, and does not read the beginning of a text again that it has read for the same owner.
    """

    keeps = True

    def __init__(
        self,
        decoder: Decoder,
        num_pages: int,
        vocab_size: int,
        view: KVView | None = None,
        prefix_cache: bool = True,
    ) -> None:
        self.decoder, self.vocab_size, self.view = decoder, vocab_size, view
        self.cache = PagedKVCache(decoder.new_storage(num_pages))
        self.prefix = PrefixTree(self.cache) if prefix_cache else None
        self._kv: dict[int, int] = {}  # sequence id -> its handle
        self._shared: set[int] = set()  # ids of those whose prompt others may use

    def text(self, sequence: Sequence) -> list[int]:
        """What the draft model reads of a sequence. Grows at its end by the tokens committed, and not otherwise."""
        return sequence.tokens

    def begin(self, sequence: Sequence) -> None:
        self._kv[sequence.id] = self.cache.new()

    def end(self, sequence: Sequence) -> None:
        kv = self._kv.pop(sequence.id, None)
        self._shared.discard(sequence.id)
        if kv is not None:
            self.cache.rollback(kv)
            self._keep(sequence, kv, final=True)
            self.cache.free(kv)

    def _keep(self, sequence: Sequence, kv: int, final: bool = False) -> None:
        """Let others of the same owner use what was read of a sequence."""
        if self.prefix is not None:
            read = self.text(sequence)[: self.cache.length(kv)]
            self.prefix.insert(sequence.owner, read, kv, final)

    def rollback(self, sequence: Sequence) -> None:
        self.cache.rollback(self._kv[sequence.id])

    def observe(self, sequence: Sequence, rows: list[int]) -> None:
        if rows:
            self.cache.commit(self._kv[sequence.id], rows)
        else:
            self.rollback(sequence)

    def admit(self, sequences: Seq[Sequence], rows: Seq[int]) -> list[bool]:
        if self.prefix is not None:
            for sequence in sequences:
                kv = self._kv[sequence.id]
                if not self.cache.length(kv) and not self.cache.reserved(kv):
                    self.prefix.attach(sequence.owner, self.text(sequence), kv)
        admitted, free = [], self.cache.available_pages
        for sequence, n in zip(sequences, rows, strict=True):
            kv, length = self._kv[sequence.id], len(self.text(sequence))
            if self.cache.length(kv) >= length:
                # All is read: by an abandoned step, or because this draft, not the one verified, foresaw the last
                # token. Its row must run again for its logits.
                self.cache.truncate(kv, length - 1)
            pages = self.cache.pages_needed(kv, length - self.cache.length(kv) + n)
            fits = pages <= free and length + n <= self.decoder.config.max_position
            free -= pages if fits else 0
            admitted.append(fits)
            if not fits and sequence.id not in self._shared:
                self.cache.truncate(kv, 0)  # it has read nothing: what it found is not held for it
        return admitted

    def catch_up(self, sequences: Seq[Sequence]) -> Logits:
        kvs = [self._kv[sequence.id] for sequence in sequences]
        texts = [self.text(sequence) for sequence in sequences]
        ends: list[FloatArray | None] = [None] * len(kvs)
        todo = list(range(len(kvs)))
        while todo:
            space, now = _CHUNK, list[tuple[int, int, bool]]()  # (index, rows, last chunk)
            for i in todo:
                unread = len(texts[i]) - self.cache.length(kvs[i])
                if space:
                    now.append((i, min(unread, space), unread <= space))
                    space -= now[-1][1]
            spans = []
            for i, n, last in now:
                start = self.cache.length(kvs[i])
                self.cache.reserve(kvs[i], n)
                spans.append(Span(texts[i][start : start + n], start, logits="last" if last else "none"))
            logits = self._forward([sequences[i] for i, _, _ in now], spans)
            done = [i for i, _, last in now if last]
            for i, n, last in now:
                self.cache.commit(kvs[i], range(n))
                if last and sequences[i].id not in self._shared:
                    self._shared.add(sequences[i].id)
                    self._keep(sequences[i], kvs[i])
            if len(done) == len(kvs):
                return logits
            for row, i in enumerate(done):
                ends[i] = host_row(logits[row]).copy()
            todo = [i for i in todo if ends[i] is None]
        return np.stack([end for end in ends if end is not None])

    def extend(self, grown: Seq[Rows]) -> Logits:
        kvs, spans = [self._kv[rows.sequence.id] for rows in grown], []
        for kv, rows in zip(kvs, grown, strict=True):
            self.cache.reserve(kv, len(rows.parents))
            mask = Tree(np.array(rows.parents, dtype=np.int64), rooted=False)
            spans.append(Span(rows.tokens, self.cache.length(kv), mask, len(rows.parents) - len(rows.tokens)))
        return self._forward([rows.sequence for rows in grown], spans)

    def _forward(self, sequences: Seq[Sequence], spans: Seq[Span]) -> Logits:
        """Logits of the rows that the spans request."""
        return self._run(self.decoder, sequences, spans)

    def _run(self, decoder: Decoder, sequences: Seq[Sequence], spans: Seq[Span]) -> Logits:
        batch = pack(spans, self.cache.page_tables([self._kv[sequence.id] for sequence in sequences]))
        if self.view is not None:
            batch = self.view(batch, sequences)
        return decoder.forward(batch, self.cache.storage).rows[:, : self.vocab_size]


class SelfSource(Source):
    """The target drafts for itself, in its own KV cache: nothing of the text is read twice, nothing is kept.

    `decoder` is the target or a view of it that shares the layout of its KV storage. The provisional region of
    `sequence.kv` holds the last token at offset 0 and row i of the draft at offset 1 + i; `rollback` closes it before
    the target's step reserves it again and overwrites what the view wrote.

    `view(batch, sequences)`, if given, rewrites every batch before its forward (sequence `b` of the batch is
    `sequences[b]`): a sparse view of the keys and values gives another page table and a smaller `committed` and leaves
    `positions` as they are, as long as the place `committed[b] + offset` still falls on the lane and page that the
    cache reserved for that offset.
    """

    keeps = False

    def __init__(
        self, decoder: Decoder, cache: PagedKVCache, vocab_size: int | None = None, view: KVView | None = None
    ) -> None:
        self.decoder, self.cache, self.view = decoder, cache, view
        self.vocab_size = decoder.config.vocab_size if vocab_size is None else vocab_size
        self.taps = NO_TAPS
        self.output: DecoderOutput  # of the last forward, as valid as its logits

    @classmethod
    def of(
        cls, context: DrafterContext, method: str, decoder: Decoder | None = None, view: KVView | None = None
    ) -> SelfSource:
        """Over the target's cache in `context`, with the target or a `decoder` that shares its layout.

        Raises MethodError in the name of `method` where the engine gives drafters no access to the target.
        """
        if context.target is None or context.cache is None:
            raise MethodError(
                f"method {method!r} drafts with the target model in its own KV cache, which this engine does not offer "
                "to drafters: pass `target` and `cache` in the DrafterContext (LLM does), or use another method"
            )
        return cls(context.target if decoder is None else decoder, context.cache, context.vocab_size, view)

    def rollback(self, sequence: Sequence) -> None:
        self.cache.rollback(sequence.kv)

    def admit(self, sequences: Seq[Sequence], rows: Seq[int]) -> list[bool]:
        admitted, free = [], self.cache.available_pages
        for sequence, n in zip(sequences, rows, strict=True):
            pages = self.cache.pages_needed(sequence.kv, 1 + n)
            fits = pages <= free and len(sequence.tokens) + n <= self.decoder.config.max_position
            free -= pages if fits else 0
            admitted.append(fits)
        return admitted

    def catch_up(self, sequences: Seq[Sequence]) -> Logits:
        spans = []
        for sequence in sequences:
            committed = self.cache.length(sequence.kv)
            assert committed == len(sequence.tokens) - 1, f"{committed} of {len(sequence.tokens)} tokens are cached"
            self.cache.reserve(sequence.kv, 1)
            spans.append(Span(sequence.tokens[-1:], committed))
        return self._forward(sequences, spans)

    def extend(self, grown: Seq[Rows]) -> Logits:
        spans = []
        for rows in grown:
            kv, n = rows.sequence.kv, len(rows.parents)
            self.cache.reserve(kv, 1 + n)
            mask = Tree(np.array(rows.parents, dtype=np.int64))
            spans.append(Span(rows.tokens, self.cache.length(kv), mask, 1 + n - len(rows.tokens)))
        return self._forward([rows.sequence for rows in grown], spans)

    def _forward(self, sequences: Seq[Sequence], spans: list[Span]) -> Logits:
        batch = pack(spans, self.cache.page_tables([sequence.kv for sequence in sequences]))
        if self.view is not None:
            batch = self.view(batch, sequences)
        self.output = self.decoder.forward(batch, self.cache.storage, self.taps)
        return self.output.rows[:, : self.vocab_size]


def draft_model_of(context: DrafterContext, method: str) -> Decoder:
    """Raises MethodError in the name of `method` if there is no draft model."""
    if context.draft is None:
        raise MethodError(
            f"method {method!r} needs a draft model and none was given; name one with --draft-model "
            "(draft_model= in Python), or use a method without one, such as suffix+recycling"
        )
    return context.draft
