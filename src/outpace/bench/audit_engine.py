"""What the loop owes to requests beside their tokens: batches, streams, seeds and owners do not show in the output.

Each check opens the method anew on the loaded weights, so that nothing learned before is in the way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from ..types import Result, SamplingParams
from .evidence import Check
from .requests import Run, TimedRequest, run_all
from .settings import Setting
from .workloads import Prompt

if TYPE_CHECKING:
    from ..engine.llm import LLM

_LATER = 22  # steps after which the second owner comes, the first one's answer of 32 tokens being under way
_SECRET, _OWN, _TRIGGER = 40, 24, 6  # tokens of the owners' texts, and of the other's text that one repeats


def as_prompt(llm: LLM, prompt: Prompt) -> Any:
    """The first turn, as a chat where the model has a template."""
    return [{"role": "user", "content": prompt.text}] if llm.tokenizer.has_chat_template else prompt.text


# -- ragged batches and their streams -------------------------------------------------------------------------------


def check_ragged(
    llm: LLM, prompts: Sequence[Prompt], references: Sequence[Result], setting: Setting, max_tokens: int, seed: int
) -> Iterator[Check]:
    """Requests of different lengths that arrive and end at different steps: each gets what plain decoding alone gave
    it (`references`, of `max_tokens` each), if that is promised, and its stream adds up to its result.

    `llm` is the method as it is audited.
    """
    requests, wanted = [], []
    for i, prompt in enumerate(prompts):
        share = max(1, max_tokens * (1 + i % 4) // 4)
        params = setting.params(share, seed + i)
        requests.append(TimedRequest(as_prompt(llm, prompt), params, after=3 * i // 2))
        wanted.append(references[i].token_ids[:share])
    runs = run_all(llm, requests)
    llm.check_integrity()
    subject = f"{llm.options.method}, {setting.name}"
    promised = ("identical", "distribution") if setting.base.greedy else ("identical",)
    claimed = [run.result.exactness in promised for run in runs]
    wrong = [run.result.token_ids != tokens for run, tokens in zip(runs, wanted, strict=True)]
    broken = sum(w and c for w, c in zip(wrong, claimed, strict=True))
    said = f"{sum(wrong)} of {len(runs)} sequences differ from plain decoding alone"
    said += "" if any(claimed) else ", and nothing is promised"
    yield Check("ragged", subject, not broken, said, {"differing": sum(wrong), "sequences": len(runs)})
    yield _streams(llm, subject, runs)


def _streams(llm: LLM, subject: str, runs: Sequence[Run]) -> Check:
    faults = [fault for run in runs if (fault := stream_fault(llm, run)) is not None]
    steps = sum(len(run.events) for run in runs)
    said = faults[0] if faults else f"{steps} events of {len(runs)} requests add up to their results"
    return Check("streams", subject, not faults, said, {"faults": len(faults), "events": steps})


def stream_fault(llm: LLM, run: Run) -> str | None:
    """What of the events does not agree with the result, None if all does."""
    result, events = run.result, run.events
    tokens = [token for event in events for token in event.token_ids]
    if tokens != result.token_ids:
        return f"the events hold {len(tokens)} tokens, the result {len(result.token_ids)}, and they are not the same"
    if "".join(event.text for event in events) != result.text:
        return "the pieces of text do not make up the text of the result"
    if [source for event in events for source in event.sources] != result.sources:
        return "the sources of the events are not those of the result"
    if len(result.sources) != len(tokens) or result.stats.tokens != len(tokens):
        return f"{result.stats.tokens} tokens were counted and {len(result.sources)} sources named for {len(tokens)}"
    visible = [t for t in tokens if t not in llm.tokenizer.eos_ids]
    if not result.text and llm.tokenizer.decode(visible):
        return "there are tokens and no text"
    for event in events:
        if event.draft is not None:
            taken = event.draft.tokens[event.draft.accepted].tolist()
            if taken[: len(event.token_ids)] != event.token_ids[: len(taken)]:
                return f"a step says that {taken} were accepted and gives {event.token_ids}"
    return None


# -- seeds ----------------------------------------------------------------------------------------------------------


def check_seeds(
    llm: LLM, method: str, prompts: Sequence[Prompt], setting: Setting, max_tokens: int, seed: int
) -> Check:
    """The same seeds give the same tokens from an engine opened anew, and other seeds others.

    A method that chooses by the clock (planner goodput) is held to it only where its output is identical to plain
    decoding: elsewhere what is drafted may change what is drawn.
    """

    def outputs(first: int) -> tuple[list[list[int]], bool, bool]:
        with llm.with_method(method) as fresh:
            chats = [as_prompt(fresh, p) for p in prompts]
            params = [setting.params(max_tokens, first + i) for i in range(len(prompts))]
            results = [result for a, p in zip(chats, params, strict=True) for result in fresh.generate(a, p)]
            identical = all(result.exactness == "identical" for result in results)
            return [result.token_ids for result in results], identical, fresh.planner == "goodput"

    once, identical, timed = outputs(seed)
    again, _, _ = outputs(seed)
    others, _, _ = outputs(seed + 7919)
    subject, differing = f"{method}, {setting.name}", sum(a != b for a, b in zip(once, again, strict=True))
    changed = sum(a != b for a, b in zip(once, others, strict=True))
    promised = identical or not timed
    deaf = not setting.base.greedy and not changed and max_tokens > 4
    said = f"{differing} of {len(once)} differ with the same seeds, {changed} with others"
    said += "" if promised else "; by the clock, so that the same is not promised"
    said += "; the seed changes nothing" if deaf else ""
    numbers = {"differing": differing, "changed": changed}
    return Check("seeds", subject, not (differing and promised) and not deaf, said, numbers)


# -- owners ---------------------------------------------------------------------------------------------------------


def check_owners(llm: LLM, method: str, seed: int = 0) -> Iterator[Check]:
    """Two owners in one engine. What is proposed to one must not hold what only the other wrote.

    The first owner's prompt is random tokens, and a bias makes its output random tokens too, so that nobody hits upon
    them by chance. The second one's prompts end in pieces of both, and a bias makes each output begin as the piece goes
    on: in the first decoding step a drafter that remembers everybody's text would go on with the first owner's.

    prompts   after the first owner had a prompt read, and no draft verified, the second one's drafts are the same as
              alone, node for node (only what is not the same twice alone either is held to less)
    outputs   after whole answers of the first owner, no three tokens in a row that are his alone are proposed (that
              is, not made of pairs in the second one's own texts so far)
    together  the same while he is still being answered, in the steps that both share
    prefixes  the same prompt of another owner finds nothing in the prefix cache
    """
    secret, output, biased = _secrets(llm, seed)
    rng = np.random.default_rng([seed, 1])
    speakable = _speakable(llm)
    room = llm.config.max_position - 64
    mine, second = [], []
    for piece in (*_pieces(secret), *_pieces(output)):
        mine.append([*rng.choice(speakable, _OWN).tolist(), *piece[:-1]][-room:])
        goes_on = SamplingParams(max_tokens=8, seed=seed, ignore_eos=True, logit_bias={piece[-1]: 100.0})
        second.append(TimedRequest(mine[-1], goes_on, "second"))
    first = TimedRequest(secret, biased, "first")
    alone, twice = _drafts(llm, method, second), _drafts(llm, method, second)
    short = SamplingParams(max_tokens=1, seed=seed)
    behind_prompt = _drafts(llm, method, [TimedRequest(secret, short, "first"), *second])[1:]
    behind_output = _drafts(llm, method, [first, first, *second])[2:]
    steady = _shape(alone) == _shape(twice)
    behind_both = _drafts(llm, method, [first, *(replace(one, after=_LATER) for one in second)], at_once=True)[1:]
    foreign = _three([*secret, *output])
    known = set().union(*(_proposed(run, tokens) for run, tokens in zip([*alone, *twice], mine * 2, strict=True)))
    for name, runs in (("prompts", behind_prompt), ("outputs", behind_output), ("together", behind_both)):
        leaked = set[tuple[int, ...]]()
        # What one of his requests holds may be proposed to the next one, or to all while they are answered together,
        # and so may three tokens that overlapping pairs of his make: canaries are few, and meet by chance
        own = [_pairs([*tokens, *run.result.token_ids]) for run, tokens in zip(runs, mine, strict=True)]
        for i, (run, tokens) in enumerate(zip(runs, mine, strict=True)):
            his = set().union(*(own if name == "together" else own[: i + 1]))
            strange = (_proposed(run, tokens) & foreign) - known
            leaked |= {three for three in strange if not {three[:2], three[1:]} <= his}
        same = _shape(runs) == _shape(alone)
        holds = not leaked and (same or not steady or name != "prompts")
        nodes = sum(len(tokens) for run in runs for tokens, _ in run.drafts)
        said = f"{nodes} nodes proposed, {'the same as' if same else 'not the same as'} alone; "
        said += f"{len(leaked)} pieces of another owner's text"
        said += "" if steady else " (twice alone is not the same either)"
        numbers = {"nodes": nodes, "same": same, "leaked": len(leaked), "steady": steady}
        yield Check("owners", f"{method}, {name}", holds, said, numbers)
    cached = _drafts(llm, method, [TimedRequest(secret, short, "first"), TimedRequest(secret, short, "second")])[1]
    found = cached.result.stats.cached_tokens
    said = f"{found} of {len(secret)} tokens of another owner's prompt were found cached"
    yield Check("owners", f"{method}, prefixes", not found, said, {"cached_tokens": found})


def _secrets(llm: LLM, seed: int) -> tuple[list[int], list[int], SamplingParams]:
    """The first owner's prompt and output, and the parameters that give this output."""
    rng = np.random.default_rng(seed)
    speakable = _speakable(llm)
    secret = rng.choice(speakable, _SECRET).tolist()
    canaries = rng.choice(speakable, min(16, len(speakable) // 2), replace=False).tolist()
    biased = SamplingParams(
        max_tokens=32, temperature=4.0, seed=seed, ignore_eos=True, logit_bias=dict.fromkeys(canaries, 100.0)
    )
    with llm.with_method("plain", verifier="auto") as plain:
        output = plain.generate(secret, biased)[0].token_ids
    return secret, output, biased


def _pieces(text: list[int]) -> list[list[int]]:
    """Two pieces of a text behind which it goes on with another token than their last."""
    ends = [i for i in range(_TRIGGER, len(text) - 4) if text[i] != text[i + 1]] or [len(text) // 2]
    return [text[i - _TRIGGER : i + 1] for i in (ends[0], ends[len(ends) // 2])]


def _speakable(llm: LLM) -> np.ndarray:
    """Tokens that are no control tokens and mean something by themselves. At most 4,096 of them."""
    rng = np.random.default_rng(5)
    ids = rng.permutation(llm.config.vocab_size)[:20_000].tolist()
    stops = {*llm.tokenizer.eos_ids, *llm.config.eos_ids}
    good = [t for t in ids if t not in stops and llm.tokenizer.decode([t]).strip()]
    return np.array(good[:4096], dtype=np.int64)


def _drafts(llm: LLM, method: str, requests: Sequence[TimedRequest], at_once: bool = False) -> list[Run]:
    """Each request after the one before it, or all `at_once`, in an engine opened anew that plans nothing by time."""
    drafting = {} if method == "plain" else {"planner": "fixed", "max_rows": 12}
    with llm.with_method(method, max_batch=len(requests) if at_once else 2, **drafting) as fresh:
        runs = run_all(fresh, requests) if at_once else [run_all(fresh, [request])[0] for request in requests]
        fresh.check_integrity()
    return runs


def _shape(runs: Sequence[Run]) -> list[object]:
    return [run.drafts for run in runs]


def _pairs(tokens: Sequence[int]) -> set[tuple[int, ...]]:
    return set(pairwise(tokens))


def _three(tokens: Sequence[int]) -> set[tuple[int, ...]]:
    return {tuple(tokens[i : i + 3]) for i in range(len(tokens) - 2)}


def _proposed(run: Run, prompt: Sequence[int]) -> set[tuple[int, ...]]:
    """Every three tokens in a row that end in a proposed node, the text before the draft included."""
    found: set[tuple[int, ...]] = set()
    text = list(prompt)
    for event in run.events:
        if event.draft is not None:
            behind: list[list[int]] = []
            for token, parent in zip(event.draft.tokens.tolist(), event.draft.parents.tolist(), strict=True):
                path = [*(text[-2:] if parent < 0 else behind[parent]), token][-3:]
                behind.append(path)
                found.add(tuple(path))
        text += event.token_ids
    return found
