"""Peers to test with: an engine that is a small script, a server that behaves as told, a tokenizer of letters."""

from __future__ import annotations

import json
import sys
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from outpace.bench.peers.peer import PeerConfig, PeerPrompt
from outpace.bench.peers.process import SCRIPTS, ScriptPeer

EOS = 0


class Letters:
    """A token is a character; 0 ends."""

    eos_ids = frozenset({EOS})
    vocab_size = 128

    def encode(self, text, special=False):
        return [ord(c) for c in text]

    prompt = encode

    def decode(self, ids, skip_special=True):
        return "".join(chr(i) for i in ids if i)

    def chat(self, messages, add_generation_prompt=True, **values):
        return self.encode("".join(f"<{m['role']}>{m['content']}" for m in messages))


GOOD = """
import sys
sys.path.insert(0, {scripts!r})
from peer_loop import serve

class Engine:
    def __init__(self, hello):
        self.hello = hello
        self.about = {{"version": "fake 1", "settings": hello["settings"]}}
        {at_start}

    def generate(self, request):
        answers = [dict(token_ids=list(reversed(p))[: request["max_tokens"]], first_token_s=0.0, total_s=0.0, steps=1)
                   for p in request["prompts"]]
        {at_batch}
        return answers

serve(Engine)
"""


def fake(tmp_path, at_batch="pass", at_start="pass", source=None, **config):
    """A peer whose script answers a prompt with its tokens backwards, with something done to it."""
    script = tmp_path / "engine.py"
    script.write_text(source or GOOD.format(scripts=str(SCRIPTS), at_start=at_start, at_batch=at_batch))

    class Fake(ScriptPeer):
        engine, package = "fake", "fake-engine"

        def command(self):
            return [sys.executable, str(script)]

    sizes = {"context": 64, "max_batch": 4, "start_timeout_s": 30.0} | config
    return Fake(PeerConfig(tmp_path / "model.gguf", Letters(), **sizes))


def ask(peer, *texts, timeout_s=20.0, max_tokens=8):
    return peer.generate([PeerPrompt(text) for text in texts or ("abc",)], max_tokens, 0.0, 0, timeout_s)


def gone(pid):
    """Ended, reaped by us or by whoever inherited it (a zombie of another parent counts as ended)."""
    for _ in range(250):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.02)
    return False


def chunk(text="", reason=None, usage=None, **more):
    choices = [{"index": 0, "text": text, "finish_reason": reason}] if usage is None else []
    return {"choices": choices, "usage": usage, **more}


def stream(*events, done=True):
    lines = [f"data: {json.dumps(e)}\n\n" for e in events] + ["data: [DONE]\n\n"] * done
    return "".join(lines).encode()


@contextmanager
def server(behaviour):
    """`behaviour(handler, body)` answers a completion, after the headers when it returns bytes."""

    class Handler(BaseHTTPRequestHandler):
        asked: list = []  # noqa: RUF012

        def log_message(self, *_):
            pass

        def send(self, status, data, kind="application/json"):
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self):
            if self.path == "/v1/models":
                self.send(200, json.dumps({"data": [{"id": "folder/tiny"}]}).encode())
            else:
                self.send(404, b'{"error": {"message": "no such page"}}')

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            Handler.asked.append((self.path, body))
            data = behaviour(self, body)
            if data is not None:
                self.send(200, data, "text/event-stream")

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{http.server_port}", Handler.asked
    finally:
        http.shutdown()
        http.server_close()
        thread.join()
