"""What a precision changes, position by position: how far its distributions are from a reference's on the same text.

The mean hides what a reader meets: the one position where another token is likely. So the worst are kept as well.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np
import torch

from ..models.decoder import Decoder
from .teacher import CHUNK, forced_logits

WORST = 10
_CONTEXT = 16  # tokens in front of a position that are shown


@dataclass(frozen=True, slots=True, order=True)
class Position:
    kl: float  # nats: the reference's distribution against the other's
    sequence: int
    index: int  # of the token that is predicted
    token: int = field(compare=False)  # the likeliest by the reference
    expected: float = field(compare=False)  # its probability by the reference
    got: float = field(compare=False)  # and by the other


@dataclass(slots=True)
class Divergence:
    """Of all positions of some texts."""

    kl: list[float] = field(default_factory=list)
    worst: list[Position] = field(default_factory=list)  # a heap

    def add(self, position: Position) -> None:
        self.kl.append(position.kl)
        (heapq.heappush if len(self.worst) < WORST else heapq.heappushpop)(self.worst, position)

    def summary(self, sequences: Sequence[Sequence[int]], decode: Any) -> dict[str, Any]:
        """As a result file has it. `decode`: tokens -> text."""
        worst = [
            {
                "kl": round(p.kl, 4),
                "context": decode(list(sequences[p.sequence][max(0, p.index - _CONTEXT) : p.index])),
                "token": decode([p.token]),
                "reference": round(p.expected, 4),
                "probability": round(p.got, 4),
            }
            for p in sorted(self.worst, reverse=True)
        ]
        median, q999 = np.quantile(self.kl, [0.5, 0.999])
        return {
            "positions": len(self.kl),
            "mean": round(float(np.mean(self.kl)), 6),
            "median": round(float(median), 6),
            "quantile_99.9": round(float(q999), 5),
            "above_0.1": int(np.sum(np.array(self.kl) > 0.1)),
            "worst": worst,
        }


def diverge(
    decoders: Mapping[str, Decoder], sequences: Sequence[Sequence[int]], *, chunk: int = CHUNK
) -> dict[str, Divergence]:
    """Every decoder but the first against the first, side by side over the same tokens; each position predicts the
    next token, the last one the token behind the sequence. Texts begin as they are given: no token is added."""
    _, *others = decoders
    found = {name: Divergence() for name in others}
    for number, tokens in enumerate(sequences):
        done = 0
        for reference, *pieces in zip(*(forced_logits(d, tokens, chunk) for d in decoders.values()), strict=True):
            expected = torch.log_softmax(reference.double(), -1)
            likeliest = expected.argmax(-1)
            for name, logits in zip(others, pieces, strict=True):
                got = torch.log_softmax(logits.double(), -1)
                kl = (expected.exp() * (expected - got)).sum(-1)
                for i, token in enumerate(likeliest.tolist()):
                    p, q = (float(x[i, token].exp()) for x in (expected, got))
                    found[name].add(Position(float(kl[i]), number, done + i + 1, token, p, q))
            done += len(reference)
    return found


def openings() -> list[str]:
    """Texts that begin without a control token and end in a lone space, where small models are least stable: a token in
    the middle takes the part that the beginning has elsewhere, with activations a hundred times the others'."""
    heads = ("the", "In", "to", "a", "Return", "sum", "data", "with", "days", "list")
    things = (" average rainfall", " total", " mean temperature", " number of sales", " income", " report", " days")
    return [f"{head}{thing} for each month in the year " for head, thing in product(heads, things)]
