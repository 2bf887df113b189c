"""Models of the Hugging Face hub, in the hub's own cache: folders with safetensors, and single GGUF files.

owner/name               a folder with safetensors, or the usual GGUF file of a repository that has none
owner/name:Q4_K_M        the GGUF file of that quantisation
owner/name:file.gguf     that file
hf:owner/name…           the same, never taken for a path
"""

from __future__ import annotations

import os
import re
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from ..errors import DownloadError, ModelNotFound, UnsupportedModel, did_you_mean
from ..paths import models_dir

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_NAME = re.compile(
    rf"(?P<prefix>hf:|hf\.co/|https://huggingface\.co/)?(?P<repo>{HUB_ID.pattern})(?::(?P<which>[\w./-]+))?"
)
_FILES = ["*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json"]
_FILES += ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"]
#: which GGUF file is meant when nobody says, the first that is there
_USUAL = ("Q4_K_M", "Q8_0", "Q5_K_M", "Q4_0", "Q6_K", "Q4_1", "Q5_0", "Q5_1", "Q4_K_S", "Q5_K_S", "BF16", "F16", "F32")
_PART = re.compile(r"-\d{5}-of-\d{5}\.gguf$", re.I)
_REACH_S = 5.0


@dataclass(frozen=True, slots=True)
class HubName:
    """`which` is a quantisation, a file, or "" for whatever there is; `called` the short name that a person wrote."""

    repo: str
    which: str = ""
    explicit: bool = False  # written with hf: and so no path
    called: str = ""


def parse_hub(name: str) -> HubName | None:
    """None for what is no name of the hub."""
    found = _NAME.fullmatch(name)
    return found and HubName(found["repo"], found["which"] or "", bool(found["prefix"]))


def fetch_hub(name: HubName, refresh: bool = False) -> Path:
    """A folder with safetensors or a GGUF file. What is in the cache whole is used without a network, unless `refresh`.

    Raises ModelNotFound if the hub has no such model,
    UnsupportedModel for a GGUF in several files, DownloadError for anything else that fails.
    """
    if not refresh and (found := cached_hub(name)):
        return found
    _check_reachable(name)
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    repo = name.repo
    try:
        files = HfApi().list_repo_files(repo)
        if name.which or not any(f.endswith(".safetensors") for f in files):
            return Path(hf_hub_download(repo, choose(files, name)))
        return Path(snapshot_download(repo, allow_patterns=_FILES, ignore_patterns=["*/*"]))
    except GatedRepoError as e:
        raise ModelNotFound(
            f"{repo} asks for its licence to be accepted: do so at {_endpoint()}/{repo}, then set HF_TOKEN or run "
            "`hf auth login`"
        ) from e
    except RepositoryNotFoundError as e:
        raise ModelNotFound(f"the hub has no model {repo!r} that you may read (private ones need a token)") from e
    except (ModelNotFound, UnsupportedModel):
        raise
    except Exception as e:  # the hub's client raises many kinds, of several libraries
        reason = " ".join(str(e).split())[:300]
        raise DownloadError(f"{repo} could not be fetched from the hub: {type(e).__name__}: {reason}") from e


def choose(files: Sequence[str], name: HubName) -> str:
    """The GGUF file that is meant among those of a repository. Raises ModelNotFound or UnsupportedModel."""
    all_of_them = [f for f in files if f.lower().endswith(".gguf") and "mmproj" not in f.lower()]
    if not all_of_them:
        raise ModelNotFound(f"{name.repo} has neither safetensors nor GGUF files" + _no_which(name))
    wanted = [name.which] if name.which else [*_USUAL]
    for which in wanted:
        fits = [f for f in all_of_them if _fits(f, which)]
        whole = [f for f in fits if not _PART.search(f)]
        if whole:
            return min(whole, key=lambda f: (len(f), f))
        if fits and name.which:
            raise UnsupportedModel(
                f"{name.repo}: {which} is in {len(fits)} files; join them by llama.cpp's llama-gguf-split --merge, and "
                "name the file"
            )
    if not name.which and len(all_of_them) == 1 and not _PART.search(all_of_them[0]):
        return all_of_them[0]
    kinds = sorted({_kind(f) for f in all_of_them if not _PART.search(f)})
    near = did_you_mean(name.which, kinds) if name.which else ""
    raise ModelNotFound(
        f"{name.repo} has no {name.which or 'usual'} GGUF file; {near}there are: {', '.join(kinds)}, as in "
        f"{name.repo}:{kinds[0] if kinds else 'FILE.gguf'}"
    )


def _no_which(name: HubName) -> str:
    return f": leave :{name.which} out" if name.which else ""


def _fits(file: str, which: str) -> bool:
    if which.lower().endswith(".gguf"):
        return file == which
    return re.search(rf"(^|[-._/]){re.escape(which)}([-.]|$)", file, re.I) is not None


def _kind(file: str) -> str:
    """The quantisation in a file's name, or the name."""
    found = re.search(r"(?:^|[-._])((?:I?Q\d\w*|B?F16|F32))\.gguf$", file, re.I)
    return found[1].upper() if found else file


def cached_hub(name: HubName) -> Path | None:
    """What is in the hub's cache whole, with no network."""
    from huggingface_hub import snapshot_download

    from .safetensors import weight_files

    try:
        folder = Path(snapshot_download(name.repo, allow_patterns=[*_FILES, "*.gguf"], local_files_only=True))
    except Exception:  # not cached: the caller asks the hub
        return None
    if not name.which:
        try:
            if (folder / "config.json").exists() and all(f.exists() for f in weight_files(folder)):
                return folder
        except Exception:  # not complete
            pass
    there = [str(f.relative_to(folder)) for f in folder.rglob("*.gguf") if f.exists()]
    try:
        return folder / choose(there, name)
    except (ModelNotFound, UnsupportedModel):
        return None


def _endpoint() -> str:
    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or "https://huggingface.co"


def _check_reachable(name: HubName) -> None:
    """Raises DownloadError at once where there is no way to the hub, whose client would try for a minute."""
    from huggingface_hub import constants

    place = models_dir() / f"{name.called or name.repo.rpartition('/')[2].lower().removesuffix('-gguf')}.gguf"
    advice = (
        f"where there is a network, fetch a GGUF file of it from {_endpoint()}/{name.repo}; put it to {place} and use "
        f"-m {place.stem}, or name any file by -m FILE.gguf"
    )
    if constants.HF_HUB_OFFLINE:
        raise DownloadError(f"{name.repo} is not on this machine, and HF_HUB_OFFLINE forbids to ask the hub: {advice}")
    proxies = ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")
    if any(os.environ.get(proxy) for proxy in proxies):  # then the way leads elsewhere
        return
    url = urlsplit(_endpoint())
    host, port = url.hostname or "", url.port or (80 if url.scheme == "http" else 443)
    try:
        socket.create_connection((host, port), _REACH_S).close()
    except OSError as error:
        reason = error.strerror or str(error) or "no answer"
        raise DownloadError(
            f"{name.repo} is not on this machine, and {host} cannot be reached ({reason}): {advice}"
        ) from None
