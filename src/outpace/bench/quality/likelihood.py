"""What the arithmetic costs, as perplexity of a fixed text, and what a verifier costs, as the likelihood that the
target gives to what was written with it."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ...types import Result
from ..teacher import Perplexity, forced_logits, perplexity
from ..workloads import own_prompts

if TYPE_CHECKING:
    from ...engine.llm import LLM

MODULES = (
    "argparse", "asyncio.base_events", "collections", "concurrent.futures.thread", "configparser", "csv", "datetime",
    "decimal", "difflib", "email.message", "fractions", "functools", "heapq", "http.client", "json.decoder",
    "logging", "pathlib", "random", "sched", "shutil", "statistics", "string", "tempfile", "textwrap", "threading",
    "traceback", "unittest.case", "urllib.parse", "uuid", "zipfile",
)  # fmt: skip


def build_text(size: int) -> str:
    """`size` characters that every installation has, of one Python version: our own prompts first, then a quarter of
    the rest each of documentation and source of the standard library."""
    prose = "\n\n".join(turn for p in own_prompts() for turn in p.turns)
    modules = [importlib.import_module(name) for name in MODULES]
    docs = [inspect.getdoc(getattr(m, name)) or "" for m in modules for name in sorted(dir(m)) if name[0] != "_"]
    documentation = "\n\n".join(dict.fromkeys(d for d in docs if len(d) > 200))
    share = max((size - len(prose)) // 2, 0)
    each = share // len(modules)
    source = "\n\n".join(inspect.getsource(m)[:each] for m in modules)
    return "\n\n".join((prose, documentation[:share], source))[:size]


def of_text(llm: LLM, text: str, window: int = 1024) -> Perplexity:
    """Perplexity of a text by teacher forcing, over windows that the context holds."""
    window = min(window, llm.config.max_position - 1)
    *_, last = perplexity(llm.decoder, llm.tokenizer.encode(text), window=window, bos=llm.config.bos_id)
    return last


def of_answers(llm: LLM, prompts: Sequence[Sequence[int]], results: Sequence[Result]) -> Perplexity:
    """Perplexity of answers, each behind its prompt, by the target's raw logits. Answers of other precisions are all
    read with this one, so that their figures compare."""
    tokens, nll = 0, 0.0
    for prompt, result in zip(prompts, results, strict=True):
        given, done = [*prompt, *result.token_ids], 0
        for logits in forced_logits(llm.decoder, given[:-1]) if len(given) > len(prompt) else ():
            first = max(len(prompt) - 1 - done, 0)  # of these rows, the one that answers with an output token
            rows = logits[first:].float()
            answers = torch.as_tensor(given[done + first + 1 : done + 1 + len(logits)], device=logits.device)
            norm = torch.logsumexp(rows.double(), dim=-1)
            nll += float((norm - rows.gather(1, answers[:, None])[:, 0].double()).sum()) if len(rows) else 0.0
            tokens += len(rows)
            done += len(logits)
    return Perplexity(tokens, nll)
