"""llama.cpp as a peer, by the C functions of llama-cpp-python, so that no wrapper costs it time.

All sequences of a batch share every step: prompts are read packed, in pieces of the batch size, and a decoding step is
one llama_decode over the last tokens and drafts of all sequences. Greedy tokens are an argmax; else llama.cpp's own
sampler chain draws. Speculation is llama.cpp's: the target's token is sampled at every drafted place and the draft
counts as far as it agrees; the draft model drafts greedily until its next token is too unlikely.
"""

from __future__ import annotations

from time import perf_counter
from typing import Any

from peer_loop import look_up, serve

SETTINGS = {"flash": True, "kv": "f16", "batch": 512, "draft_tokens": 16, "draft_min_p": 0.75, "ngram": 3}


class Context:
    """A model and what it has read of up to `sequences` sequences, `length` tokens each."""

    def __init__(self, lib: Any, path: str, hello: dict[str, Any], settings: dict[str, Any]) -> None:
        self.lib, self.rows = lib, settings["batch"]
        params = lib.llama_model_default_params()
        params.n_gpu_layers = 0
        self.model = lib.llama_model_load_from_file(path.encode(), params)
        if not self.model:
            raise RuntimeError("llama.cpp does not read this model")
        params = lib.llama_context_default_params()
        sequences = hello["max_batch"]
        params.n_ctx = -(-hello["context"] // 256) * 256 * sequences  # the cache is split in parts of 256 places
        params.n_batch = params.n_ubatch = self.rows
        params.n_seq_max = sequences
        params.n_threads = params.n_threads_batch = hello["threads"]
        params.kv_unified = False  # each sequence attends to its own part alone
        params.type_k = params.type_v = {"f16": lib.GGML_TYPE_F16, "q8_0": lib.GGML_TYPE_Q8_0}[settings["kv"]]
        params.flash_attn_type = (
            lib.LLAMA_FLASH_ATTN_TYPE_AUTO if settings["flash"] else lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
        )
        self.ctx = lib.llama_init_from_model(self.model, params)
        if not self.ctx:
            raise RuntimeError(f"llama.cpp made no context for {sequences} sequences of {hello['context']} tokens")
        self.memory = lib.llama_get_memory(self.ctx)
        self.vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self.model))
        self.batch = lib.llama_batch_init(self.rows, 0, 1)

    def clear(self) -> None:
        self.lib.llama_memory_clear(self.memory, True)

    def forget(self, sequence: int, start: int) -> None:
        """Drop what a sequence has at place `start` and after it."""
        self.lib.llama_memory_seq_rm(self.memory, sequence, start, -1)

    def decode(self, rows: list[tuple[int, int, int, bool]]) -> list[int]:
        """Rows of (token, position, sequence, whether its logits are wanted), at most `self.rows`. Which are."""
        batch = self.batch
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
            batch.seq_id[i][0], batch.logits[i] = sequence, wanted
        code = self.lib.llama_decode(self.ctx, batch)
        if code:
            raise RuntimeError(f"llama_decode returned {code}")
        return [i for i, row in enumerate(rows) if row[3]]

    def logits(self, count: int) -> Any:
        """Of the wanted rows of the last `decode`, in their order. f32[count, vocabulary]"""
        import numpy as np

        return np.ctypeslib.as_array(self.lib.llama_get_logits(self.ctx), (count, self.vocab))


class Sequence:
    def __init__(self, number: int, prompt: list[int]) -> None:
        self.number, self.prompt = number, prompt
        self.out: list[int] = []
        self.draft: list[int] = []
        self.draft_read = 0  # tokens of prompt and output that the draft model's cache holds
        self.steps = 0
        self.first_s = self.total_s = 0.0
        self.done = False

    @property
    def tokens(self) -> list[int]:
        return self.prompt + self.out

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.out)


class LlamaCpp:
    def __init__(self, hello: dict[str, Any]) -> None:
        import llama_cpp

        unknown = set(hello["settings"]) - set(SETTINGS)
        if unknown:
            raise ValueError(f"no setting {', '.join(sorted(unknown))}; there are: {', '.join(SETTINGS)}")
        self.lib: Any = llama_cpp
        self.settings = settings = SETTINGS | hello["settings"]
        self.mode, self.stop = hello["mode"], frozenset(() if hello["past_end"] else hello["stop_ids"])
        self.lib.llama_backend_init()
        self.target = Context(self.lib, hello["model"], hello, settings)
        self.drafter = Context(self.lib, hello["draft"], hello, settings) if self.mode == "draft" else None
        if self.drafter is not None and self.drafter.vocab != self.target.vocab:
            raise ValueError(f"the draft model has {self.drafter.vocab} tokens and the target {self.target.vocab}")
        used = {"plain": (), "draft": ("draft_tokens", "draft_min_p"), "lookup": ("draft_tokens", "ngram")}[self.mode]
        self.about = {
            "version": f"llama-cpp-python {llama_cpp.__version__}",
            "built_for": self.lib.llama_print_system_info().decode().strip(),
            "settings": {name: settings[name] for name in ("flash", "kv", "batch", *used)} | {"kv_unified": False},
            "batches": "in one step",
        }
        if used:
            self.about["output"] = (
                "may differ from llama.cpp's plain decoding where two tokens are nearly as likely: depending on the "
                "weights' format, a step of four or more rows rounds otherwise than one of a single row"
            )

    def generate(self, request: dict[str, Any]) -> list[dict[str, Any]]:
        began = perf_counter()
        for context in filter(None, (self.target, self.drafter)):
            context.clear()
        sequences = [Sequence(i, prompt) for i, prompt in enumerate(request["prompts"])]
        choose = Sampler(self.target, request["temperature"], request["seed"], len(sequences))
        try:
            self._read(sequences, choose, began, request["max_tokens"])
            while running := [s for s in sequences if not s.done]:
                self._propose(running, request["max_tokens"])
                self._verify(running, choose, began, request["max_tokens"])
        finally:
            choose.close()
        return [
            {"token_ids": s.out, "first_token_s": s.first_s, "total_s": s.total_s, "steps": s.steps} for s in sequences
        ]

    def _read(self, sequences: list[Sequence], choose: Sampler, began: float, most: int) -> None:
        rows = [(token, i, s.number, i == len(s.prompt) - 1) for s in sequences for i, token in enumerate(s.prompt)]
        for start in range(0, len(rows), self.target.rows):
            part = rows[start : start + self.target.rows]
            ends = [row[2] for row in part if row[3]]
            choose.look(self.target.decode(part))
            for at, number in enumerate(ends):
                self._take(sequences[number], [choose(at, number)], began, most)
        read = perf_counter() - began  # nobody goes on before all prompts are read
        for s in sequences:
            s.first_s = s.first_s if s.done else read

    def _take(self, sequence: Sequence, tokens: list[int], began: float, most: int) -> None:
        """Append, up to an end token or the most that is wanted."""
        now = perf_counter() - began
        sequence.first_s = sequence.first_s or now
        for token in tokens:
            sequence.out.append(token)
            if token in self.stop or len(sequence.out) == most:
                sequence.done, sequence.total_s = True, now
                return

    def _propose(self, running: list[Sequence], most: int) -> None:
        """A chain for every sequence, so that all together fit one step."""
        room = min(self.settings["draft_tokens"], self.target.rows // len(running) - 1)
        limits = {s.number: max(min(room, most - len(s.out) - 1), 0) for s in running}
        if self.mode == "lookup":
            for s in running:
                s.draft = look_up(s.tokens, self.settings["ngram"], limits[s.number]) if limits[s.number] else []
        elif self.drafter is not None:
            self._draft(self.drafter, running, limits)

    def _draft(self, model: Context, running: list[Sequence], limits: dict[int, int]) -> None:
        import numpy as np

        for s in running:
            s.draft = []
        growing = [s for s in running if limits[s.number]]
        unread = [
            (token, s.draft_read + i, s.number, s.draft_read + i == s.length - 1)
            for s in growing
            for i, token in enumerate(s.tokens[s.draft_read :])
        ]
        pieces = [unread[i : i + model.rows] for i in range(0, len(unread), model.rows)]
        while growing:
            asked: list[Sequence] = []
            for piece in pieces:
                by_number = {s.number: s for s in growing}
                ends = [by_number[row[2]] for row in piece if row[3]]
                model.decode(piece)
                for _, position, number, _ in piece:
                    by_number[number].draft_read = position + 1
                if not ends:
                    continue
                logits = model.logits(len(ends))
                best = logits.argmax(axis=1)
                for i, s in enumerate(ends):
                    top = np.partition(logits[i], -10)[-10:]  # llama.cpp asks how likely it is among the ten likeliest
                    likely = 1.0 / float(np.exp(top - top.max()).sum())
                    if likely >= self.settings["draft_min_p"]:
                        s.draft.append(int(best[i]))
                        if len(s.draft) < limits[s.number] and s.draft[-1] not in self.stop:
                            asked.append(s)
            growing = asked
            pieces = [[(s.draft[-1], s.length + len(s.draft) - 1, s.number, True) for s in growing]] if growing else []

    def _verify(self, running: list[Sequence], choose: Sampler, began: float, most: int) -> None:
        rows = [
            (token, s.length - 1 + i, s.number, True) for s in running for i, token in enumerate([s.out[-1], *s.draft])
        ]
        choose.look(self.target.decode(rows))
        at = 0
        for s in running:
            taken: list[int] = []
            before = s.length
            for i in range(len(s.draft) + 1):
                taken.append(choose(at + i, s.number))
                if i == len(s.draft) or taken[-1] != s.draft[i]:
                    break
            at += len(s.draft) + 1
            s.steps += 1
            self._take(s, taken, began, most)
            right = before + len(taken) - 1  # tokens that the caches may keep: all but the last taken
            if s.draft:
                self.target.forget(s.number, right)
            if self.drafter is not None:
                s.draft_read = min(s.draft_read, right)
                self.drafter.forget(s.number, s.draft_read)


class Sampler:
    """The target's choice at the rows of the last step."""

    def __init__(self, context: Context, temperature: float, seed: int, sequences: int) -> None:
        self.context = context
        self.best: list[int] = []
        self.chains: list[Any] = []
        lib = context.lib
        for i in range(sequences if temperature > 0 else 0):
            chain = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
            lib.llama_sampler_chain_add(chain, lib.llama_sampler_init_temp(temperature))
            lib.llama_sampler_chain_add(chain, lib.llama_sampler_init_dist((seed + i) % 2**32))
            self.chains.append(chain)
        self.rows: list[int] = []

    def look(self, rows: list[int]) -> None:
        """At the wanted rows of a step."""
        self.rows = rows
        if rows and not self.chains:
            self.best = self.context.logits(len(rows)).argmax(axis=1).tolist()

    def __call__(self, wanted: int, sequence: int) -> int:
        """Of the wanted row of this number."""
        if not self.chains:
            return int(self.best[wanted])
        return int(self.context.lib.llama_sampler_sample(self.chains[sequence], self.context.ctx, self.rows[wanted]))

    def close(self) -> None:
        for chain in self.chains:
            self.context.lib.llama_sampler_free(chain)


if __name__ == "__main__":
    serve(LlamaCpp)
