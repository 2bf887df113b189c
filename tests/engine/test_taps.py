"""What a step gives beside logits reaches those who declared it: of every row, of prompts too."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from toy import Rig, random_tokens, toy_checkpoint

from outpace.decoding.contracts import Drafter, Market, Observation, Proposal
from outpace.decoding.contracts import Sequence as TokenSequence
from outpace.decoding.drafters.plain import Plain
from outpace.decoding.verify.coupled import CoupledVerifier
from outpace.engine.engine import Engine
from outpace.engine.options import EngineOptions
from outpace.errors import ParameterError
from outpace.models.decoder import NO_TAPS, Decoder, Taps
from outpace.models.native import NativeDecoder
from outpace.models.torch_decoder import TorchDecoder
from outpace.ops.masks import CAUSAL
from outpace.types import Draft, SamplingParams


def native(precision: str = "float32") -> NativeDecoder:
    return NativeDecoder.from_checkpoint(toy_checkpoint("llama")[0], precision, threads=1)  # type: ignore[arg-type]


class Listener(Drafter):
    """Keeps what it is shown; drafts nothing, or two tokens that are wrong."""

    name = "listener"
    paper = ""

    def __init__(self, taps: Taps) -> None:
        self._taps = taps
        self.hidden: dict[int, list[np.ndarray]] = {}
        self.queries: dict[int, list[np.ndarray]] = {}
        self.kinds: dict[int, list[str]] = {}

    @property
    def taps(self) -> Taps:
        return self._taps

    def begin(self, sequence: TokenSequence) -> None:
        for kept in (self.hidden, self.queries, self.kinds):
            kept[sequence.id] = []  # type: ignore[assignment]

    def propose(self, sequences: Sequence[TokenSequence], budgets: Sequence[int], market: Market) -> Proposal:
        return Proposal([Draft.chain([1, 2], self.name) if b > 1 else Draft.empty() for b in budgets])

    def observe(self, sequence: TokenSequence, seen: Observation) -> None:
        self.kinds[sequence.id].append(seen.kind)
        # of a chunk all rows stay, of a step the last token's and those of the accepted path
        path = slice(None) if seen.kind == "prefill" else [0, *(node + 1 for node in seen.accepted.path)]
        for layer in self.taps.hidden:
            self.hidden[sequence.id].append(np.array(seen.outputs.hidden(layer))[path])
        for layer in self.taps.queries:
            self.queries[sequence.id].append(np.array(seen.outputs.queries(layer))[path])


def test_taps_are_joined() -> None:
    assert NO_TAPS | NO_TAPS == NO_TAPS == Taps()
    assert Taps((3, 1), (2,), 8) | Taps((1,), (), 5) == Taps((1, 3), (2,), 8)
    assert NO_TAPS | Taps(topk=4) == Taps(topk=4) | NO_TAPS == Taps(topk=4)


def test_hidden_states_and_queries_come_of_every_row_that_stays() -> None:
    decoder = native()
    last = decoder.config.num_layers - 1
    listener = Listener(Taps(hidden=(0, last), queries=(last,)))
    options = EngineOptions(kv_tokens=1024, max_batch=3, max_rows=4, prefill_rows=16, prefix_cache=False)
    engine = Engine(decoder, listener, CoupledVerifier(), options=options, methods={"plain": Plain()})
    prompts = [random_tokens(n, seed=n).tolist() for n in (40, 5, 23)]
    ids = [engine.add(prompt, SamplingParams(max_tokens=9, ignore_eos=True)) for prompt in prompts]
    texts, results = {}, {}
    while not engine.idle:
        for id in ids:
            if id in engine._requests:
                texts[id] = engine._requests[id].sequence
        for event in engine.step():
            results[event.id] = event.result
        for id in [id for id in ids if id in listener.hidden]:
            rows = sum(len(part) for part in listener.hidden[id]) // 2
            assert rows == len(texts[id].tokens) - 1 or not texts[id].output
    for id, prompt in zip(ids, prompts, strict=True):
        tokens = (prompt + results[id].token_ids)[:-1]
        rig = Rig(native())
        rig.step((rig.cache.new(), tokens, CAUSAL), taps=Taps(hidden=(0, last)))
        for i, layer in enumerate((0, last)):
            assert (np.concatenate(listener.hidden[id][i::2]) == rig.hidden[layer]).all()
        assert listener.kinds[id][-1] == "step" and listener.kinds[id].index("step") == listener.kinds[id].count(
            "prefill"
        )
        assert len(np.concatenate(listener.queries[id])) == len(tokens)
    assert sorted(listener.kinds[ids[0]].count("prefill") for _ in ids)[0] > 1, "chunks are observed one by one"


def test_both_decoders_give_the_same_queries() -> None:
    checkpoint, _ = toy_checkpoint("llama")
    tokens = random_tokens(20)
    given = []
    decoders: list[Decoder] = [native(), TorchDecoder.from_checkpoint(checkpoint, "float32", "cpu")]
    for decoder in decoders:
        rig, last = Rig(decoder), decoder.config.num_layers - 1
        rig.step((rig.cache.new(), tokens, CAUSAL), taps=Taps(queries=(last,)))
        given.append(np.asarray(rig.output.queries[last])[..., : decoder.config.head_dim])
    assert given[0].shape == (20, decoders[0].config.num_heads, decoders[0].config.head_dim)
    np.testing.assert_allclose(given[0], given[1], atol=1e-4)


def test_queries_that_are_not_kept_are_refused() -> None:
    view = native().view()
    view.skip([0], [])
    rig = Rig(view)
    with pytest.raises(ParameterError, match="layer 0 is left out"):
        rig.step((rig.cache.new(), [1, 2], CAUSAL), taps=Taps(queries=(0,)))
