"""A decoder without weights whose logits are a hash of exactly what a row sees, and drafters that know the answer.

Every mistake of the loop (a wrong mask, a stale slot, a position off by one, a path that was not moved) changes the
hash, so the tokens part from plain decoding at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from outpace.cache.storage import PAGE_SIZE, KVStorage
from outpace.decoding.contracts import Drafter, Market, Observation, Proposal
from outpace.decoding.contracts import Sequence as TokenSequence
from outpace.engine.engine import Engine
from outpace.engine.load import LoadedModel
from outpace.engine.options import EngineOptions
from outpace.models.batch import ForwardBatch
from outpace.models.checkpoint import TokenizerFiles
from outpace.models.config import ModelConfig
from outpace.models.decoder import NO_TAPS, Decoder, DecoderOutput, Taps
from outpace.models.tokenizer import Tokenizer
from outpace.types import Draft, Result

VOCAB = 40
EOS = 39


def engine_options(**given: Any) -> EngineOptions:
    """For an engine without an LLM: a small cache, and no prefixes unless they are asked for."""
    return EngineOptions(**{"kv_tokens": 4096, "max_rows": 16, "prefix_cache": False, **given})


def finished(engine: Engine) -> dict[int, Result]:
    """Step until nobody is left, and compare the books after every step. Raises what goes wrong with a request."""
    results = {}
    while not engine.idle:
        for event in engine.step():
            if event.error is not None:
                raise event.error
            if event.result is not None:
                results[event.id] = event.result
        engine.check_integrity()
    return results


class HashStorage(KVStorage):
    """A slot holds the token and the position written to it; unwritten slots hold a poison."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages, self.bytes_per_page = num_pages, PAGE_SIZE * 16
        self.slots = np.full((num_pages * PAGE_SIZE, 2), -7, dtype=np.int64)

    def copy_pages(self, source: np.ndarray, target: np.ndarray) -> None:
        pages = self.slots.reshape(self.num_pages, PAGE_SIZE, 2)
        pages[target] = pages[source].copy()

    def move(self, source: np.ndarray, target: np.ndarray) -> None:
        self.slots[target] = self.slots[source].copy()

    def read_pages(self, pages: np.ndarray) -> tuple[Any, ...]:
        return (self.slots.reshape(1, self.num_pages, PAGE_SIZE, 2)[:, pages],)

    def write_pages(self, blob: tuple[Any, ...], pages: np.ndarray) -> None:
        self.slots.reshape(1, self.num_pages, PAGE_SIZE, 2)[:, pages] = blob[0]


class HashDecoder(Decoder):
    """`eos_after`: from that position on the end-of-text token is by far the likeliest. Only the first `speakable`
    tokens of the vocabulary, and that one, are ever likely."""

    precision = "float32"
    device = torch.device("cpu")
    weight_bytes = 0

    def __init__(
        self,
        *,
        max_position: int = 4096,
        eos_after: int | None = None,
        row_invariant: bool = True,
        vocab: int = VOCAB,
        speakable: int = VOCAB,
        eos: int = EOS,
    ) -> None:
        self.row_invariant = row_invariant
        self.speakable, self.eos = speakable, eos
        self.eos_after = eos_after
        self.forwards: list[tuple[int, int]] = []  # (sequences, rows) of each
        self.config = ModelConfig(
            architecture="llama",
            vocab_size=vocab,
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
            attention_scale=1.0,
            eos_ids=(eos,),
        )

    def new_storage(self, num_pages: int) -> HashStorage:
        return HashStorage(num_pages)

    def forward(self, batch: ForwardBatch, storage: KVStorage, taps: Taps = NO_TAPS) -> DecoderOutput:
        assert isinstance(storage, HashStorage)
        self.forwards.append((len(batch.committed), len(batch.tokens)))
        rows: list[tuple[int, np.ndarray]] = []  # (row, slots that it sees)
        for b, committed in enumerate(batch.committed.tolist()):
            for t in range(batch.row_start[b], batch.row_start[b + 1]):
                offset = int(batch.offsets[t])
                if batch.causal[b]:
                    seen = list(range(offset + 1))
                else:
                    seen = batch.visible[batch.visible_start[t] : batch.visible_start[t + 1]].tolist()
                places = np.array([*range(committed), *(committed + o for o in seen)])
                slots = batch.page_tables[b, places // PAGE_SIZE].astype(np.int64) * PAGE_SIZE + places % PAGE_SIZE
                own = committed + offset
                slot = int(batch.page_tables[b, own // PAGE_SIZE]) * PAGE_SIZE + own % PAGE_SIZE
                storage.slots[slot] = batch.tokens[t], batch.positions[t]
                rows.append((t, slots))
        seen_by = dict(rows)
        logits = [self.logits(storage.slots[seen_by[t]]) for t in batch.logit_rows.tolist()]
        return DecoderOutput(
            torch.from_numpy(np.array(logits, dtype=np.float32).reshape(-1, self.config.vocab_size)), {}
        )

    def logits(self, seen: np.ndarray) -> np.ndarray:
        """f32[V] from the (token, position) pairs that a row sees, in the order of their places."""
        assert (seen[:, 1] == np.arange(len(seen))).all(), f"positions {seen[:, 1].tolist()}"
        key = hash(tuple(seen[:, 0].tolist())) & (2**63 - 1)
        logits = np.random.Generator(np.random.Philox(key=key)).normal(size=self.config.vocab_size).astype(np.float32)
        logits[self.speakable :] = -50.0
        logits[self.eos] = -50.0
        if self.eos_after is not None and len(seen) >= self.eos_after:
            logits[self.eos] = 50.0
        return logits


def plain_tokens(decoder: HashDecoder, prompt: Sequence[int], n: int) -> list[int]:
    """Greedy output by definition: one full read of the text per token."""
    tokens = list(prompt)
    for _ in range(n):
        seen = np.array([tokens, range(len(tokens))]).T
        tokens.append(int(decoder.logits(seen).argmax()))
        if tokens[-1] == EOS:
            break
    return tokens[len(prompt) :]


class Scripted(Drafter):
    """Drafts from a function of (tokens so far, budget), and checks that it is told everything."""

    name = "scripted"
    paper = ""

    def __init__(self, script: Callable[[list[int], int], Draft]) -> None:
        self.script = script
        self.live: dict[int, int] = {}  # id -> length that it has been told of
        self.budgets: list[list[int]] = []

    def begin(self, sequence: TokenSequence) -> None:
        self.live[sequence.id] = len(sequence.tokens)

    def propose(self, sequences: Sequence[TokenSequence], budgets: Sequence[int], market: Market) -> Proposal:
        assert all(self.live[s.id] == len(s.tokens) for s in sequences)
        self.budgets.append(list(budgets))
        drafts = [self.script(s.tokens, b) if b else Draft.empty() for s, b in zip(sequences, budgets, strict=True)]
        return Proposal(drafts)

    def observe(self, sequence: TokenSequence, seen: Observation) -> None:
        self.live[sequence.id] += len(seen.new_tokens)
        assert sequence.tokens[len(sequence.tokens) - len(seen.new_tokens) :] == seen.new_tokens
        if seen.new_tokens:
            first = self.live[sequence.id] == sequence.prompt_length + len(seen.new_tokens)
            assert first == (seen.kind == "prefill")
        else:
            assert seen.kind == "prefill" and not len(seen.outputs)

    def end(self, sequence: TokenSequence) -> None:
        self.live.pop(sequence.id, None)


def oracle(decoder: HashDecoder, right: float = 1.0, tree: bool = False) -> Callable[[list[int], int], Draft]:
    """Proposes what greedy decoding will say, each token wrong with probability 1 - right (keyed by the position).

    With `tree`, wrong branches stand before, between and below the right ones.
    """

    def script(tokens: list[int], budget: int) -> Draft:
        rng = np.random.default_rng(len(tokens) * 7919 + tokens[-1])
        truth = plain_tokens(decoder, tokens, budget)
        nodes: list[int] = []
        parents: list[int] = []
        parent = -1
        for token in truth:
            if tree and len(nodes) + 2 <= budget:
                nodes += [(token + 1) % VOCAB, int(rng.integers(VOCAB))]
                parents += [parent, len(nodes) - 2]
            if len(nodes) == budget:
                break
            nodes.append(token if rng.random() < right else int(rng.integers(VOCAB)))
            parents.append(parent)
            parent = len(nodes) - 1
        sources = ["left" if i % 2 else "right" for i in range(len(nodes))]
        return Draft(np.array(nodes, dtype=np.int64), np.array(parents, dtype=np.int64), sources)

    return script


CHAT_TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


def toy_loaded(name: str = "toy", template: str | None = CHAT_TEMPLATE, **decoder: Any) -> LoadedModel:
    """A byte tokenizer and a decoder that says printable characters, as `load_model` would return them."""
    from toy import EOS, VOCAB, MemoryCheckpoint

    made = HashDecoder(vocab=VOCAB, speakable=94, eos=EOS, **decoder)
    files = MemoryCheckpoint(made.config, {}).tokenizer_files()
    config = {**files.tokenizer_config, **({"chat_template": template} if template else {})}
    return LoadedModel(name, made, Tokenizer(TokenizerFiles(files.tokenizer_json, config)))
