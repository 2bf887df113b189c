"""One packed decoder step as a single compiled function that every thread of the team runs.

All inputs sit in a control block of int64 (addresses, sizes, flags), indexed by the names below; per-layer addresses in
a second table. Threads split each phase and meet at barriers; no phase depends on how it was split.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from .attention import MAX_QUERIES, attend
from .attention_int4 import attend_int4
from .attention_tiles import attend_pairs
from .barrier import J_ARRIVED, J_BARRIER, J_THREADS, get, meet, put
from .isa import AMX, BF16
from .linear import ADD, STORE
from .product import embed_panels, multiply, pack_inputs, share
from .rows import add_norm_row, embed_row, norm_row, rotate_head, write_key, write_value
from .simd import atomic_add, call_at, load_f32, load_i32, load_i64, store_i64, vload, vstore
from .tiles import load_tile_config, release_tiles

# The control block, the per-layer table and the block of float32 constants: names of their entries.
(
    C_BARRIER, C_ARRIVED, C_THREADS, C_LEVEL, C_TILE_CONFIG, C_PAGE_TILE_CONFIG, C_ITEMS, C_ROWS,
    C_SEQUENCES, C_LOGIT_ROWS, C_LAYERS, C_LAYER_TABLE, C_FLOATS, C_WIDTH, C_TRUE_WIDTH, C_HIDDEN, C_TRUE_HIDDEN,
    C_HEADS, C_KV_HEADS, C_HEAD, C_HEAD_TRUE, C_ACTIVATION, C_POST_NORMS, C_TOKENS, C_POSITIONS, C_ROW_START,
    C_OFFSETS, C_CAUSAL, C_VISIBLE_START, C_VISIBLE, C_COMMITTED, C_PAGES, C_PAGES_STRIDE,
    C_LOGIT_INDEX, C_EMBEDDING, C_EMBEDDING_KIND, C_COS, C_SIN, C_COS_LOCAL, C_SIN_LOCAL, C_FINAL_NORM,
    C_HEAD_PRODUCT, C_LOGITS, C_LOGITS_STRIDE, C_KEYS, C_VALUES,
    C_KV_LAYER_BYTES, C_KV_PAGE_BYTES, C_KV_HEAD_BYTES, C_KV_BF16, C_X, C_QKV, C_ATTENTION, C_GATED,
    C_SUBLAYER, C_INPUTS, C_INPUT_SCALES, C_THREAD_SPACE, C_THREAD_STRIDE,
    C_SCORE_STRIDE, C_HIDDEN_OUT, C_COMPACT, C_COMPACT_PAGES, C_ATTEND,
    C_RAGGED, C_QUERIES_OUT,
) = range(66)  # fmt: skip
(
    L_QKV, L_OUT, L_GATE_UP, L_DOWN,  # products
    L_NORM_1, L_NORM_2, L_POST_1, L_POST_2, L_Q_NORM, L_K_NORM, L_WINDOW, L_LOCAL_ROPE, L_SAVE_HIDDEN,
    L_SKIP_ATTENTION, L_SKIP_MLP, L_SAVE_QUERIES,
) = range(16)  # fmt: skip
(
    F_EPS, F_EMBEDDING_SCALE, F_ATTENTION_SCALE,
) = range(3)  # fmt: skip

CONTROL_SIZE, LAYER_SIZE = 72, 16
LAYER_STRIDE = 8 * LAYER_SIZE

# What C_EMBEDDING is: rows of float32 or bf16, or the record of a segment whose outputs are the rows
ROWS_F32, ROWS_BF16, PANELS = range(3)

# C_RAGGED: 0, or for each sequence a record of these: a table of head pages for each layer and head, i32[L, Hkv, P],
# its P, and how many places lie before the sequence's own pages, i32[L, Hkv]. A table of 0: the pages are as usual.
R_TABLE, R_WIDTH, R_BEFORE = range(3)
RAGGED_SIZE = 3

assert (C_BARRIER, C_ARRIVED, C_THREADS) == (J_BARRIER, J_ARRIVED, J_THREADS)


@njit
def _product(c, me, threads, mode, rows, product, out, out_stride, scratch):
    multiply(
        product, get(c, C_LEVEL), mode, rows, get(c, C_INPUTS), get(c, C_INPUT_SCALES), me, threads, out, out_stride,
        scratch,
    )  # fmt: skip


@njit
def _norm_and_pack(c, me, threads, x, rows, norm, product, eps, space):
    width, true_width = get(c, C_WIDTH), get(c, C_TRUE_WIDTH)
    for t in range(me, rows, threads):
        norm_row(x + 4 * t * width, norm, space, width, true_width, eps)
        pack_inputs(product, get(c, C_INPUTS), get(c, C_INPUT_SCALES), t, space, width, space + 4 * width)


@njit
def _pack(c, me, threads, x, width, rows, chosen, product, space):
    """`chosen`: the rows to pack, i64[rows], one behind the other; 0: the first."""
    for r in range(me, rows, threads):
        t = load_i64(chosen + 8 * r) if chosen != 0 else r
        pack_inputs(product, get(c, C_INPUTS), get(c, C_INPUT_SCALES), r, x + 4 * t * width, width, space)


@njit
def _gather(rows, count, x, width):
    """Rows `rows` (ascending, i64[count]) of x to its beginning, in place. By one thread: they may overlap."""
    for r in range(count):
        t = load_i64(rows + 8 * r)
        if t != r:
            for i in range(0, width, 16):
                vstore(x + 4 * (r * width + i), vload(x + 4 * (t * width + i)))


@njit
def _rotate_and_write(c, layer, me, threads, keys, values, eps, attention_scale, space):
    """Rotary embedding of queries and keys in place; keys and values go to their cache places."""
    heads, kv_heads = get(c, C_HEADS), get(c, C_KV_HEADS)
    head, head_true = get(c, C_HEAD), get(c, C_HEAD_TRUE)
    half, is_bf16 = head_true // 2, get(c, C_KV_BF16)
    local = get(layer, L_LOCAL_ROPE)
    cos, sin = (get(c, C_COS_LOCAL), get(c, C_SIN_LOCAL)) if local else (get(c, C_COS), get(c, C_SIN))
    columns = heads + 2 * kv_heads
    page_bytes, head_bytes = get(c, C_KV_PAGE_BYTES), get(c, C_KV_HEAD_BYTES)
    row_start, b = get(c, C_ROW_START), 0
    one = np.float32(1.0)
    # Heads that lie side by side, as a thread's columns of the product did: they are in its own cache.
    first, last = share(heads + kv_heads, 1, me, threads), share(heads + kv_heads, 1, me + 1, threads)
    for t in range(get(c, C_ROWS)):
        while load_i32(row_start + 4 * (b + 1)) <= t:
            b += 1
        place = load_i32(get(c, C_COMMITTED) + 4 * b) + load_i32(get(c, C_OFFSETS) + 4 * t)
        page = load_i32(get(c, C_PAGES) + b * get(c, C_PAGES_STRIDE) + 4 * (place // 16))
        ct, st = cos + 4 * t * half, sin + 4 * t * half
        for h in range(first, last):
            x = get(c, C_QKV) + 4 * head * (t * columns + h)
            if h < heads:
                rotate_head(x, ct, st, half, get(layer, L_Q_NORM), head, head_true, eps, attention_scale)
            else:
                rotate_head(x, ct, st, half, get(layer, L_K_NORM), head, head_true, eps, one)
                at = page * page_bytes + (h - heads) * head_bytes
                write_key(x, keys + at, place % 16, head, is_bf16, space)
                write_value(x + 4 * head * kv_heads, values + at, place % 16, head, is_bf16, space)


@njit
def _attention(c, layer, index, space):
    """Work items are taken off a shared counter: (sequence, KV head, block of rows)."""
    keys = get(c, C_KEYS) + index * get(c, C_KV_LAYER_BYTES)
    values = get(c, C_VALUES) + index * get(c, C_KV_LAYER_BYTES)
    heads, kv_heads, head = get(c, C_HEADS), get(c, C_KV_HEADS), get(c, C_HEAD)
    group, is_bf16 = heads // kv_heads, get(c, C_KV_BF16)
    columns = heads + 2 * kv_heads
    block = max(1, MAX_QUERIES // group)
    queries = max(MAX_QUERIES, (group + 7) // 8 * 8) + 16
    stride = get(c, C_SCORE_STRIDE)
    q, acc = space, space + 4 * queries * head
    spare = acc + 4 * queries * head
    scores = spare + 128 * head + 64
    store_i64(spare + 96 * head, 0)
    pairs = get(c, C_LEVEL) >= BF16 and is_bf16
    ragged = get(c, C_RAGGED)
    layout, few_bits = get(c, C_COMPACT), 0  # pages that a draft reads from their copy in few bits
    counter = get(c, C_ITEMS) + 8 * index
    wanted, item = atomic_add(counter, 1), 0
    row_start, head_bytes = get(c, C_ROW_START), get(c, C_KV_HEAD_BYTES)
    for b in range(get(c, C_SEQUENCES)):
        begin, end = load_i32(row_start + 4 * b), load_i32(row_start + 4 * (b + 1))
        blocks = (end - begin + block - 1) // block
        while wanted < item + blocks * kv_heads:
            kv, row = (wanted - item) % kv_heads, begin + (wanted - item) // kv_heads * block
            n = min(block, end - row)
            queries_at, out_at = get(c, C_QKV) + 4 * head * kv * group, get(c, C_ATTENTION) + 4 * head * kv * group
            offsets, positions = get(c, C_OFFSETS), get(c, C_POSITIONS)
            causal, committed = load_i32(get(c, C_CAUSAL) + 4 * b), load_i32(get(c, C_COMMITTED) + 4 * b)
            visible_start, visible = get(c, C_VISIBLE_START), get(c, C_VISIBLE)
            window, pages = get(layer, L_WINDOW), get(c, C_PAGES) + b * get(c, C_PAGES_STRIDE)
            k, v, page_bytes = keys + kv * head_bytes, values + kv * head_bytes, get(c, C_KV_PAGE_BYTES)
            if ragged != 0:
                record = ragged + 8 * RAGGED_SIZE * b
                if get(record, R_TABLE) != 0:  # this head's own pages, wherever in the storage they lie
                    mine = index * kv_heads + kv
                    pages = get(record, R_TABLE) + 4 * mine * get(record, R_WIDTH)
                    committed += load_i32(get(record, R_BEFORE) + 4 * mine)
                    k, v, page_bytes = get(c, C_KEYS), get(c, C_VALUES), head_bytes
            if layout:
                few_bits = load_i32(get(c, C_COMPACT_PAGES) + 4 * b)
            if few_bits:
                attend_int4(
                    group, head, queries_at, 4 * head * columns, row, n, offsets, positions, causal, visible_start,
                    visible, committed, window, pages, k, v, page_bytes, out_at, 4 * head * heads, q, scores, stride,
                    acc, layout, index, kv, kv_heads, few_bits, scores + queries * stride,
                )  # fmt: skip
            elif pairs:
                attend_pairs(
                    get(c, C_LEVEL), group, head, queries_at, 4 * head * columns, row, n, offsets, positions, causal,
                    visible_start, visible, committed, window, pages, k, v, page_bytes, out_at, 4 * head * heads, q,
                    scores, stride, acc, spare, get(c, C_TILE_CONFIG), get(c, C_PAGE_TILE_CONFIG),
                )  # fmt: skip
            else:
                attend(
                    is_bf16, group, head, queries_at, 4 * head * columns, row, n, offsets, positions, causal,
                    visible_start, visible, committed, window, pages, k, v, page_bytes, out_at, 4 * head * heads,
                    q, scores, stride, acc,
                )  # fmt: skip
            wanted = atomic_add(counter, 1)
        item += blocks * kv_heads


def attention(c: int, space: int) -> None:
    """One thread's part of a layer's attention, compiled by itself (compiled.address_of). `space` begins with the
    address of the layer's entries and its number, and is used up to C_THREAD_STRIDE."""
    _attention(c, get(space, 0), get(space, 1), space)


@njit
def _save_queries(c, layer, me, threads):
    """Rotated and scaled, f32[rows, heads, C], to the place of this layer."""
    save, rows, width = get(layer, L_SAVE_QUERIES), get(c, C_ROWS), get(c, C_HEADS) * get(c, C_HEAD)
    if save < 0:
        return
    columns = (get(c, C_HEADS) + 2 * get(c, C_KV_HEADS)) * get(c, C_HEAD)
    for t in range(me, rows, threads):
        for i in range(0, width, 16):
            out = get(c, C_QUERIES_OUT) + 4 * ((save * rows + t) * width + i)
            vstore(out, vload(get(c, C_QKV) + 4 * (t * columns + i)))


@njit
def _post_norm(c, me, threads, rows, norm, eps):
    width, true_width = get(c, C_WIDTH), get(c, C_TRUE_WIDTH)
    for t in range(me, rows, threads):
        add_norm_row(get(c, C_SUBLAYER) + 4 * t * width, norm, get(c, C_X) + 4 * t * width, width, true_width, eps)


@njit
def _attention_sublayer(c, layer, index, me, threads, arrived, space, eps, attention_scale, narrow):
    """`narrow`: of the rows, those that give logits alone go on behind the keys and values, moved to the beginning."""
    rows, x, width, post = get(c, C_ROWS), get(c, C_X), get(c, C_WIDTH), get(c, C_POST_NORMS)
    heads, kv_heads, head = get(c, C_HEADS), get(c, C_KV_HEADS), get(c, C_HEAD)
    columns = (heads + 2 * kv_heads) * head
    keys = get(c, C_KEYS) + index * get(c, C_KV_LAYER_BYTES)
    values = get(c, C_VALUES) + index * get(c, C_KV_LAYER_BYTES)
    mode, target = (STORE, get(c, C_SUBLAYER)) if post else (ADD, x)

    _norm_and_pack(c, me, threads, x, rows, get(layer, L_NORM_1), get(layer, L_QKV), eps, space)
    arrived = meet(c, threads, arrived)
    _product(c, me, threads, STORE, rows, get(layer, L_QKV), get(c, C_QKV), 4 * columns, space)
    arrived = meet(c, threads, arrived)
    _rotate_and_write(c, layer, me, threads, keys, values, eps, attention_scale, space)
    arrived = meet(c, threads, arrived)
    _save_queries(c, layer, me, threads)
    put(space, 0, layer)
    put(space, 1, index)
    call_at(get(c, C_ATTEND), c, space)
    arrived = meet(c, threads, arrived)
    chosen = 0
    if narrow:
        rows, chosen = get(c, C_LOGIT_ROWS), get(c, C_LOGIT_INDEX)
        if me == 0:
            _gather(chosen, rows, x, width)
    _pack(c, me, threads, get(c, C_ATTENTION), heads * head, rows, chosen, get(layer, L_OUT), space)
    arrived = meet(c, threads, arrived)
    _product(c, me, threads, mode, rows, get(layer, L_OUT), target, 4 * width, space)
    arrived = meet(c, threads, arrived)
    if post:
        _post_norm(c, me, threads, rows, get(layer, L_POST_1), eps)
        arrived = meet(c, threads, arrived)
    return arrived


@njit
def _mlp_sublayer(c, layer, me, threads, arrived, space, eps, rows):
    x, width, post = get(c, C_X), get(c, C_WIDTH), get(c, C_POST_NORMS)
    hidden = get(c, C_HIDDEN)
    mode, target = (STORE, get(c, C_SUBLAYER)) if post else (ADD, x)

    _norm_and_pack(c, me, threads, x, rows, get(layer, L_NORM_2), get(layer, L_GATE_UP), eps, space)
    arrived = meet(c, threads, arrived)
    activation = get(c, C_ACTIVATION)
    _product(c, me, threads, activation, rows, get(layer, L_GATE_UP), get(c, C_GATED), 4 * hidden, space)
    arrived = meet(c, threads, arrived)
    _pack(c, me, threads, get(c, C_GATED), hidden, rows, 0, get(layer, L_DOWN), space)
    arrived = meet(c, threads, arrived)
    _product(c, me, threads, mode, rows, get(layer, L_DOWN), target, 4 * width, space)
    arrived = meet(c, threads, arrived)
    if post:
        _post_norm(c, me, threads, rows, get(layer, L_POST_2), eps)
        arrived = meet(c, threads, arrived)
    return arrived


@njit
def _layer(c, layer, index, me, threads, arrived, space, eps, attention_scale, narrow):
    """A sublayer that is skipped touches nothing: neither the residual stream nor the layer's keys and values."""
    rows, x, width = get(c, C_ROWS), get(c, C_X), get(c, C_WIDTH)
    if get(layer, L_SKIP_ATTENTION) == 0:
        arrived = _attention_sublayer(c, layer, index, me, threads, arrived, space, eps, attention_scale, narrow)
    if get(layer, L_SKIP_MLP) == 0:
        arrived = _mlp_sublayer(c, layer, me, threads, arrived, space, eps, get(c, C_LOGIT_ROWS) if narrow else rows)
    save = get(layer, L_SAVE_HIDDEN)
    if save >= 0:
        out = get(c, C_HIDDEN_OUT) + 4 * save * rows * width
        for i in range(me * 16, rows * width, threads * 16):
            vstore(out + 4 * i, vload(x + 4 * i))
    return arrived


@njit
def _embed(c, token, width, scale, out, space):
    table, kind = get(c, C_EMBEDDING), get(c, C_EMBEDDING_KIND)
    if kind == PANELS:
        embed_panels(table, token, width, get(c, C_FLOATS) + 4 * F_EMBEDDING_SCALE, out, space)
    else:
        embed_row(table, kind == ROWS_BF16, token, width, scale, out)


@njit
def _decoder_step(c, me):
    threads = get(c, C_THREADS)
    space = get(c, C_THREAD_SPACE) + me * get(c, C_THREAD_STRIDE)
    floats, rows, width, x = get(c, C_FLOATS), get(c, C_ROWS), get(c, C_WIDTH), get(c, C_X)
    eps = load_f32(floats + 4 * F_EPS)
    embedding_scale, attention_scale = (
        load_f32(floats + 4 * F_EMBEDDING_SCALE),
        load_f32(floats + 4 * F_ATTENTION_SCALE),
    )
    arrived = get(c, C_ARRIVED) + threads
    if get(c, C_LEVEL) == AMX:
        load_tile_config(get(c, C_TILE_CONFIG))
    for t in range(me, rows, threads):
        _embed(c, load_i64(get(c, C_TOKENS) + 8 * t), width, embedding_scale, x + 4 * t * width, space)
    arrived = meet(c, threads, arrived)
    # What the last layer makes of a row that gives no logits, beyond its keys and values, nobody reads.
    layers, wanted, narrow = get(c, C_LAYERS), get(c, C_LOGIT_ROWS), False
    for i in range(layers):
        layer = get(c, C_LAYER_TABLE) + i * LAYER_STRIDE
        if i == layers - 1 and wanted < rows:
            narrow = get(layer, L_SAVE_HIDDEN) < 0 and get(layer, L_SKIP_ATTENTION) == 0
        arrived = _layer(c, layer, i, me, threads, arrived, space, eps, attention_scale, narrow)
    head, scales = get(c, C_HEAD_PRODUCT), get(c, C_INPUT_SCALES)
    for r in range(me, wanted, threads):
        t = r if narrow else load_i64(get(c, C_LOGIT_INDEX) + 8 * r)
        norm_row(x + 4 * t * width, get(c, C_FINAL_NORM), space, width, get(c, C_TRUE_WIDTH), eps)
        pack_inputs(head, get(c, C_INPUTS), scales, r, space, width, space + 4 * width)
    arrived = meet(c, threads, arrived)
    if wanted > 0:
        _product(c, me, threads, STORE, wanted, head, get(c, C_LOGITS), get(c, C_LOGITS_STRIDE), space)
    if get(c, C_LEVEL) == AMX:
        release_tiles()
    meet(c, threads, arrived)


def decoder_step(c: int, me: int) -> None:
    """Thread `me` of the team; `c` is the control block's address. A job (see team.py)."""
    _decoder_step(c, me)
