"""Names of the hub: which file they stand for, and what is said without a network."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

from outpace.errors import DownloadError, ModelNotFound, UnsupportedModel
from outpace.models.catalog import CATALOG, HUB_NAMES, short_name
from outpace.models.hub import HUB_ID, HubName, choose, parse_hub
from outpace.models.source import find, resolve

FILES = ["README.md", "a-q4_k_m.gguf", "a-q8_0.gguf", "a-IQ4_XS.gguf", "mmproj-a-q4_k_m.gguf", "sub/a-Q6_K.gguf"]
PARTS = ["b-q8_0-00001-of-00002.gguf", "b-q8_0-00002-of-00002.gguf", "b-q5_k_m.gguf"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OUTPACE_CACHE", str(tmp_path))
    for name in ("OUTPACE_MODELS", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@contextmanager
def listening() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize(
    ("name", "repo", "which", "explicit"),
    [
        ("owner/name", "owner/name", "", False),
        ("owner/name:Q4_K_M", "owner/name", "Q4_K_M", False),
        ("hf:owner/name", "owner/name", "", True),
        ("hf.co/owner/name:Q8_0", "owner/name", "Q8_0", True),
        ("https://huggingface.co/owner/name", "owner/name", "", True),
        ("owner/name:sub/file.gguf", "owner/name", "sub/file.gguf", False),
    ],
)
def test_names(name: str, repo: str, which: str, explicit: bool) -> None:
    assert parse_hub(name) == HubName(repo, which, explicit)


@pytest.mark.parametrize(
    "name", ["name", "a/b/c", "../b", "hf:name", "owner/name:", "owner/na me", "/etc/passwd", "-o/n"]
)
def test_what_is_no_name(name: str) -> None:
    assert parse_hub(name) is None


def test_short_names_are_repositories_that_no_model_of_the_catalog_hides() -> None:
    assert not CATALOG.keys() & HUB_NAMES.keys()
    assert all(HUB_ID.fullmatch(repo) and repo.endswith("GGUF") for repo in HUB_NAMES.values())
    assert short_name("Qwen3:4B") == "qwen3-4b" and short_name("smollm2:135m") == "smollm2-135m"
    assert short_name("gpt-4") is None


@pytest.mark.parametrize(
    ("which", "file"),
    [
        ("", "a-q4_k_m.gguf"),
        ("Q8_0", "a-q8_0.gguf"),
        ("q6_k", "sub/a-Q6_K.gguf"),
        ("IQ4_XS", "a-IQ4_XS.gguf"),
        ("a-q8_0.gguf", "a-q8_0.gguf"),
    ],
)
def test_which_file(which: str, file: str) -> None:
    assert choose(FILES, HubName("o/n", which)) == file


def test_files_that_are_not_to_be_had() -> None:
    with pytest.raises(ModelNotFound, match=r"o/n has no Q4_K_L GGUF file; did you mean 'Q4_K_M'\? there are: .*Q8_0"):
        choose(FILES, HubName("o/n", "Q4_K_L"))
    with pytest.raises(UnsupportedModel, match="is in 2 files; join them"):
        choose(PARTS, HubName("o/n", "Q8_0"))
    assert choose(PARTS, HubName("o/n")) == "b-q5_k_m.gguf"  # the usual one would be in parts
    with pytest.raises(ModelNotFound, match="neither safetensors nor GGUF"):
        choose(["README.md"], HubName("o/n"))
    assert choose(["odd-name.gguf"], HubName("o/n")) == "odd-name.gguf"
    with pytest.raises(ModelNotFound):  # the part that sees pictures is no language model
        choose(["mmproj-q8_0.gguf"], HubName("o/n", "Q8_0"))


def test_a_file_is_fetched_by_the_quantisation_and_named_by_the_short_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched = []

    def download(repo: str, file: str) -> str:
        fetched.append((repo, file))
        (tmp_path / file).write_bytes(b"GGUF" + bytes(60))
        return str(tmp_path / file)

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda self, repo: ["x-Q4_K_M.gguf", "x-Q8_0.gguf"])
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with listening() as endpoint:
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        one, other = resolve("owner/x-gguf:Q8_0"), resolve("qwen3:4b")
    assert fetched == [("owner/x-gguf", "x-Q8_0.gguf"), (HUB_NAMES["qwen3-4b"], "x-Q4_K_M.gguf")]
    assert (one.name, one.kind, one.path.name) == ("x-Q8_0", "gguf", "x-Q8_0.gguf")
    assert other.name == "qwen3-4b" and other.key.startswith("qwen3-4b-")


def test_a_file_in_the_hubs_cache_needs_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x-q4_0.gguf").write_bytes(b"GGUF")

    def snapshot(repo: str, local_files_only: bool = False, **options: object) -> str:
        assert local_files_only, "the hub was asked"
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    assert resolve("owner/x").path == tmp_path / "x-q4_0.gguf"
    assert resolve("hf:owner/x:Q4_0").path == tmp_path / "x-q4_0.gguf"
    with pytest.raises(DownloadError):  # another one is not there
        resolve("owner/x:Q8_0")


def test_without_a_network_it_says_which_host_and_where_to_put_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(DownloadError) as caught:
        resolve("qwen3:4b")
    said = str(caught.value)
    place = tmp_path / "models" / "qwen3-4b.gguf"
    assert "127.0.0.1 cannot be reached" in said and HUB_NAMES["qwen3-4b"] in said
    assert f"put it to {place} and use -m qwen3-4b" in said
    place.parent.mkdir()
    place.write_bytes(b"GGUF")  # what it advises works
    assert resolve("qwen3-4b").path == place


def test_what_the_hub_says(monkeypatch: pytest.MonkeyPatch) -> None:
    def files(self: object, repo: str) -> list[str]:
        kind = {"o/none": RepositoryNotFoundError, "o/gated": GatedRepoError, "o/broken": LocalEntryNotFoundError}[repo]
        raise kind.__new__(kind)

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", files)
    with listening() as endpoint:
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        with pytest.raises(ModelNotFound, match="no model 'o/none'"):
            resolve("o/none")
        with pytest.raises(ModelNotFound, match="asks for its licence to be accepted"):
            resolve("o/gated")
        with pytest.raises(DownloadError, match="o/broken could not be fetched from the hub: LocalEntryNotFoundError"):
            resolve("o/broken")


def test_misspelt_names_say_the_nearest_and_fetch_nothing() -> None:
    with pytest.raises(ModelNotFound, match=r"no model 'smolm2-135m'; did you mean 'smollm2-135m'\?"):
        find("smolm2-135m")
    with pytest.raises(ModelNotFound, match=r"did you mean 'qwen3-4b'\?"):
        find("qwen3-4bb")
