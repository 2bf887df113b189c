"""One packed step over any number of sequences: spans, reserve, pack, forward, judge; then commit.

    rows of a step    | t d d d | t d | p p p p p p p p |
                        seq 3     seq 5   text of seq 7
    logits of           all four  both    the last row, if the text ends here

What the rows of a sequence are, and what their answers mean, its `Advance` says. `forward` leaves the region of every
sequence that has tokens reserved; each must then be committed, or all rolled back with `abandon`.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from contextlib import suppress
from dataclasses import dataclass, field
from functools import reduce
from operator import or_
from time import perf_counter

from ..cache.pages import PagedKVCache
from ..decoding.advance import Advance, Outcome, Work
from ..decoding.contracts import NOT_CACHED, Sequence
from ..decoding.outputs import StepOutputs, TargetOutputs
from ..decoding.planners.planner import StepBudget
from ..errors import OutpaceError
from ..models.batch import pack
from ..models.decoder import Decoder, Taps
from ..types import Accepted
from .jobs import StepPlan
from .request import Request

NOTHING = Outcome(Accepted([], []))


@dataclass(slots=True, eq=False)
class Part:
    """What one sequence has of a step. `reads`: its rows are a chunk of its text. `judged`: unless that goes on.

    `outputs` are valid until the next forward. `error`: what went wrong when they were judged (a grammar that outgrew
    its limits, say); nothing is accepted then.
    """

    request: Request
    work: Work
    reads: bool = False
    judged: bool = True
    outputs: TargetOutputs = field(init=False)
    outcome: Outcome = NOTHING
    error: Exception | None = None


class Runner:
    """Moves sequences through a decoder. The only caller of the cache; keeps no sequence itself."""

    def __init__(self, decoder: Decoder, cache: PagedKVCache) -> None:
        self.decoder, self.cache = decoder, cache
        self.threads = int(getattr(decoder, "threads", 1))  # idle while tokens are chosen
        self.rows = 0  # of the last step
        self.draft_s = self.forward_s = self.sample_s = 0.0  # so far: proposing, the target's forwards, choosing tokens

    def end(self, request: Request) -> None:
        """Forget a request, at any moment outside `forward`; one that has no pages too."""
        if request.cached:
            self.cache.free(request.kv)
            request.sequence.kv = NOT_CACHED
        request.advance.end(request.sequence)

    def forward(self, decoding: list[Request], chunks: list[tuple[Request, int]], plan: StepPlan) -> list[Part]:
        """One step, with the drafts that `plan` allows. `chunks` are texts to read on, each with its number of rows;
        they are committed here. What its rows gave is left for `commit`.
        """
        began = perf_counter()
        groups = _spans(decoding, plan)
        parts = [part for group in groups.values() for part in group]
        spanned = perf_counter()
        parts += [_chunk(request, n) for request, n in chunks]
        try:
            self._run(parts, drafted=bool(groups))
            forwarded = perf_counter()
            self._judge([part for part in parts if part.judged])
        except BaseException:
            self.abandon([part.request for part in parts])
            raise
        self.draft_s += spanned - began
        self.forward_s += forwarded - spanned
        self.sample_s += perf_counter() - forwarded
        for request, n in chunks:
            self.cache.commit(request.kv, range(n))
            request.prefilled += n
        for advance, group in groups.items():
            rows = sum([len(part.work.tokens) for part in group])
            step = [(part.request.sequence, part.work, part.outcome) for part in group]
            advance.account(step, self.rows - rows, perf_counter() - spanned)
        return parts

    def commit(self, part: Part, kept: Accepted) -> None:
        """Keep the rows of the accepted path and append its tokens; without tokens the rows stay open."""
        request, sequence = part.request, part.request.sequence
        if kept.tokens:
            if part.reads:
                length = self.cache.length(sequence.kv)
            else:
                path = kept.path
                chain = not path or path[-1] == len(path) - 1
                length = self.cache.commit(sequence.kv, range(len(path) + 1) if chain else [0, *(i + 1 for i in path)])
            sequence.tokens += kept.tokens
            assert length == len(sequence.tokens) - 1, "the last token alone is not in the KV cache"
        request.advance.observe(sequence, part.work, kept, part.outputs)

    def abandon(self, requests: Seq[Request]) -> None:
        """Drop what a failed step reserved; nothing was committed."""
        for request in requests:
            if request.cached:
                self.cache.rollback(request.kv)

    def _run(self, parts: list[Part], drafted: bool) -> None:
        """Reserve, pack and run; gives each part its outputs. `drafted`: there are others than chunks."""
        cache, works = self.cache, [part.work for part in parts]
        for part in parts:
            cache.reserve(part.request.kv, len(part.work.tokens))
            if before := cache.before(part.request.kv):
                part.work.before, part.work.committed = before, part.work.committed - before
            if len(parts) > 1:
                part.request.alone = False
        kvs = [part.request.kv for part in parts]
        batch = pack(works, cache.page_tables(kvs))
        batch.ragged = cache.ragged(kvs)
        self.rows = len(batch.tokens)
        if any([work.embeddings is not None for work in works]):
            batch.embeddings = self.decoder.embedding(batch.tokens)
            for work, row in zip(works, batch.row_start.tolist(), strict=False):
                if work.embeddings is not None:
                    batch.embeddings[row : row + len(work.tokens)] = work.embeddings
        last = self.decoder.config.num_layers - 1
        taps = reduce(or_, [advance.taps for advance in {part.request.advance for part in parts}])
        if any(
            [part.reads and part.request.reading is not None and part.request.reading.wants_hidden for part in parts]
        ):
            taps |= Taps(hidden=(last,))
        if any([part.reads and part.request.window_of(len(part.work.tokens)) for part in parts]):
            taps |= Taps(queries=tuple(range(last + 1)))
        out = self.decoder.forward(batch, cache.storage, taps)
        step = StepOutputs(out, taps.topk if drafted else 0, self.threads)
        row = logit = 0
        for part in parts:
            rows, end = slice(row, row + len(part.work.tokens)), logit + _logit_rows(part.work)
            if part.reads:
                reading = part.request.reading
                if reading is not None:
                    hidden = out.hidden[last][rows] if reading.wants_hidden else None
                    reading.add(part.request.prefilled, out.rows[logit:end] if reading.wants_logits else None, hidden)
                logit = end - part.judged
                part.request.tap(out.queries, rows)
            part.outputs = TargetOutputs(step, logit, end, rows)
            row, logit = rows.stop, end

    def _judge(self, parts: list[Part]) -> None:
        """What the outputs mean. An error of one request (its grammar, its numbers) must not end the others of its
        step. What fails for all together is left to each one's own judgement, which can tell whose error it is."""
        together: dict[Advance, list[tuple[Sequence, TargetOutputs]]] = {}
        for part in parts:
            together.setdefault(part.request.advance, []).append((part.request.sequence, part.outputs))
        for advance, step in together.items():
            with suppress(OutpaceError):
                advance.prepare(step, self.threads)
        for part in parts:
            try:
                part.outcome = part.request.advance.judge(part.request.sequence, part.work, part.outputs)
            except Exception as error:
                part.error = error


def _spans(decoding: list[Request], plan: StepPlan) -> dict[Advance, list[Part]]:
    """The rows of those that decode, by their way to advance."""
    together: dict[Advance, list[Request]] = {}
    for request in decoding:
        together.setdefault(request.advance, []).append(request)
    groups: dict[Advance, list[Part]] = {}
    for advance, requests in together.items():
        sequences, caps = [request.sequence for request in requests], [plan.caps[request.id] for request in requests]
        nodes = min(plan.draft_rows, sum(caps))
        works = advance.spans(sequences, StepBudget(caps, nodes, [len(s.tokens) for s in sequences]))
        groups[advance] = [Part(request, work) for request, work in zip(requests, works, strict=True)]
    return groups


def _chunk(request: Request, n: int) -> Part:
    """The next `n` rows of a text that is read."""
    work = request.advance.read(request.sequence, request.prefilled, n)
    judged = request.prefilled + n == request.to_read and request.advance.reads_last
    if request.reading is not None and request.reading.wants_logits:
        work.logits = "all"
    else:
        work.logits = "last" if judged else "none"
    return Part(request, work, reads=True, judged=judged)


def _logit_rows(work: Work) -> int:
    return len(work.tokens) if work.logits == "all" else int(work.logits == "last")
