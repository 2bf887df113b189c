"""The store of responses: owners, limits, age, files that are damaged, and several threads."""

from __future__ import annotations

import sqlite3
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from outpace.errors import ParameterError
from outpace.server.routes.response_store import LONGEST_CONVERSATION, Kept, ResponseStore, StoreLimits


def kept(id: str, previous: str | None = None, text: str = "") -> Kept:
    return Kept([{"type": "message", "content": text}], {"id": id, "previous_response_id": previous})


def ids(store: ResponseStore, owner: str, names: str) -> str:
    return "".join(name for name in names if store.get(owner, name) is not None)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        self.now += 1
        return self.now


def test_each_owner_has_its_own() -> None:
    store = ResponseStore()
    assert store.put("a", kept("1", text="é\ud800")) and store.get("a", "1") == kept("1", text="é\ud800")
    assert store.get("b", "1") is None and not store.delete("b", "1") and store.conversation("b", "1") is None
    assert store.delete("a", "1") and not store.delete("a", "1") and len(store) == 0


def test_a_conversation_is_whole_or_nothing() -> None:
    store = ResponseStore()
    for id, previous in (("1", None), ("2", "1"), ("3", "2")):
        store.put("a", kept(id, previous))
    store.put("b", kept("4", "3"))
    found = store.conversation("a", "3")
    assert found is not None and [one.response["id"] for one in found] == ["1", "2", "3"]
    assert store.conversation("b", "4") is None, "it leads to another owner's"
    store.delete("a", "1")
    assert store.conversation("a", "3") is None
    for i in range(LONGEST_CONVERSATION + 1):
        store.put("a", kept(f"x{i}", f"x{i - 1}" if i else None))
    assert store.conversation("a", f"x{LONGEST_CONVERSATION - 1}") is not None
    assert store.conversation("a", f"x{LONGEST_CONVERSATION}") is None


def test_the_oldest_go_first_and_of_whoever_has_most() -> None:
    store = ResponseStore(limits=StoreLimits(entries=5), clock=Clock())
    store.put("b", kept("0"))
    for id in "1234567":
        store.put("a", kept(id))
    assert ids(store, "a", "1234567") == "4567" and ids(store, "b", "0") == "0" and len(store) == 5


def test_many_owners_of_one_key_do_not_push_out_another_key() -> None:
    store = ResponseStore(limits=StoreLimits(entries=5), clock=Clock())
    store.put("x", kept("0", text="x" * 50), account="X")
    for id in "1234567":
        store.put(id, kept(id), account="Y")
    assert ids(store, "x", "0") == "0" and [id for id in "1234567" if store.get(id, id)] == list("4567")


def test_bytes_are_limited() -> None:
    store = ResponseStore(limits=StoreLimits(bytes=3000), clock=Clock())
    assert not store.put("a", kept("0", text="x" * 4000)) and len(store) == 0
    for id in "1234":
        assert store.put("a", kept(id, text="x" * 900))
    assert ids(store, "a", "1234") == "234"
    assert store.put("a", kept("5", text="x" * 2500)) and ids(store, "a", "12345") == "5"


def test_what_is_too_old_is_gone() -> None:
    clock = Clock()
    store = ResponseStore(limits=StoreLimits(age_s=100), clock=clock)
    store.put("a", kept("1"))
    clock.now += 60
    store.put("a", kept("2"))
    clock.now += 60
    assert ids(store, "a", "12") == "2" and len(store) == 1
    assert not store.delete("a", "1") and store.conversation("a", "1") is None


def test_a_file_is_read_again_and_is_its_owner_s_alone(tmp_path: Path) -> None:
    file = tmp_path / "kept.db"
    store = ResponseStore(file, StoreLimits(entries=3))
    for id in "123":
        store.put("a", kept(id))
    with pytest.raises(ParameterError, match=r"--responses-file .* is locked"):
        ResponseStore(file)
    store.close()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    again = ResponseStore(file, StoreLimits(entries=3))
    assert len(again) == 3 and again.get("a", "2") == kept("2")
    again.put("a", kept("4"))
    assert len(again) == 3
    again.close()


@pytest.mark.parametrize("content", [b"no database at all, but text that is long enough to be one" * 100, None])
def test_a_file_that_cannot_be_used_is_refused(content: bytes | None, tmp_path: Path) -> None:
    file = tmp_path / "kept.db"
    if content is None:
        with sqlite3.connect(file) as db:
            db.execute("PRAGMA user_version = 99")
        db.close()
    else:
        file.write_bytes(content)
    with pytest.raises(ParameterError, match=r"--responses-file .* cannot be used"):
        ResponseStore(file)
    with pytest.raises(ParameterError, match="cannot be used"):
        ResponseStore(tmp_path / "none" / "kept.db")


def test_many_threads(tmp_path: Path) -> None:
    store = ResponseStore(tmp_path / "kept.db", StoreLimits(entries=50))

    def work(owner: str) -> list[Any]:
        for i in range(40):
            store.put(owner, kept(f"{owner}{i}"))
            found = store.get(owner, f"{owner}{i}")
            assert found is None or found == kept(f"{owner}{i}")
        return [store.get(owner, f"{owner}{i}") for i in range(40)]

    with ThreadPoolExecutor(4) as pool:
        found = [one for each in pool.map(work, "abcd") for one in each]
    assert len(store) == 50 and sum(one is not None for one in found) >= 40
    store.close()


def test_a_file_that_fails_costs_nobody_the_answer(tmp_path: Path) -> None:
    store = ResponseStore(tmp_path / "kept.db")
    store.put("a", kept("1"))
    store._db.execute("PRAGMA query_only = ON")
    assert not store.put("a", kept("2")) and store.get("a", "1") == kept("1") and len(store) == 1
