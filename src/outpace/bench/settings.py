"""Named sampler settings that an audit runs with. No torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ..errors import ParameterError
from ..types import SamplingParams

#: name -> fields of SamplingParams. "mixed" has everything at once that a request may set, but a grammar
SAMPLERS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 0.8},
    "top-k": {"temperature": 1.0, "top_k": 20},
    "top-p": {"temperature": 1.0, "top_p": 0.9},
    "min-p": {"temperature": 1.0, "min_p": 0.05},
    "penalties": {
        "temperature": 0.8, "repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": 0.2,
    },
    "bias": {"temperature": 0.8, "logit_bias": {13: 3.0, 17: -5.0}},
    "mixed": {
        "temperature": 0.9, "top_k": 50, "top_p": 0.95, "min_p": 0.01, "repetition_penalty": 1.1,
        "presence_penalty": 0.2, "frequency_penalty": 0.1, "logit_bias": {13: 1.0},
    },
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Setting:
    """`base` without the number of tokens and the seed, which each prompt has of its own."""

    name: str
    base: SamplingParams

    def params(self, max_tokens: int, seed: int) -> SamplingParams:
        return replace(self.base, max_tokens=max_tokens, seed=seed)


def setting(name: str) -> Setting:
    """One of SAMPLERS, or a temperature: "0.8". Raises ParameterError for anything else."""
    if name in SAMPLERS:
        return Setting(name, SamplingParams(**SAMPLERS[name]))
    try:
        temperature = float(name)
    except ValueError:
        known = ", ".join(SAMPLERS)
        raise ParameterError(f"no sampler setting {name!r}; there are: {known}, or a temperature") from None
    return of_temperature(temperature)


def of_temperature(temperature: float) -> Setting:
    """Raises ParameterError for a temperature out of range."""
    base = SamplingParams(temperature=temperature)
    return Setting("greedy" if base.greedy else f"temperature {temperature:g}", base)
