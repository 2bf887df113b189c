"""Coupled verification: accept what the target itself would have said."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import ClassVar

from ...registry import register
from ...types import NO_PARENT, Accepted, Draft, Exactness
from ..contracts import Sequence, Verifier
from ..outputs import TargetOutputs
from ..sampling import choose, choose_rows
from ..tree import child_lookup
from .walk import Recorder, target_row


@register(
    kind="verifier",
    family="SPEC",
    title="Greedy and coupled sampling",
    paper="https://arxiv.org/abs/2408.07978",
    exactness="identical",
)
class CoupledVerifier(Verifier):
    """Walks the draft tree from the root. At each node the target's own token is drawn exactly as plain
    decoding draws it at that position, with the uniform of (seed, position); a child that carries the token
    is accepted, and without one the token ends the step as correction or bonus. Greedy is the case of
    temperature zero.

    Exactness: identical, for every drafter and tree, because the output never looks at the draft.
    Acceptance: sum over proposed x of p(x) at a node, which is what rejection sampling with point masses
    reaches. Only rows on the accepted path are sampled. Sampling with shared randomness for speculation:
    Daliri, Musco and Suresh, "Coupling without Communication and Drafter-Invariant Speculative Decoding"
    (section 3).
    """

    name = "coupled"
    exactness: ClassVar[Exactness] = "identical"

    def prepare(self, step: Seq[tuple[Sequence, TargetOutputs]], threads: int) -> None:
        """Draw what follows each sequence's last token, for all of them at once: these rows are always needed."""
        sampled = [
            (outputs, (target_row(outputs, NO_PARENT), sequence.params, len(sequence.tokens)))
            for sequence, outputs in step
            if not sequence.params.greedy and not sequence.edits_logits
        ]
        if len(sampled) > 1:
            tokens = choose_rows([row for _, row in sampled], threads)
            for (outputs, _), token in zip(sampled, tokens, strict=True):
                outputs.draw(0, token)

    def verify(self, sequence: Sequence, draft: Draft, outputs: TargetOutputs) -> Accepted:
        params, lookup = sequence.params, child_lookup(draft)
        if sequence.edits_logits or params.logprobs is not None:
            return self._walk(sequence, lookup, outputs)
        greedy, path, tokens = params.greedy, list[int](), list[int]()
        node: int | None = NO_PARENT
        while node is not None:
            token = outputs.best(node + 1) if greedy else self._drawn(sequence, outputs, node, len(tokens))
            tokens.append(token)
            node = lookup.get((node, token))
            if node is not None:
                path.append(node)
        return Accepted(path, tokens)

    def _drawn(self, sequence: Sequence, outputs: TargetOutputs, node: int, depth: int) -> int:
        """The target's token after `node`, to which `depth` drafted tokens lead."""
        token = outputs.drawn(node + 1)
        if token is None:
            token = choose(target_row(outputs, node), sequence.params, len(sequence.tokens) + depth)
        return token

    def _walk(self, sequence: Sequence, lookup: dict[tuple[int, int], int], outputs: TargetOutputs) -> Accepted:
        with Recorder(sequence) as record:
            node: int | None = NO_PARENT
            while node is not None:
                processed = record.process(target_row(outputs, node))
                token = outputs.drawn(node + 1)
                if token is None:
                    token = record.choose(processed)
                node = lookup.get((node, token))
                record.emit(processed, token, node)
            return record.result()
