"""Where models, what is made of them, settings and conversations are kept."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """$OUTPACE_CACHE, else $XDG_CACHE_HOME/outpace, else ~/.cache/outpace."""
    if own := os.environ.get("OUTPACE_CACHE"):
        return Path(own).expanduser()
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        return Path(xdg).expanduser() / "outpace"
    return Path("~/.cache/outpace").expanduser()


def models_dir() -> Path:
    """$OUTPACE_MODELS, else `models` in the cache."""
    own = os.environ.get("OUTPACE_MODELS")
    return Path(own).expanduser() if own else cache_dir() / "models"


def prepared_dir() -> Path:
    """One folder for each model that has been opened: configuration, tokenizer, packed weights."""
    return cache_dir() / "prepared"


def config_file() -> Path:
    """$OUTPACE_CONFIG, else `outpace/config.toml` in $XDG_CONFIG_HOME or ~/.config."""
    if own := os.environ.get("OUTPACE_CONFIG"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config").expanduser() / "outpace" / "config.toml"


def state_dir() -> Path:
    """What a person typed: $OUTPACE_STATE, else `outpace` in $XDG_STATE_HOME or ~/.local/state."""
    if own := os.environ.get("OUTPACE_STATE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state").expanduser() / "outpace"
