"""The target's answers after a drafter's own nodes, whichever draft was verified.

For drafters that learn from rejected rows, such as Jacobi decoding. A drafter's nodes are found in the verified
draft by their tokens: it may be their own, a merged tree, or a part of either.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ...types import NO_PARENT, Draft, FloatArray
from ..contracts import Observation, Sequence
from ..sampling import choose, host_row, process
from ..tree import child_lookup, node_depths, path_to


class Answers:
    """Of one step; `own` was proposed for it, with the last token before the step's as its root.

    Valid during `observe` only. A node's answer is the token at the position behind it.
    """

    def __init__(self, sequence: Sequence, seen: Observation, own: Draft) -> None:
        self._sequence, self._outputs, self._own = sequence, seen.outputs, own
        self._root = len(sequence.tokens) - len(seen.new_tokens)
        self._depths = node_depths(own.parents)
        lookup = child_lookup(seen.draft)
        self._rows: dict[int, int] = {NO_PARENT: 0}  # node -> row of the outputs
        for node, (parent, token) in enumerate(zip(own.parents.tolist(), own.tokens.tolist(), strict=True)):
            if parent in self._rows:
                place = lookup.get((self._rows[parent] - 1, token))
                if place is not None:
                    self._rows[node] = place + 1

    def __contains__(self, node: int) -> bool:
        """Whether the target answered after this node."""
        return node in self._rows

    def position(self, node: int) -> int:
        return self._root + (int(self._depths[node]) + 1 if node != NO_PARENT else 0)

    def processed(self, node: int) -> FloatArray:
        """Logits f32[V] as the sampler would see them there, had the nodes down to it been emitted."""
        logits = host_row(self._outputs.logits(self._rows[node]))
        params = self._sequence.params
        if not params.edits_logits:
            return logits
        history = self._sequence.history
        history.truncate(self._root)
        for on_path in path_to(self._own.parents, node):
            history.append(int(self._own.tokens[on_path]))
        edited = process(logits, params, history)
        history.truncate(self._root)  # it catches up with the sequence when it is next read
        return edited

    def token(self, node: int, coupled: bool) -> int:
        """The target's own token after a node: the likeliest, or with `coupled` what it would draw there."""
        params = self._sequence.params
        if params.greedy or not coupled:
            if not params.edits_logits:
                return int(self._outputs.argmax()[self._rows[node]])
            return int(self.processed(node).argmax())
        return choose(self.processed(node), params, self.position(node))

    def likeliest(self, node: int, k: int) -> tuple[list[int], NDArray[np.float64]]:
        """The k likeliest tokens after a node and their shares of each other's probability."""
        if self._sequence.params.edits_logits:
            logits = self.processed(node)
            ids = np.argsort(-logits, kind="stable")[:k]
            values = logits[ids]
        else:
            values, ids = (part[self._rows[node]] for part in self._outputs.topk(k))
        weights = np.exp((values - values[0]).astype(np.float64))
        return ids.tolist(), weights / weights.sum()


def follows(sequence: Sequence, seen: Observation, root: int) -> bool:
    """Whether a draft that was proposed when the sequence had `root` tokens was for this very step, and it decoded."""
    return seen.kind == "step" and root == len(sequence.tokens) - len(seen.new_tokens)
