"""Requests sent through an open LLM one by one, with the events of every step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..engine.request import StepEvent
from ..types import RequestOptions, Result, SamplingParams

if TYPE_CHECKING:
    from ..engine.llm import LLM


@dataclass(frozen=True, slots=True)
class TimedRequest:
    """`prompt` as LLM.submit takes it. `after`: steps that others run before it arrives."""

    prompt: Any
    params: SamplingParams
    owner: str = ""
    after: int = 0


@dataclass(slots=True)
class Run:
    """What one request got: its result and, step by step, the events that led to it."""

    result: Result
    events: list[StepEvent] = field(default_factory=list)

    @property
    def drafts(self) -> list[tuple[list[int], list[int]]]:
        """(tokens, parents) that were proposed in each decoding step."""
        return [(e.draft.tokens.tolist(), e.draft.parents.tolist()) for e in self.events if e.draft is not None]


def run_all(llm: LLM, requests: Sequence[TimedRequest]) -> list[Run]:
    """Answer all of them; results in the order of the requests. Raises what a request failed with."""
    waiting = sorted(range(len(requests)), key=lambda i: requests[i].after)
    ids: dict[int, int] = {}
    events: dict[int, list[StepEvent]] = {}
    runs: dict[int, Run] = {}
    steps = 0
    while waiting or ids:
        while waiting and (requests[waiting[0]].after <= steps or not ids):
            place = waiting.pop(0)
            request = requests[place]
            ids[llm.submit(request.prompt, request.params, options=RequestOptions(owner=request.owner))] = place
            events[place] = []
        for event in llm.step():
            place = ids[event.id]
            events[place].append(event)
            if event.error is not None:
                raise event.error
            if event.result is not None:
                runs[place] = Run(event.result, events[place])
                del ids[event.id]
        steps += 1
    return [runs[i] for i in range(len(requests))]
