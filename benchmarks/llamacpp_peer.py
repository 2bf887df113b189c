"""The llama.cpp side of `llamacpp.py`. Runs under a Python that has llama-cpp-python; imports nothing of Outpace.

    python llamacpp_peer.py MODEL.gguf THREADS CONTEXT

Reads a JSON object a line, {"tokens": [...], "max_tokens": n, "stop": [...]}, decodes greedily and answers with
{"tokens": [...], "prefill_s": s, "decode_s": s}. Calls llama.cpp's C functions directly, so that no wrapper costs it
time: a prompt goes in at once, in pieces of the batch size, and a step is one decode and one argmax.
"""

import ctypes
import json
import sys
from time import perf_counter

import llama_cpp
import numpy as np

BATCH = 512


def main() -> None:
    path, threads, context = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    llm = llama_cpp.Llama(
        path, n_ctx=context, n_batch=BATCH, n_threads=threads, n_threads_batch=threads, n_gpu_layers=0, verbose=False
    )
    ctx, vocab = llm.ctx, llm.n_vocab()
    version = llama_cpp.__version__
    info = llama_cpp.llama_print_system_info().decode()
    print(json.dumps({"version": version, "system_info": info}), flush=True)

    def decode(tokens: list[int]) -> None:
        array = (llama_cpp.llama_token * len(tokens))(*tokens)
        code = llama_cpp.llama_decode(ctx, llama_cpp.llama_batch_get_one(array, len(tokens)))
        if code:
            raise RuntimeError(f"llama_decode returned {code}")

    def best() -> int:
        pointer = llama_cpp.llama_get_logits_ith(ctx, -1)
        address = ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float * vocab))
        return int(np.frombuffer(address.contents, dtype=np.float32).argmax())

    for line in sys.stdin:
        request = json.loads(line)
        prompt, stop = request["tokens"], set(request["stop"])
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(ctx), True)
        began = perf_counter()
        for start in range(0, len(prompt), BATCH):
            decode(prompt[start : start + BATCH])
        out = [best()]
        first = perf_counter()
        while len(out) < request["max_tokens"] and out[-1] not in stop:
            decode(out[-1:])
            out.append(best())
        answer = {"tokens": out, "prefill_s": first - began, "decode_s": perf_counter() - first}
        print(json.dumps(answer), flush=True)


main()
