"""Trained heads: the network in torch and what drafts are one, training goes on where it was stopped, and no head ever
changes a text."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hashing import engine_options, finished
from toy import random_tokens, toy_checkpoint

from outpace.decoding.contracts import Drafter, DrafterContext, Market, Observation, Proposal
from outpace.decoding.contracts import Sequence as TokenSequence
from outpace.decoding.drafters.merged import Merged
from outpace.decoding.drafters.spark import BlockSource, hidden_states
from outpace.decoding.methods import make_drafter
from outpace.decoding.outputs import StepOutputs, TargetOutputs
from outpace.decoding.verify.coupled import CoupledVerifier
from outpace.decoding.verify.rejection import RejectionVerifier
from outpace.engine.engine import Engine, new_cache
from outpace.errors import CorruptModel, MethodError, ModelNotFound, ParameterError
from outpace.models.decoder import DecoderOutput
from outpace.models.heads import Check, Head, HeadConfig, fits, read, target_of, write
from outpace.models.native import NativeDecoder
from outpace.training.corpus import Text
from outpace.training.features import Features, Meta
from outpace.training.spark import Spark, SparkConfig, hits, loss
from outpace.training.trainer import Recipe, Trainer, hot_tokens, parted
from outpace.types import Accepted, Draft, SamplingParams

TAPS, BLOCK = (0, 1, 2), 4
GREEDY = SamplingParams(max_tokens=40, ignore_eos=True)
SAMPLED = replace(GREEDY, temperature=0.8, top_p=0.95, seed=5)
PENALISED = replace(GREEDY, repetition_penalty=1.3, presence_penalty=0.2)
PROMPTS = [random_tokens(n, n).tolist() for n in (5, 70, 33)]
HOT = 3.0  # a temperature at which the toy model does not go in circles
RECIPE = Recipe(visits=5_000, rate=3e-3, warm_up=5, anchors=1, held_out=4, test_every=2_500, keep_every=1e9)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """More of them wait for each other longer than they work on toys."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def target() -> NativeDecoder:
    return NativeDecoder.from_checkpoint(toy_checkpoint("qwen2")[0], "float32", 1)


def net_of(target: NativeDecoder, layers: int = 1, hot: torch.Tensor | None = None) -> Spark:
    torch.manual_seed(3)
    config, all_tokens = target.config, np.arange(target.config.vocab_size)
    embed = torch.from_numpy(np.array(target.embedding(all_tokens)))
    norm = torch.from_numpy(np.array(toy_checkpoint("qwen2")[0].tensor("model.norm.weight")))
    hot = torch.from_numpy(all_tokens) if hot is None else hot
    return Spark(SparkConfig(TAPS, layers, BLOCK, 16), replace(config, qkv_bias=False), embed, hot, norm)


def head_of(net: Spark, path: Path, check: Check | None = None, **other: Any) -> Head:
    arrays = {name: value.detach().numpy() for name, value in net.named_parameters()}
    c, about = net.config, {"target": target_of("toy", net.model), "trained": {}, "kind": "spark", **other}
    config = HeadConfig(taps=c.taps, layers=c.layers, block=c.block, rank=c.rank, check=check or CHECK, **about)
    write(path, config, net.hot.numpy(), arrays)
    return read(path)


CHECK = Check((1, 2, 3), 1, (0.0,))


def texts_of(target: NativeDecoder, count: int = 3, length: int = 40) -> list[Text]:
    """What the toy model writes, drawn at random so that it does not go in circles."""
    prompts = [random_tokens(4 + i, 100 + i).tolist() for i in range(count)]
    params = [replace(GREEDY, max_tokens=length, temperature=HOT, seed=i) for i in range(count)]
    found = run(target, None, prompts, params)
    return [Text(2 * i + 1, "toy", p, t, 1.0) for i, (p, t) in enumerate(zip(prompts, found, strict=True))]


def run(
    target: NativeDecoder,
    head: Head | None,
    prompts: list[list[int]],
    params: Any,
    method: str = "spark",
    **options: Any,
) -> list[list[int]]:
    """All prompts at once, through the engine; its books are compared after every step."""
    engine = engine_of(target, head, method, **options)
    each = params if isinstance(params, list) else [params] * len(prompts)
    ids = [engine.add(prompt, one) for prompt, one in zip(prompts, each, strict=True)]
    results = finished(engine)
    run.tokens_per_step = np.mean([len(r.token_ids) / r.stats.steps for r in results.values()])  # type: ignore[attr-defined]
    return [results[id].token_ids for id in ids]


def engine_of(target: NativeDecoder, head: Head | None, method: str, verifier: Any = None, **options: Any) -> Engine:
    verifier = verifier or CoupledVerifier()
    chosen = engine_options(**{"kv_tokens": 1024, "max_batch": 3, "max_rows": 8, **options})
    cache = new_cache(target, chosen)
    context = DrafterContext(
        target.config.vocab_size, draft_pages=64, target=target, cache=cache, head=head, sampled=verifier.uses_q
    )
    drafter = make_drafter("plain" if head is None else method, context)
    return Engine(target, drafter, verifier, options=chosen, cache=cache)


@pytest.mark.parametrize("layers", [1, 2])
def test_what_drafts_is_the_network_that_was_trained(target: NativeDecoder, tmp_path: Path, layers: int) -> None:
    hot = torch.arange(3, 200, 2)
    net, tokens = net_of(target, layers, hot), random_tokens(40, 9).tolist()
    states = hidden_states(target, tokens, TAPS)
    anchors = torch.tensor([1, 7, 8, 30])
    with torch.no_grad():
        for value in net.parameters():  # the file keeps matrices in 255 steps a row; here they are on them
            if value.ndim == 2:
                scale = value.abs().amax(1, keepdim=True) / 127
                value.copy_((value / scale).round() * scale)
        y, logits = net(torch.tensor(tokens), torch.from_numpy(states), anchors)
        mine = logits - net.edges(y, torch.tensor(tokens)[anchors[:, None] + torch.arange(BLOCK)]) @ net.edge.T
    head = head_of(net, tmp_path / "head.safetensors")
    source = BlockSource(head, target, 32, precision="float32")
    sequence, read = TokenSequence(1, [], 4, GREEDY), 0
    source.begin(sequence)
    for row, anchor in enumerate(anchors.tolist()):
        observe(source, sequence, states[read:anchor])
        read, sequence.tokens = anchor, tokens[: anchor + 1]
        source.catch_up([sequence])
        np.testing.assert_allclose(source.lattices[0].logits, mine[row], rtol=2e-3, atol=2e-3)
        wanted = torch.sigmoid(y[row] @ net.gate.T).detach()
        np.testing.assert_allclose(source.lattices[0].gates, wanted, rtol=2e-3, atol=2e-3)
        assert source.cache.length(source._texts[1].kv) == anchor  # nothing of a draft stays
        source.catch_up([sequence])  # as when a step was abandoned
        np.testing.assert_allclose(source.lattices[0].logits, mine[row], rtol=2e-3, atol=2e-3)
        assert source.cache.length(source._texts[1].kv) == anchor


def observe(source: BlockSource, sequence: TokenSequence, states: np.ndarray) -> None:
    """As a chunk of a text."""
    output = DecoderOutput(np.zeros((0, 4), np.float32), {layer: states[:, i] for i, layer in enumerate(TAPS)})
    outputs = TargetOutputs(StepOutputs(output), 0, 0, slice(0, len(states)))
    source.feed(sequence, Observation(Accepted([], []), Draft.empty(), outputs, "prefill"))


def by_heart(net: Spark, tokens: torch.Tensor, features: torch.Tensor, anchors: torch.Tensor) -> torch.Tensor:
    """Cross entropy against the text itself, which the target draws too far from its likeliest tokens to be learned
    from its distributions."""
    _, logits = net(tokens, features, anchors)
    goal = tokens[anchors[:, None] + 1 + torch.arange(BLOCK)]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), goal.flatten())


@pytest.fixture(scope="module")
def trained(target: NativeDecoder, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Text]]:
    """A head that knows some texts by heart: its folder, and these texts."""
    folder = tmp_path_factory.mktemp("head")
    texts = texts_of(target, 5)
    features = Features(folder / "features", Meta("toy", "float32", TAPS, target.config.hidden_size))
    features.add(target, texts)
    net = net_of(target)
    trainer = Trainer(net, BLOCK, by_heart, hits, features, RECIPE, folder)
    trainer.run()
    one = features[trainer.train_on[0]]
    found = hits(net, torch.from_numpy(one.tokens), torch.from_numpy(one.features).float(), torch.arange(5, 35))
    assert found.mean() > 0.95
    check = Check(tuple(one.tokens[: 35 + BLOCK + 1].tolist()), 5, tuple(found.mean(0).tolist()))
    head_of(net, folder / "head.safetensors", check)
    return folder, [texts[i] for i in trainer.train_on]


def test_texts_known_by_heart_are_drafted_whole(target: NativeDecoder, trained: tuple[Path, list[Text]]) -> None:
    """An index that is off by one anywhere cannot pass."""
    folder, texts = trained
    head = read(folder / "head.safetensors")
    params = [replace(GREEDY, max_tokens=40, temperature=HOT, seed=(text.ask - 1) // 2) for text in texts]
    prompts = [text.prompt_tokens for text in texts]
    assert run(target, head, prompts[:3], params[:3]) == [text.tokens for text in texts[:3]]
    assert run.tokens_per_step > 2.5  # type: ignore[attr-defined]  # of 5: the draws must agree too
    source = BlockSource(head, target, 8)
    assert source.replay(head.config.check.tokens, head.config.check.prompt).mean() > 0.8


@pytest.mark.parametrize("params", [GREEDY, SAMPLED, PENALISED], ids=["greedy", "sampled", "penalised"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"prefill_rows": 7},
        {"method": "ngram+spark"},
        {"kv_tokens": 256, "swap_tokens": 0},
        {"kv_tokens": 256, "swap_tokens": 4096},
    ],
    ids=["batch", "chunks", "merged", "preempted", "swapped"],
)
def test_no_head_changes_a_text(
    target: NativeDecoder, trained: tuple[Path, list[Text]], params: SamplingParams, options: dict[str, Any]
) -> None:
    head = read(trained[0] / "head.safetensors")
    expected = [run(target, None, [prompt], params)[0] for prompt in PROMPTS]
    assert run(target, head, PROMPTS, params, **options) == expected


@pytest.mark.parametrize("method", ["spark", "recycling+spark"])
def test_what_the_head_is_shown_is_the_committed_text(
    target: NativeDecoder, trained: tuple[Path, list[Text]], method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each token once and in order, whatever was drafted and rejected beside it."""
    shown: list[np.ndarray] = []
    feed = BlockSource.feed

    def recorded(self: BlockSource, sequence: TokenSequence, seen: Observation) -> None:
        feed(self, sequence, seen)
        shown.append(self._texts[sequence.id].waiting[-1])

    monkeypatch.setattr(BlockSource, "feed", recorded)
    folder, [text, *_] = trained
    params = replace(GREEDY, max_tokens=40, temperature=HOT, seed=(text.ask - 1) // 2)
    [tokens] = run(target, read(folder / "head.safetensors"), [text.prompt_tokens], params, method)
    assert len(shown) < 30  # some drafts were right
    states = hidden_states(target, [*text.prompt_tokens, *tokens[:-1]], TAPS)
    assert np.array_equal(np.concatenate(shown), states.reshape(len(states), -1))


class Silent(Drafter):
    """Drafts nothing and counts what it is shown."""

    name = "silent"
    paper = ""

    def __init__(self, follows: bool) -> None:
        self.follows = follows  # type: ignore[misc]  # of the instance, here
        self.seen = 0

    def propose(self, sequences: Any, budgets: Any, market: Market) -> Proposal:
        return Proposal([Draft.empty()] * len(sequences))

    def observe(self, sequence: TokenSequence, seen: Observation) -> None:
        self.seen += 1


def test_who_follows_sees_the_steps_in_which_nobody_drafted() -> None:
    drafters = [Silent(False), Silent(True)]
    merged, sequence = Merged(drafters), TokenSequence(1, [1, 2], 2, GREEDY)
    merged.begin(sequence)
    logits = TargetOutputs.of(np.zeros((1, 8), np.float32))
    for budget in (0, 3, 0):
        merged.propose([sequence], [budget], Market())
        merged.observe(sequence, Observation(Accepted(path=[], tokens=[5]), Draft.empty(), logits))
    merged.observe(sequence, Observation(Accepted([], []), Draft.empty(), logits, "prefill"))
    assert [one.seen for one in drafters] == [1, 4]


def test_a_text_that_begins_in_the_prefix_tree(target: NativeDecoder, trained: tuple[Path, list[Text]]) -> None:
    """The head has not seen what the target did not compute again, and drafts from what comes behind."""
    head, prompt = read(trained[0] / "head.safetensors"), PROMPTS[1]
    longer = [*prompt, *random_tokens(9, 77).tolist()]
    engine = engine_of(target, head, "spark")
    for tokens in (prompt, longer, longer):
        engine.add(tokens, GREEDY)
        results = list(finished(engine).values())
        assert results[0].token_ids == run(target, None, [tokens], GREEDY)[0]
        assert results[0].stats.sources["spark"].proposed > 0


def test_rejection_sampling_runs_with_a_head(target: NativeDecoder, trained: tuple[Path, list[Text]]) -> None:
    head = read(trained[0] / "head.safetensors")
    assert all(len(tokens) == 40 for tokens in run(target, head, PROMPTS, SAMPLED, verifier=RejectionVerifier()))


def test_training_goes_on_where_it_was_stopped(
    target: NativeDecoder, trained: tuple[Path, list[Text]], tmp_path: Path
) -> None:
    folder, _ = trained
    shutil.copytree(folder / "features", tmp_path / "features")
    features = Features(tmp_path / "features")
    short, seen = replace(RECIPE, visits=900, test_every=10_000), []
    straight = Trainer(net_of(target), BLOCK, loss, hits, features, short, tmp_path / "straight")
    torch.manual_seed(11)
    straight.run()

    class Stopped(Exception):
        pass

    def stop(what: str, done: float, total: float) -> None:
        seen.append(done)
        if done >= 400:
            raise Stopped

    parted = Trainer(net_of(target), BLOCK, loss, hits, features, replace(short, keep_every=0), tmp_path / "parted")
    torch.manual_seed(11)
    with pytest.raises(Stopped):
        parted.run(stop)
    random_state = torch.get_rng_state()
    rest = Trainer(net_of(target), BLOCK, loss, hits, features, short, tmp_path / "parted")
    assert 0 < rest.state.visits == seen[-1]
    torch.set_rng_state(random_state)
    rest.run()
    for (name, one), (_, other) in zip(straight.net.named_parameters(), rest.net.named_parameters(), strict=True):
        assert torch.equal(one, other), name
    for net, recipe, message in (
        (net_of(target, layers=2), short, "another head"),
        (net_of(target, hot=torch.arange(80)), short, "has edge of shape"),
        (net_of(target), replace(short, rate=1e-4), "begun with rate=0.003, not 0.0001"),
        (net_of(target), replace(short, seed=1), "begun with seed=0, not 1"),
    ):
        with pytest.raises(ParameterError, match=message):
            Trainer(net, BLOCK, loss, hits, features, recipe, tmp_path / "parted")
    longer = Trainer(net_of(target), BLOCK, loss, hits, features, replace(short, visits=2000), tmp_path / "parted")
    assert longer.state.visits == rest.state.visits


def test_no_prompt_is_trained_on_and_held_out(target: NativeDecoder, tmp_path: Path) -> None:
    texts = texts_of(target, 12, 8)
    features = Features(tmp_path, Meta("toy", "float32", TAPS, target.config.hidden_size))
    features.add(target, [*texts, *(replace(text, ask=text.ask + 100, tokens=text.tokens[::-1]) for text in texts)])
    sides = parted(features, replace(RECIPE, held_out=3))
    prompts = [{tuple(features[i].tokens[: features[i].prompt].tolist()) for i in side} for side in sides]
    assert sorted(sides[0] + sides[1]) == list(range(24)) and all(prompts) and not prompts[0] & prompts[1]


def test_features_that_were_cut_short_go_on(target: NativeDecoder, tmp_path: Path) -> None:
    texts, meta = texts_of(target, 3, 12), Meta("toy", "float32", TAPS, target.config.hidden_size)
    whole = Features(tmp_path / "whole", meta)
    whole.add(target, texts)
    cut = Features(tmp_path / "cut", meta)
    cut.add(target, texts[:2])
    data = tmp_path / "cut" / "features.f16"
    data.write_bytes(data.read_bytes()[:-10])
    again = Features(tmp_path / "cut", meta)
    assert len(again) == 1
    again.add(target, texts)
    for i in range(3):
        assert np.array_equal(again[i].features, whole[i].features) and np.array_equal(again[i].tokens, whole[i].tokens)
    with pytest.raises(ParameterError, match="another folder"):
        Features(tmp_path / "cut", replace(meta, precision="int8"))


def test_hot_tokens_are_the_most_used(target: NativeDecoder, trained: tuple[Path, list[Text]]) -> None:
    features = Features(trained[0] / "features")
    train_on, _ = parted(features, RECIPE)
    hot = hot_tokens(map(features.tokens, train_on), 272, 40).tolist()
    written = [token for text in trained[1] for token in text.tokens]
    assert hot == sorted(set(hot)) and len(hot) == 40
    assert max(set(written), key=written.count) in hot


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:200], "not a whole safetensors file"),
        (lambda data: b"", "not a whole safetensors file"),
        (lambda data: data.replace(b"outpace-head-1", b"outpace-head-9"), "no head of"),
        (lambda data: data.replace(b'\\"block\\": 4', b'\\"block\\": 0'), "block"),
        (lambda data: data.replace(b'\\"block\\": 4', b'\\"block\\": 5'), "slots"),
        (lambda data: data.replace(b'\\"rank\\": 16', b'\\"rank\\": -9'), "from 1 to"),
        (lambda data: data.replace(b'\\"kind\\"', b'\\"kin_\\"'), "cannot be read"),
    ],
)
def test_damaged_files_are_refused(trained: tuple[Path, list[Text]], tmp_path: Path, damage: Any, message: str) -> None:
    data = (trained[0] / "head.safetensors").read_bytes()
    (tmp_path / "bad.safetensors").write_bytes(damage(data))
    with pytest.raises(CorruptModel, match=message):
        read(tmp_path / "bad.safetensors")
    with pytest.raises(ModelNotFound, match="train-head"):
        read(tmp_path / "nothing.safetensors")


def test_a_head_of_another_model(target: NativeDecoder, trained: tuple[Path, list[Text]]) -> None:
    head = read(trained[0] / "head.safetensors")
    assert fits(head, target.config) == ""
    assert "hidden_size" in fits(head, replace(target.config, hidden_size=128))
    other = replace(head, config=replace(head.config, target={**head.config.target, "num_layers": 9}))
    with pytest.raises(MethodError, match="num_layers 9"):
        make_drafter("spark", DrafterContext(272, draft_pages=8, target=target, head=other))
    with pytest.raises(MethodError, match="train-head"):
        make_drafter("spark", DrafterContext(272, draft_pages=8, target=target))


def test_cards_say_what_was_trained(trained: tuple[Path, list[Text]]) -> None:
    head = read(trained[0] / "head.safetensors")
    assert head.config.target["name"] == "toy" and json.dumps(head.config.trained) == "{}"
    assert head.arrays["slots"].shape == (BLOCK, 64) and len(head.hot) == 272
