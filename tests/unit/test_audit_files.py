"""Result files and servers: what was cut short is found, and no beginning passes for the whole."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from outpace import ParameterError
from outpace.bench.audit_files import Reference, check_file, load_reference, save_reference, text_difference
from outpace.bench.audit_urls import Endpoint, check_urls
from outpace.bench.workloads import Prompt

OUTPUTS = {("p1", "greedy"): [1, 2, 3], ("p2", "greedy"): [4, 5], ("p1", "top-p"): [6]}


def answer_line(name: str, text: str = "some text", **more: Any) -> str:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    body = {"choices": [{**choice, **more}], "usage": {"completion_tokens": 12}}
    return json.dumps({"custom_id": name, "response": {"status_code": 200, "body": body}, "error": None}) + "\n"


@pytest.fixture
def batch(tmp_path: Path) -> tuple[Path, Path]:
    """(output, requests) of three requests."""
    out, asked = tmp_path / "out.jsonl", tmp_path / "in.jsonl"
    asked.write_text("".join(json.dumps({"custom_id": f"r{i}", "body": {}}) + "\n" for i in range(3)))
    out.write_text("".join(answer_line(f"r{i}") for i in (2, 0, 1)))
    return out, asked


def test_a_whole_batch_passes(batch: tuple[Path, Path]) -> None:
    (check,) = check_file(*batch)
    assert check.holds and check.evidence == "3 answers, 0 of them errors, one for each request"


def test_a_batch_cut_short_anywhere_is_found(batch: tuple[Path, Path]) -> None:
    out, asked = batch
    whole = out.read_bytes()
    for end in range(len(whole)):
        out.write_bytes(whole[:end])
        (check,) = check_file(out, asked)
        assert not check.holds, end
    out.write_bytes(whole[: whole.index(b"\n") - 20])  # within a line, and nobody says what was asked
    (check,) = check_file(out)
    assert not check.holds and "cut short" in check.evidence


@pytest.mark.parametrize(
    "line, says",
    [
        (answer_line("r1"), "answers 'r1' again"),
        (answer_line("r9"), "nobody's request"),
        (answer_line("x", finish_reason=None), "did not come to its end"),
        (answer_line("x", text=""), "12 tokens were counted, and there is no text"),
        ('{"custom_id": "x", "error": null}\n', "neither an answer nor an error"),
        ("[1]\n", "no JSON object"),
    ],
)
def test_what_else_is_wrong_with_a_line(batch: tuple[Path, Path], line: str, says: str) -> None:
    out, asked = batch
    out.write_text(out.read_text() + line)
    (check,) = check_file(out, asked)
    assert not check.holds and says in check.evidence


def test_references_are_whole_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "ref.jsonl"
    save_reference(path, Reference({"model": "toy"}, OUTPUTS))
    assert load_reference(path) == Reference({"model": "toy"}, OUTPUTS)
    assert check_file(path)[0].holds
    whole = path.read_bytes()
    for end in range(len(whole)):
        path.write_bytes(whole[:end])
        assert not check_file(path)[0].holds, end
        with pytest.raises(ParameterError, match="cannot be used"):
            load_reference(path)
    path.write_bytes(whole.replace(b"[4, 5]", b"[4, 6]"))
    (changed,) = check_file(path)
    assert not changed.holds and "digest is wrong" in changed.evidence
    lines = whole.splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:1], *lines[2:]]))
    assert "2 of 3 outputs" in check_file(path)[0].evidence
    with pytest.raises(ParameterError, match="cannot read"):
        check_file(tmp_path / "none")


def test_reports_and_other_files(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text(json.dumps({"holds": True, "rows": [1, 2]}, indent=1) + "\n")
    assert check_file(path)[0].holds and "holds, rows" in check_file(path)[0].evidence
    path.write_text(path.read_text()[:-8])
    assert not check_file(path)[0].holds
    path.write_text("")
    assert check_file(path)[0].evidence == "it is empty"


def test_a_beginning_is_not_the_whole() -> None:
    assert text_difference("abc", "abc") is None
    assert text_difference("abcdef", "abc") == "cut short: the first 3 of 6 characters"
    assert "goes on" in str(text_difference("abc", "abcd"))
    assert text_difference("abc", "axc") == "from character 1 on: 'bc' became 'xc'"


# -- servers --------------------------------------------------------------------------------------------------------


class Server:
    """OpenAI's API with texts of our own; `fault` changes the text, or is an HTTP status."""

    def __init__(self) -> None:
        self.fault: Any = None
        self.bodies: list[dict[str, Any]] = []
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args: object) -> None:
                pass

            def do_GET(self) -> None:
                self.send({"data": [{"id": "toy"}]})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                owner.bodies.append(body)
                if isinstance(owner.fault, int):
                    self.send({"error": "broken"}, owner.fault)
                    return
                text = "an answer to " + body["messages"][0]["content"]
                text = owner.fault(text) if owner.fault else text
                choice = {"message": {"content": text}, "finish_reason": "stop"}
                self.send({"choices": [choice], "usage": {"completion_tokens": 30}})

            def send(self, found: object, status: int = 200) -> None:
                raw = json.dumps(found).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(raw)))
                self.end_headers()
                self.wfile.write(raw)

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()


@pytest.fixture
def servers() -> Iterator[tuple[Server, Server]]:
    pair = Server(), Server()
    yield pair
    for server in pair:
        server.http.shutdown()
        server.http.server_close()


PROMPTS = [Prompt(f"p{i}", "chat", (f"question {i}",)) for i in range(4)]


def test_two_servers_that_say_the_same(servers: tuple[Server, Server]) -> None:
    plain, other = servers
    seen: list[int] = []
    checks = check_urls(
        Endpoint(plain.url),
        Endpoint(other.url),
        PROMPTS,
        at_once=3,
        progress=lambda what, done, total: seen.append(done),
    )
    assert [c.holds for c in checks] == [True, True] and seen == list(range(1, 13))
    assert checks[1].numbers["tokens"] == 120 and "one wrong in 40 would have been seen" in checks[1].evidence
    assert len(plain.bodies) == 8 and len(other.bodies) == 4
    assert all(body["temperature"] == 0 and body["model"] == "toy" for body in other.bodies)


def test_a_server_whose_text_differs_or_fails_is_found(servers: tuple[Server, Server]) -> None:
    plain, other = servers
    other.fault = lambda text: text[:-3] if text.endswith("2") else text
    alone, between = check_urls(Endpoint(plain.url), Endpoint(other.url), PROMPTS)
    assert alone.holds and not between.holds and between.numbers["differing"] == 1
    assert "p2: cut short" in between.evidence
    plain.fault = other.fault = lambda text: ""
    assert not any(c.holds for c in check_urls(Endpoint(plain.url), Endpoint(other.url), PROMPTS))  # nothing compared
    plain.fault, other.fault = None, 500
    _, between = check_urls(Endpoint(plain.url), Endpoint(other.url), PROMPTS)
    assert between.numbers["failed"] == 4 and "HTTP 500" in between.evidence
    with pytest.raises(ParameterError, match="names no model"):
        check_urls(Endpoint("http://127.0.0.1:9/v1", timeout_s=2), Endpoint(other.url), PROMPTS)


def test_a_server_that_does_not_repeat_itself_is_told_apart(servers: tuple[Server, Server]) -> None:
    plain, other = servers
    plain.fault = lambda text: text + str(len(plain.bodies))
    alone, between = check_urls(Endpoint(plain.url), Endpoint(other.url), PROMPTS)
    assert alone.holds and "does not repeat itself" in alone.evidence and not between.holds
