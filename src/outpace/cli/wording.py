"""What a person reads about a run: the closing line, and the lines of --explain."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..types import Exactness, Result

if TYPE_CHECKING:
    from ..engine.llm import LLM

SAME: dict[Exactness, str] = {
    "identical": "same text as plain decoding",
    "distribution": "other words than plain decoding, equally likely",
    "approximate": "approximate: the text may differ from plain decoding's",
}
_NOTABLE = 0.1  # share of the time from which reading the prompt is mentioned


def closing_line(result: Result, arithmetic: str, extra: str = "") -> str:
    """The one line after a run, as in

    128 tokens in 2.1 s (61 tokens/s), 2.4 tokens per step, file (Q4_K, Q6_K), same text as plain decoding
    """
    stats = result.stats
    parts = [f"{stats.tokens} token{'s' if stats.tokens != 1 else ''}"]
    if stats.tokens:
        seconds = stats.time_to_first_token_s + stats.decode_s
        parts[0] += f" in {seconds:.1f} s" if seconds >= 1 else f" in {seconds:.2f} s"
        speed = f"{stats.tokens_per_s:.0f} tokens/s" if stats.tokens_per_s else ""
        if stats.time_to_first_token_s > _NOTABLE * seconds:
            speed = f"first after {stats.time_to_first_token_s:.2f} s{f', then {speed}' if speed else ''}"
        parts[0] += f" ({speed})" if speed else ""
    if stats.steps and result.method != "plain":
        parts.append(f"{stats.mean_accepted:.1f} tokens per step")
    if extra:
        parts.append(extra)
    parts.append(arithmetic)
    parts.append("plain decoding" if result.method == "plain" else SAME[result.exactness])
    return ", ".join(parts)


def ending(result: Result, advice: str) -> str:
    """Why an answer is not whole, or "" for one that is. `advice` says how it becomes longer."""
    if result.finish_reason == "length":
        return f"cut after {result.stats.tokens} token{'s' if result.stats.tokens != 1 else ''}; {advice}"
    return "stopped" if result.finish_reason == "cancelled" else ""


def explained(llm: LLM, result: Result) -> list[str]:
    """How an answer was made, in whole sentences."""
    from ..decoding.methods import split_spec
    from ..registry import method

    stats = result.stats
    cached = f", {stats.cached_tokens} of which were known from before" if stats.cached_tokens else ""
    lines = [
        f"How this answer was made: method {result.method}, {llm.arithmetic} arithmetic.",
        f"The prompt has {stats.prompt_tokens} tokens{cached}; reading it took {stats.prefill_s:.2f} s and gave the "
        "first token.",
    ]
    if not stats.steps:
        return lines
    after = stats.tokens - 1
    lines.append(
        f"The other {after} tokens took {stats.steps} steps of the model and {stats.decode_s:.2f} s. Plain decoding "
        f"takes {after} steps, one for each token."
    )
    if stats.realised_speedup is not None:
        lines.append(
            f"By the step times of this machine plain decoding needs {stats.plain_s:.2f} s for them, which makes this "
            f"{stats.realised_speedup:.2f} times as fast."
        )
    titles = {name: method(name, "drafter").title for name in split_spec(result.method)}
    for name, source in stats.sources.items():
        title = f"{name} ({titles[name]})" if name in titles else name
        if not source.proposed:
            lines.append(f"{title} proposed nothing.")
            continue
        pairs = [(right, tested) for right, tested in zip(source.right, source.tested, strict=True) if tested]
        by_place = ", ".join(f"{right / tested:.0%}" for right, tested in pairs)
        lines.append(
            f"{title} proposed {source.proposed} tokens, {source.accepted} were right; by place in a "
            f"proposal (first, second, …): {by_place}."
        )
    return lines + [f"{line[0].upper()}{line[1:]}." for line in llm.explain()[1:] if line]
