"""The way that every ordinary request advances: a drafter proposes, the target's answers decide. Plain decoding is its
case without drafts.

    rows of a step    | t d d d | t d |        `t` is a sequence's last token, `d` are its draft nodes
                        seq 3     seq 5
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from time import perf_counter

from ..models.batch import Tree
from ..models.decoder import Taps
from ..types import Accepted, Draft, Exactness
from .advance import Advance, Outcome, Work
from .contracts import Drafter, Observation, Sequence, Verifier
from .outputs import TargetOutputs
from .planners.planner import Planner, StepBudget
from .tree import expected_accepted

NO_DRAFT = Draft.empty()


class DraftVerify(Advance):
    """Drafts as much as the planner says, and keeps what the verifier accepts."""

    name = "draft and verify"

    def __init__(self, drafter: Drafter, verifier: Verifier, planner: Planner) -> None:
        self.drafter, self.verifier, self.planner = drafter, verifier, planner
        self._context = self._draft_s = 0.0  # of the last spans

    @property
    def exactness(self) -> Exactness:
        return self.verifier.exactness

    @property
    def taps(self) -> Taps:
        return self.drafter.taps

    def begin(self, sequence: Sequence) -> None:
        self.drafter.begin(sequence)

    def pause(self, sequence: Sequence) -> None:
        self.drafter.end(sequence)

    def end(self, sequence: Sequence) -> None:
        self.drafter.end(sequence)

    def spans(self, sequences: Seq[Sequence], budget: StepBudget) -> list[Work]:
        began = perf_counter()
        budgets, market = self.planner.offer(budget)
        asked = perf_counter()
        proposal = self.drafter.propose(sequences, budgets, market)
        seconds = perf_counter() - asked
        for draft, most in zip(proposal.drafts, budgets, strict=True):
            nodes = len(draft.tokens)
            assert nodes <= most, f"drafter {self.drafter.name!r} proposed {nodes} nodes of {most}"
        self._count(sequences, seconds, proposal.seconds)
        chosen = self.planner.choose(proposal.drafts, budget)
        nodes = sum([len(draft.tokens) for draft in chosen])
        assert nodes <= budget.nodes, f"planner {self.planner.name!r} chose more nodes than it may"
        works = [_work(sequence.tokens, draft) for sequence, draft in zip(sequences, chosen, strict=True)]
        self._context, self._draft_s = budget.context, perf_counter() - began
        return works

    def prepare(self, step: Seq[tuple[Sequence, TargetOutputs]], threads: int) -> None:
        self.verifier.prepare(step, threads)

    def judge(self, sequence: Sequence, work: Work, outputs: TargetOutputs) -> Outcome:
        return Outcome(self.verifier.verify(sequence, NO_DRAFT if work.draft is None else work.draft, outputs))

    def observe(self, sequence: Sequence, work: Work, kept: Accepted, outputs: TargetOutputs) -> None:
        draft = work.draft
        seen = Observation(kept, NO_DRAFT, outputs, "prefill") if draft is None else Observation(kept, draft, outputs)
        self.drafter.observe(sequence, seen)

    def account(self, step: Seq[tuple[Sequence, Work, Outcome]], others: int, seconds: float) -> None:
        """Report the time of a step to the planner, and count what plain decoding would have taken: as long for the
        other rows in it, and a step of its own for each token."""
        rows = sum([len(work.tokens) for _, work, _ in step])
        tokens = sum([len(outcome.accepted.tokens) for _, _, outcome in step])
        own_s = self.planner.observe(rows, self._context, tokens, self._draft_s, seconds, others)
        plain_s = self.planner.plain_seconds(len(step), self._context)
        share = own_s / len(step)
        for sequence, work, outcome in step:
            stats = sequence.stats
            stats.verify_s += share
            stats.expected_tokens += 1
            if plain_s > 0:
                stats.plain_s += plain_s * len(outcome.accepted.tokens) + seconds - own_s
            if work.draft is not None and work.draft.sources:
                stats.expected_tokens += expected_accepted(work.draft)

    def _count(self, sequences: Seq[Sequence], seconds: float, by_source: dict[str, float]) -> None:
        """Each sequence's share of the seconds that drafting took."""
        shares = [(name, spent / len(sequences)) for name, spent in by_source.items()]
        for sequence in sequences:
            stats = sequence.stats
            stats.draft_s += seconds / len(sequences)
            for name, share in shares:
                stats.source(name).draft_s += share


def _work(tokens: list[int], draft: Draft) -> Work:
    if len(draft.tokens):
        return Work(tokens[-1:] + draft.tokens.tolist(), len(tokens) - 1, Tree(draft.parents), draft=draft)
    return Work(tokens[-1:], len(tokens) - 1, draft=draft)
