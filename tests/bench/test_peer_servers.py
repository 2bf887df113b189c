"""A server as a peer: measured from its stream; one that fails, hangs or talks nonsense gives errors."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from peering import Letters, ask, chunk, server, stream

from outpace.bench.peers.open import open_peer
from outpace.bench.peers.openai import OpenAIPeer
from outpace.bench.peers.peer import PeerError, PeerPrompt


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
            assert one.first_tokens == 2  # those of the first piece of text
            assert 0.2 <= one.first_token_s < one.total_s - 0.15
            assert len(one.arrivals) == 3 and min(one.arrivals) > one.first_token_s + 0.15  # those of the second piece
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
        (lambda h, b: stream(chunk("x" * 50, "length")), "gave 50 tokens instead of at most 8"),
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
