"""Order of offline batches: groups against all partitions, the order against a cache that forgets."""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from outpace.engine.grouping import NONE, Grouping, group

PAGE = 4


def common(prompts: Sequence[Sequence[int]]) -> int:
    """Tokens in whole pages that all begin with, the last token of each left out."""
    n = min(len(p) for p in prompts) - 1
    while n > 0 and any(p[:n] != prompts[0][:n] for p in prompts):
        n -= 1
    return max(n, 0) // PAGE * PAGE


def partitions(items: list[int]) -> Iterator[list[list[int]]]:
    if not items:
        yield []
        return
    for rest in partitions(items[1:]):
        yield [[items[0]], *rest]
        for i, part in enumerate(rest):
            yield [*rest[:i], [items[0], *part], *rest[i + 1 :]]


def most_saved(prompts: list[list[int]]) -> int:
    """By definition: the best of all ways to form groups."""
    return max(
        sum((len(part) - 1) * common([prompts[i] for i in part]) for part in parts)
        for parts in partitions(list(range(len(prompts))))
    )


def check(prompts: list[list[int]], found: Grouping) -> None:
    assert sorted(found.order) == list(range(len(prompts)))
    members: dict[int, list[int]] = {}
    for i, g in enumerate(found.groups):
        assert (found.shared[i] > 0) == (g != NONE)
        if g != NONE:
            members.setdefault(g, []).append(i)
    for ids in members.values():
        assert len(ids) > 1
        assert {found.shared[i] for i in ids} <= set(range(PAGE, common([prompts[i] for i in ids]) + 1, PAGE))
        places = [found.order.index(i) for i in ids]
        assert max(places) - min(places) == len(ids) - 1, "a group is not together"


in_pages = st.lists(st.sampled_from([1, 2]), max_size=4).map(lambda pages: [t for p in pages for t in [p] * PAGE] + [9])
trees = st.lists(in_pages, max_size=6)  # the reference looks at all partitions


@given(trees)
def test_no_grouping_saves_more(prompts: list[list[int]]) -> None:
    found = group(prompts, [10] * len(prompts), PAGE)
    check(prompts, found)
    assert found.saved_tokens == (most_saved(prompts) if prompts else 0)


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=30), max_size=40), st.randoms(use_true_random=False))
def test_any_prompts(prompts: list[list[int]], rng: random.Random) -> None:
    found = group(prompts, [rng.randint(1, 50) for _ in prompts], PAGE)
    check(prompts, found)
    arrays = [np.array(p, dtype=np.int32) for p in prompts]
    assert group(arrays, [1] * len(prompts), PAGE).groups == found.groups


def test_the_last_token_is_read() -> None:
    """Equal prompts of whole pages share all but the page that holds their last token."""
    found = group([[5] * 8, [5] * 8], [1, 1], PAGE)
    assert found.shared == [4, 4] and found.saved_tokens == 4
    assert group([[5] * 4, [5] * 4], [1, 1], PAGE).groups == [NONE, NONE]


def test_a_deep_beginning_leaves_the_shallow_one() -> None:
    """Ten prompts share five pages of which two share one with three others: two groups, not one of thirteen."""
    deep = [[1] * 20 + [i + 10] for i in range(10)]
    shallow = [[1] * 4 + [2] * 8 + [i + 10] * 3 for i in range(3)]
    found = group([*deep, *shallow], [1] * 13, PAGE)
    assert found.shared == [20] * 10 + [12] * 3
    assert len(set(found.groups)) == 2 and found.saved_tokens == 9 * 20 + 2 * 12


def test_nested_beginnings_by_the_hundred() -> None:
    prompts = [[7] * (PAGE * n) + [8] for n in range(1, 700)]
    found = group(prompts, [1] * len(prompts), PAGE)
    check(prompts, found)
    assert found.saved_tokens > 0


def test_decode_heavy_first_and_of_equals_more_sharing() -> None:
    long_prompt, long_answer = [[1] * 40, [2] * 40], [[3] * 9, [4] * 9]
    found = group([*long_prompt, *long_answer], [4, 4, 400, 40], PAGE)
    assert found.order == [2, 3, 0, 1] or found.order == [2, 3, 1, 0]
    pair, single = [[5] * 13 + [6], [5] * 13 + [7]], [[8] * 16]
    found = group([*single, *pair], [16, 8, 8], PAGE)  # 16 to write per 16 to read each
    assert found.order[2] == 0


def tokens_read(prompts: list[list[int]], order: Sequence[int], pages: int) -> int:
    """Prompt tokens that an LRU cache of so many pages leaves to be read."""
    cache: OrderedDict[tuple[int, ...], None] = OrderedDict()
    read = 0
    for i in order:
        prompt, hit = prompts[i], True
        for end in range(PAGE, len(prompt), PAGE):
            key = tuple(prompt[:end])
            hit = hit and key in cache
            read += 0 if hit else PAGE
            cache[key] = None
            cache.move_to_end(key)
        read += (len(prompt) - 1) % PAGE + 1
        while len(cache) > pages:
            cache.popitem(last=False)
    return read


@pytest.mark.parametrize("documents", [10, 40])
def test_grouped_prompts_are_read_once_where_the_order_given_reads_them_again(documents: int) -> None:
    rng = random.Random(documents)
    texts = [[rng.randrange(100) for _ in range(rng.randrange(80, 120))] for _ in range(documents)]
    prompts = [texts[rng.randrange(documents)] + [rng.randrange(100) for _ in range(9)] for _ in range(300)]
    found = group(prompts, [20] * len(prompts), PAGE)
    given, grouped = (tokens_read(prompts, o, 100) for o in (range(len(prompts)), found.order))
    assert grouped <= sum(map(len, prompts)) - found.saved_tokens
    assert grouped < 0.5 * given
