"""The llama.cpp side of the benchmarks. Runs under a Python that has llama-cpp-python; imports nothing of Outpace.

    python llamacpp_peer.py MODEL.gguf THREADS CONTEXT [--sequences N] [--unified] [--no-flash]

Reads a JSON object a line and answers with one. {"tokens": [...], "max_tokens": n, "stop": [...]} is one sequence,
decoded greedily: {"tokens": [...], "prefill_s": s, "decode_s": s}. {"prompts": [[...], ...], "max_tokens": n} are as
many sequences in lock-step, each of n tokens whatever they are: {"outputs": [[...], ...], "prefill_s": s, "decode_s":
s}. Calls llama.cpp's C functions directly, so that no wrapper costs it time: prompts go in packed, in pieces of the
batch size, and a step is one decode of all sequences and one argmax over all their rows.

CONTEXT counts the tokens of all sequences together. Each has an equal part of it, which is what llama.h advises for
sequences that share nothing, and was faster; --unified gives them one buffer.
"""

import argparse
import json
import sys
from time import perf_counter

import llama_cpp
import numpy as np

BATCH = 512


class Peer:
    """A model and a context for at most `sequences` sequences."""

    def __init__(self, path: str, threads: int, context: int, sequences: int, unified: bool, flash: bool) -> None:
        llama_cpp.llama_backend_init()
        model_params = llama_cpp.llama_model_default_params()
        model_params.n_gpu_layers = 0
        model = llama_cpp.llama_model_load_from_file(path.encode(), model_params)
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = context, BATCH, BATCH, sequences
        params.n_threads = params.n_threads_batch = threads
        params.kv_unified = unified
        params.flash_attn_type = (
            llama_cpp.LLAMA_FLASH_ATTN_TYPE_AUTO if flash else llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        )
        self.ctx = llama_cpp.llama_init_from_model(model, params)
        if not self.ctx:
            raise SystemExit(f"llama.cpp made no context of {context} tokens for {sequences} sequences")
        self.vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        self.batch = llama_cpp.llama_batch_init(BATCH, 0, 1)

    def clear(self) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.ctx), True)

    def decode(self, rows: list[tuple[int, int, int, bool]]) -> np.ndarray:
        """Rows of (token, position, sequence, whether its logits are wanted). Returns the likeliest token of each
        wanted row."""
        batch = self.batch
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
            batch.seq_id[i][0], batch.logits[i] = sequence, wanted
        code = llama_cpp.llama_decode(self.ctx, batch)
        if code:
            raise RuntimeError(f"llama_decode returned {code}")
        wanted_rows = sum(row[3] for row in rows)
        if not wanted_rows:
            return np.empty(0, dtype=np.int64)
        pointer = llama_cpp.llama_get_logits(self.ctx)  # of the wanted rows alone, in their order
        return np.ctypeslib.as_array(pointer, (wanted_rows, self.vocab)).argmax(axis=1)

    def read(self, prompts: list[list[int]]) -> list[int]:
        """Read all prompts, packed; the first token of each output."""
        rows = [
            (token, i, s, i == len(prompt) - 1) for s, prompt in enumerate(prompts) for i, token in enumerate(prompt)
        ]
        found: list[int] = []
        for start in range(0, len(rows), BATCH):
            found += self.decode(rows[start : start + BATCH]).tolist()
        return found

    def generate(self, prompts: list[list[int]], max_tokens: int, stop: set[int]) -> tuple[list[list[int]], ...]:
        """Lock-step decoding. One sequence ends at a token of `stop`. Returns outputs and (prefill, decode) seconds."""
        self.clear()
        began = perf_counter()
        outputs = [[token] for token in self.read(prompts)]
        first = perf_counter()
        while len(outputs[0]) < max_tokens and outputs[0][-1] not in stop:
            at = len(outputs[0]) - 1
            best = self.decode([(out[-1], len(prompts[s]) + at, s, True) for s, out in enumerate(outputs)])
            for out, token in zip(outputs, best.tolist(), strict=True):
                out.append(token)
        return outputs, [first - began, perf_counter() - first]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("threads", type=int)
    parser.add_argument("context", type=int)
    parser.add_argument("--sequences", type=int, default=1)
    parser.add_argument("--unified", action="store_true")
    parser.add_argument("--no-flash", action="store_true")
    options = parser.parse_args()
    flash, unified = not options.no_flash, options.unified
    peer = Peer(options.model, options.threads, options.context, options.sequences, unified, flash)
    about = {
        "version": llama_cpp.__version__,
        "system_info": llama_cpp.llama_print_system_info().decode(),
        "settings": {
            "n_batch": BATCH,
            "n_ubatch": BATCH,
            "n_seq_max": options.sequences,
            "kv_unified": unified,
            "flash_attn": "auto" if flash else "off",
        },
    }
    print(json.dumps(about), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "prompts" in request:
            outputs, (prefill_s, decode_s) = peer.generate(request["prompts"], request["max_tokens"], set())
            answer = {"outputs": outputs, "prefill_s": prefill_s, "decode_s": decode_s}
        else:
            outputs, times = peer.generate([request["tokens"]], request["max_tokens"], set(request["stop"]))
            answer = {"tokens": outputs[0], "prefill_s": times[0], "decode_s": times[1]}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
