"""Options that people know from llama.cpp, ollama and other tools: taken with a word on what they are called here, or
refused with what does the same."""

from __future__ import annotations

import click

from ..errors import ParameterError

#: what people type -> the option that it is here
ALIASES = {
    "--temp": "--temperature",
    "--n-predict": "--max-tokens",
    "--num-predict": "--max-tokens",
    "--predict": "--max-tokens",
    "--max-new-tokens": "--max-tokens",
    "--repeat-penalty": "--repetition-penalty",
    "--model-draft": "--draft-model",
    "-md": "--draft-model",
    "--system-prompt": "--system",
    "-sys": "--system",
    "-s": "--seed",
    "--grammar-file": "--grammar",
    "--reverse-prompt": "--stop",
    "-r": "--stop",
    "-j": "--json-schema",
    "-no-cnv": "--raw",
    "--no-conversation": "--raw",
}
_CONTEXT = "the context is the model's own; the size of the cache of `outpace serve` is set by --kv-tokens"
_GPU = "the model runs on one device as a whole: --device cuda"
_CACHE = "the KV cache has the precision of the model: see --precision"
_BATCH = "the engine chooses the size of a step; --max-batch of `outpace serve` bounds the requests that run at once"
_CHAT = "to talk, use `outpace chat`"
_DRAFT = "the length of a draft is an option of the method, as in --method draft:max_tokens=8"
_SAMPLERS = "this sampler does not exist here; there are --temperature, --top-k, --top-p, --min-p and penalties"
_ALWAYS = "it is always on here: leave it out"
#: what people type -> what does the same here
REFUSED = {
    "-t": "write --threads",
    "-tb": "prompts are read with the same --threads",
    "-ngl": _GPU,
    "--gpu-layers": _GPU,
    "--n-gpu-layers": _GPU,
    "--num-gpu": _GPU,
    "-c": f"{_CONTEXT}; to go on with the last conversation: --continue",
    "--ctx-size": _CONTEXT,
    "--num-ctx": _CONTEXT,
    "-b": _BATCH,
    "--batch-size": _BATCH,
    "-ub": _BATCH,
    "--ubatch-size": _BATCH,
    "-np": _BATCH,
    "--parallel": _BATCH,
    "-ctk": _CACHE,
    "-ctv": _CACHE,
    "--cache-type-k": _CACHE,
    "--cache-type-v": _CACHE,
    "-fa": _ALWAYS,
    "--flash-attn": _ALWAYS,
    "--jinja": _ALWAYS,
    "--mlock": "packed weights are read into memory as a whole: leave it out",
    "--no-mmap": "packed weights are read into memory as a whole: leave it out",
    "-hf": "write -m hf:owner/repo or -m hf:owner/repo:Q4_K_M",
    "--hf-repo": "write -m hf:owner/repo or -m hf:owner/repo:Q4_K_M",
    "-hff": "write -m hf:owner/repo:FILE.gguf",
    "--hf-file": "write -m hf:owner/repo:FILE.gguf",
    "-mu": "download the file and give it with -m FILE.gguf",
    "--model-url": "download the file and give it with -m FILE.gguf",
    "-p": "the prompt is the argument itself, as in: outpace run Why is the sky blue",
    "--prompt": "the prompt is the argument itself, as in: outpace run Why is the sky blue",
    "-i": _CHAT,
    "--interactive": _CHAT,
    "-cnv": _CHAT,
    "--conversation": _CHAT,
    "--draft": _DRAFT,
    "--draft-max": _DRAFT,
    "--draft-min": _DRAFT,
    "--verbose": "every answer ends with a line of figures; --explain says more",
    "--format": "write --json-schema with a schema, or --json for an object with the answer and its figures",
    "--keepalive": "a model that stays in memory is a server's: outpace serve",
    "--mirostat": _SAMPLERS,
    "--typical": _SAMPLERS,
    "--xtc-probability": _SAMPLERS,
    "--dry-multiplier": _SAMPLERS,
    "--samplers": _SAMPLERS,
    "--lora": "adapters are not supported: merge it into the model's file",
    "--quantize": "write --precision int8 or int4",
}


def translate(command: click.Command, args: list[str]) -> tuple[list[str], list[str]]:
    """Arguments as the command has them, and a hint for each that was called otherwise.

    Raises ParameterError for an option of another tool that has no counterpart. Values of options are left alone.
    """
    own = {flag: p for p in command.params for flag in (*p.opts, *p.secondary_opts) if isinstance(p, click.Option)}
    if "--model" not in own:
        return args, []
    out: list[str] = []
    hints: list[str] = []
    rest = iter(args)
    for arg in rest:
        if arg == "--":
            return [*out, arg, *rest], hints
        flag, equals, value = arg.partition("=") if arg.startswith("--") else (arg, "", "")
        ours = flag if flag in own else ALIASES.get(flag, flag.replace("_", "-") if flag.startswith("--") else flag)
        if ours in own:
            if ours != flag:
                hints.append(f"{flag} is called {ours} here")
            out.append(ours + equals + value)
            option = own[ours]
            if not equals and isinstance(option, click.Option) and not option.is_flag and not option.count:
                out += [taken for _, taken in zip(range(option.nargs), rest, strict=False)]
        elif ours in REFUSED:
            raise ParameterError(f"there is no option {flag} here: {REFUSED[ours]}")
        else:
            out.append(arg)
    return out, hints
