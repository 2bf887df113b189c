from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from outpace.engine.prediction import common_tokens

TOKENS = st.lists(st.integers(0, 4), max_size=80)


def by_table(a: list[int], b: list[int]) -> int:
    row = [0] * (len(b) + 1)
    for x in a:
        above, row = row, [0]
        for j, y in enumerate(b):
            row.append(above[j] + 1 if x == y else max(row[j], above[j + 1]))
    return row[-1]


@given(TOKENS, TOKENS)
def test_common_tokens_equals_the_textbook_table(a: list[int], b: list[int]) -> None:
    assert common_tokens(a, b) == by_table(a, b)
