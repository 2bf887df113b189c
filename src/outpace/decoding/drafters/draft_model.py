"""Drafting by a smaller model of the same vocabulary: what chain and tree share, and the chain.

One round, in the draft model's own KV cache:

    catch up   the tokens it has not read yet; they are committed, the last row's logits give the first candidates
    grow       provisional rows, one forward per layer of the draft
    observe    the provisional rows that turned out right are committed, so nothing is read twice

Shapes: `B` sequences, `R` rows of one forward, `V` vocabulary, `k` candidates per row.
"""

from __future__ import annotations

from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ...cache.pages import PagedKVCache
from ...errors import MethodError
from ...models.batch import Span, pack
from ...models.decoder import Decoder
from ...ops.select import row_topk
from ...registry import register
from ...types import Draft, FloatArray, SamplingParams
from ..contracts import Drafter, DrafterContext, Observation, Sequence
from ..sampling import Stream, choose, distribution_of, draw, host_row, process, uniform
from .rates import Rates, judged_nodes

_CHUNK = 512  # rows of one forward while catching up
NO_OFFSET = -1
NO_CELL = -1
_EDGES = (0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 0.85, 0.95)  # bins of the draft model's probability of its own draw
_PRIOR = (0.15, 0.2, 0.25, 0.35, 0.45, 0.55, 0.68, 0.8, 0.88, 0.96)  # acceptance of such draws to start from


@dataclass(slots=True)
class DraftState:
    kv: int
    draft: Draft = field(default_factory=Draft.empty)
    offsets: list[int] = field(default_factory=list)  # where each draft node's KV is, if it was computed
    cells: list[int] = field(default_factory=list)  # of each node's rate, if it is a coupled draw

    def clear(self) -> None:
        self.draft, self.offsets, self.cells = Draft.empty(), [], []


@dataclass(slots=True, eq=False)
class Growing:
    """A sequence that is drafted for in this round."""

    sequence: Sequence
    state: DraftState
    budget: int


class DraftModel(Drafter):
    """What chain and tree share. Sequences that the draft model's cache or context cannot hold get empty drafts.

    `decoder` the draft model, of the target's vocabulary (the caller checks that); `num_pages` of its KV cache;
    `vocab_size` the target's, ids from there on are never proposed. `coupled`: where the target samples, the draft
    model also draws with the uniform that the target will draw with, and agrees the more often the closer their
    distributions are (Daliri et al., arXiv 2408.07978). Only for the coupled verifier, whose output cannot depend on
    the draft; under rejection sampling a draft must know nothing of the verifier's uniforms.
    """

    def __init__(self, decoder: Decoder, num_pages: int, vocab_size: int, coupled: bool) -> None:
        self.decoder, self.vocab_size, self.coupled = decoder, vocab_size, coupled
        self._draws = Rates(_PRIOR)
        self.cache = PagedKVCache(decoder.new_storage(num_pages))
        self._states: dict[int, DraftState] = {}

    @classmethod
    def _decoder_of(cls, context: DrafterContext) -> Decoder:
        if context.draft is None:
            raise MethodError(
                f"method {cls.name!r} needs a draft model and none was given; name one with --draft-model "
                "(draft_model= in Python), or use a method without one, such as suffix+recycling"
            )
        return context.draft

    def begin(self, sequence: Sequence) -> None:
        self._states[sequence.id] = DraftState(self.cache.new())

    def end(self, sequence: Sequence) -> None:
        state = self._states.pop(sequence.id, None)
        if state is not None:
            self.cache.free(state.kv)

    def observe(self, sequence: Sequence, seen: Observation) -> None:
        state = self._states[sequence.id]
        if len(state.draft):
            judged = judged_nodes(state.draft, seen.new_tokens)
            for node, _, ok in judged:
                if state.cells[node] != NO_CELL:
                    self._draws.update(state.cells[node], ok)
            right = [node for node, _, ok in judged if ok]
            kept = [state.offsets[node] for node in right if state.offsets[node] != NO_OFFSET]
            self.cache.commit(state.kv, kept)
            state.clear()

    def propose(self, sequences: Seq[Sequence], budgets: Seq[int]) -> list[Draft]:
        growing = self._admit(sequences, budgets)
        if growing:
            try:
                self._grow(growing, self._catch_up(growing))
            except BaseException:
                for one in growing:
                    self.cache.rollback(one.state.kv)
                    one.state.clear()
                raise
        return [self._states[s.id].draft for s in sequences]

    def _draw(self, row: torch.Tensor, params: SamplingParams, position: int) -> tuple[int, float, int]:
        """The coupled draw at `position` from processed logits f32[V]: token, probability (T = 1), cell of its rate."""
        token = choose(host_row(row), params, position)
        p = float(torch.exp(row[token] - torch.logsumexp(row, dim=-1)))
        return token, p, bisect_right(_EDGES, p)

    @abstractmethod
    def _places(self, budget: int) -> int:
        """Most provisional places that a draft of `budget` nodes needs."""

    @abstractmethod
    def _grow(self, growing: list[Growing], logits: torch.Tensor) -> None:
        """Set each state's draft and offsets. `logits` f32[B, V] after the last tokens; a view, as of `_forward`."""

    def _admit(self, sequences: Seq[Sequence], budgets: Seq[int]) -> list[Growing]:
        """The sequences to draft for: a budget above zero, and room for it."""
        growing: list[Growing] = []
        free = self.cache.free_pages
        for sequence, budget in zip(sequences, budgets, strict=True):
            state = self._states[sequence.id]
            self.cache.rollback(state.kv)  # of a step that was abandoned
            state.clear()
            if self.cache.length(state.kv) >= len(sequence.tokens):
                # All is read: by an abandoned step, or because this draft, not the one verified, foresaw the last
                # token. Its row must run again for its logits.
                self.cache.truncate(state.kv, len(sequence.tokens) - 1)
            places = self._places(budget)
            unread = len(sequence.tokens) - self.cache.length(state.kv)
            pages = self.cache.pages_needed(state.kv, unread + places)
            if budget > 0 and pages <= free and len(sequence.tokens) + places <= self.decoder.config.max_position:
                free -= pages
                growing.append(Growing(sequence, state, budget))
        return growing

    def _catch_up(self, growing: list[Growing]) -> torch.Tensor:
        """Read and commit what is new of each sequence. Returns the logits after its last token, f32[B, V]."""
        ends: list[torch.Tensor | None] = [None] * len(growing)
        todo = list(range(len(growing)))
        while todo:
            room, now = _CHUNK, list[tuple[int, int, bool]]()  # (index, rows, last chunk)
            for i in todo:
                one = growing[i]
                unread = len(one.sequence.tokens) - self.cache.length(one.state.kv)
                if room:
                    now.append((i, min(unread, room), unread <= room))
                    room -= now[-1][1]
            spans = []
            for i, n, last in now:
                kv = growing[i].state.kv
                start = self.cache.length(kv)
                self.cache.reserve(kv, n)
                tokens = growing[i].sequence.tokens[start : start + n]
                spans.append(Span(tokens, start, logits="last" if last else "none"))
            logits = self._forward([growing[i].state.kv for i, _, _ in now], spans)
            done = [i for i, _, last in now if last]
            for i, n, _ in now:
                self.cache.commit(growing[i].state.kv, range(n))
            if len(done) == len(growing):
                return logits
            for row, i in enumerate(done):
                ends[i] = logits[row].clone()
            todo = [i for i in todo if ends[i] is None]
        return torch.stack([end for end in ends if end is not None])

    def _forward(self, kvs: list[int], spans: list[Span]) -> torch.Tensor:
        """Logits f32[R, V] of the rows that the spans ask for, valid until the next forward."""
        batch = pack(spans, self.cache.page_tables(kvs))
        return self.decoder.forward(batch, self.cache.storage).logits[:, : self.vocab_size]


def edit_rows(logits: torch.Tensor, rows: list[tuple[Sequence, list[int]]]) -> torch.Tensor:
    """Penalties and bias of each row's sequence, given the draft tokens on the way to it."""
    if not any(sequence.params.edits_logits for sequence, _ in rows):
        return logits
    logits = logits.clone()
    for row, (sequence, path) in enumerate(rows):
        if sequence.params.edits_logits:
            edited = _on_path(host_row(logits[row]), sequence, path)
            logits[row] = torch.from_numpy(edited).to(logits.device)
    return logits


def _on_path(logits: FloatArray, sequence: Sequence, path: list[int]) -> FloatArray:
    """`process` as if `path` had been emitted; leaves the history as it was."""
    history = sequence.history
    for token in path:
        history.append(token)
    edited = process(logits, sequence.params, history)
    history.truncate(len(sequence.tokens))
    return edited


def likeliest(logits: torch.Tensor, k: int) -> tuple[list[list[int]], list[list[float]]]:
    """Ids and probabilities of the k likeliest tokens of each row. [R, k] each"""
    values, ids = row_topk(logits, min(k, logits.shape[1]))
    norm = torch.logsumexp(logits, dim=-1).cpu().numpy()
    return ids.tolist(), np.exp(values - norm[:, None]).tolist()


@register(
    family="SPEC",
    title="Draft model, chain",
    paper="https://arxiv.org/abs/2211.17192",
    exactness="identical",
    needs=("draft model",),
)
class DraftChain(DraftModel):
    """The draft model continues the text by itself, one forward per token.

    Under coupled verification it proposes its likeliest token, or where the target samples its own coupled draw. Under
    rejection sampling (`sampled=True`) it samples
    with the request's own parameters and passes its distribution on as q; the length of such a draft depends on
    measured rates alone, never on the tokens sampled, as exactness demands.

    Leviathan, Kalman and Matias, "Fast Inference from Transformers via Speculative Decoding", algorithm 1.

    Parameters: `max_tokens` longest draft; `min_reach` the draft ends when the probability that its last token is
    reached and accepted falls below.
    """

    name = "draft"
    paper = "https://arxiv.org/abs/2211.17192"

    def __init__(
        self,
        decoder: Decoder,
        num_pages: int,
        vocab_size: int,
        sampled: bool = False,
        coupled: bool = True,
        max_tokens: int = 16,
        min_reach: float = 0.25,
    ) -> None:
        super().__init__(decoder, num_pages, vocab_size, coupled and not sampled)
        self.sampled, self.max_tokens, self.min_reach = sampled, max_tokens, min_reach
        self._rates = Rates(np.full(max_tokens, 0.8))  # by depth, of sampled drafts

    @classmethod
    def create(cls, context: DrafterContext, **options: Any) -> DraftChain:
        decoder = cls._decoder_of(context)
        sampled = context.sampled and not context.merged
        return cls(decoder, context.draft_pages, context.vocab_size, sampled, coupled=not context.sampled, **options)

    def _places(self, budget: int) -> int:
        return min(budget, self.max_tokens)

    def observe(self, sequence: Sequence, seen: Observation) -> None:
        draft = self._states[sequence.id].draft
        if draft.q is not None:
            for _, depth, right in judged_nodes(draft, seen.new_tokens):
                self._rates.update(depth, right)
        super().observe(sequence, seen)

    def _grow(self, growing: list[Growing], logits: torch.Tensor) -> None:
        paths: list[list[int]] = [[] for _ in growing]
        scores: list[list[float]] = [[] for _ in growing]
        cells: list[list[int]] = [[] for _ in growing]
        q: list[list[FloatArray]] = [[] for _ in growing]
        reach = [1.0] * len(growing)
        active = list(range(len(growing)))
        for depth in range(self.max_tokens):
            going: list[int] = []
            chosen = self._choose([(growing[i].sequence, paths[i]) for i in active], logits)
            for i, (token, score, cell, row_q) in zip(active, chosen, strict=True):
                paths[i].append(token)
                scores[i].append(score)
                cells[i].append(cell)
                reach[i] *= score
                if row_q is not None:
                    q[i].append(row_q)
                if len(paths[i]) < self._places(growing[i].budget) and reach[i] >= self.min_reach:
                    going.append(i)
            active = going
            if not active:
                break
            spans = []
            for i in active:
                kv = growing[i].state.kv
                self.cache.reserve(kv, depth + 1)
                spans.append(Span([paths[i][-1]], self.cache.length(kv), offset=depth))
            logits = self._forward([growing[i].state.kv for i in active], spans)
        for i, one in enumerate(growing):
            n = len(paths[i])
            self.cache.reserve(one.state.kv, n - 1)
            one.state.draft = Draft.chain(
                paths[i], self.name, np.array(scores[i], dtype=np.float32), np.stack(q[i]) if q[i] else None
            )
            one.state.offsets, one.state.cells = [*range(n - 1), NO_OFFSET], cells[i]

    def _choose(
        self, rows: list[tuple[Sequence, list[int]]], logits: torch.Tensor
    ) -> list[tuple[int, float, int, FloatArray | None]]:
        """Per row: token, score, cell of its rate, and the q that it was sampled from."""
        edited = edit_rows(logits, rows)
        ids, p = likeliest(edited, 1)
        chosen: list[tuple[int, float, int, FloatArray | None]] = []
        for row, (sequence, path) in enumerate(rows):
            params = sequence.params
            position = len(sequence.tokens) + len(path)
            if params.greedy or not (self.sampled or self.coupled):
                chosen.append((ids[row][0], p[row][0], NO_CELL, None))
            elif self.coupled:
                token, _, cell = self._draw(edited[row], params, position)
                chosen.append((token, float(self._draws.value[cell]), cell, None))
            else:
                q = np.zeros(self.vocab_size, dtype=np.float32)
                q[: logits.shape[1]] = distribution_of(host_row(edited[row]), params)
                token = draw(q, uniform(params.seed, position, Stream.DRAFT))
                chosen.append((token, float(self._rates.value[len(path)]), NO_CELL, q))
        return chosen
