"""Every decoder equals `transformers` on toy models of every architecture, in float32 to 1e-4.

Windows are shorter than the sequences, and sequences longer than a page.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from toy import ARCHITECTURES, Rig, hf_logits, random_tokens, toy_checkpoint

from outpace.cache.pages import PagedKVCache
from outpace.models.batch import Span, pack
from outpace.models.decoder import Taps
from outpace.ops.masks import CAUSAL, Bidirectional, Block, Tree

TOLERANCE = 1e-4
each_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)
#     root ── 0 ── 2 ── 5 ── 8 ── 9
#          │    │    └─ 6
#          │    └─ 3 ── 7
#          └─ 1 ── 4
PARENTS = np.array([-1, -1, 0, 0, 1, 2, 2, 3, 5, 8])


def ancestry(parents, node):
    """The nodes from the root down to `node`."""
    path = []
    while node >= 0:
        path.append(node)
        node = int(parents[node])
    return path[::-1]


def assert_same(ours, theirs):
    assert ours.shape == theirs.shape
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE)


@each_architecture
def test_prefill(load, architecture):
    checkpoint, model = toy_checkpoint(architecture)
    rig = Rig(load(checkpoint))
    tokens = random_tokens(45)
    assert_same(rig.feed(rig.cache.new(), tokens), hf_logits(model, tokens))


@each_architecture
def test_chunks_of_any_size_equal_one_pass(load, architecture):
    checkpoint, model = toy_checkpoint(architecture)
    rig = Rig(load(checkpoint))
    tokens, seq = random_tokens(45, 1), rig.cache.new()
    chunks = np.split(tokens, np.cumsum([3, 1, 1, 17, 6, 1, 11, 1, 1]))
    assert_same(np.concatenate([rig.feed(seq, c) for c in chunks if len(c)]), hf_logits(model, tokens))


#: Llama 3.1's context extension, beside plain rotary embedding
EXTENDED = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 2048,
}


@pytest.mark.parametrize("start", [500, 1016, 2040, 4088, 8184, 16376])
@pytest.mark.parametrize("extended", [False, True])
def test_far_positions(load, start, extended):
    """Rows on both sides of each power of two, where tables of positions grow or would end: only the distance of two
    positions counts, so rows that are all beyond it would not show a shift."""
    more = {"rope_scaling": EXTENDED} if extended else {}
    checkpoint, model = toy_checkpoint("llama", max_position_embeddings=32768, **more)
    decoder = load(checkpoint)
    cache = PagedKVCache(decoder.new_storage(2))
    tokens, seq, logits = random_tokens(24, 6), cache.new(), []
    for chunk in np.split(tokens, [6, 7, 15]):
        cache.reserve(seq, len(chunk))
        batch = pack([Span(chunk, cache.length(seq))], cache.page_tables([seq]))
        batch.positions = batch.positions + start  # as if so many tokens stood before the text
        logits.append(decoder.forward(batch, cache.storage).logits.cpu().numpy().copy())
        cache.commit(seq, range(len(chunk)))
    with torch.no_grad():
        places = torch.arange(start, start + len(tokens))[None]
        theirs = model(torch.from_numpy(tokens)[None], position_ids=places).logits[0].numpy()
    # angles of far positions are rounded in float32 there, and in float64 in one of ours
    np.testing.assert_allclose(np.concatenate(logits), theirs, rtol=0, atol=TOLERANCE * max(1, start / 512))


@each_architecture
def test_every_branch_of_a_tree_equals_its_own_linear_run(load, architecture):
    checkpoint, model = toy_checkpoint(architecture)
    rig = Rig(load(checkpoint))
    prompt, step, seq = random_tokens(27, 2), random_tokens(1 + len(PARENTS), 3), rig.cache.new()
    rig.feed(seq, prompt)
    (logits,) = rig.step((seq, step, Tree(PARENTS)))
    for node in range(-1, len(PARENTS)):
        branch = [0, *(i + 1 for i in ancestry(PARENTS, node))]
        assert_same(logits[node + 1], hf_logits(model, [*prompt, *step[branch]])[-1])
    path = [0, *(i + 1 for i in ancestry(PARENTS, 8))]
    rig.cache.commit(seq, path)
    rig.cache.check_integrity()
    assert_same(rig.feed(seq, [7, 8]), hf_logits(model, [*prompt, *step[path], 7, 8])[-2:])


@each_architecture
@pytest.mark.parametrize("rooted", [True, False])
def test_a_tree_grown_layer_by_layer_equals_the_whole_tree(load, architecture, rooted):
    checkpoint, _ = toy_checkpoint(architecture)
    rig = Rig(load(checkpoint))
    prompt, step, seq = random_tokens(14, 4), random_tokens(1 + len(PARENTS), 5), rig.cache.new()
    rig.feed(seq, prompt)
    (whole,) = rig.step((seq, step, Tree(PARENTS)))
    rig.cache.rollback(seq)
    grown, at = [], 0
    if not rooted:
        grown.append(rig.feed(seq, step[:1]))
    for stop in ([1, 3, 5, 8, 11]) if rooted else ([2, 5, 7, 10]):
        mask = Tree(PARENTS[: stop - rooted], rooted)
        tokens = step[at + (not rooted) : stop + (not rooted)]
        grown += rig.step((seq, tokens, mask, at))
        at = stop
    assert_same(np.concatenate(grown), whole)


@each_architecture
def test_a_ragged_batch_equals_single_sequences(load, architecture):
    checkpoint, model = toy_checkpoint(architecture)
    rig = Rig(load(checkpoint))
    a, b, c, d = (rig.cache.new() for _ in range(4))
    long, short, branch = random_tokens(37, 6), random_tokens(5, 7), random_tokens(16, 8)
    first = rig.step((a, long, CAUSAL), (b, short, CAUSAL), (c, branch, CAUSAL))
    for ours, tokens in zip(first, (long, short, branch), strict=True):
        assert_same(ours, hf_logits(model, tokens))
    for seq, tokens in ((a, long), (b, short), (c, branch)):
        rig.cache.commit(seq, range(len(tokens)))
    fresh, tree, block = random_tokens(70, 9), random_tokens(1 + len(PARENTS), 10), random_tokens(6, 11)
    ours = rig.step((a, [3], CAUSAL), (d, fresh, CAUSAL), (c, tree, Tree(PARENTS)), (b, block, Bidirectional()))
    assert_same(ours[0], hf_logits(model, [*long, 3])[-1:])
    assert_same(ours[1], hf_logits(model, fresh))
    for node in range(len(PARENTS)):
        path = [0, *(i + 1 for i in ancestry(PARENTS, node))]
        assert_same(ours[2][node + 1], hf_logits(model, [*branch, *tree[path]])[-1])
    sees = lambda i, j: j <= i or (i >= 5 and j >= 5)  # noqa: E731
    assert_same(ours[3], hf_logits(model, [*short, *block], sees)[5:])


@each_architecture
@pytest.mark.parametrize("prompt_length", [0, 19])
def test_block_causal_and_bidirectional_masks(load, architecture, prompt_length):
    checkpoint, model = toy_checkpoint(architecture)
    rig = Rig(load(checkpoint))
    prompt, canvas, seq = random_tokens(prompt_length, 12), random_tokens(18, 13), rig.cache.new()
    if prompt_length:
        rig.feed(seq, prompt)
    place = lambda i: (i - prompt_length) // 4 if i >= prompt_length else -1  # noqa: E731
    cases = (
        (Block(4), lambda i, j: j <= i or (i >= prompt_length and place(j) <= place(i))),
        (Bidirectional(), lambda i, j: j <= i or i >= prompt_length),
    )
    for mask, sees in cases:
        (ours,) = rig.step((seq, canvas, mask))
        assert_same(ours, hf_logits(model, [*prompt, *canvas], sees)[prompt_length:])
        rig.cache.rollback(seq)


ROPES = {
    "linear": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
        "rope_theta": 500.0,
    },
}


@pytest.mark.parametrize("kind", ROPES)
def test_rope_scaling(load, kind):
    checkpoint, model = toy_checkpoint("llama", rope_parameters=ROPES[kind])
    assert checkpoint.config.rope_scaling is not None
    rig = Rig(load(checkpoint))
    tokens = random_tokens(150, 14)
    assert_same(rig.feed(rig.cache.new(), tokens), hf_logits(model, tokens))


def test_gemma3_with_scaled_global_rope(load):
    rope = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    checkpoint, model = toy_checkpoint("gemma3", rope_parameters=rope)
    rig = Rig(load(checkpoint))
    tokens = random_tokens(60, 15)
    assert_same(rig.feed(rig.cache.new(), tokens), hf_logits(model, tokens))


def test_qwen2_with_some_sliding_layers(load):
    checkpoint, model = toy_checkpoint(
        "qwen2", use_sliding_window=True, sliding_window=5, max_window_layers=1, num_hidden_layers=3
    )
    assert checkpoint.config.layer_types == ("full", "sliding", "sliding")
    rig = Rig(load(checkpoint))
    tokens = random_tokens(30, 16)
    assert_same(rig.feed(rig.cache.new(), tokens), hf_logits(model, tokens))


@each_architecture
def test_hidden_states(load, architecture):
    checkpoint, model = toy_checkpoint(architecture)
    rig = Rig(load(checkpoint))
    tokens = random_tokens(20, 17)
    rig.step((rig.cache.new(), tokens, CAUSAL), taps=Taps(hidden=(0, 1)))
    import torch

    theirs = model(torch.as_tensor(tokens)[None], output_hidden_states=True, use_cache=False).hidden_states
    for layer in (0, 1):
        assert_same(rig.hidden[layer], theirs[layer + 1][0].detach().numpy())


def test_forked_sequences_go_their_own_ways(load):
    checkpoint, model = toy_checkpoint("llama")
    rig = Rig(load(checkpoint))
    prompt, one = random_tokens(21, 18), rig.cache.new()
    rig.feed(one, prompt)
    two = rig.cache.fork(one)
    ours = rig.step((one, [5, 6], CAUSAL), (two, [9, 1], CAUSAL))
    assert_same(ours[0], hf_logits(model, [*prompt, 5, 6])[-2:])
    assert_same(ours[1], hf_logits(model, [*prompt, 9, 1])[-2:])


@each_architecture
def test_logits_of_chosen_rows_only(load, architecture):
    from outpace.models.batch import Span, pack

    checkpoint, model = toy_checkpoint(architecture)
    rig = Rig(load(checkpoint))
    a, b, c = (rig.cache.new() for _ in range(3))
    tokens = random_tokens(9, 19)
    for seq in (a, b, c):
        rig.cache.reserve(seq, len(tokens))
    spans = [Span(tokens, 0, logits=kind) for kind in ("last", "none", "all")]
    out = rig.decoder.forward(pack(spans, rig.cache.page_tables([a, b, c])), rig.cache.storage)
    expected = hf_logits(model, tokens)
    assert_same(out.logits.cpu().numpy(), np.concatenate((expected[-1:], expected)))
