"""Models of the Hugging Face hub, by their id `owner/name`, as a local folder in the hub's own cache."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from ..errors import DownloadError, ModelNotFound

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_FILES = ["*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json"]
_FILES += ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"]


def fetch_hub(repo: str, refresh: bool = False) -> Path:
    """The folder of a snapshot. A complete one in the cache is used without asking the hub, unless `refresh`.

    Raises ModelNotFound if the hub has no such model, DownloadError for anything else that fails.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError
    from huggingface_hub.utils import disable_progress_bars

    if not refresh and (folder := cached_hub(repo)):
        return folder
    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        return Path(snapshot_download(repo, allow_patterns=_FILES, ignore_patterns=["*/*"]))
    except RepositoryNotFoundError as e:
        raise ModelNotFound(f"the hub has no model {repo!r} that you may read (private ones need a token)") from e
    except LocalEntryNotFoundError as e:
        raise DownloadError(
            f"{repo} is not in the hub's cache and the hub cannot be reached; check the network (and HF_HUB_OFFLINE)"
        ) from e
    except Exception as e:  # the hub's client raises many kinds, of several libraries
        reason = " ".join(str(e).split())[:300]
        raise DownloadError(f"{repo} could not be fetched from the hub: {type(e).__name__}: {reason}") from e


def cached_hub(repo: str) -> Path | None:
    """The folder of a complete snapshot that is in the hub's cache; no network."""
    from huggingface_hub import snapshot_download

    from .safetensors import weight_files

    try:
        folder = Path(snapshot_download(repo, allow_patterns=_FILES, local_files_only=True))
        complete = (folder / "config.json").exists() and all(f.exists() for f in weight_files(folder))
    except Exception:  # not cached, or not complete: the caller asks the hub
        return None
    return folder if complete else None
