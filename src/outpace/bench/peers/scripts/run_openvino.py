"""OpenVINO GenAI as a peer: plain, with a draft model, or with prompt lookup, by its LLMPipeline on the CPU.

The stateful pipeline answers one sequence at a time; batches and speculation go through its continuous batching, which
a scheduler configuration turns on.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

from peer_loop import serve

SETTINGS: dict[str, Any] = {"draft_tokens": 5, "ngram": 3, "kv": None}


class OpenVino:
    def __init__(self, hello: dict[str, Any]) -> None:
        import openvino_genai as genai  # isort: skip  first: it is what has to be installed
        import numpy as np
        import openvino as ov

        unknown = set(hello["settings"]) - set(SETTINGS)
        if unknown:
            raise ValueError(f"no setting {', '.join(sorted(unknown))}; there are: {', '.join(SETTINGS)}")
        settings = SETTINGS | hello["settings"]
        self.np, self.ov, self.genai = np, ov, genai
        self.mode, self.stop, self.settings = hello["mode"], hello["stop_ids"], settings
        self.past_end = hello["past_end"]
        options: dict[str, Any] = {"INFERENCE_NUM_THREADS": hello["threads"], "PERFORMANCE_HINT": "LATENCY"}
        if settings["kv"]:
            options["KV_CACHE_PRECISION"] = settings["kv"]
        batched = hello["max_batch"] > 1 or self.mode != "plain"
        extra: dict[str, Any] = {}
        if batched:
            scheduler = genai.SchedulerConfig()
            scheduler.num_kv_blocks = -(-hello["context"] // 32) * hello["max_batch"] + 8
            scheduler.max_num_seqs = hello["max_batch"]
            scheduler.enable_prefix_caching = False  # no prompt may find what an earlier one left
            extra["scheduler_config"] = scheduler
        if self.mode == "draft":
            with self._folder(Path(hello["draft"])) as folder:
                extra["draft_model"] = genai.draft_model(str(folder), "CPU")
        elif self.mode == "lookup":
            extra["prompt_lookup"] = True
        self.pipe = genai.LLMPipeline(hello["model"], "CPU", **options, **extra)
        used = {"plain": (), "draft": ("draft_tokens",), "lookup": ("draft_tokens", "ngram")}[self.mode]
        self.about = {
            "version": f"openvino {ov.__version__}, openvino-genai {genai.__version__}",
            "settings": {
                "pipeline": "continuous batching" if batched else "stateful",
                "kv": settings["kv"] or "its default",
                "hint": "latency",
            }
            | {name: settings[name] for name in used},
            "batches": "by continuous batching" if batched else "one sequence",
        }

    @contextmanager
    def _folder(self, draft: Path) -> Iterator[Path]:
        """A draft model as it must be: converted. A pipeline reads GGUF, a draft model does not."""
        if draft.is_dir():
            yield draft
            return
        with TemporaryDirectory() as folder:
            link = Path(folder) / draft.name
            link.symlink_to(draft.resolve())
            try:
                self.genai.LLMPipeline(str(link), "CPU", enable_save_ov_model=True)
            except RuntimeError as error:
                last = str(error).strip().splitlines()[-1].strip()
                raise ValueError(f"OpenVINO cannot convert {draft.name}, and a draft model it must: {last}") from None
            yield Path(folder)

    def generate(self, request: dict[str, Any]) -> list[dict[str, Any]]:
        """Prompts of a batch are padded on the left. Seconds are those of the whole batch."""
        config = self.genai.GenerationConfig()
        config.max_new_tokens = request["max_tokens"]
        config.stop_token_ids = set() if self.past_end else set(self.stop)
        config.eos_token_id = self.stop[0]
        config.ignore_eos = self.past_end
        config.apply_chat_template = False
        config.do_sample = request["temperature"] > 0
        if config.do_sample:
            config.temperature, config.top_p, config.top_k = request["temperature"], 1.0, 2**31
            config.rng_seed = request["seed"]
        if self.mode != "plain":
            config.num_assistant_tokens = self.settings["draft_tokens"]
        if self.mode == "lookup":
            config.max_ngram_size = self.settings["ngram"]
        prompts = request["prompts"]
        width = max(map(len, prompts))
        ids = self.np.array([[self.stop[0]] * (width - len(p)) + p for p in prompts], dtype=self.np.int64)
        mask = self.np.array([[0] * (width - len(p)) + [1] * len(p) for p in prompts], dtype=self.np.int64)
        inputs = self.genai.TokenizedInputs(self.ov.Tensor(ids), self.ov.Tensor(mask))
        began = perf_counter()
        result = self.pipe.generate(inputs, config)
        total = perf_counter() - began
        first = min(result.perf_metrics.get_ttft().mean / 1000, total)
        return [
            {"token_ids": self._whole(list(row), request["max_tokens"]), "first_token_s": first, "total_s": total}
            for row in result.tokens
        ]

    def _whole(self, tokens: list[int], most: int) -> list[int]:
        """With the end token, which the pipeline generates and may keep to itself."""
        ended = not self.past_end and len(tokens) < most and not (tokens and tokens[-1] in self.stop)
        return [*tokens, self.stop[0]] if ended else tokens


if __name__ == "__main__":
    serve(OpenVino)
