"""A trained block head: all of a draft in one pass over what the target's hidden states say of the text."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...cache.pages import PAGE_SIZE, PagedKVCache
from ...errors import MethodError
from ...models.batch import Span, pack
from ...models.decoder import Decoder, Taps
from ...models.heads import Head, HeadCheckpoint, fits, output_rows
from ...models.native import NativeDecoder
from ...ops.cpu.project import project
from ...ops.select import row_logsumexp, row_topk
from ...registry import register
from ...types import NO_PARENT, FloatArray, Logits, Precision, SamplingParams
from ..contracts import DrafterContext, Market, Observation, Sequence
from .grown import Draws, Grown, Growth, edit_rows
from .sources import Rows, Source

_WINDOW = 128  # tokens that are read at once at most, of a prompt or after a rest: their hidden states know the others
_CANDIDATES = 16  # tokens of a slot that an edge is computed for


def scaled(x: FloatArray, eps: float = 1e-5) -> FloatArray:
    """Each row divided by its root mean square. f32[..., D]"""
    return np.asarray(x / np.sqrt(np.square(x).mean(axis=-1, keepdims=True) + eps), dtype=np.float32)


def sigmoid(x: FloatArray) -> FloatArray:
    return np.asarray(1 / (1 + np.exp(-np.clip(x, -30, 30))), dtype=np.float32)


def hidden_states(decoder: Decoder, tokens: list[int], layers: tuple[int, ...]) -> FloatArray:
    """The residual stream after each of `layers`, read in one step. f32[T, layers, D]"""
    cache = PagedKVCache(decoder.new_storage(-(-len(tokens) // PAGE_SIZE)))
    kv = cache.new()
    cache.reserve(kv, len(tokens))
    batch = pack([Span(tokens, 0, logits="last")], cache.page_tables([kv]))
    hidden = decoder.forward(batch, cache.storage, Taps(hidden=layers)).hidden
    return np.stack([np.asarray(hidden[layer]) for layer in layers], axis=1)


@dataclass(slots=True, eq=False)
class Lattice:
    """What the slots behind one text say. `values`, `ids` [G, k]: the likeliest hot tokens, by their place in `hot`;
    `mass` [G]: logsumexp of all; `gates` [G, R]: of the edges; `logits` f32[G, V]."""

    values: FloatArray
    ids: NDArray[np.int64]
    mass: FloatArray
    gates: FloatArray
    logits: Logits


@dataclass(slots=True, eq=False)
class _Text:
    """A sequence: its handle in the head's cache, and the hidden states that were observed and not read yet,
    f32[n, L * D] each: nothing is computed of them before a draft is wanted."""

    kv: int
    waiting: list[FloatArray] = field(default_factory=list)
    rows: int = 0  # of them
    last: FloatArray | None = None  # what was read of the newest token, f32[D]


class BlockSource(Source):
    """Runs the head. Its cache holds a row for each token that the target computed, and never anything of a draft.

    Where the target did not compute a text's beginning (a prefix hit), the head reads what comes behind it.
    """

    keeps = True

    def __init__(
        self, head: Head, target: Decoder, num_pages: int, threads: int | None = None, precision: Precision = "int8"
    ) -> None:
        checkpoint = HeadCheckpoint(head, target.config, output_rows(target, head.hot))
        self.head, self.target = head, target
        self.decoder = NativeDecoder.from_checkpoint(checkpoint, precision, threads)
        self.cache = PagedKVCache(self.decoder.new_storage(num_pages))
        self.vocab_size = target.config.vocab_size
        self.lattices: list[Lattice] = []
        arrays = head.arrays
        self._fuse, self._token = (np.ascontiguousarray(arrays[name].T) for name in ("fuse", "token"))
        self._gate = np.ascontiguousarray(arrays["gate"].T)
        self.edge = arrays["edge"]  # [V, R]
        self.all_edges = np.ascontiguousarray(self.edge.T)
        everything = target.embedding(np.arange(self.vocab_size))
        self.before = scaled(everything) @ arrays["prev"].T  # [all, R]
        self._texts: dict[int, _Text] = {}

    def begin(self, sequence: Sequence) -> None:
        self._texts[sequence.id] = _Text(self.cache.new())

    def end(self, sequence: Sequence) -> None:
        text = self._texts.pop(sequence.id, None)
        if text is not None:
            self.cache.free(text.kv)

    def feed(self, sequence: Sequence, seen: Observation) -> None:
        """The hidden states of tokens that are committed: of a chunk, or of a last token and the accepted ones."""
        path = [0, *(node + 1 for node in seen.accepted.path)]
        rows = slice(-_WINDOW, None) if seen.kind == "prefill" else path
        text = self._texts[sequence.id]
        text.waiting.append(
            np.hstack([np.asarray(seen.outputs.hidden(layer))[rows] for layer in self.head.config.taps])
        )
        text.rows += len(text.waiting[-1])
        while text.rows - len(text.waiting[0]) >= _WINDOW:
            text.rows -= len(text.waiting.pop(0))

    def _fused(self, states: FloatArray) -> FloatArray:
        """What the head reads of each token. f32[n, L * D] -> f32[n, D]"""
        layers = scaled(states.reshape(len(states), len(self.head.config.taps), -1))
        return scaled(project(layers.reshape(states.shape), self._fuse))

    def replay(self, tokens: Seq[int], prompt: int) -> FloatArray:
        """How often each slot's likeliest token is the text's, behind each token from `prompt` on and given the true
        tokens before it: the same figure as `training.spark.hits`. f32[G]"""
        block, hot = self.head.config.block, self.head.hot
        states = hidden_states(self.target, list(tokens), self.head.config.taps)
        flat = states.reshape(len(states), -1)
        sequence = Sequence(-1, [], prompt, SamplingParams())
        self.begin(sequence)
        right = []
        try:
            read = 0
            for place in range(prompt, len(tokens) - block - 1):
                self._texts[-1].waiting, read = [flat[read:place]], place
                sequence.tokens = list(tokens[: place + 1])
                self.catch_up([sequence])
                [lattice] = self.lattices
                edges = (self.before[list(tokens[place : place + block])] * lattice.gates) @ self.all_edges
                found = hot[(np.asarray(lattice.logits) + edges).argmax(axis=1)]
                right.append(found == tokens[place + 1 : place + 1 + block])
        finally:
            self.end(sequence)
        return np.mean(right, axis=0, dtype=np.float32) if right else np.zeros(block, dtype=np.float32)

    def admit(self, sequences: Seq[Sequence], rows: Seq[int]) -> list[bool]:
        admitted, free, block = [], self.cache.available_pages, self.head.config.block
        for sequence in sequences:
            text = self._texts[sequence.id]
            new = min(sum(map(len, text.waiting)), _WINDOW)
            length = self.cache.length(text.kv) + new + block
            pages = self.cache.pages_needed(text.kv, new + block)
            fits = pages <= free and length <= self.decoder.config.max_position and length > block
            free -= pages if fits else 0
            admitted.append(fits)
        return admitted

    def catch_up(self, sequences: Seq[Sequence]) -> Logits:
        """Reads what is new and runs the slots. The logits of the first slots, of hot tokens alone, f32[B, V]; what the
        others say is in `lattices`."""
        texts, block = [self._texts[sequence.id] for sequence in sequences], self.head.config.block
        last = np.array([sequence.tokens[-1] for sequence in sequences])
        anchors = project(self.target.embedding(last), self._token)
        spans, parts, rows = list[Span](), list[FloatArray](), list[int]()
        for text, anchor in zip(texts, anchors, strict=True):
            if text.waiting:  # there is nothing new behind a step that was abandoned
                new = self._fused(np.concatenate(text.waiting)[-_WINDOW:])
                text.last = new[-1]
            else:
                new = np.empty((0, anchors.shape[1]), dtype=np.float32)
            assert text.last is not None, "a text that nothing was read of is not admitted"
            self.cache.reserve(text.kv, len(new) + block)
            spans.append(Span([0] * (len(new) + block), self.cache.length(text.kv)))
            parts += [new, text.last + anchor + self.head.arrays["slots"]]
            rows.append(len(new))
        batch = pack(spans, self.cache.page_tables([text.kv for text in texts]))
        batch.embeddings = np.concatenate(parts)
        first = batch.row_start[:-1] + np.array(rows)
        slots = (first[:, None] + np.arange(block)).reshape(-1)
        batch.logit_rows = slots.astype(np.int64)
        top = self.head.config.layers - 1
        out = self.decoder.forward(batch, self.cache.storage, Taps(hidden=(top,)))
        for text, n in zip(texts, rows, strict=True):
            self.cache.commit(text.kv, range(n))
            text.waiting, text.rows = [], 0
        gates = sigmoid(project(self.decoder.final_norm(out.hidden[top][slots]), self._gate))
        logits = np.asarray(out.rows)
        values, ids = row_topk(logits, _CANDIDATES)
        mass = row_logsumexp(logits).astype(np.float32)
        cuts = [slice(i, i + block) for i in range(0, len(slots), block)]
        self.lattices = [Lattice(values[c], ids[c], mass[c], gates[c], logits[c]) for c in cuts]
        return logits[::block]

    def extend(self, grown: Seq[Rows]) -> Logits:
        raise NotImplementedError("a block head runs all its slots at once")

    def rollback(self, sequence: Sequence) -> None:
        self.cache.rollback(self._texts[sequence.id].kv)


@register(
    family="SPEC",
    title="Block head with edges",
    paper="https://arxiv.org/abs/2607.05147",
    exactness="identical",
    needs=("head",),
    claim="5.4 (HumanEval) and 3.6 (MT-bench) tokens a step on Qwen3-4B with five layers",
)
class Spark(Grown):
    """One or two small layers read the target's hidden states and fill a block of slots in one pass; an edge of low
    rank adds what a slot cannot know, the token drafted before it. Nodes are taken best first by their probability.

    The layout is DFlash's (arXiv:2602.06036), the edge DSpark's (arXiv:2607.05147), with slots that are causal, so that
    the head is an ordinary decoder over vectors, and a vocabulary of the tokens that the target uses most.
    `outpace train-head` trains one.
    """

    name = "spark"
    paper = "https://arxiv.org/abs/2607.05147"
    #: Its features are of each token that the target computes, so it sees every step and chunk
    follows = True

    source: BlockSource

    def __init__(self, source: BlockSource, draws: Draws = Draws.COUPLED) -> None:
        super().__init__(source, draws)

    @classmethod
    def create(cls, context: DrafterContext, **options: Any) -> Spark:  # type: ignore[override]  # no draft model
        if context.head is None or context.target is None:
            raise MethodError(
                f"method {cls.name!r} needs a trained head: name its file with --head (head= in Python); "
                "`outpace train-head` makes one"
            )
        if why := fits(context.head, context.target.config):
            raise MethodError(f"{context.head.path} is not a head of this model: {why}")
        threads = getattr(context.target, "threads", None)
        source = BlockSource(context.head, context.target, context.draft_pages, threads)
        return cls(source, Draws.LIKELIEST if context.sampled else Draws.COUPLED, **options)

    @property
    def taps(self) -> Taps:
        return Taps(hidden=self.source.head.config.taps)

    def observe(self, sequence: Sequence, seen: Observation) -> None:
        self.source.feed(sequence, seen)
        super().observe(sequence, seen)

    def _rows(self, budget: int) -> int:
        return self.source.head.config.block

    def _grow(self, growing: list[Growth], logits: Logits, market: Market) -> None:
        for one, lattice in zip(growing, self.source.lattices, strict=True):
            self._best_first(one, lattice, market.floor)
            one.finish(self.name, market.floor, one.budget)

    def _best_first(self, one: Growth, lattice: Lattice, floor: float) -> None:
        """Take the node that is likeliest to be reached and accepted, and offer its children, until the budget is used
        up or nothing repays a row."""
        block = len(lattice.mass)
        heap: list[tuple[float, int, int, int, float]] = []
        order = 0
        parent, depth, token, above = NO_PARENT, 0, one.sequence.tokens[-1], 1.0
        while True:
            if depth < block:
                for child, score in self._children(one, lattice, depth, token, parent):
                    if above * score >= max(floor, 0.01):
                        order += 1
                        heappush(heap, (-above * score, order, parent, child, score))
            if not heap or len(one.tokens) >= one.budget:
                return
            reach, _, parent, token, score = heappop(heap)
            parent = one.add(parent, token, score)
            depth, above = one.depths[parent] + 1, -reach

    def _children(self, one: Growth, lattice: Lattice, depth: int, token: int, node: int) -> list[tuple[int, float]]:
        """Tokens behind `token` with their probabilities, likeliest first."""
        source, params = self.source, one.sequence.params
        edge = source.before[token] * lattice.gates[depth]
        if self.draws is Draws.COUPLED and not params.greedy:
            row = np.full((1, source.vocab_size), -np.inf, dtype=np.float32)
            row[0, source.head.hot] = lattice.logits[depth] + project(edge[None], source.all_edges)[0]
            row = np.asarray(edit_rows(row, [(one.sequence, one.path(node))]))
            values, ids = row_topk(row, _CANDIDATES)
            p = np.exp(values[0] - row_logsumexp(row)[0]).tolist()
            found = self._candidates(one.sequence, depth, row[0], ids[0].tolist(), p)
            return [(one.token, min(one.score, 0.99)) for one in found]
        values = lattice.values[depth]
        raised = values + source.edge[lattice.ids[depth]] @ edge
        most = float(raised.max())
        rest = max(np.exp(float(lattice.mass[depth]) - most) - float(np.exp(values - most).sum()), 0.0)
        p = np.exp(raised - most)
        p /= p.sum() + rest
        places = np.argsort(-p, kind="stable")
        return [(int(source.head.hot[lattice.ids[depth, i]]), min(float(p[i]), 0.99)) for i in places]
