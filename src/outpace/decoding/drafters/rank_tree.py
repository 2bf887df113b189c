"""Trees of fixed shape: which ranks of candidates to follow, whatever the tokens.

A shape is a list of paths; a path names at each depth the rank of the candidate (0: the likeliest) on the way down, and
stands for the node at its end. Every path's prefix is in the shape, before it.
"""

from __future__ import annotations

from heapq import heappop, heappush

from ...types import FloatArray

Path = tuple[int, ...]

# Below each inner node of the tree its children's ranks run from 0; how many there are. 80 nodes in six layers for
# k = 8: the template "2.2.2" that the authors of Token Recycling (arXiv 2408.08696, figure 3) published in
# github.com/Luowaterbi/TokenRecycling, model/recycling/tree_template_.py.
_PUBLISHED_CHILDREN: dict[str, int] = {
    "": 8,
    "0": 8, "1": 4, "2": 3, "3": 2, "4": 1, "5": 1, "6": 1, "7": 1,
    "00": 8, "01": 3, "02": 2, "03": 1, "04": 1, "05": 1, "06": 1, "07": 1, "10": 2, "11": 1,
    "20": 1, "30": 1, "40": 1, "50": 1,
    "000": 5, "001": 2, "002": 1, "003": 1, "004": 1, "010": 1, "020": 1, "100": 1, "200": 1, "300": 1,
    "0000": 3, "0001": 1, "0002": 1, "0010": 1, "0100": 1, "1000": 1,
    "00000": 2, "00010": 1,
}  # fmt: skip


def _published() -> list[Path]:
    paths: list[Path] = [
        (*map(int, above), rank) for above, children in _PUBLISHED_CHILDREN.items() for rank in range(children)
    ]
    # Cut to a budget below 80 it should stay a tree of several layers: the most promising nodes first, those with the
    # smallest sum of ranks and depth. No node comes before its parent.
    return sorted(paths, key=lambda path: (sum(path) + len(path), len(path), path))


PUBLISHED = _published()


def fitted(acceptance: FloatArray, nodes: int, floor: float = 0.0) -> list[Path]:
    """The shape of at most `nodes` nodes with the largest expected number of accepted tokens, best nodes first.

    `acceptance` f32[depths, ranks] is the probability that a candidate of this rank at this depth is accepted if its
    parent is; a node's probability of being reached is the product down to it, and those below `floor` are left out.

    Sequoia (Chen et al., arXiv 2402.12374, section 3.1) finds such a tree by dynamic programming over its size. As the
    objective is the sum of the nodes' probabilities and no node is likelier than its parent, the `nodes` likeliest
    paths of all are a tree already, and no tree of that size has a larger sum; best-first search lists them.
    """
    table: list[list[float]] = acceptance.tolist()
    ranked = [sorted(range(len(row)), key=row.__getitem__, reverse=True) for row in table]
    shape: list[Path] = []
    heap: list[tuple[float, Path, int, float]] = []  # -reach, path above, place in the ranking, reach above

    def offer(above: Path, place: int, reach: float) -> None:
        if len(above) < len(table) and place < len(table[len(above)]):
            gain = reach * table[len(above)][ranked[len(above)][place]]
            if gain > 0 and gain >= floor:
                heappush(heap, (-gain, above, place, reach))

    offer((), 0, 1.0)
    while heap and len(shape) < nodes:
        gain, above, place, reach = heappop(heap)
        path = (*above, ranked[len(above)][place])
        shape.append(path)
        offer(above, place + 1, reach)
        offer(path, 0, -gain)
    return shape
