"""Who runs, and with how many rows. First come, first served; pure Python, no tensors.

A request is admitted when its whole worst case fits beside those that run, so nothing is ever preempted.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from ..errors import CapacityError


@dataclass(slots=True)
class Admission:
    """Ids in order of arrival. `pages` are claimed at admission and given back by `release`."""

    max_batch: int
    num_pages: int
    page_size: int
    max_position: int
    _waiting: deque[tuple[int, int]] = field(default_factory=deque)
    _claims: dict[int, int] = field(default_factory=dict)
    _claimed: int = 0

    def pages(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    def check(self, prompt_tokens: int, max_tokens: int) -> None:
        """Raises CapacityError when the request could never run."""
        total = prompt_tokens + max_tokens
        if total > self.max_position:
            room = self.max_position - prompt_tokens
            advice = f"use max_tokens of at most {room}" if room > 0 else "shorten the prompt"
            raise CapacityError(
                f"{prompt_tokens} prompt tokens and max_tokens={max_tokens} make {total}, but the model's context "
                f"is {self.max_position} tokens: {advice}"
            )
        if self.pages(total) > self.num_pages:
            raise CapacityError(
                f"{prompt_tokens} prompt tokens and max_tokens={max_tokens} make {total}, but the KV cache holds "
                f"{self.num_pages * self.page_size} tokens: lower max_tokens, shorten the prompt or raise kv_tokens"
            )

    def add(self, id: int, prompt_tokens: int, max_tokens: int) -> None:
        self.check(prompt_tokens, max_tokens)
        self._waiting.append((id, self.pages(prompt_tokens + max_tokens)))

    def admit(self) -> list[int]:
        """Ids that start now, in order of arrival."""
        started = []
        while self._waiting and len(self._claims) < self.max_batch:
            id, need = self._waiting[0]
            if self._claimed + need > self.num_pages:
                break  # no overtaking: a large request would starve
            self._waiting.popleft()
            self._claims[id] = need
            self._claimed += need
            started.append(id)
        return started

    def release(self, id: int) -> None:
        """The request is over, running or still waiting."""
        need = self._claims.pop(id, None)
        if need is None:
            self._waiting = deque(w for w in self._waiting if w[0] != id)
        else:
            self._claimed -= need

    def check_integrity(self) -> None:
        assert self._claimed == sum(self._claims.values()) <= self.num_pages
        assert len(self._claims) <= self.max_batch
        assert not self._claims.keys() & {id for id, _ in self._waiting}
