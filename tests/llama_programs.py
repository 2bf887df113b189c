"""Programs that act like `llama-server` and `llama-bench`, to test with: small scripts, with something done to them."""

from __future__ import annotations

import sys
from pathlib import Path

from peering import Letters

from outpace.bench.peers.open import open_peer

SERVER_OPTIONS = (
    "-h, --help", "--version", "-t, --threads N", "-tb, --threads-batch N", "-c, --ctx-size N", "-np, --parallel N",
    "-m, --model FNAME", "--host HOST", "--port PORT", "-cram, --cache-ram N", "-kvu, --kv-unified",
    "-no-kvu, --no-kv-unified", "-fa, --flash-attn [on|off|auto]", "-md, --model-draft FNAME", "-rtr",
    "--spec-type none,draft-simple,draft-mtp,ngram-simple,ngram-cache   comma-separated list of types",
)  # fmt: skip

#: Answers a prompt with its tokens backwards, again and again. `at_start` is run with `args` before it listens,
#: `at_request` with the `answer` to one request's `body`
SERVER = """#!{python}
import json, os, signal, sys, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
args = sys.argv[1:]
if "--help" in args:
    print({options!r})
    raise SystemExit(0)
if "--version" in args:
    print("version: 77 (abcdef)\\nbuilt with a compiler", file=sys.stderr)
    raise SystemExit(0)
HERE = os.path.dirname(os.path.abspath(__file__))
open(HERE + "/started", "a").write(json.dumps({{"pid": os.getpid(), "args": args}}) + "\\n")
starts = len(open(HERE + "/started").readlines())
port = int(args[args.index("--port") + 1])
print("system_info: n_threads = 2 | CPU : AVX2 = 1 | OPENMP = 1 | ", flush=True)
{at_start}

class Handler(BaseHTTPRequestHandler):
    asked = 0

    def log_message(self, *words):
        pass

    def reply(self, status, data):
        data = data if isinstance(data, bytes) else json.dumps(data).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        Handler.asked += 1
        self.reply(503 if Handler.asked < 3 else {health}, {{"status": "loading"}})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        open(HERE + "/bodies", "a").write(json.dumps(body) + "\\n")
        time.sleep(0.05)
        prompt, count = body["prompt"], body["n_predict"]
        tokens = (prompt[::-1] * count)[:count]
        answer = {{
            "content": "".join(map(chr, tokens)), "tokens": tokens, "truncated": False,
            "timings": {{"prompt_n": len(prompt), "predicted_n": count, "predicted_ms": 20.0}},
        }}
        status = 200
        {at_request}
        self.reply(status, answer)

ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""

#: Reads a token in a microsecond and writes one in a millisecond
BENCH = """#!{python}
import json, os, sys
args = sys.argv[1:]
if "--help" in args:
    print({options!r})
    raise SystemExit(1)
{at_start}
value = lambda name: args[args.index(name) + 1] if name in args else None
HERE = os.path.dirname(os.path.abspath(__file__))
open(HERE + "/started", "a").write(json.dumps({{"pid": os.getpid(), "args": args}}) + "\\n")
found = []
if int(value("-p") or 0):
    found.append({{"n_prompt": int(value("-p")), "n_gen": 0, "avg_ns": 1000 * int(value("-p"))}})
behind = value("-gp")
write = int(behind.split(",")[1] if behind else value("-n"))
if write:
    found.append({{"n_prompt": 0, "n_gen": write, "avg_ns": 1000000 * write}})
import time
time.sleep(0.1)
print("noise before it" if {noise!r} else "", json.dumps(found))
"""
BENCH_OPTIONS = ("-h, --help", "-m, --model <filename>", "-p, --n-prompt <n>", "-n, --n-gen <n>", "-t, --threads <n>",
                 "-r, --repetitions <n>", "-o, --output <csv|json>", "-rtr, --run-time-repack <0|1>")  # fmt: skip


def server(
    folder: Path,
    at_request: str = "pass",
    at_start: str = "pass",
    options: tuple[str, ...] = SERVER_OPTIONS,
    health: int = 200,
    name: str = "llama-server",
) -> Path:
    text = SERVER.format(
        python=sys.executable, options="\n".join(options), at_start=at_start, at_request=at_request, health=health
    )
    return _program(folder / name, text)


def bench(folder: Path, at_start: str = "pass", options: tuple[str, ...] = BENCH_OPTIONS, noise: bool = False) -> Path:
    text = BENCH.format(python=sys.executable, options="\n".join(options), at_start=at_start, noise=noise)
    return _program(folder / "llama-bench", text)


def _program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def opened(program: Path, arguments: str = "", name: str = "mine", **config):
    """A peer of such a program, as the command line makes it. Not started."""
    sizes = {"context": 64, "max_batch": 4, "threads": 2, "start_timeout_s": 30.0} | config
    model = program.parent / "some folder" / "model.gguf"
    draft = program.parent / "small.gguf" if name.endswith(":draft") else None
    return open_peer(f"{name}='{program}' {arguments}", Letters(), model, draft, **sizes)
