"""A llama-server or llama-bench of the user's own as a peer: what it is given, how it is measured, how it fails.

The programs are small scripts (`llama_programs.py`); those of a real build are marked slow.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from llama_programs import BENCH_OPTIONS, SERVER_OPTIONS, bench, opened, server
from peering import Letters, ask, gone

from outpace.bench.compare.contestant import run_of_answers
from outpace.bench.compare.sets import Unit
from outpace.bench.peers.open import PeerSpec, open_peer
from outpace.bench.peers.peer import PeerError, PeerPrompt
from outpace.bench.peers.process import SCRIPTS
from outpace.errors import ParameterError


def lines(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def pids(folder: Path) -> list[int]:
    return [line["pid"] for line in lines(folder, "started")]


# -- how it is written


def test_names_paths_and_arguments(tmp_path):
    program = server(tmp_path / "build" / "bin")
    spec = PeerSpec.parse(f"ik:draft={program} -rtr -fa on --lora /x/y.gguf --slots=/x/z")
    assert (spec.name, spec.engine, spec.mode, spec.program) == ("ik:draft", "llama.cpp", "draft", program)
    assert dict(spec.settings)["arguments"] == ("-rtr", "-fa", "on", "--lora", "/x/y.gguf", "--slots=/x/z")
    assert spec.shown == "ik:draft=llama-server -rtr -fa on --lora y.gguf --slots=z"
    for folder in (tmp_path, tmp_path / "build", program.parent):
        assert PeerSpec.parse(f"llama.cpp={folder}").program == program
    bench(program.parent)
    assert PeerSpec.parse(f"llama.cpp={tmp_path}").program == program  # the server where both are
    assert PeerSpec.parse(f"b={program.parent / 'llama-bench'}").program == program.parent / "llama-bench"
    spaced = server(tmp_path / "my builds")
    assert PeerSpec.parse(f"a={spaced}").program == PeerSpec.parse(f"a='{spaced}' -rtr").program == spaced


@pytest.mark.parametrize(
    ("written", "says"),
    [
        ("ik=/no/such/folder", "no such file"),
        ("ik=", "a program is written NAME=PATH"),
        ("={bin}/llama-server", "a program is written NAME=PATH"),
        ("ik:fast={bin}/llama-server", "a program is written NAME=PATH"),
        ("ik={bin}/text", "not an executable file"),
        ("ik={bin}/empty", "has no llama-server and no llama-bench"),
        ("ik={bin}/llama-server 'x", "No closing quotation"),
        ("ik={bin}/llama-server -m other.gguf", "leave out -m"),
        ("ik={bin}/llama-server --port=80", "leave out --port=80"),
        ("transformers={bin}/python", "--peer-python"),
        ("llamacpp", r"NAME=PATH of a llama-server"),
    ],
)
def test_what_is_no_program_is_refused_before_anything_is_loaded(tmp_path, written, says):
    server(tmp_path)
    (tmp_path / "text").write_text("text")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ParameterError, match=says):
        PeerSpec.parse(written.format(bin=tmp_path))


# -- a server


def test_a_server_answers_cold_and_its_first_token_came_before_the_time_that_it_generated(tmp_path):
    with opened(server(tmp_path), "-fa on") as peer:
        assert peer.about() == {
            "engine": "llama.cpp", "mode": "plain", "threads": 2, "model": "model.gguf", "program": "llama-server",
            "version": "version: 77 (abcdef)", "built_for": "CPU : AVX2 = 1 | OPENMP = 1",
            "arguments": "--model model.gguf --threads 2 --threads-batch 2 --parallel 4 --ctx-size 1024 "
            "--no-kv-unified --cache-ram 0 -fa on",
            "batches": "requests at once",
        }  # fmt: skip
        first, second = peer.generate([PeerPrompt("abc"), PeerPrompt(token_ids=(65, 66))], 5, 0.5, 10, 20)
        assert (first.text, first.token_ids, first.tokens, first.error) == ("cbacb", (99, 98, 97, 99, 98), 5, None)
        assert second.text == "BABAB" and (second.steps, second.first_tokens) == (4, 1)
        read = max(one.total_s - 0.02 for one in (first, second))
        for one in (first, second):
            assert one.total_s >= 0.05 and one.first_token_s == pytest.approx(min(read, one.total_s))
        assert peer.memory_bytes > 1e6
        ask(peer, "abc")
    assert all(map(gone, pids(tmp_path)))
    *drawn, greedy = lines(tmp_path, "bodies")
    drawn.sort(key=lambda body: body["seed"])
    assert [b["seed"] for b in drawn] == [10, 11] and drawn[1]["prompt"] == [65, 66]
    assert drawn[0]["temperature"] == 0.5 and drawn[0]["samplers"] == ["temperature"]
    assert greedy["samplers"] == ["top_k"] and greedy["top_k"] == 1
    assert all(b["cache_prompt"] is False and not b["stream"] and b["n_predict"] in (5, 8) for b in (*drawn, greedy))
    assert "ignore_eos" not in greedy


def test_answers_go_on_behind_every_end_token(tmp_path):
    with opened(server(tmp_path), past_end=True) as peer:
        ask(peer)
    (body,) = lines(tmp_path, "bodies")
    assert body["ignore_eos"] is True and body["logit_bias"] == [[0, False]]


def test_a_fork_that_gives_no_ids_counts_its_tokens_itself(tmp_path):
    """Some tokens have no text, and without the server's count such an answer would seem slow."""
    with opened(server(tmp_path, 'del answer["tokens"]; answer["content"] = "ab"')) as peer:
        answer = ask(peer)[0]
    assert (answer.text, answer.token_ids, answer.tokens, answer.error) == ("ab", None, 8, None)


def test_all_answers_of_a_batch_began_when_the_last_prompt_was_read(tmp_path):
    """The first one waited 0.3 s for the other's prompt: that is no time of decoding, nor has it fewer tokens."""
    slow = "time.sleep(0.3); answer['timings']['predicted_ms'] = 330.0 if prompt[0] == 97 else 30.0"
    with opened(server(tmp_path, slow)) as peer:
        answers = ask(peer, "abc", "xyz")
    assert [a.error for a in answers] == [None, None]
    assert answers[0].first_token_s == answers[1].first_token_s == pytest.approx(answers[1].total_s - 0.03, abs=0.03)
    run = run_of_answers(answers, Unit(("a", "b"), ((1,), (2,)), ("", ""), (0, 1)), None)
    assert run.decode_tokens == pytest.approx(14) and run.decode_s < 0.1


def test_drafts_that_were_accepted_are_steps_saved(tmp_path):
    accepted = 'answer["timings"] |= {"draft_n": 9, "draft_n_accepted": 5}'
    with opened(server(tmp_path, accepted), name="mine:lookup") as peer:
        assert ask(peer)[0].steps == 2


@pytest.mark.parametrize(
    ("name", "arguments", "has", "lacks"),
    [
        ("mine", "-t 7 --cache-ram=5", "-t 7 --cache-ram=5", "--threads 2"),
        ("mine", "-np 2", "-np 2", "--parallel"),
        ("mine", "", "", "--spec-type"),
        ("mine:draft", "", "--model-draft small.gguf --spec-type draft-simple", "ngl"),
        ("mine:lookup", "", "--spec-type ngram-simple", "draft"),
        ("mine:lookup", "--spec-type ngram-cache", "--spec-type ngram-cache", "ngram-simple"),
    ],
)
def test_what_the_user_writes_replaces_ours(tmp_path, name, arguments, has, lacks):
    with opened(server(tmp_path), arguments, name) as peer:
        said = peer.about()["arguments"]
    assert has in said and lacks not in said


def test_only_options_that_its_help_lists_are_used(tmp_path):
    """An old build: no unified cache, no cache of prompts, a draft model that needs no type."""
    old = tuple(option for option in SERVER_OPTIONS if not any(w in option for w in ("kv-", "cram", "spec-type")))
    with opened(server(tmp_path, options=old), name="old:draft") as peer:
        said = peer.about()["arguments"]
    assert "--model-draft small.gguf" in said and not any(w in said for w in ("kv-", "cache-ram", "spec-type"))
    with pytest.raises(PeerError, match="looks no drafts up"):
        opened(tmp_path / "llama-server", name="old:lookup").start()
    server(tmp_path, options=tuple(option for option in old if "draft" not in option))
    with pytest.raises(PeerError, match="drafts with no second model"):
        opened(tmp_path / "llama-server", name="old:draft").start()


LAST = "print('one\\n\\ntwo\\nerror: cannot read', args[args.index('--model') + 1], flush=True); "


@pytest.mark.parametrize(
    ("at_start", "says"),
    [
        (LAST + "sys.exit(3)", "does not start: llama-server ended with exit code 3; its last words: "),
        (LAST + "sys.exit(3)", "one / two / error: cannot read model.gguf"),
        (f"print({'a' * 120!r}, sys.argv[0], HERE + '/libs/one.so'); sys.exit(3)", f"{'a' * 120} llama-server one.so"),
        (LAST + "os.kill(os.getpid(), signal.SIGILL)", "ended with signal SIGILL; its last words:"),
        ("print('couldn\\'t bind to the port', flush=True); sys.exit(1)", "couldn't bind to the port"),
        ("time.sleep(60)", "gave no answer within 2 s"),
        ("open(HERE + '/quiet', 'w'); os.close(1); os.close(2); time.sleep(60)", "gave no answer within 2 s"),
    ],
)
def test_a_server_that_does_not_come_up(tmp_path, at_start, says):
    program = server(tmp_path, at_start=at_start)
    with pytest.raises(PeerError) as caught, opened(program, start_timeout_s=2.0 if "2 s" in says else 30.0):
        pass
    assert says in str(caught.value) and "\n" not in str(caught.value) and tmp_path.name[:20] not in str(caught.value)
    assert len(pids(tmp_path)) == (3 if "bind" in says else 1)
    assert all(map(gone, pids(tmp_path)))


def test_a_port_that_was_taken_in_between_is_not_the_end(tmp_path):
    taken = "if starts == 1: print('bind: Address already in use', flush=True); sys.exit(1)"
    with opened(server(tmp_path, at_start=taken)) as peer:
        assert ask(peer)[0].text == "cbacbacb"
    first, second = (line["args"][line["args"].index("--port") + 1] for line in lines(tmp_path, "started"))
    assert first != second


def test_a_program_that_is_no_llama_server(tmp_path):
    wrong = server(tmp_path, options=("-h, --help", "-m, --model FNAME"), name="llama-cli")
    with pytest.raises(PeerError, match="llama-cli is neither llama-server nor llama-bench"):
        opened(wrong).start()
    with pytest.raises(PeerError, match="true is neither llama-server nor llama-bench"):
        open_peer("x=/bin/true", Letters(), tmp_path / "m.gguf").start()
    with pytest.raises(PeerError, match="has no /health"):
        opened(server(tmp_path, health=404)).start()
    assert all(map(gone, pids(tmp_path)))
    broken = tmp_path / "llama-server"
    broken.write_text("#!/bin/sh\necho 'error while loading shared libraries: libggml.so'\nexit 127\n")
    with pytest.raises(PeerError, match=r"ended with exit code 127; its last words: .*libggml\.so"):
        opened(broken).start()
    broken.write_bytes(b"\x7fELF of another machine")
    with pytest.raises(PeerError, match="cannot be run: Exec format error"):
        opened(broken).start()


def test_a_program_that_shows_no_help(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    module = importlib.import_module("program")
    monkeypatch.setattr(module, "_HELP_S", 0.3)
    silent = tmp_path / "silent"
    silent.write_text("#!/bin/sh\nexec sleep 60\n")
    silent.chmod(0o755)
    with pytest.raises(Exception, match=r"silent --help did not end within 0.3 s"):
        module.Program(str(silent), [])


@pytest.mark.parametrize(
    ("at_request", "says"),
    [
        ("status, answer = 500, {'error': {'message': 'out of\\nmemory'}}", "refused with status 500: out of memory"),
        ("status, answer = 400, {'error': 'no'}", "refused with status 400: no"),
        ("answer = b'<html>'", "answered with what is no completion"),
        ("answer = [1]", "answered with what is no completion"),
        ("del answer['timings']", "answered with what is no completion"),
        ("answer['timings']['predicted_ms'] = 'long'", "answered with what is no completion"),
        ("answer['timings']['predicted_ms'] = 9000", "says that it generated for 9.000 s"),
        ("answer['timings']['prompt_n'] = 1", "read 1 of the prompt's 3 tokens"),
        ("answer['truncated'] = True", "and cut it"),
        ("answer['tokens'] = [1]", "says that it gave 8 tokens, and gave 1"),
        ("answer['timings']['predicted_n'] = 9; del answer['tokens']", "gave 9 tokens instead of at most 8"),
        ("self.connection.close(); return", "gave no answer: RemoteDisconnected"),
    ],
)
def test_a_wrong_answer_is_an_error_and_the_server_lives_on(tmp_path, at_request, says):
    with opened(server(tmp_path, f"if prompt[0] == 97:\n            {at_request}")) as peer:
        bad, good = ask(peer, "abc", "xyz")
        assert says in bad.error and bad.tokens == 0 and "\n" not in bad.error
        assert good.text == "zyxzyxzy" and len(pids(tmp_path)) == 1


@pytest.mark.parametrize(
    ("at_request", "says"),
    [
        ("print('CUDA error: out of memory', flush=True); os._exit(7)", "ended with exit code 7; its last words: "),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "signal SIGSEGV"),
        ("time.sleep(60)", "gave no answer within 1 s"),
    ],
)
def test_a_server_that_dies_or_hangs_midway_is_started_again(tmp_path, at_request, says):
    once = f"if starts == 1: {at_request}"
    with opened(server(tmp_path, once)) as peer:
        began = time.monotonic()
        answers = ask(peer, "abc", "xyz", timeout_s=1.0 if "sleep" in at_request else 20.0)
        assert all(says in a.error for a in answers) and time.monotonic() - began < 15
        peer.close()
        assert all(map(gone, pids(tmp_path)))
        peer.start()
        assert ask(peer)[0].text == "cbacbacb"
    assert all(map(gone, pids(tmp_path)))


PARENT = """
import sys
sys.path[:0] = {path!r}
from pathlib import Path
import llama_programs, peering
peer = llama_programs.opened(Path({program!r}))
{do}
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
@pytest.mark.parametrize("when", ["starts", "answers", "rests"])
def test_the_end_of_the_caller_ends_the_server(tmp_path, how, when):
    """Ctrl-C without a context manager, or a caller that had no time for anything."""
    program = server(tmp_path, "time.sleep(60)", "time.sleep(60)" if when == "starts" else "pass")
    then = {"starts": "", "answers": "peering.ask(peer, timeout_s=50)", "rests": "import time; time.sleep(50)"}[when]
    code = PARENT.format(path=sys.path, program=str(program), do=f"peer.start()\n{then}")
    caller = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    there = tmp_path / ("bodies" if when == "answers" else "started")
    until = time.monotonic() + 30
    while not there.exists() and time.monotonic() < until:
        time.sleep(0.05)
    time.sleep(0.5)
    (pid,) = pids(tmp_path)
    assert Path(f"/proc/{pid}").exists()
    caller.send_signal(how)
    caller.communicate(timeout=20)
    assert gone(pid)


def test_an_interrupt_ends_the_server(tmp_path):
    with opened(server(tmp_path, "time.sleep(60)")) as peer:
        threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            ask(peer)
        assert all(map(gone, pids(tmp_path)))


# -- a bench


@pytest.mark.parametrize(
    ("options", "runs"),
    [
        ((), ["-p 3 -n 7"]),
        (("-d, --n-depth <n>",), ["-p 3 -n 0", "-p 0 -n 7 -d 3"]),
        (("-gp <pp,tg>",), ["-p 3 -n 0 -gp 3,7"]),
    ],
)
def test_a_bench_gives_the_times_of_as_many_tokens(tmp_path, options, runs):
    program = bench(tmp_path, options=BENCH_OPTIONS + options, noise=True)
    with opened(program, "-rtr 1") as peer:
        assert peer.about()["arguments"] == "--model model.gguf --threads 2 --repetitions 1 --output json -rtr 1"
        assert "random tokens" in peer.about()["output"]
        answer = ask(peer)[0]
        assert (answer.tokens, answer.steps, answer.text, answer.error) == (8, 7, "", None)
        assert answer.first_token_s == pytest.approx(3e-6) and answer.total_s == pytest.approx(7.003e-3)
        assert peer.memory_bytes > 1e6
        assert "one sequence at a time" in ask(peer, "ab", "cd")[0].error
    assert [" ".join(line["args"]).partition("-rtr 1 ")[2] for line in lines(tmp_path, "started")] == runs


@pytest.mark.parametrize(
    ("at_start", "says"),
    [
        ("print('no\\nmodel', file=sys.stderr); sys.exit(1)", "ended with exit code 1; its last words: no / model"),
        ("print('| table |'); sys.exit()", "no result of llama-bench"),
        ("print('[1]'); sys.exit()", "no result of llama-bench"),
        ("print('[]'); sys.exit()", "did not measure a prompt and an answer"),
    ],
)
def test_a_bench_that_fails(tmp_path, at_start, says):
    with opened(bench(tmp_path, at_start)) as peer:
        assert says in ask(peer)[0].error


def test_a_bench_drafts_nothing_and_its_sizes_are_ours(tmp_path):
    program = bench(tmp_path)
    with pytest.raises(PeerError, match="measures plain decoding alone; name a llama-server for :lookup"):
        opened(program, name="b:lookup").start()
    with pytest.raises(PeerError, match="is given -p by the comparison"):
        opened(program, "-p 512").start()


# -- real builds


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["plain", "lookup", "draft"])
def test_a_real_build_answers_as_it_does_alone(mode):
    """$OUTPACE_LLAMA: a llama-server, or the folder of a build."""
    from outpace.models.prepared import open_model
    from outpace.models.source import resolve

    build = os.environ.get("OUTPACE_LLAMA")
    if not build:
        pytest.skip("another engine is not installed: OUTPACE_LLAMA names no llama-server")
    words, model = open_model("smollm2-135m").tokenizer, resolve("smollm2-135m").path
    prompts = [PeerPrompt(messages=[{"role": "user", "content": q}]) for q in ("Count to ten.", "Why?", "Say A B A B.")]
    options = {"threads": 2, "context": 512, "max_batch": 3, "past_end": True}
    with open_peer(f"mine={build}", words, model, **options) as plain:
        alone = [plain.generate([p], 24, 0.0, 0, 120)[0] for p in prompts]
    name = "mine" if mode == "plain" else f"mine:{mode}"
    with open_peer(f"{name}={build}", words, model, model if mode == "draft" else None, **options) as peer:
        together = peer.generate(prompts, 24, 0.0, 0, 120)
        drawn = [peer.generate(prompts, 8, 1.0, seed, 120) for seed in (1, 2)]
    for one, other in zip(alone, together, strict=True):
        assert one.error is None and other.error is None
        assert one.text[:12] == other.text[:12] and one.tokens == other.tokens == 24
        assert 0 < one.first_token_s < one.total_s
    assert mode != "draft" or sum(a.steps for a in together) < 60
    assert all(a.error is None for answers in drawn for a in answers)
    assert [a.text for a in drawn[0]] != [a.text for a in drawn[1]]
