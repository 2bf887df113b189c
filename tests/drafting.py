"""A draft model for tests of drafters: a fake decoder that checks what the cache gives it to see.

The fake's storage keeps the token and position of every slot. Each row gathers the context that the batch lets it see
and answers from a table of that context alone, so a wrong page, offset, mask or commit changes the draft.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray

from outpace.cache.storage import PAGE_SIZE, KVStorage, PageBlob
from outpace.decoding.contracts import Drafter, Market, Observation, Sequence
from outpace.decoding.outputs import TargetOutputs
from outpace.decoding.sampling import History, sample
from outpace.decoding.tree import check_draft, path_to
from outpace.decoding.verify.coupled import CoupledVerifier
from outpace.models.batch import ForwardBatch
from outpace.models.config import ModelConfig
from outpace.models.decoder import NO_TAPS, Decoder, DecoderOutput, Taps
from outpace.types import Draft, SamplingParams

V = 13


def logits_of(context: list[int], salt: int = 0) -> np.ndarray:
    """A language: the next token depends on the last two, and a little on everything before."""
    return _logits(tuple(context), salt)


@lru_cache(maxsize=20_000)
def _logits(context: tuple[int, ...], salt: int) -> np.ndarray:
    row = np.random.default_rng([salt, *context[-2:]]).standard_normal(V) * 2
    return (row + 0.05 * np.random.default_rng(context).standard_normal(V)).astype(np.float32)


class SlotStorage(KVStorage):
    def __init__(self, num_pages: int) -> None:
        self.num_pages, self.bytes_per_page = num_pages, PAGE_SIZE * 8
        self.tokens = np.full(num_pages * PAGE_SIZE, -1)
        self.positions = np.full(num_pages * PAGE_SIZE, -1)

    def copy_pages(self, source: NDArray[np.int64], target: NDArray[np.int64]) -> None:
        for array in (self.tokens, self.positions):
            paged = array.reshape(-1, PAGE_SIZE)
            paged[target] = paged[source]

    def move(self, source: NDArray[np.int64], target: NDArray[np.int64]) -> None:
        for array in (self.tokens, self.positions):
            array[target] = array[source]

    def read_pages(self, pages: NDArray[np.int64]) -> PageBlob:
        return tuple(array.reshape(1, -1, PAGE_SIZE)[:, pages] for array in (self.tokens, self.positions))

    def write_pages(self, blob: PageBlob, pages: NDArray[np.int64]) -> None:
        for array, part in zip((self.tokens, self.positions), blob, strict=True):
            array.reshape(1, -1, PAGE_SIZE)[:, pages] = part


class FakeDecoder(Decoder):
    precision = "float32"
    device = torch.device("cpu")
    weight_bytes = 0
    row_invariant = True

    def __init__(self, salt: int = 0, max_position: int = 4096, vocab_size: int = V) -> None:
        self.salt, self.rows, self.forwards, self.fail = salt, 0, 0, False
        self.config = ModelConfig(
            architecture="llama",
            vocab_size=vocab_size,
            hidden_size=8,
            intermediate_size=8,
            num_layers=1,
            num_heads=1,
            num_kv_heads=1,
            head_dim=8,
            max_position=max_position,
            rms_norm_eps=1e-5,
            rope_theta=1e4,
            layer_types=("full",),
        )
        self._buffer = torch.empty(4096, vocab_size)

    def new_storage(self, num_pages: int) -> SlotStorage:
        return SlotStorage(num_pages)

    def forward(self, batch: ForwardBatch, storage: KVStorage, taps: Taps = NO_TAPS) -> DecoderOutput:
        assert isinstance(storage, SlotStorage)
        self.forwards += 1
        self.rows += len(batch.tokens)
        if self.fail:
            raise RuntimeError("the draft model broke")
        answers: dict[int, np.ndarray] = {}
        for b in range(len(batch.committed)):
            committed, table = int(batch.committed[b]), batch.page_tables[b]
            rows = range(int(batch.row_start[b]), int(batch.row_start[b + 1]))

            def slots(places: NDArray[np.int64], table: NDArray[np.int32] = table) -> NDArray[np.int64]:
                return table[places // PAGE_SIZE].astype(np.int64) * PAGE_SIZE + places % PAGE_SIZE

            for t in rows:
                slot = slots(np.array([committed + int(batch.offsets[t])]))
                storage.tokens[slot], storage.positions[slot] = batch.tokens[t], batch.positions[t]
            seen: NDArray[np.int32]
            for t in rows:
                if batch.causal[b]:
                    seen = np.arange(int(batch.offsets[t]) + 1, dtype=np.int32)
                else:
                    seen = batch.visible[batch.visible_start[t] : batch.visible_start[t + 1]]
                where = slots(np.concatenate((np.arange(committed), committed + seen)))
                assert storage.positions[where].tolist() == list(range(len(where)))
                assert batch.positions[t] == len(where) - 1
                answers[t] = logits_of(storage.tokens[where].tolist(), self.salt)
        out = self._buffer[: len(batch.logit_rows)]
        out.fill_(-1e4)
        for row, t in enumerate(batch.logit_rows.tolist()):
            out[row, :V] = torch.from_numpy(answers[t])
        return DecoderOutput(out, {})


def outputs_of(tokens: list[int], draft: Draft) -> TargetOutputs:
    rows = [logits_of(tokens)]
    for node in range(len(draft)):
        rows.append(logits_of(tokens + draft.tokens[path_to(draft.parents, node)].tolist()))
    return TargetOutputs.of(torch.from_numpy(np.stack(rows)))


def plain(prompt: list[int], params: SamplingParams, n: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(n):
        tokens.append(sample(logits_of(tokens), params, History(tokens, len(prompt)), len(tokens)))
    return tokens


FREE = Market()
NO_OUTPUTS = TargetOutputs.of(torch.empty(0, V))


def propose(drafter: Drafter, sequences: list[Sequence], budgets: list[int], market: Market = FREE) -> list[Draft]:
    return drafter.propose(sequences, budgets, market).drafts


def step(drafter: Drafter, sequences: list[Sequence], budgets: list[int]) -> tuple[int, list[Draft]]:
    """One engine step of several sequences; returns the tokens committed."""
    drafts, total = propose(drafter, sequences, budgets), 0
    for sequence, draft, budget in zip(sequences, drafts, budgets, strict=True):
        check_draft(draft, budget, V)
        outputs = outputs_of(sequence.tokens, draft)
        accepted = CoupledVerifier().verify(sequence, draft, outputs)
        sequence.tokens += accepted.tokens
        drafter.observe(sequence, Observation(accepted, draft, outputs))
        total += len(accepted.tokens)
    return total, drafts


PARAMS = [
    SamplingParams(),
    SamplingParams(temperature=0.8, seed=4),
    SamplingParams(repetition_penalty=1.3, presence_penalty=0.2),
]
