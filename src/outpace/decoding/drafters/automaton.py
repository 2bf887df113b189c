"""All substrings of a growing text, where each last occurred and how often."""

from __future__ import annotations

from collections.abc import Iterable

_COUNT_WALK = 48  # suffix links followed to count one token; only loops have longer chains


class SuffixAutomaton:
    """All substrings of a growing text. An append takes amortised constant time.

    A state stands for the substrings that end at the same places: `length` of the longest of them, `link`
    to the state of its longest suffix that ends at more places, `next` token -> state, `count` of the
    places, `last` of them. The text itself is in state `end`; the longest suffix that also occurs earlier
    is in `link[end]`. Blumer et al., "The smallest automaton recognizing the subwords of a text" (1985).
    """

    __slots__ = ("count", "end", "last", "length", "link", "next", "size")

    def __init__(self, tokens: Iterable[int] = ()) -> None:
        self.next: list[dict[int, int]] = [{}]
        self.link, self.length, self.count, self.last = [-1], [0], [0], [-1]
        self.end = 0
        self.size = 0  # of the text
        self.extend(tokens)

    def extend(self, tokens: Iterable[int]) -> None:
        for token in tokens:
            self._append(int(token))

    def _append(self, token: int) -> None:
        successors, link, length = self.next, self.link, self.length
        new, state = self._state({}, self.size + 1), self.end
        while state >= 0 and token not in successors[state]:
            successors[state][token] = new
            state = link[state]
        if state < 0:
            link[new] = 0
        else:
            target = successors[state][token]
            if length[target] > length[state] + 1:
                target = self._split(state, token, target)
            link[new] = target
        self.end = state = new
        count, last = self.count, self.last
        for _ in range(_COUNT_WALK):
            if state <= 0:
                break
            count[state] += 1
            last[state] = self.size
            state = link[state]
        self.size += 1

    def _split(self, state: int, token: int, target: int) -> int:
        """A copy of `target` for its strings short enough to follow `state`; returns it."""
        successors, link = self.next, self.link
        short = self._state(dict(successors[target]), self.length[state] + 1)
        link[short], self.count[short], self.last[short] = link[target], self.count[target], self.last[target]
        link[target] = short
        while state >= 0 and successors[state].get(token) == target:
            successors[state][token] = short
            state = link[state]
        return short

    def _state(self, successors: dict[int, int], length: int) -> int:
        self.next.append(successors)
        self.link.append(-1)
        self.length.append(length)
        self.count.append(0)
        self.last.append(-1)
        return len(self.next) - 1

    def continuations(self, state: int) -> list[tuple[int, int]]:
        """(token, state after it), the most frequent first, then the most recent."""
        after = self.next[state]
        if len(after) < 2:
            return list(after.items())
        count, last = self.count, self.last
        return sorted(after.items(), key=lambda item: (count[item[1]], last[item[1]]), reverse=True)

    def match(self, tokens: Iterable[int]) -> tuple[int, int]:
        """The state of the longest suffix of `tokens` that occurs in the text, and its length."""
        state = matched = 0
        for token in tokens:
            while state and token not in self.next[state]:
                state = self.link[state]
                matched = self.length[state]
            state = self.next[state].get(token, 0)
            matched = matched + 1 if state else 0
        return state, matched
