"""Peers that behave, and peers that die, hang, lie or write garbage: the caller gets answers or errors.

The misbehaving ones are small scripts run by the same machinery as the real engines. Real engines are marked slow.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from peering import Letters, ask, fake, gone

from outpace.bench.compare.contestant import run_of_answers
from outpace.bench.compare.sets import Unit
from outpace.bench.peers.open import PeerSpec, open_peer
from outpace.bench.peers.openai import OpenAIPeer
from outpace.bench.peers.peer import PeerAnswer, PeerConfig, PeerError, PeerPrompt
from outpace.bench.peers.process import SCRIPTS
from outpace.errors import ParameterError


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


def test_tokens_of_a_first_step_that_verified_a_draft_are_not_counted_as_decoding(tmp_path):
    """Ten tokens, six of them at once after the prompt: four were decoded."""
    told = "first_tokens=6, first_token_s=0.01, total_s=0.03, token_ids=[65] * 10, steps=2"
    with fake(tmp_path, at_batch=f"import time; time.sleep(0.05); [a.update({told}) for a in answers]") as peer:
        answers = ask(peer, "abc", "def", max_tokens=10)
    assert [a.first_tokens for a in answers] == [6, 6]
    assert answers[0].decode_tokens_per_s == pytest.approx(4 / 0.02)
    run = run_of_answers(answers, Unit(("a", "b"), ((1,), (2,)), ("", ""), (0, 1)), None)
    assert (run.tokens, run.decode_tokens, run.turns) == (20, pytest.approx(8), 4)
    assert PeerAnswer("x", None, 6, 1.0, 3.0, first_tokens=6).decode_tokens_per_s is None


@pytest.mark.parametrize("past_end", [False, True])
def test_a_peer_is_told_whether_an_end_token_ends(tmp_path, past_end):
    with fake(tmp_path, at_start="self.about = {'told': hello['past_end']}", past_end=past_end) as peer:
        assert peer.about()["told"] is past_end


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
        ("raise ValueError('cannot read ' + hello['model'])", "does not start: ValueError: cannot read model.gguf"),
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
        ("answers[0]['token_ids'] = [1] * 9", "gave 9 tokens instead of at most 8"),
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
        ("answers[0]['first_tokens'] = 0", "says that 0 of 3 tokens came first"),
        ("answers[0]['first_tokens'] = 4", "says that 4 of 3 tokens came first"),
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
        ("print('{\"id\": 9}', flush=True); sys.stdin.read()", "answered request 9 instead of 1"),
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
        assert "wrote more than was requested" in ask(peer)[0].error


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
import peering
peer = peering.fake(Path({tmp!r}), at_batch="import time; time.sleep(60)")
peer.start()
print(peer._child.pid, flush=True)
peering.ask(peer, timeout_s=50)
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_the_end_of_the_caller_ends_the_peer(tmp_path, how):
    """Ctrl-C while a peer works, without a context manager; and a caller that had no time for anything."""
    code = PARENT.format(path=sys.path, tmp=str(tmp_path))
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
        pytest.skip(f"another engine is not installed: {e}")
    with open_peer(engine if mode == "plain" else f"{engine}:{mode}", words, model, **options) as peer:
        together = peer.generate(prompts, 16, 0.0, 0, 120)
        drawn = [peer.generate(prompts, 8, 1.0, seed, 120) for seed in (1, 2)]
    for one, other in zip(alone, together, strict=True):
        assert one.error is None and other.error is None
        assert one.text[:12] == other.text[:12]
        assert 0 < one.first_token_s <= one.total_s and other.tokens <= 16
    assert all(a.error is None for answers in drawn for a in answers)
    assert [a.text for a in drawn[0]] != [a.text for a in drawn[1]]
