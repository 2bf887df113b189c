"""The best order to read a batch of known prompts: those that share a prefix run together.

BatchLLM (arXiv 2412.03594: global prefixes, groups by them, their order by decoding). A cache that evicts what was
used least recently cannot know which prefixes come again; a batch file can. So the prompts are sorted into a tree of
common prefixes, every prompt is given one prefix that it shares with a group, such that the tokens saved are the most,
and the groups run one after another: a prefix is read once, and its pages are free again when its group is done. Groups
whose answers are long beside their prompts start first, so that the prompts of later ones are read in the steps in
which earlier ones decode.

Where this differs from the paper: which prefix a prompt shares is an exact optimum over the whole tree instead of
merging a node with its grandchildren while that gains.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..types import IntArray

Tokens = Sequence[int] | NDArray[np.int32] | IntArray

ROOT = 0
NONE = -1


@dataclass(frozen=True, slots=True, eq=False)
class Grouping:
    """`order`: the prompts as they should be submitted. `groups[i]`: a number that prompt i shares with those of its
    group, or -1. `shared[i]`: tokens of the prefix that prompt i has in common with its group."""

    order: list[int]
    groups: list[int]
    shared: list[int]

    @property
    def saved_tokens(self) -> int:
        """Prompt tokens that need not be read if each group's prefix is read once."""
        first: dict[int, int] = {g: n for g, n in zip(self.groups, self.shared, strict=True) if g != NONE}
        return sum(self.shared) - sum(first.values())


@dataclass(slots=True, eq=False)
class _Tree:
    """Common prefixes of two and more prompts. Node 0 is the root, of no page. [N] nodes."""

    depth: list[int]  # pages from the root
    parent: list[int]
    node_of: list[int]  # per prompt: the longest prefix that it shares with any other
    ranks: list[int]  # per prompt: its place in sorted order, in which every node's prompts are contiguous


def group(prompts: Sequence[Tokens], outputs: Sequence[int], page_size: int) -> Grouping:
    """Groups and order for prompts of token ids; `outputs` are the lengths that their answers may have.

    Prefixes are compared in whole pages, as the cache shares them; the last token of a prompt is never shared,
    because its logits are needed. Takes time and memory in proportion to the tokens (and sorting).
    """
    assert len(prompts) == len(outputs)
    ids = [np.asarray(p, dtype=np.int64) for p in prompts]
    tree = _tree(ids, page_size)
    opened = _best_groups(tree)
    groups = [opened[node] for node in tree.node_of]
    shared = [0 if g == NONE else tree.depth[g] * page_size for g in groups]
    order = _order(tree, groups, shared, [len(p) for p in ids], outputs)
    return Grouping(order, groups, shared)


def _tree(prompts: Sequence[IntArray], page_size: int) -> _Tree:
    """Sorts the prompts and reads the tree off the pages that neighbours have in common."""
    whole = [p[: max(len(p) - 1, 0) // page_size * page_size] for p in prompts]
    keys = [p.astype(">u4").tobytes() for p in whole]  # compares as the tokens do
    ranked = sorted(range(len(keys)), key=keys.__getitem__)
    common = [0] * (len(ranked) + 1)  # [n + 1] pages that place i has in common with the place before it
    for place in range(1, len(ranked)):
        common[place] = _common_pages(whole[ranked[place - 1]], whole[ranked[place]], page_size)
    tree = _Tree([0], [NONE], [ROOT] * len(ranked), [0] * len(ranked))
    path = [ROOT]  # nodes from the root to the one that the last prompt is in
    for place, prompt in enumerate(ranked):
        tree.ranks[prompt] = place
        _close(tree, path, common[place])
        if common[place + 1] > tree.depth[path[-1]]:
            path.append(_new(tree, common[place + 1], path[-1]))
        tree.node_of[prompt] = path[-1]
    return tree


def _close(tree: _Tree, path: list[int], depth: int) -> None:
    """Leave the nodes that are deeper than `depth`; where none has just that depth, one is put between."""
    left = NONE
    while tree.depth[path[-1]] > depth:
        left = path.pop()
    if left != NONE and tree.depth[path[-1]] < depth:
        path.append(_new(tree, depth, path[-1]))
        tree.parent[left] = path[-1]


def _new(tree: _Tree, depth: int, parent: int) -> int:
    tree.depth.append(depth)
    tree.parent.append(parent)
    return len(tree.depth) - 1


def _common_pages(a: IntArray, b: IntArray, page_size: int) -> int:
    n = min(len(a), len(b))
    differs = a[:n] != b[:n]
    return (int(differs.argmax()) if differs.any() else n) // page_size


def _best_groups(tree: _Tree) -> list[int]:
    """Per node: the node whose prefix its own prompts share as a group, or -1.

    The most that can be saved by groups that each share one prefix: a group of m prompts with a prefix of d pages
    saves (m - 1) d. `value[v][j]` is the most that v's prompts can save if those that form no group of their own
    join the group of v's j-th ancestor. Either v opens a group, which costs reading its prefix once, or it does not.
    """
    nodes = len(tree.depth)
    depth = np.array(tree.depth, dtype=np.int64)
    own = np.bincount(np.array(tree.node_of, dtype=np.int64), minlength=nodes)
    downwards = np.argsort(depth, kind="stable").tolist()  # every node after its parent
    above: list[NDArray[np.int64]] = [np.zeros(0, dtype=np.int64)] * nodes  # depths of the ancestors, root first
    for v in downwards[1:]:
        p = tree.parent[v]
        above[v] = np.append(above[p], depth[p])
    # what the children save, by which of v's ancestors they may join, v itself last
    below = [np.zeros(len(a) + 1, dtype=np.int64) for a in above]
    opens: list[NDArray[np.bool_]] = [np.zeros(0, dtype=np.bool_)] * nodes
    for v in reversed(downwards[1:]):
        joined = below[v][:-1] + own[v] * above[v]
        grouped = below[v][-1] + (own[v] - 1) * depth[v]
        opens[v] = grouped > joined
        below[tree.parent[v]] += np.maximum(joined, grouped)
    opened = [NONE] * nodes
    joins = [0] * nodes  # index of the open group's node among the ancestors
    for v in downwards[1:]:
        p = tree.parent[v]
        outer = len(above[p]) if opened[p] == p else joins[p]
        joins[v] = outer
        opened[v] = v if opens[v][outer] else opened[p]
    return opened


def _order(tree: _Tree, groups: list[int], shared: list[int], lengths: list[int], outputs: Sequence[int]) -> list[int]:
    """Families (all that has its first page in common) by tokens to write per token to read, the most first; of equals
    the one that shares more. Inside a family group by group, and there by prefix."""
    family = [NONE] * len(tree.depth)
    for v in sorted(range(1, len(tree.depth)), key=tree.depth.__getitem__):
        family[v] = v if tree.parent[v] == ROOT else family[tree.parent[v]]
    # a prompt without a common page is a family of one, numbered behind the nodes
    families = [family[v] if v != ROOT else len(tree.depth) + i for i, v in enumerate(tree.node_of)]
    places: dict[int, int] = {}  # group -> first place of its prompts
    read: dict[int, int] = {}
    write: dict[int, int] = {}
    saved: dict[int, int] = {}
    for i in sorted(range(len(groups)), key=tree.ranks.__getitem__):
        f, g = families[i], groups[i]
        again = shared[i] if g != NONE and g in places else 0
        places.setdefault(g, tree.ranks[i])
        read[f] = read.get(f, 0) + lengths[i] - again
        write[f] = write.get(f, 0) + outputs[i]
        saved[f] = saved.get(f, 0) + again

    def key(i: int) -> tuple[float, int, int, int, int]:
        f, g = families[i], groups[i]
        place = tree.ranks[i] if g == NONE else places[g]
        return -write[f] / max(read[f], 1), -saved[f], f, place, tree.ranks[i]

    return sorted(range(len(groups)), key=key)
