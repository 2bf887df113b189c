"""Asynchronous drafting: the draft model goes on while the target verifies, and hedges against a rejection.

    handed out     the | cat | sat | on
    in the           `-- dog | ran | off        the second choice where the draft was least sure
    background                      `-- the | mat    everything is accepted, and this is the target's next token

The target's step decides which of the branches the text takes. The draft below it is ready then, and the draft model
goes on from its end; on any other outcome it starts anew, as it would have without.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Event
from time import perf_counter
from typing import Any

from ...models.decoder import Decoder
from ...registry import register
from ...types import NO_PARENT, Draft, Logits
from ..contracts import DrafterContext, Market, Observation, Proposal, Sequence
from .draft_model import DraftChain
from .grown import NO_ROW, Choice, Draws, Growth, cell_of, coupled_draw, edit_rows, likeliest
from .nodes import check_range
from .rates import checked_nodes
from .sources import ModelSource, draft_model_of

_LEAST = 0.02  # probability below which a hedge does not repay its rows


@dataclass(slots=True, eq=False)
class Branching(Growth):
    """A tree whose draft is a chain; branches hang from it. `others`: of each node that was chosen as a chain goes on,
    the second choice and its probability in relation to all but the first."""

    others: dict[int, tuple[int, float]] = field(default_factory=dict)


@dataclass(slots=True)
class Overlap:
    """What the background did, over all sequences. Times in seconds."""

    drafts: int = 0  # handed out
    hits: int = 0  # of these, the text went on along a branch with a draft below it
    tokens: int = 0  # of all drafts
    ready: int = 0  # of these, those that were ready before they were needed
    busy_s: float = 0.0  # the draft model's time in the background
    waited_s: float = 0.0  # part of it that the engine waited for

    def clear(self) -> None:
        self.drafts = self.hits = self.tokens = self.ready = 0
        self.busy_s = self.waited_s = 0.0


class BranchSource(ModelSource):
    """A draft model that runs on other threads in the background, and keeps rows of a branch provisional."""

    def __init__(self, decoder: Decoder, num_pages: int, vocab_size: int) -> None:
        super().__init__(decoder, num_pages, vocab_size)
        self.foreground = self.background = decoder

    def in_background(self, threads: int) -> None:
        """Use so many threads in the background, where that can be chosen; 0: as in the foreground."""
        view = getattr(self.foreground, "view", None)  # of decoders that run on a team of threads
        if threads and view is not None and getattr(self.foreground, "threads", threads) != threads:
            self.background = view(threads)

    def keep(self, sequence: Sequence, rows: list[int], ready: list[int]) -> None:
        """Commit `rows`; `ready` are what follows them and become the first rows of the next round. Drop the others."""
        kv = self._kv[sequence.id]
        if rows or ready:
            self.cache.commit(kv, [*rows, *ready])
            self.cache.reopen(kv, len(ready))
        else:
            self.cache.rollback(kv)

    def pages_for(self, sequence: Sequence, rows: int) -> int | None:
        """Free pages that a provisional region of `rows` takes; None if it is longer than the model's context."""
        kv = self._kv[sequence.id]
        fits = self.cache.length(kv) + rows <= self.foreground.config.max_position
        return self.cache.pages_needed(kv, rows) if fits else None


@register(
    family="SPEC",
    title="SpecBranch: the draft model goes on while the target verifies",
    paper="https://arxiv.org/abs/2506.01979",
    exactness="identical",
    needs=("draft model",),
    claim="1.8x to 4.5x on two devices (SpecBranch)",
)
class BranchDraft(DraftChain):
    """Proposes a chain as `draft` does. While the target verifies it, a thread grows branches: on from its end, as if
    all of it were accepted, and from the second choice at the nodes where it was least sure. If the text takes one of
    the branches, the next draft is there already. With penalties, bias or a grammar a request is drafted for without
    branches, since those follow the history that the target's step moves.

    Shen et al., "Speculative Decoding via Hybrid Drafting and Rollback-Aware Branch Parallelism" (SpecBranch), section
    4: branches at likely rejection points; continuous speculation beside the target's run after Butler et al.,
    "PipeInfer" (arXiv 2407.11798), section 3, and Lv et al., "DuoDecoding" (arXiv 2503.00784), section 3. Not built:
    SpecBranch's predictor from the target's features. On a CPU it pays only where target and draft model have cores of
    their own: give both fewer threads than there are cores.

    Parameters: `max_tokens` longest draft and longest branch; `min_reach` a draft or a branch ends where its
    probability falls below; `hedges` branches from second choices; `threads` of the draft model in the background, on a
    CPU (0: as many as it has in the foreground). Raises ParameterError for a value out of range.
    """

    name = "branch"
    paper = "https://arxiv.org/abs/2506.01979"

    source: BranchSource

    def __init__(
        self,
        source: BranchSource,
        draws: Draws = Draws.COUPLED,
        max_tokens: int = 6,
        min_reach: float = 0.1,
        hedges: int = 1,
        threads: int = 1,
    ) -> None:
        super().__init__(source, Draws.LIKELIEST if draws is Draws.SAMPLED else draws, max_tokens, min_reach)
        check_range(self.name, "hedges", hedges, 0, 8)
        check_range(self.name, "threads", threads, 0)
        source.in_background(threads)
        self.hedges, self.overlap = hedges, Overlap()
        self._trees: dict[int, Branching] = {}  # by sequence id, of drafts handed out, or ready ones
        self._stop = Event()
        self._running: tuple[Future[None], list[Branching]] | None = None
        self._failed: Exception | None = None
        self._pool: ThreadPoolExecutor | None = None

    @classmethod
    def create(cls, context: DrafterContext, **options: Any) -> BranchDraft:
        source = BranchSource(draft_model_of(context, cls.name), context.draft_pages, context.vocab_size)
        return cls(source, Draws.of(context), **options)

    # -- a sequence's life: every call that touches the draft model's cache first waits for the background ------

    def begin(self, sequence: Sequence) -> None:
        self._join()
        super().begin(sequence)

    def end(self, sequence: Sequence) -> None:
        self._join()
        self._trees.pop(sequence.id, None)
        super().end(sequence)

    def observe(self, sequence: Sequence, seen: Observation) -> None:
        self._join()
        self._follow(sequence)

    def propose(self, sequences: Seq[Sequence], budgets: Seq[int], market: Market) -> Proposal:
        self._join()
        if self._failed is not None:
            failed, self._failed = self._failed, None
            raise failed
        for sequence in sequences:
            self._follow(sequence)
        wanted = [(s, budget) for s, budget in zip(sequences, budgets, strict=True) if budget > 0]
        for sequence, budget in zip(sequences, budgets, strict=True):
            if not budget:
                self._drop(sequence)
        try:
            stop = max(self.min_reach, market.forward_floor, market.floor)
            growing = self._ready(wanted, stop) + self._anew(wanted, stop)
        except BaseException:
            for sequence, _ in wanted:
                self._drop(sequence)
            raise
        for one in growing:
            one.finish(self.name, market.floor, one.budget)
            self._trees[one.sequence.id] = one
            self.overlap.drafts += 1
            self.overlap.tokens += len(one.draft)
        self._start(growing, max(self.min_reach, market.forward_floor))
        trees = self._trees
        return Proposal([trees[s.id].draft if s.id in trees else Draft.empty() for s in sequences])

    def _drop(self, sequence: Sequence) -> None:
        self._trees.pop(sequence.id, None)
        self.source.rollback(sequence)

    # -- in the foreground -------------------------------------------------------------------------------------

    def _ready(self, wanted: list[tuple[Sequence, int]], stop: float) -> list[Branching]:
        """Drafts that the background has begun, brought to their full length."""
        growing, free = [], self.source.cache.available_pages
        for sequence, budget in wanted:
            one = self._trees.get(sequence.id)
            if one is None:
                continue
            pages = self.source.pages_for(sequence, max(self._rows(budget), len(one.row_parents)))
            if pages is None or pages > free:
                del self._trees[sequence.id]
                continue
            free -= pages
            one.budget = budget
            growing.append(one)
            self.overlap.hits += 1
            self.overlap.ready += min(len(one.tokens), budget)
        self._finish_chains(growing, stop)
        return growing

    def _anew(self, wanted: list[tuple[Sequence, int]], stop: float) -> list[Branching]:
        """Drafts begun after the last token."""
        missing = [(s, budget) for s, budget in wanted if s.id not in self._trees]
        for sequence, _ in missing:
            self.source.rollback(sequence)
        fits = self.source.admit([s for s, _ in missing], [self._rows(budget) for _, budget in missing])
        growing = [Branching(s, b, len(s.tokens)) for (s, b), ok in zip(missing, fits, strict=True) if ok]
        if growing:
            logits = self.source.catch_up([one.sequence for one in growing])
            self._choose([(one, NO_PARENT) for one in growing], logits)
            self._finish_chains(growing, stop)
        return growing

    def _finish_chains(self, growing: list[Branching], stop: float) -> None:
        """Lengthen chains as long as their reach is `stop` at least."""
        while True:
            active = [
                one for one in growing if len(one.tokens) < min(one.budget, self.max_tokens) and one.reach[-1] >= stop
            ]
            if not active:
                return
            tips = [(one, len(one.tokens) - 1) for one in active]
            self._choose(tips, self.source.extend([one.run([node]) for one, node in tips]))

    def _choose(self, tips: list[tuple[Branching, int]], logits: Logits) -> list[int]:
        """The next node below each tip, from its row of `logits`."""
        edited = edit_rows(logits, [(one.sequence, one.path(node)) for one, node in tips])
        ids, p = likeliest(edited, 2)
        chosen = []
        for row, (one, tip) in enumerate(tips):
            params, position = one.sequence.params, one.root + (one.depths[tip] + 1 if tip >= 0 else 0)
            token, own, kind = ids[row][0], p[row][0], Choice.GREEDY if params.greedy else Choice.OUTRIGHT
            if not params.greedy and self.draws is Draws.COUPLED:
                kind = Choice.COUPLED
                token, own = coupled_draw(edited[row], params, position)
            cell = cell_of(kind, own)
            node = one.add(tip, token, self._rate(cell), cell)
            second = 1 if token == ids[row][0] else 0
            if second < len(ids[row]):
                one.others[node] = ids[row][second], min(p[row][second] / max(1 - own, 1e-6), 1.0)
            chosen.append(node)
        return chosen

    def _follow(self, sequence: Sequence) -> None:
        """Take the branch that the text took: its tokens are read, what was drafted below it is the next draft."""
        one = self._trees.pop(sequence.id, None)
        if one is None:
            return
        truth = sequence.tokens[one.root :]
        self._check(one, truth)
        below: dict[int, list[int]] = {}
        for node, parent in enumerate(one.parents):
            below.setdefault(parent, []).append(node)
        at, rows = NO_PARENT, list[int]()
        for token in truth:
            found = next((node for node in below.get(at, ()) if one.tokens[node] == token), None)
            if found is None or one.rows[found] == NO_ROW:
                self.source.keep(sequence, rows, [])
                return
            at = found
            rows.append(one.rows[at])
        chain: list[int] = []
        while at in below:
            at = max(below[at], key=one.scores.__getitem__)
            chain.append(at)
        ready = [one.rows[node] for node in chain if one.rows[node] != NO_ROW]
        self.source.keep(sequence, rows, ready)
        if chain:
            self._trees[sequence.id] = _replant(one, chain, len(sequence.tokens))

    def _check(self, one: Branching, truth: list[int]) -> None:
        for node, _, right in checked_nodes(one.draft, truth[: len(one.draft)]):
            cell = one.cells[one.kept[node]]
            if cell is not None:
                self.confidence.update(cell, right)

    # -- in the background -------------------------------------------------------------------------------------

    def _start(self, growing: list[Branching], stop: float) -> None:
        """Grow branches below the drafts that were handed out, until `_join`. One ends where its reach from
        its start on falls below `stop`."""
        free, chosen = self.source.cache.available_pages, list[Branching]()
        for one in growing:
            more = (1 + self.hedges) * (self.max_tokens + 1)
            pages = self.source.pages_for(one.sequence, len(one.row_parents) + more)
            if one.tokens and not one.sequence.params.edits_logits and pages is not None and pages <= free:
                free -= pages
                chosen.append(one)
        if not chosen:
            return
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="outpace-branch")
        self._stop.clear()
        self.source.decoder = self.source.background
        self._running = self._pool.submit(self._branch, chosen, stop), chosen

    def _join(self) -> None:
        """Wait for the background; what went wrong there is kept for the next `propose`."""
        if self._running is None:
            return
        (future, chosen), self._running = self._running, None
        began = perf_counter()
        self._stop.set()
        try:
            future.result()
        except Exception as error:
            self._failed = error
            for one in chosen:
                self._drop(one.sequence)
        self.source.decoder = self.source.foreground
        self.overlap.waited_s += perf_counter() - began

    def _branch(self, chosen: list[Branching], stop: float) -> None:
        """One row for each branch in each forward. Touches nothing that the target's step changes."""
        began = perf_counter()
        starts = [(one, start) for one in chosen for start in self._starts(one)]
        tips = list(starts)
        for _ in range(self.max_tokens + 1):
            if self._stop.is_set() or not tips:
                break
            by_tree: dict[int, tuple[Branching, list[int]]] = {}
            for one, node in tips:
                by_tree.setdefault(id(one), (one, []))[1].append(node)
            # tips are in the order of their trees, so rows and tips are in one order
            below = self._choose(tips, self.source.extend([one.run(nodes) for one, nodes in by_tree.values()]))
            going = [
                (start, (one, node))
                for start, (one, _), node in zip(starts, tips, below, strict=True)
                if one.reach[node] >= stop * one.reach[start[1]]
            ]
            starts, tips = [start for start, _ in going], [tip for _, tip in going]
        self.overlap.busy_s += perf_counter() - began

    def _starts(self, one: Branching) -> list[int]:
        """Where branches begin: the end of the chain, and the likeliest second choices on the way to it."""
        hedges = []
        for node in one.kept:
            other, share = one.others.get(node, (0, 0.0))
            parent = one.parents[node]
            reached = (one.reach[parent] if parent >= 0 else 1.0) * (1 - one.scores[node]) * share
            if reached >= _LEAST:
                hedges.append((reached, node, other, share))
        starts = [len(one.tokens) - 1]
        for _, node, other, share in sorted(hedges, reverse=True)[: self.hedges]:
            starts.append(one.add(one.parents[node], other, (1 - one.scores[node]) * share))
        return starts


def _replant(one: Branching, chain: list[int], root: int) -> Branching:
    """A tree of its own of a chain of nodes, whose rows are now the first of the provisional region."""
    tree = Branching(one.sequence, 0, root)
    for node in chain:
        placed = tree.add(len(tree.tokens) - 1, one.tokens[node], one.scores[node], one.cells[node])
        if one.rows[node] != NO_ROW:
            tree.run([placed])
        if node in one.others:
            tree.others[placed] = one.others[node]
    return tree
