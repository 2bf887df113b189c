"""Batch files: what is read, what is refused, and a journal that neither loses nor repeats a line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from outpace.server import batchfile
from outpace.server.batchfile import LINE_BYTES, BadLine, BatchFileError, BatchInput, Journal

CHAT = "/v1/chat/completions"
TOY = {"--model": "toy", "--precision": "int8", "--answer-tokens": 2048}


def request(custom_id: Any = "a", **changes: Any) -> dict[str, Any]:
    body = {"messages": [{"role": "user", "content": f"hello {custom_id}"}], "max_tokens": 5}
    return {"custom_id": custom_id, "method": "POST", "url": CHAT, "body": body} | changes


def write(path: Path, *lines: Any) -> Path:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("".join(text + "\n" for text in texts), encoding="utf-8")
    return path


def read(path: Path) -> list[dict[str, Any]]:
    data = path.read_bytes()
    assert not data or data.endswith(b"\n")
    return [json.loads(line) for line in data.splitlines()]


def answer_all(path: Path, source: BatchInput, stop_after: int | None = None) -> Journal:
    """What a run does, with an answer that follows from the request."""
    journal = Journal(path, source)
    journal.settle(TOY)
    written = 0
    for place in range(len(source)):
        if journal.done[place] or written == stop_after:
            continue
        written += 1
        try:
            line = source.read(place)
            journal.answer(place, line.custom_id, 200, {"echo": line.body, "text": "ä\u2028\n" * (place % 5)})
        except BadLine as bad:
            journal.refuse(place, bad)
    journal.close()
    return journal


def test_lines_are_found_and_blank_ones_are_none(tmp_path: Path) -> None:
    source = BatchInput(write(tmp_path / "in", request("a"), "", request("b"), "   ", request("ü\ud800")))
    assert len(source) == 3
    assert [source.read(i).custom_id for i in (2, 0, 1)] == ["ü\ud800", "a", "b"]
    assert [source.number(i) for i in range(3)] == [1, 3, 5]
    assert [source.place(n) for n in range(7)] == [None, 0, None, 1, None, 2, None]
    assert source.read(1).body["messages"][0]["content"] == "hello b"


def test_the_last_line_needs_no_end(tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(json.dumps(request()).encode())
    assert BatchInput(tmp_path / "in").read(0).custom_id == "a"


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("{", "invalid_json"),
        ("[1]", "invalid_json"),
        ("nul\x00", "invalid_json"),
        ("[" * 100_000, "invalid_json"),
        ('{"custom_id": ' + "9" * 5000 + "}", "invalid_json"),
        (request() | {"custom_id": None}, "missing_custom_id"),
        (request(7), "missing_custom_id"),
        (request(""), "missing_custom_id"),
        (request("x" * 600), "missing_custom_id"),
        (request(method="GET"), "invalid_method"),
        (request(url="/v1/embeddings"), "invalid_url"),
        (request(url=["/v1"]), "invalid_url"),
        (request(body="text"), "invalid_body"),
        (request(more=1), "unknown_field"),
        (request("good"), "duplicate_custom_id"),
        (" " * (LINE_BYTES + 5) + "{}", "line_too_long"),
    ],
)
def test_a_bad_line_says_why_and_harms_no_other(tmp_path: Path, line: Any, code: str) -> None:
    source = BatchInput(write(tmp_path / "in", request("good"), line, request("after")))
    assert len(source) == 3
    with pytest.raises(BadLine) as bad:
        source.read(1)
    assert bad.value.code == code
    assert [source.read(i).custom_id for i in (0, 2)] == ["good", "after"]
    journal = answer_all(tmp_path / "out", source)
    assert journal.failed == 1 and journal.done.all()
    answers = read(tmp_path / "out")
    assert answers[1]["error"]["code"] == code and answers[1]["error"]["line"] == 2
    assert answers[1]["error"]["message"] == str(bad.value) and not str(bad.value).startswith("(")
    assert answers[1]["response"] is None and answers[0]["error"] is None


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_an_empty_input_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "in").write_bytes(content)
    with pytest.raises(BatchFileError, match="no lines"):
        BatchInput(tmp_path / "in")


def test_what_cannot_be_opened_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BatchFileError, match="cannot be read: No such file"):
        BatchInput(tmp_path / "in")
    with pytest.raises(BatchFileError, match="cannot be read: Is a directory"):
        BatchInput(tmp_path)
    source = BatchInput(write(tmp_path / "in", request()))
    with pytest.raises(BatchFileError, match="cannot be written"):
        Journal(tmp_path / "missing/out", source)
    with pytest.raises(BatchFileError, match="the same file"):
        Journal(tmp_path / "in", source)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """An input with good and bad lines, and the output of an undisturbed run."""
    folder = tmp_path_factory.mktemp("whole")
    lines = [request(f"ä-{i}") for i in range(9)]
    path = write(folder / "in", *lines[:4], "{bad", *lines[4:], request("ä-3"), request(url="/x"))
    answer_all(folder / "out", BatchInput(path))
    return path, (folder / "out").read_bytes()


def test_cut_anywhere_and_resumed(whole: tuple[Path, bytes], tmp_path: Path) -> None:
    """Wherever a kill tears the output, the rest is made, nothing twice, and the same as without a kill."""
    path, data = whole
    source, out = BatchInput(path), tmp_path / "out"
    ends = [i for i, byte in enumerate(data) if byte == ord("\n")]
    for cut in sorted({*range(0, len(data), 11), *range(60), *(e + d for e in ends for d in (-1, 0, 1))} - {len(data)}):
        out.write_bytes(data[:cut])
        journal = Journal(out, source)
        assert journal.found == data[:cut].count(b"\n")
        assert journal.cut == cut - (data.rfind(b"\n", 0, cut) + 1)
        journal.close()
        answer_all(out, source)
        assert out.read_bytes() == data


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 400)), max_size=8))
def test_killed_again_and_again(whole: tuple[Path, bytes], tmp_path: Path, kills: list[tuple[int, int]]) -> None:
    path, data = whole
    source, out = BatchInput(path), tmp_path / "out"
    out.unlink(missing_ok=True)
    for lines, torn in kills:
        answer_all(out, source, stop_after=lines)
        kept = out.read_bytes()
        out.write_bytes(kept[: max(0, len(kept) - torn)])
    answer_all(out, source)
    assert out.read_bytes() == data


def test_answers_in_any_order_are_sorted_at_the_end(whole: tuple[Path, bytes], tmp_path: Path) -> None:
    path, data = whole
    source, out = BatchInput(path), tmp_path / "out"
    lines = data.splitlines(keepends=True)
    out.write_bytes(b"".join(lines[::-1]))
    with Journal(out, source) as journal:
        assert journal.done.all() and journal.failed == 3
        journal.sort()
    assert out.read_bytes() == data and list(tmp_path.iterdir()) == [out]


def test_a_changed_input_is_refused(whole: tuple[Path, bytes], tmp_path: Path) -> None:
    _, data = whole
    (tmp_path / "out").write_bytes(data)
    other = BatchInput(write(tmp_path / "in", request("other")))
    with pytest.raises(BatchFileError, match=r"another input.*bring back.*or name another output"):
        Journal(tmp_path / "out", other)
    assert (tmp_path / "out").read_bytes() == data


@pytest.mark.parametrize("name", TOY)
@pytest.mark.parametrize("lines", [3, None])
def test_other_settings_are_refused_by_name(
    whole: tuple[Path, bytes], tmp_path: Path, name: str, lines: int | None
) -> None:
    """Also when nothing is left to be answered."""
    path, data = whole
    kept = b"".join(data.splitlines(keepends=True)[:lines])
    (tmp_path / "out").write_bytes(kept)
    with Journal(tmp_path / "out", BatchInput(path)) as journal:
        journal.settle(TOY)
        with pytest.raises(BatchFileError) as refused:
            journal.settle(TOY | {name: "other"})
        assert f"another {name} (now 'other'): go on with" in str(refused.value)
        assert not any(other in str(refused.value) for other in TOY.keys() - {name})
        with pytest.raises(BatchFileError, match=r"--model.*, another --precision.*, another --answer-tokens"):
            journal.settle(dict.fromkeys(TOY, "other"))
        with pytest.raises(BatchFileError, match="another version of Outpace"):
            journal.settle(TOY | {"more": 1})
    assert (tmp_path / "out").read_bytes() == kept


def test_a_torn_line_that_is_longer_than_its_replacement_leaves_nothing(tmp_path: Path) -> None:
    source, out = BatchInput(write(tmp_path / "in", request("a"), request("b"))), tmp_path / "out"
    with Journal(out, source) as journal:
        journal.settle(TOY)
        journal.answer(0, "a", 200, {"text": "first"})
        journal.answer(1, "b", 200, {"text": "long " * 200})
    torn = out.read_bytes()[:-100]
    out.write_bytes(torn)
    with Journal(out, source) as journal:
        assert journal.cut == len(torn) - torn.index(b"\n") - 1 and out.read_bytes() == torn[: torn.index(b"\n") + 1]
        journal.settle(TOY)
        journal.answer(1, "b", 200, {"text": "short"})
    assert [answer["response"]["body"]["text"] for answer in read(out)] == ["first", "short"]


@pytest.mark.parametrize("text", ["precious", "precious\n", '{"id": 1}\n', "[]\n{}", "\n", '{"id":"batch_req_0"'])
def test_a_file_of_something_else_is_left_alone(whole: tuple[Path, bytes], tmp_path: Path, text: str) -> None:
    (tmp_path / "out").write_text(text)
    with pytest.raises(BatchFileError, match="name another"):
        Journal(tmp_path / "out", BatchInput(whole[0]))
    assert (tmp_path / "out").read_text() == text


@pytest.mark.parametrize("change", ["twice", "middle", "no such line"])
def test_an_edited_output_is_refused(whole: tuple[Path, bytes], tmp_path: Path, change: str) -> None:
    lines = whole[1].splitlines(keepends=True)
    if change == "twice":
        lines.append(lines[2])
    elif change == "middle":
        lines[3] = lines[3][:20] + b"\n"
    else:
        lines[1] = lines[1].replace(b'_2","custom_id"', b'_77","custom_id"')
        assert b"_77" in lines[1]
    (tmp_path / "out").write_bytes(b"".join(lines))
    with pytest.raises(BatchFileError, match="name another"):
        Journal(tmp_path / "out", BatchInput(whole[0]))


def test_two_runs_at_once_are_refused(tmp_path: Path) -> None:
    source = BatchInput(write(tmp_path / "in", request()))
    with Journal(tmp_path / "out", source), pytest.raises(BatchFileError, match="another process"):
        Journal(tmp_path / "out", source)
    Journal(tmp_path / "out", source).close()


def test_a_disk_that_is_full_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when it takes a part of a line."""
    source, taken = BatchInput(write(tmp_path / "in", request("a"), request("b"))), []

    def pwrite(fd: int, data: Any, at: int) -> int:
        if taken:
            raise OSError(28, "No space left on device")
        taken.append(at)
        with (tmp_path / "out").open("r+b") as file:
            file.seek(at)
            return file.write(bytes(data[:30]))

    with Journal(tmp_path / "out", source) as journal:
        journal.settle(TOY)
        with monkeypatch.context() as patch:
            patch.setattr("os.pwrite", pwrite)
            with pytest.raises(BatchFileError, match=r"No space left.*the same command goes on"):
                journal.answer(0, "a", 200, {})
    assert len((tmp_path / "out").read_bytes()) == 30
    journal = answer_all(tmp_path / "out", source)
    assert journal.cut == 30 and [r["custom_id"] for r in read(tmp_path / "out")] == ["a", "b"]


def test_answers_are_safe_from_a_power_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that are older than SYNC_S, and a file that is sorted or closed."""
    synced: list[int] = []
    source = BatchInput(write(tmp_path / "in", request("a"), request("b"), request("c")))
    with Journal(tmp_path / "out", source) as journal:
        monkeypatch.setattr("os.fsync", synced.append)
        journal.settle(TOY)
        journal.answer(2, "c", 200, {})
        assert synced == [], "one that is young waits for others"
        monkeypatch.setattr(batchfile, "SYNC_S", -1.0)
        journal.answer(1, "b", 200, {})
        assert len(synced) == 1
        journal.answer(0, "a", 200, {})
        assert len(synced) == 2
        journal.sort()
        assert len(synced) == 3
    assert len(synced) == 4
    assert [answer["custom_id"] for answer in read(tmp_path / "out")] == ["a", "b", "c"]


def test_a_large_input_takes_little_memory(tmp_path: Path) -> None:
    import tracemalloc

    n = 20_000
    write(tmp_path / "in", *(request(f"request-{i}") for i in range(n)))
    tracemalloc.start()
    source = BatchInput(tmp_path / "in")
    journal = Journal(tmp_path / "out", source)
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    journal.close()
    assert held < 60 * n and peak < 300 * n
