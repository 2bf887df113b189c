"""The sampler: one implementation for every path, plain or speculative.

    logits --process--> penalties and bias --weights--> temperature, top-k, top-p, min-p --draw--> token

`process` edits raw logits: repetition penalty over prompt and output, then frequency and presence penalties over the
output, then the logit bias; then what a grammar forbids becomes -inf, and what ends the output before `min_tokens`.
Filters apply in the order temperature, top-k, top-p, min-p; tokens that tie with the last one kept stay, so no filter
depends on how a sort breaks ties. Greedy is the argmax of the processed logits, the smaller id winning a tie.

Sampling spends one uniform per position, keyed by (seed, position), and takes the inverse of the cumulative
distribution in vocabulary order. The token therefore depends on one row of logits, the history and the key:
never on what else shared the step or on what was drafted.

Log-probabilities are those of the processed logits before temperature and filters, so that they can be compared
across settings; tokens that a grammar forbids are never listed. With `raw_logprobs` they are those of the raw logits.

Shapes: `V` vocabulary, `m` ids that carry weight. All arrays are numpy on the host.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Seq
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from ..errors import OutpaceError, ParameterError
from ..types import FloatArray, IntArray, Logits, SamplingParams
from .grammar import Matcher

_BLOCK = 512  # of the two-level cumulative sum
_WORD = 2**64 - 1
_SMALLEST_TEMPERATURE = 1e-6  # below it the quotient overflows float32; ties alone are left to chance there


class Stream(IntEnum):
    """What a uniform is for. Different streams of one (seed, position) are independent."""

    TARGET = 0  # the target's own draw
    ACCEPT = 1  # acceptance tests of rejection sampling
    # A drafter's own draws. Keyed by the position at which the step starts and the number of the draw, not by the
    # token's position: a verifier that looks at a whole draft before it cuts it leaves nothing random to use again.
    DRAFT = 2


def uniform(seed: int, position: int, stream: Stream = Stream.TARGET, draw: int = 0) -> float:
    """A number in [0, 1) that depends on its key alone (Philox 4x64, 53 bits).

    `position` is the index in the sequence of the token being chosen.
    """
    generator = np.random.Philox(key=seed, counter=[draw, position, int(stream), 0])
    raw: int = generator.random_raw()
    return (raw >> 11) * 2.0**-53


class History:
    """Tokens so far with their counts, what ends the output, and where it is in its grammar, if it has one. Append and
    truncate take constant time a token."""

    __slots__ = ("_ids", "_output", "_seen", "_slot", "matcher", "prompt_length", "stop_ids", "tokens")

    def __init__(
        self,
        tokens: Iterable[int] = (),
        prompt_length: int = 0,
        matcher: Matcher | None = None,
        stop_ids: Iterable[int] = (),
    ) -> None:
        self.prompt_length, self.matcher = prompt_length, matcher
        self.stop_ids = np.array(sorted(stop_ids), dtype=np.int64)
        self.tokens: list[int] = []
        self._slot: dict[int, int] = {}  # token -> slot, slots in order of first occurrence
        self._ids = np.empty(64, dtype=np.int64)
        self._seen = np.empty(64, dtype=np.int64)
        self._output = np.empty(64, dtype=np.int64)
        for token in tokens:
            self.append(token)

    def __len__(self) -> int:
        return len(self.tokens)

    def append(self, token: int) -> None:
        token = int(token)
        slot = self._slot.get(token)
        if slot is None:
            slot = self._slot[token] = len(self._slot)
            if slot == len(self._ids):
                self._ids, self._seen, self._output = (
                    np.concatenate([a, np.empty_like(a)]) for a in (self._ids, self._seen, self._output)
                )
            self._ids[slot], self._seen[slot], self._output[slot] = token, 0, 0
        self._seen[slot] += 1
        if len(self.tokens) >= self.prompt_length:
            self._output[slot] += 1
            if self.matcher is not None:
                self.matcher.advance(token)
        self.tokens.append(token)

    def truncate(self, length: int) -> None:
        """Drop tokens from the end. The first occurrence goes last, so an emptied slot is always the last
        one.
        """
        if self.matcher is not None:
            self.matcher.retreat(max(0, len(self.tokens) - max(length, self.prompt_length)))
        while len(self.tokens) > length:
            token = self.tokens.pop()
            slot = self._slot[token]
            self._seen[slot] -= 1
            self._output[slot] -= len(self.tokens) >= self.prompt_length
            if self._seen[slot] == 0:
                del self._slot[token]

    @property
    def ids(self) -> IntArray:
        """Distinct tokens, in order of first occurrence."""
        return self._ids[: len(self._slot)]

    @property
    def output_counts(self) -> IntArray:
        """How often each of `ids` occurs after the prompt."""
        return self._output[: len(self._slot)]


def host_row(logits: Logits) -> FloatArray:
    """f32[V] on the host; shares memory with a CPU tensor."""
    if isinstance(logits, np.ndarray):
        return np.asarray(logits, dtype=np.float32)
    return logits.detach().cpu().float().numpy()


def process(logits: FloatArray, params: SamplingParams, history: History | None = None) -> FloatArray:
    """Penalties, bias and grammar. f32[V] -> f32[V]; returns its argument when nothing is to be edited, never
    writes to it.

    `history` is needed for penalties and grammars. V may be that of a drafter, smaller than the target's; where it has
    none of the tokens that the grammar allows, its own row is left as it is, as good as any other. Raises
    ParameterError for a bias outside the vocabulary.
    """
    if not params.edits_logits:
        return logits
    edited = logits.copy()
    if history is not None and len(history):
        ids, counts = history.ids, history.output_counts
        values = edited[ids].astype(np.float64)
        penalty = params.repetition_penalty
        if penalty != 1:
            values = np.where(values > 0, values / penalty, values * penalty)
        values -= params.frequency_penalty * counts + params.presence_penalty * (counts > 0)
        edited[ids] = values
    for token, bias in params.logit_bias.items():
        if not 0 <= token < len(edited):
            raise ParameterError(
                f"logit_bias names token {token}, which the model does not have: ids run from 0 to {len(edited) - 1}"
            )
        edited[token] += bias
    if params.constraint is not None:
        assert history is not None and history.matcher is not None, "a grammar without its matcher"
        allowed = history.matcher.allowed()
        if allowed is not None:
            forbidden = ~allowed[: len(edited)]
            if np.isfinite(edited[~forbidden]).any():
                edited[: len(forbidden)][forbidden] = -np.inf
                edited[len(forbidden) :] = -np.inf
    if history is not None and len(history) - history.prompt_length < params.min_tokens:
        _forbid_end(edited, history.stop_ids)
    return edited


def _forbid_end(row: FloatArray, stop_ids: IntArray) -> None:
    """What ends the output becomes -inf, in place, unless nothing else is left: a grammar that is complete."""
    ids = stop_ids[stop_ids < len(row)]
    kept = row[ids]
    row[ids] = -np.inf
    if not np.isfinite(row).any():
        row[ids] = kept


def _weights(logits: FloatArray, params: SamplingParams) -> tuple[IntArray | None, FloatArray]:
    """Unnormalised probabilities after temperature and filters: ascending ids [m] (None: all) and weights
    f32[m].

    The largest weight is 1.
    """
    # A fresh array first: what follows never depends on where the row lay in memory.
    scaled = logits - logits.max()
    scaled /= np.float32(max(params.temperature, _SMALLEST_TEMPERATURE))
    ids: IntArray | None = None
    if 0 < params.top_k < len(scaled):
        cut = np.partition(scaled, len(scaled) - params.top_k)[len(scaled) - params.top_k]
        ids = np.flatnonzero(scaled >= cut)
        scaled = scaled[ids]
    weights: FloatArray = np.exp(scaled, out=scaled)
    if params.top_p < 1:
        ids, weights = _keep(ids, weights, _nucleus_cut(weights, params.top_p))
    if params.min_p > 0:
        ids, weights = _keep(ids, weights, np.float32(params.min_p))
    return ids, weights


def _keep(ids: IntArray | None, weights: FloatArray, cut: np.float32) -> tuple[IntArray, FloatArray]:
    kept = np.flatnonzero(weights >= cut)
    return (kept if ids is None else ids[kept]), weights[kept]


def _nucleus_cut(weights: FloatArray, top_p: float) -> np.float32:
    """Smallest weight inside the nucleus: the fewest heaviest tokens whose mass reaches `top_p`."""
    total = weights.sum(dtype=np.float64)
    # All tokens below this floor together weigh less than (1 - top_p) * total: the nucleus never reaches
    # them, so only the few above it are sorted. Half of it leaves room for rounding.
    floor = 0.5 * (1 - top_p) * total / len(weights)
    heavy = np.sort(weights[weights >= floor])[::-1]
    mass = np.cumsum(heavy, dtype=np.float64)
    last = min(int(np.searchsorted(mass, top_p * total)), len(heavy) - 1)
    cut: np.float32 = heavy[last]
    return cut


def distribution(logits: FloatArray, params: SamplingParams, history: History | None = None) -> NDArray[np.float64]:
    """The distribution that `sample` draws from, f64[V], summing to 1. Greedy is a point mass."""
    return distribution_of(process(logits, params, history), params)


def distribution_of(processed: FloatArray, params: SamplingParams) -> NDArray[np.float64]:
    """`distribution` for logits already processed."""
    p = np.zeros(len(processed), dtype=np.float64)
    if params.greedy:
        p[int(processed.argmax())] = 1.0
        return p
    ids, weights = _weights(processed, params)
    exact = weights.astype(np.float64)
    exact /= exact.sum()
    if ids is None:
        return exact
    p[ids] = exact
    return p


def draw(weights: NDArray[np.floating], u: float) -> int:
    """Inverse of the cumulative distribution: the index at which the running sum passes `u` times the total.

    `weights` need not be normalised; `u` is in [0, 1). An index of weight zero is never returned.
    """
    whole = len(weights) // _BLOCK
    sums = np.empty(whole + 1, dtype=np.float64)
    weights[: whole * _BLOCK].reshape(whole, _BLOCK).sum(axis=1, dtype=np.float64, out=sums[:whole])
    sums[whole] = weights[whole * _BLOCK :].sum(dtype=np.float64)
    running = np.cumsum(sums)
    goal = u * running[-1]
    block = min(int(np.searchsorted(running, goal, side="right")), whole)
    while sums[block] == 0:  # rounding at the very end
        block -= 1
    start = block * _BLOCK
    inside = np.cumsum(weights[start : start + _BLOCK], dtype=np.float64)
    before = running[block - 1] if block else 0.0
    index = int(np.searchsorted(inside, goal - before, side="right"))
    if index == len(inside):  # rounding again: the last index of the block that has weight
        index = int(np.flatnonzero(weights[start : start + _BLOCK])[-1])
    return start + index


def sample(logits: FloatArray, params: SamplingParams, history: History | None, position: int) -> int:
    """The target's own token at `position`. `logits` raw f32[V], `history` the tokens before it."""
    return choose(process(logits, params, history), params, position)


def choose(processed: FloatArray, params: SamplingParams, position: int) -> int:
    """`sample` for logits already processed. Raises OutpaceError for logits that are no numbers."""
    if params.greedy:
        return int(processed.argmax())
    return choose_rows([(processed, params, position)])[0]


def choose_rows(asked: Seq[tuple[FloatArray, SamplingParams, int]], threads: int = 1) -> list[int]:
    """`choose` for sampled rows of one vocabulary, on several threads: (processed f32[V], params, position) each.

    A compiled kernel computes what `_weights`, `draw` and `uniform` say; the token does not depend on the other rows.
    """
    from ..ops.cpu.address import address
    from ..ops.cpu.draws import draws  # numba

    rows = [np.ascontiguousarray(row, dtype=np.float32) for row, _, _ in asked]
    tokens = draws(len(rows[0]), threads)(
        [
            (
                *(address(row), 1 / max(p.temperature, _SMALLEST_TEMPERATURE), p.top_k, p.top_p, p.min_p, 0),
                *(p.seed & _WORD, p.seed >> 64, position),
            )
            for row, (_, p, position) in zip(rows, asked, strict=True)
        ]
    ).tolist()
    if min(tokens) < 0:
        raise OutpaceError(
            "the model's logits are not numbers: its weights are damaged, or too large for the precision"
        )
    return tokens


def certainty(logits: FloatArray, params: SamplingParams) -> float:
    """The largest probability of a token before penalties and filters, at temperature 1 if decoding is greedy. Where
    tokens are sampled without them, no drafted token is accepted more often."""
    scaled = logits - logits.max()
    if not params.greedy:
        scaled /= np.float32(max(params.temperature, _SMALLEST_TEMPERATURE))
    return 1.0 / float(np.exp(scaled, out=scaled).sum(dtype=np.float64))


def logprobs(processed: FloatArray, token: int, k: int) -> tuple[float, list[tuple[int, float]]]:
    """Log-probability of `token`, and the `k` most likely tokens with theirs (ties: smaller id first).

    `processed` f32[V], see the module's docstring for which distribution this is.
    """
    highest = processed.max()
    norm = float(highest) + float(np.log(np.exp(processed - highest).sum(dtype=np.float64)))
    if k == 0:
        return float(processed[token]) - norm, []
    k = min(k, len(processed))
    cut = np.partition(processed, len(processed) - k)[len(processed) - k]
    ids = np.flatnonzero((processed >= cut) & (processed > -np.inf))
    ids = ids[np.argsort(-processed[ids], kind="stable")][:k]
    return float(processed[token]) - norm, [(int(i), float(processed[i]) - norm) for i in ids]
