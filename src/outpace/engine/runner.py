"""One packed step over any number of sequences: propose, reserve, pack, forward, verify; then commit.

    rows of a step    | t d d d | t d | p p p p p p p p |
                        seq 3     seq 5   prompt of seq 7
    logits of           all four  both    the last row, if the prompt ends here

`t` is a sequence's last token, which is not in the KV cache yet, `d` its draft nodes. `forward` leaves every
sequence's region reserved; each must then be committed, or all rolled back with `abandon`.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from contextlib import suppress
from dataclasses import dataclass
from time import perf_counter
from typing import Literal

from ..cache.pages import PagedKVCache
from ..decoding.contracts import NOT_CACHED, Drafter, Observation, Verifier
from ..decoding.outputs import StepOutputs, TargetOutputs
from ..decoding.planners.planner import Planner, StepBudget
from ..decoding.tree import expected_accepted
from ..errors import OutpaceError
from ..models.batch import Span, Tree, pack
from ..models.decoder import Decoder
from ..types import Accepted, Draft, Logits
from .request import Request

Target = tuple[Request, Draft | None, TargetOutputs]  # one sequence's rows; without a draft: the end of a prompt
NO_DRAFT = Draft.empty()
NOTHING = Accepted([], [])


@dataclass(slots=True, eq=False)
class Verified:
    """What the target answered for one sequence. `draft` is None for the token that prefill gives.

    `error`: what went wrong when it was verified (a grammar that outgrew its limits, say); nothing is accepted then.
    """

    request: Request
    draft: Draft | None
    outputs: TargetOutputs  # valid until the next forward
    accepted: Accepted
    error: Exception | None = None


class Runner:
    """Moves sequences through a decoder. The only caller of the cache; keeps no sequence itself."""

    def __init__(
        self, decoder: Decoder, cache: PagedKVCache, drafter: Drafter, verifier: Verifier, planner: Planner
    ) -> None:
        self.decoder, self.cache, self.drafter, self.verifier = decoder, cache, drafter, verifier
        self.planner = planner
        self.threads = int(getattr(decoder, "threads", 1))  # idle while tokens are chosen
        self.rows = 0  # of the last step
        self.draft_s = self.forward_s = self.sample_s = 0.0  # so far: proposing, the target's forwards, choosing tokens

    def end(self, request: Request) -> None:
        """Forget a request, at any moment outside `forward`; one that has no pages too."""
        if request.cached:
            self.cache.free(request.kv)
            request.sequence.kv = NOT_CACHED
        self.drafter.end(request.sequence)

    def forward(self, decoding: list[Request], limits: StepBudget, chunks: list[tuple[Request, int]]) -> list[Verified]:
        """One step. `limits` is for drafts. `chunks` are prompts to read on, each with its number of rows; a chunk is
        committed here unless it ends its prompt, and what ends a prompt or decodes is verified and left for `commit`.
        """
        began = perf_counter()
        drafts = self._propose(decoding, limits)
        drafted = perf_counter()
        try:
            step, read = self._run(decoding, drafts, chunks)
            forwarded = perf_counter()
            targets = _targets(step, decoding, drafts, read)
            self._prepare(targets)
            verified = [self._verify(*target) for target in targets]
        except BaseException:
            self.abandon([*decoding, *(r for r, _ in chunks)])
            raise
        self.draft_s += drafted - began
        self.forward_s += forwarded - drafted
        self.sample_s += perf_counter() - forwarded
        for request, n in chunks:
            self.cache.commit(request.kv, range(n))
            request.prefilled += n
        if decoding:
            prompt_rows = sum(n for _, n in chunks)
            self._account(verified[: len(decoding)], limits, prompt_rows, drafted - began, perf_counter() - drafted)
        return verified

    def _prepare(self, targets: list[Target]) -> None:
        """What fails for all together is left to each one's own verification, which can tell whose error it is."""
        with suppress(OutpaceError):
            self.verifier.prepare([(request.sequence, outputs) for request, _, outputs in targets], self.threads)

    def _verify(self, request: Request, draft: Draft | None, outputs: TargetOutputs) -> Verified:
        """An error of one request (its grammar, its numbers) must not end the others of its step."""
        try:
            accepted = self.verifier.verify(request.sequence, NO_DRAFT if draft is None else draft, outputs)
            return Verified(request, draft, outputs, accepted)
        except Exception as error:
            return Verified(request, draft, outputs, NOTHING, error)

    def _account(
        self, decoded: list[Verified], limits: StepBudget, prompt_rows: int, draft_s: float, step_s: float
    ) -> None:
        """Report the time of a step to the planner, and count what plain decoding would have taken: as long for the
        prompts that were read in it, and a step of its own for each token."""
        rows, tokens = self.rows - prompt_rows, sum([len(v.accepted.tokens) for v in decoded])
        own_s = self.planner.observe(rows, limits.context, tokens, draft_s, step_s, prompt_rows)
        plain_s = self.planner.plain_seconds(len(decoded), limits.context)
        share = own_s / len(decoded)
        for v in decoded:
            stats = v.request.stats
            stats.verify_s += share
            stats.expected_tokens += 1
            if plain_s > 0:
                stats.plain_s += plain_s * len(v.accepted.tokens) + step_s - own_s
            if v.draft is not None and v.draft.sources:
                stats.expected_tokens += expected_accepted(v.draft)

    def commit(self, verified: Verified, kept: Accepted) -> None:
        """Keep the KV of the accepted path and append its tokens; the drafter observes."""
        request = verified.request
        sequence, draft = request.sequence, verified.draft
        if draft is not None:
            path = kept.path
            chain = not path or path[-1] == len(path) - 1
            offsets = range(len(path) + 1) if chain else [0, *(i + 1 for i in path)]
            length = self.cache.commit(sequence.kv, offsets)
            seen = Observation(kept.tokens, draft, kept, verified.outputs)
        else:
            length = self.cache.length(sequence.kv)
            seen = Observation(kept.tokens, NO_DRAFT, kept, None, first=verified.outputs)
        sequence.tokens += kept.tokens
        assert length == len(sequence.tokens) - 1, "the last token alone is not in the KV cache"
        self.drafter.observe(sequence, seen)

    def abandon(self, requests: Seq[Request]) -> None:
        """Drop what a failed step reserved; nothing was committed."""
        for request in requests:
            if request.cached:
                self.cache.rollback(request.kv)

    def _propose(self, decoding: list[Request], limits: StepBudget) -> list[Draft]:
        if not decoding:
            return []
        budgets, market = self.planner.offer(limits)
        began = perf_counter()
        proposal = self.drafter.propose([r.sequence for r in decoding], budgets, market)
        total = perf_counter() - began
        for draft, budget in zip(proposal.drafts, budgets, strict=True):
            nodes = len(draft.tokens)
            assert nodes <= budget, f"drafter {self.drafter.name!r} proposed {nodes} nodes of {budget}"
        shares = [(name, seconds / len(decoding)) for name, seconds in proposal.seconds.items()]
        total /= len(decoding)
        for request in decoding:
            stats = request.stats
            stats.draft_s += total
            for name, seconds in shares:
                stats.source(name).draft_s += seconds
        chosen = self.planner.choose(proposal.drafts, limits)
        nodes = sum([len(draft.tokens) for draft in chosen])
        assert nodes <= limits.nodes, f"planner {self.planner.name!r} chose more nodes than it may"
        return chosen

    def _run(
        self, decoding: list[Request], drafts: list[Draft], chunks: list[tuple[Request, int]]
    ) -> tuple[StepOutputs, list[_Chunk]]:
        """Reserve, pack and run. Returns the outputs, and what became of each chunk."""
        cache, spans, read = self.cache, [], []
        for request, draft in zip(decoding, drafts, strict=True):
            sequence, nodes = request.sequence, len(draft.tokens)
            cache.reserve(sequence.kv, 1 + nodes)
            rows, committed = sequence.tokens[-1:], len(sequence.tokens) - 1
            if nodes:
                spans.append(Span(rows + draft.tokens.tolist(), committed, Tree(draft.parents)))
            else:
                spans.append(Span(rows, committed))
        for request, n in chunks:
            cache.reserve(request.kv, n)
            at = request.prefilled
            chunk = _Chunk(request, n, ended=at + n == request.to_read)
            spans.append(Span(request.sequence.tokens[at : at + n], at, logits=chunk.logits))
            read.append(chunk)
        stepping = [*decoding, *(request for request, _ in chunks)]
        if len(stepping) > 1:
            for request in stepping:
                request.alone = False
        batch = pack(spans, cache.page_tables([request.sequence.kv for request in stepping]))
        self.rows = len(batch.tokens)
        # only steps that decode are observed together with their outputs
        expected = self.drafter.expects_topk if decoding else 0
        last = self.decoder.config.num_layers - 1
        pooled = any(c.request.reading is not None and c.request.reading.wants_hidden for c in read)
        out = self.decoder.forward(batch, cache.storage, (last,) if pooled else ())
        if any(chunk.request.reading is not None for chunk in read):
            decoded = sum(len(span.tokens) for span in spans[: len(decoding)])
            _gather(read, out.rows[decoded:], out.hidden[last][decoded:] if pooled else None)
        return StepOutputs(out.rows, expected, self.threads), read


@dataclass(slots=True, eq=False)
class _Chunk:
    """Rows of a prompt in a step. `ended`: the prompt ends with them."""

    request: Request
    rows: int
    ended: bool

    @property
    def logits(self) -> Literal["all", "last", "none"]:
        reading = self.request.reading
        if reading is not None and reading.wants_logits:
            return "all"
        return "last" if self.ended else "none"

    @property
    def logit_rows(self) -> int:
        return {"all": self.rows, "last": 1, "none": 0}[self.logits]


def _gather(chunks: list[_Chunk], logits: Logits, hidden: Logits | None) -> None:
    """Hand the rows of prompts to those who gather them. `logits` and `hidden` are those of the chunks, in order."""
    row = logit = 0
    for chunk in chunks:
        reading, n = chunk.request.reading, chunk.rows
        if reading is not None:
            reading.add(
                chunk.request.prefilled,
                logits[logit : logit + n] if reading.wants_logits else None,
                hidden[row : row + n] if hidden is not None and reading.wants_hidden else None,
            )
        row += n
        logit += chunk.logit_rows


def _targets(step: StepOutputs, decoding: list[Request], drafts: list[Draft], read: list[_Chunk]) -> list[Target]:
    """Whose rows of a step are to be verified: those of every draft, and the last one of a prompt that has ended."""
    found: list[Target] = []
    row = 0
    for request, draft in zip(decoding, drafts, strict=True):
        end = row + 1 + len(draft.tokens)
        found.append((request, draft, TargetOutputs(step, row, end)))
        row = end
    for chunk in read:
        row += chunk.logit_rows
        if chunk.ended:
            found.append((chunk.request, None, TargetOutputs(step, row - 1, row)))
    return found
