"""transformers as a peer: greedy or plain sampling, with an assistant model, or with prompt lookup.

One `generate` call answers a batch, padded on the left. Assisted generation and prompt lookup take one sequence at a
time in transformers, so there the prompts of a batch follow one another, and each waits for those before it.
"""

from __future__ import annotations

import os
from time import perf_counter
from typing import Any

from peer_loop import serve

SETTINGS: dict[str, Any] = {"dtype": "auto", "draft_tokens": None, "lookup_tokens": 10}


class Transformers:
    def __init__(self, hello: dict[str, Any]) -> None:
        import torch
        import transformers

        unknown = set(hello["settings"]) - set(SETTINGS)
        if unknown:
            raise ValueError(f"no setting {', '.join(sorted(unknown))}; there are: {', '.join(SETTINGS)}")
        settings = SETTINGS | hello["settings"]
        torch.set_num_threads(hello["threads"])
        torch.set_grad_enabled(False)
        if settings["dtype"] == "auto":
            settings["dtype"] = "bfloat16" if has_bfloat16() else "float32"
        self.torch, self.transformers = torch, transformers
        self.mode, self.stop, self.past_end = hello["mode"], hello["stop_ids"], hello["past_end"]
        self.model = load(transformers, hello["model"], getattr(torch, settings["dtype"]))
        if self.past_end:  # what `generate` is not told it takes from here
            self.model.generation_config.eos_token_id = None
        self.extra: dict[str, Any] = {}
        if self.mode == "draft":
            assistant = load(transformers, hello["draft"], getattr(torch, settings["dtype"]))
            if settings["draft_tokens"]:
                assistant.generation_config.num_assistant_tokens = settings["draft_tokens"]
                assistant.generation_config.num_assistant_tokens_schedule = "constant"
            self.extra["assistant_model"] = assistant
        elif self.mode == "lookup":
            self.extra["prompt_lookup_num_tokens"] = settings["lookup_tokens"]
        used = {"plain": (), "draft": ("draft_tokens",), "lookup": ("lookup_tokens",)}[self.mode]
        self.about = {
            "version": f"transformers {transformers.__version__}, torch {torch.__version__}",
            "settings": {
                "dtype": settings["dtype"],
                "attention": self.model.config._attn_implementation,
                "kv_cache": "dynamic",
            }
            | {name: settings[name] or "its default" for name in used},
            "batches": "in one step" if self.mode == "plain" else "one sequence after another",
        }

    def generate(self, request: dict[str, Any]) -> list[dict[str, Any]]:
        began = perf_counter()
        prompts, most = request["prompts"], request["max_tokens"]
        if self.mode == "plain":
            return self._batch(prompts, most, request["temperature"], request["seed"], began)
        answers = []
        for i, prompt in enumerate(prompts):
            answers += self._batch([prompt], most, request["temperature"], request["seed"] + i, began)
        return answers

    def _batch(
        self, prompts: list[list[int]], most: int, temperature: float, seed: int, began: float
    ) -> list[dict[str, Any]]:
        torch, width = self.torch, max(map(len, prompts))
        ids = torch.tensor([[self.stop[0]] * (width - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        ends = None if self.past_end else self.stop
        watch = Watch(torch, width, frozenset(ends or ()), len(prompts), began)
        torch.manual_seed(seed)
        chosen: dict[str, Any] = {"do_sample": False}
        if temperature > 0:
            chosen = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        config = self.transformers.GenerationConfig(
            max_new_tokens=most, eos_token_id=ends, pad_token_id=self.stop[0], use_cache=True, **chosen
        )
        extra = dict(self.extra)
        if lookup := extra.pop("prompt_lookup_num_tokens", None):
            config.prompt_lookup_num_tokens = lookup
        rows = self.model.generate(
            ids,
            attention_mask=mask,
            generation_config=config,
            stopping_criteria=self.transformers.StoppingCriteriaList([watch]),
            **extra,
        ).tolist()
        end = perf_counter() - began
        return [watch.answer(i, row[width:], end) for i, row in enumerate(rows)]


class Watch:
    """Asked after every step of the target whether to stop: never, but it sees when tokens come."""

    def __init__(self, torch: Any, width: int, stop: frozenset[int], count: int, began: float) -> None:
        self.torch, self.stop, self.began, self.seen = torch, stop, began, width
        self.first: float | None = None
        self.at_first = 1
        self.ends: list[float | None] = [None] * count
        self.steps = [0] * count
        self.calls = 0

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        now = perf_counter() - self.began
        self.first = self.first or now
        new = input_ids[:, self.seen :].tolist()
        if not self.calls:
            self.at_first = len(new[0])  # more than one when a draft was verified together with the prompt
        self.seen = input_ids.shape[1]
        for i, tokens in enumerate(new):
            if self.ends[i] is None:
                self.steps[i] = self.calls  # the first call is the prompt's
                if self.stop.intersection(tokens):
                    self.ends[i] = now
        self.calls += 1
        return self.torch.zeros(input_ids.shape[0], dtype=self.torch.bool)

    def answer(self, i: int, tokens: list[int], end: float) -> dict[str, Any]:
        """Up to the end token, this included; behind it is padding."""
        size = next((at + 1 for at, token in enumerate(tokens) if token in self.stop), len(tokens))
        total = end if self.ends[i] is None else self.ends[i]
        return {
            "token_ids": tokens[:size],
            "first_token_s": self.first,
            "first_tokens": min(self.at_first, size),
            "total_s": total,
            "steps": self.steps[i],
        }


def load(transformers: Any, path: str, dtype: Any) -> Any:
    folder, file = os.path.split(path)
    source = {"pretrained_model_name_or_path": path}
    if not os.path.isdir(path):
        source = {"pretrained_model_name_or_path": folder, "gguf_file": file}
    return transformers.AutoModelForCausalLM.from_pretrained(**source, dtype=dtype, attn_implementation="sdpa").eval()


def has_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16."""
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as f:
            flags = next((line for line in f if line.startswith("flags")), "").split()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


if __name__ == "__main__":
    serve(Transformers)
