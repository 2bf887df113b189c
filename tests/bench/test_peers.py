"""Peers that behave, and peers that die, hang, lie or write garbage: the caller gets answers or errors.

The misbehaving ones are small scripts run by the same machinery as the real engines. Real engines are marked slow.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from outpace.bench.peers.open import PeerSpec, open_peer
from outpace.bench.peers.openai import OpenAIPeer
from outpace.bench.peers.peer import PeerAnswer, PeerConfig, PeerError, PeerPrompt
from outpace.bench.peers.process import SCRIPTS, ScriptPeer
from outpace.errors import ParameterError

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


def test_answers_in_order_counted_by_ids(tmp_path):
    with fake(tmp_path, settings={"x": 1}) as peer:
        assert peer.about() == {
            "engine": "fake", "mode": "plain", "threads": 1, "model": "model.gguf",
            "version": "fake 1", "settings": {"x": 1},
        }  # fmt: skip
        assert peer.memory_bytes > 1e6
        pid = peer._child.pid
        for _ in range(2):
            first, second = ask(peer, "abc", "wxyz")
            assert first == PeerAnswer("cba", (99, 98, 97), 3, 0.0, 0.0, None, 1, None)
            assert second.text == "zyxw" and second.tokens == 4
        chat = PeerPrompt(messages=[{"role": "u", "content": "hi"}])
        assert peer.generate([chat], 50, 0.0, 0, 20)[0].text == "ih>u<"
        assert peer.generate([PeerPrompt(token_ids=[65, 66])], 50, 0.0, 0, 20)[0].text == "BA"
    assert gone(pid) and peer.memory_bytes is None
    assert ask(peer)[0].error == "fake was closed"


def test_long_messages_pass_both_ways(tmp_path):
    """Longer than any pipe's buffer, with a peer that talks beside its answers all the time."""
    noise = 'import os; os.write(2, b"x" * 300000); print("hello " * 100000)'
    with fake(tmp_path, at_batch=noise, context=2_000_000) as peer:
        text = "ab" * 300_000
        assert ask(peer, text, max_tokens=600_000)[0].text == text[::-1]


def test_text_of_a_peer_without_ids_is_counted_by_our_tokenizer(tmp_path):
    words = 'answers = [dict(text="hello", ended=e, total_s=0.0, tokens=5) for e in (True, False)]'
    with fake(tmp_path, at_batch=words) as peer:
        ended, cut = ask(peer, "a", "b")
        assert (ended.tokens, cut.tokens) == (6, 5)
        assert ended.token_ids is None and ended.first_token_s is None and ended.reported_tokens == 5


@pytest.mark.parametrize(
    ("at_start", "says"),
    [
        ("raise SystemExit(3)", "ended with exit code 3"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "signal SIGSEGV"),
        ("import os; sys.stderr.write('no such\\nmodel\\n'); sys.stderr.flush(); os._exit(1)", "its last words: model"),
        ("raise ValueError('first line\\nthe reason')", "does not start: ValueError: the reason"),
        ("import no_such_engine", "needs no_such_engine, which this Python has not: pip install fake-engine"),
        ("self.about = 5", "did not say what it is"),
        ("import time; time.sleep(60)", "gave no answer within 1.5 s"),
        ("import os; os.write(1, b'ready!\\n')", None),  # what libraries print does not stand among the answers
    ],
)
def test_start(tmp_path, at_start, says):
    peer = fake(tmp_path, at_start=at_start, start_timeout_s=1.5 if "sleep" in at_start else 30.0)
    if says is None:
        with peer:
            assert ask(peer)[0].text == "cba"
        return
    with pytest.raises(PeerError) as caught, peer:
        pass
    assert says in str(caught.value) and "\n" not in str(caught.value)
    assert says in ask(peer)[0].error


def test_a_python_that_is_not_there(tmp_path):
    peer = fake(tmp_path)
    peer.command = lambda: [str(tmp_path / "python")]
    with pytest.raises(PeerError, match=r"cannot be run by .*No such file"):
        peer.start()


@pytest.mark.parametrize(
    ("at_batch", "says"),
    [
        ("import os; os._exit(7)", "ended with exit code 7"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "signal SIGKILL"),
        ("import time; time.sleep(60)", "gave no answer within 1 s"),
        ("answers = answers * 2", "did not answer 1 prompts"),
        ("answers = 'text'", "did not answer 1 prompts"),
    ],
)
def test_a_peer_that_fails_midway_is_closed_and_can_start_again(tmp_path, at_batch, says):
    once = f"if not __import__('os').path.exists({str(tmp_path / 'broken')!r}):\n"
    once += f"            open({str(tmp_path / 'broken')!r}, 'w').close()\n            {at_batch}"
    with fake(tmp_path, at_batch=once) as peer:
        pid = peer._child.pid
        began = time.monotonic()
        assert says in ask(peer, timeout_s=1.0 if "sleep" in at_batch else 20.0)[0].error
        assert time.monotonic() - began < 15
        assert gone(pid)
        assert says in ask(peer)[0].error  # it says again why it is not there
        peer.start()
        assert ask(peer)[0].text == "cba"


@pytest.mark.parametrize(
    ("at_batch", "says"),
    [
        ("raise RuntimeError('out of\\nmemory')", "RuntimeError: memory"),
        ("answers[0] = dict(error='too hot')", "too hot"),
        ("answers[0] = 5", "an answer is int"),
        ("answers[0]['token_ids'] = [1, 128]", "not in the vocabulary"),
        ("answers[0]['token_ids'] = [1, True]", "not in the vocabulary"),
        ("answers[0]['token_ids'] = 'abc'", "not in the vocabulary"),
        ("answers[0]['token_ids'] = [1] * 9", "gave 9 tokens when asked for at most 8"),
        ("answers[0]['token_ids'] = []", "gave no token"),
        ("answers[0]['tokens'] = 2", "says that it gave 2 tokens, and gave 3"),
        ("answers[0]['tokens'] = 'three'", "no number of tokens"),
        ("answers[0] = dict(total_s=0.0)", "neither tokens nor text"),
        ("answers[0]['total_s'] = float('nan')", "no durations"),
        ("answers[0]['total_s'] = None", "no durations"),
        ("answers[0]['first_token_s'] = -1", "no durations"),
        ("answers[0]['total_s'] = 1000.0", "it took"),
        ("answers[0]['first_token_s'] = 0.01", "0.01 s to the first token"),
        ("answers[0]['steps'] = 1.5", "no number of steps"),
    ],
)
def test_a_wrong_answer_is_an_error_and_the_peer_lives_on(tmp_path, at_batch, says):
    with fake(tmp_path, at_batch=f"if request['prompts'][0][0] == 97: {at_batch}") as peer:
        answer = ask(peer, "abc")[0]
        assert says in answer.error and answer.tokens == 0 and answer.text == ""
        assert answer.decode_tokens_per_s is None
        assert ask(peer, "xyz")[0].text == "zyx"


RAW = "import json, sys\nsys.stdin.readline()\nprint(json.dumps({'about': {}}), flush=True)\nsys.stdin.readline()\n"


@pytest.mark.parametrize(
    ("then", "says"),
    [
        ("print('loading model...', flush=True); sys.stdin.read()", "no JSON object: 'loading model...'"),
        ("sys.stdout.buffer.write(bytes(range(128, 256)) + b'\\n'); sys.stdout.flush(); sys.stdin.read()", "no JSON"),
        ("print('[' * 100000, flush=True); sys.stdin.read()", "no JSON object"),
        ("print('{\"id\": 9}', flush=True); sys.stdin.read()", "answered request 9 when asked for 1"),
        ("sys.stdout.close()\nimport os, time; os.close(1); time.sleep(60)", "closed its output without an answer"),
        ("import time\nwhile True: sys.stdout.write('x' * 100000)", "without an end of line"),
    ],
)
def test_garbage(tmp_path, monkeypatch, then, says):
    monkeypatch.setattr("outpace.bench.peers.child.LONGEST", 1 << 20)
    with fake(tmp_path, source=RAW + then) as peer:
        pid = peer._child.pid
        assert says in ask(peer)[0].error
        assert gone(pid)


def test_more_than_it_was_asked_for(tmp_path):
    with fake(tmp_path, source="import sys\nsys.stdin.readline()\nprint('{\"about\": {}}\\n{}', flush=True)\n") as peer:
        assert "wrote more than it was asked for" in ask(peer)[0].error


def test_what_a_peer_started_ends_with_it(tmp_path):
    child = tmp_path / "child"
    starts = f"import subprocess; open({str(child)!r}, 'w').write(str(subprocess.Popen(['sleep', '300']).pid))"
    with fake(tmp_path, at_start=starts):
        pid = int(child.read_text())
        assert Path(f"/proc/{pid}").exists()
    assert gone(pid)


PARENT = """
import sys, time, threading, os, signal
sys.path[:0] = {path!r}
from pathlib import Path
import test_peers
peer = test_peers.fake(Path({tmp!r}), at_batch="import time; time.sleep(60)")
peer.start()
print(peer._child.pid, flush=True)
test_peers.ask(peer, timeout_s=50)
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_the_end_of_the_caller_ends_the_peer(tmp_path, how):
    """Ctrl-C while a peer works, without a context manager; and a caller that had no time for anything."""
    code = PARENT.format(path=[str(Path(__file__).parent), *sys.path], tmp=str(tmp_path))
    caller = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    pid = int(caller.stdout.readline())
    time.sleep(0.3)
    caller.send_signal(how)
    caller.communicate(timeout=20)
    assert gone(pid)


def test_an_interrupt_closes(tmp_path):
    with fake(tmp_path, at_batch="import time; time.sleep(60)") as peer:
        pid = peer._child.pid
        threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            ask(peer)
        assert gone(pid) and ask(peer)[0].error == "fake was closed"


def test_a_prompt_that_does_not_fit_leaves_the_others(tmp_path):
    with fake(tmp_path) as peer:
        long, short = ask(peer, "x" * 60, "abc")
        assert long.error == "68 tokens do not fit its context of 64" and short.text == "cba"


def test_what_makes_no_sense_is_refused(tmp_path):
    peer = fake(tmp_path)
    for wrong in (
        lambda: PeerPrompt(),
        lambda: PeerPrompt("a", token_ids=(1,)),
        lambda: peer.generate([], 8, 0.0, 0, 1.0),
        lambda: ask(peer, max_tokens=0),
        lambda: ask(peer, timeout_s=0.0),
        lambda: peer.generate([PeerPrompt("a")], 8, float("nan"), 0, 1.0),
        lambda: ask(peer, *"abcde"),
        lambda: PeerConfig(tmp_path, Letters(), mode="guess"),
        lambda: PeerConfig(tmp_path, Letters(), mode="draft"),
        lambda: PeerConfig(tmp_path, Letters(), draft=tmp_path),
        lambda: PeerConfig(tmp_path, Letters(), threads=0),
        lambda: open_peer("llama.cpp", Letters(), tmp_path),  # a folder
        lambda: open_peer("llama.cpp:draft", Letters(), tmp_path / "m.gguf"),
        lambda: OpenAIPeer("localhost:8000", Letters()),
        lambda: OpenAIPeer("http://host:no", Letters()),
    ):
        with pytest.raises(ParameterError):
            wrong()


def test_names_of_peers():
    assert PeerSpec.parse("llama.cpp") == PeerSpec("llama.cpp", "llama.cpp")
    written = "transformers:lookup,dtype=float32,lookup_tokens=5"
    settings = (("dtype", "float32"), ("lookup_tokens", 5))
    assert PeerSpec.parse(written) == PeerSpec(written, "transformers", "lookup", settings)
    assert PeerSpec.parse("http://h:1/v1") == PeerSpec("http://h:1/v1", url="http://h:1/v1")
    assert PeerSpec.parse("vllm n-gram=http://h:1") == PeerSpec("vllm n-gram", url="http://h:1")
    for wrong in ("", "llama", "llama.cpp:fast", "llama.cpp,flash", "ftp://h"):
        with pytest.raises(ParameterError):
            PeerSpec.parse(wrong)


def test_scripts_import_nothing_of_this_package():
    for script in SCRIPTS.glob("*.py"):
        assert "outpace" not in script.read_text(), script.name
        assert script.stem not in ("transformers", "openvino", "llama_cpp")  # would hide the engine from itself


def test_an_engine_that_is_not_installed_is_named(tmp_path):
    """By a Python without any package."""
    model = tmp_path / "m.gguf"
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    bare.chmod(0o755)
    for engine, module in (("llama.cpp", "llama_cpp"), ("transformers", "torch"), ("openvino", "openvino_genai")):
        with pytest.raises(PeerError, match=f"needs {module}, .*pip install .*--peer-python"):
            open_peer(engine, Letters(), model, python=bare).start()


def lookup():
    spec = importlib.util.spec_from_file_location("peer_loop", SCRIPTS / "peer_loop.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.look_up


def test_look_up_takes_the_longest_then_the_newest_match():
    look_up = lookup()
    assert look_up([1, 2, 3, 9, 1, 2, 3], 3, 2) == [9, 1]
    assert look_up([1, 2, 8, 1, 2, 9, 1, 2], 2, 1) == [9]
    assert look_up([5, 2, 7, 1, 2], 3, 4) == [7, 1, 2]  # only the last token stood before
    assert look_up([1, 2, 3], 3, 4) == [] and look_up([1], 3, 4) == [] and look_up([4, 4], 3, 4) == [4]


# servers


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


def test_a_server_is_measured_from_its_stream():
    def answer(handler, body):
        role = {"choices": [{"delta": {"role": "assistant", "content": ""}, "finish_reason": None}]}
        handler.send(200, stream(role, done=False), "text/event-stream")
        time.sleep(0.2)
        handler.wfile.write(stream({"choices": [{"delta": {"content": "he"}}]}, done=False))
        time.sleep(0.2)
        handler.wfile.write(
            b": a comment\n\n" + stream(chunk("llo"), chunk("", "stop"), chunk(usage={"completion_tokens": 6}))
        )

    with server(answer) as (url, asked), open_peer(f"mine={url}", Letters(), Path("m.gguf")) as peer:
        assert peer.name == "mine"
        assert peer.about() == {"engine": "server", "url": url + "/v1", "model": "tiny", "batches": "requests at once"}
        prompts = [
            PeerPrompt("abc"),
            PeerPrompt(messages=[{"role": "user", "content": "hi"}]),
            PeerPrompt(token_ids=[7]),
        ]
        answers = peer.generate(prompts, 8, 0.5, 10, 20)
        for one in answers:
            assert (one.text, one.tokens, one.reported_tokens, one.error) == ("hello", 6, 6, None)
            assert 0.2 <= one.first_token_s < one.total_s - 0.15
        by_seed = {body["seed"]: (path, body) for path, body in asked}
        assert by_seed[10][0] == "/v1/completions" and by_seed[10][1]["prompt"] == "abc"
        assert by_seed[11][0] == "/v1/chat/completions" and by_seed[11][1]["messages"][0]["content"] == "hi"
        assert by_seed[12][1]["prompt"] == [7] and by_seed[12][1]["temperature"] == 0.5


def wait(handler, body):
    time.sleep(1.5)


def drip(handler, body):
    """Never a whole line, never silent."""
    handler.send(200, b"data: ", "text/event-stream")
    for _ in range(40):
        time.sleep(0.05)
        handler.wfile.write(b"x")


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (wait, "gave no answer within 0.5 s"),
        (drip, "gave no answer within 0.5 s"),
        (lambda h, b: h.send(500, b'{"error": {"message": "out of\\nmemory"}}'), "status 500: out of memory"),
        (lambda h, b: h.send(502, b"<html>bad gateway"), "status 502: <html>bad gateway"),
        (lambda h, b: h.connection.close(), "RemoteDisconnected"),
        (lambda h, b: stream(chunk("hel"), done=False), "broke off after 3 characters"),
        (lambda h, b: stream(chunk("hel"), {"error": {"message": "boom"}}), "broke off: boom"),
        (lambda h, b: b'{"choices": [{"text": "hello"}]}\n', "does not stream"),
        (lambda h, b: b"data: {nonsense\n\n", "no completion"),
        (lambda h, b: b"data: 5\n\n", "no completion"),
        (lambda h, b: stream({"choices": [5]}), "no completion"),
        (lambda h, b: stream(chunk("x" * 50, "length")), "gave 50 tokens when asked for at most 8"),
        (lambda h, b: stream(chunk("hello", "stop"), chunk(usage={"completion_tokens": 60})), "its text has 6"),
        (lambda h, b: stream(chunk("", "length")), "gave no token"),
        (lambda h, b: stream(chunk("a", "content_filter")), "content_filter"),
    ],
)
def test_a_server_that_fails(answer, says):
    with server(lambda h, b: stream(chunk("ok", "stop")) if b["prompt"] == "good" else answer(h, b)) as (url, _):
        with OpenAIPeer(url, Letters()) as peer:
            began = time.monotonic()
            bad, good = peer.generate([PeerPrompt("bad"), PeerPrompt("good")], 8, 0.0, 0, 0.5 if "0.5" in says else 10)
            assert time.monotonic() - began < 5
            assert says in bad.error and bad.tokens == 0 and "\n" not in bad.error
            assert good.text == "ok" and good.tokens == 3
            assert ask(peer, "good")[0].text == "ok"
        assert "was not started" in ask(peer, "good")[0].error


def test_nobody_answers_at_the_url():
    with server(lambda h, b: None) as (url, _):
        with pytest.raises(PeerError, match="no model 'big'; it has folder/tiny"):
            OpenAIPeer(url, Letters(), model="big").start()
        with pytest.raises(PeerError, match="status 404: no such page"):
            OpenAIPeer(url + "/api", Letters()).start()
    with pytest.raises(PeerError, match="is a server with OpenAI's API running at"):
        OpenAIPeer(url, Letters()).start()


# real engines


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["llama.cpp", "transformers", "openvino"])
@pytest.mark.parametrize("mode", ["plain", "lookup"])
def test_real_engines_answer_as_they_do_alone(engine, mode):
    """A batch, a lookup and a sequence alone give the same greedy text, but where the engine's arithmetic breaks a tie.

    $OUTPACE_PEER_PYTHON: a Python that has the engine.
    """
    from outpace.models.prepared import open_model
    from outpace.models.source import resolve

    words, model = open_model("smollm2-135m").tokenizer, resolve("smollm2-135m").path
    python = os.environ.get("OUTPACE_PEER_PYTHON")
    options = {"threads": 2, "context": 512, "max_batch": 3, "python": Path(python) if python else None}
    prompts = [PeerPrompt(messages=[{"role": "user", "content": q}]) for q in ("Count to ten.", "Why?", "Say A B A B.")]
    try:
        with open_peer(engine, words, model, **options) as plain:
            alone = [plain.generate([p], 16, 0.0, 0, 120)[0] for p in prompts]
    except PeerError as e:
        pytest.skip(str(e))
    with open_peer(engine if mode == "plain" else f"{engine}:{mode}", words, model, **options) as peer:
        together = peer.generate(prompts, 16, 0.0, 0, 120)
        drawn = [peer.generate(prompts, 8, 1.0, seed, 120) for seed in (1, 2)]
    for one, other in zip(alone, together, strict=True):
        assert one.error is None and other.error is None
        assert one.text[:12] == other.text[:12]
        assert 0 < one.first_token_s <= one.total_s and other.tokens <= 16
    assert all(a.error is None for answers in drawn for a in answers)
    assert [a.text for a in drawn[0]] != [a.text for a in drawn[1]]
