"""The loop that trains a head: one text after the other, a step of the optimizer for each, a checkpoint every minute.

Small budgets want many small steps: four texts a step gave fewer accepted tokens than one at equal numbers of tokens.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..errors import ParameterError
from .features import Example, Features

Progress = Callable[[str, float, float], None]
_MAY_CHANGE = {"visits", "test_every", "keep_every"}  # between two starts of one training
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # what AdamW keeps of each tensor


@dataclass(frozen=True)
class Recipe:
    """How to train. `visits`: tokens of answers seen, repeated ones counted again."""

    visits: int = 4_000_000
    rate: float = 1e-3
    warm_up: int = 50  # steps
    anchors: int = 3  # one in so many places of an answer is drafted from, each time others
    held_out: int = 50  # one in so many prompts is never trained on
    test_texts: int = 24
    test_every: int = 100_000  # visits
    keep_every: float = 60.0  # seconds between checkpoints
    seed: int = 0


@dataclass
class State:
    """Where a training is; with the tensors beside it, all that the next start needs."""

    step: int = 0
    visits: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)  # of the tests on held-out texts


def parted(features: Features, recipe: Recipe) -> tuple[list[int], list[int]]:
    """Which texts are trained on, and which are held out: by their prompts, so that no prompt is among both."""
    sides: tuple[list[int], list[int]] = [], []
    for i in range(len(features)):
        tokens, prompt = features.tokens(i)
        digest = sha256(np.array(tokens[:prompt], dtype=np.int64).tobytes()).digest()
        sides[int.from_bytes(digest[:8], "little") % recipe.held_out == 0].append(i)
    return sides


def hot_tokens(texts: Iterable[tuple[list[int], int]], vocab_size: int, most: int) -> Tensor:
    """The `most` tokens that the target writes most often, ascending; ids in order fill up. i64[V]. A text is its
    tokens and where its answer begins."""
    counts: Counter[int] = Counter()
    for tokens, prompt in texts:
        counts.update(tokens[prompt:])
        counts.update(set(tokens[:prompt]))
    ranked = [token for token, _ in counts.most_common(most)]
    rest = (token for token in range(vocab_size) if token not in counts)
    ranked += [token for _, token in zip(range(most - len(ranked)), rest, strict=False)]
    return torch.tensor(sorted(ranked))


Loss = Callable[[Any, Tensor, Tensor, Tensor], Tensor]
Hits = Callable[[Any, Tensor, Tensor, Tensor], "np.ndarray[Any, np.dtype[np.bool_]]"]


class Trainer:
    """Trains `net` on a folder of features, in `folder`; one that was begun goes on."""

    def __init__(
        self, net: nn.Module, block: int, loss: Loss, hits: Hits, features: Features, recipe: Recipe, folder: Path
    ) -> None:
        self.net, self.block, self.loss, self.hits = net, block, loss, hits
        self.features, self.recipe, self.folder = features, recipe, folder
        self.state = State()
        betas = (0.9, 0.95)
        self.optimizer = torch.optim.AdamW(net.parameters(), recipe.rate, betas, weight_decay=0.0, fused=True)
        self.train_on, held = parted(features, recipe)
        self.test = held[: recipe.test_texts]
        if not self.train_on or not self.test:
            raise ParameterError(
                f"{len(features)} texts are too few to train on and to hold some out: write more of them"
            )
        folder.mkdir(parents=True, exist_ok=True)
        self._load()

    def run(self, progress: Progress | None = None) -> State:
        """Until all visits are done. Ctrl-C leaves the last checkpoint."""
        recipe, state = self.recipe, self.state
        kept, said, value = time.monotonic(), "", torch.tensor(math.nan)
        while state.visits < recipe.visits:
            one = self._example(state.step)
            rising = min(1.0, (state.step + 1) / recipe.warm_up)
            rate = recipe.rate * rising * (0.05 + 0.475 * (1 + math.cos(math.pi * state.visits / recipe.visits)))
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            if (anchors := self._anchors(one, state.step)) is not None:
                tokens, rows = torch.from_numpy(one.tokens), torch.from_numpy(one.features).float()
                value = self.loss(self.net, tokens, rows, anchors)
                self.optimizer.zero_grad()
                value.backward()
                nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
                self.optimizer.step()
            before = state.visits // recipe.test_every
            state.step, state.visits = state.step + 1, state.visits + len(one.tokens) - one.prompt
            if state.visits // recipe.test_every > before or state.visits >= recipe.visits:
                state.history.append({"visits": state.visits, "loss": value.item(), **self.tested()})
                said = f", held out: {state.history[-1]['tokens_per_step']:.2f} tokens a step"
            if time.monotonic() - kept > recipe.keep_every or state.visits >= recipe.visits:
                self.keep()
                kept = time.monotonic()
            if progress is not None:
                progress(f"training{said}: visits", state.visits, recipe.visits)
        return state

    def tested(self) -> dict[str, Any]:
        """Held-out texts: how often each slot is right, and tokens a step of a greedy chain with the target's one."""
        found = []
        for i in self.test:
            one = self.features[i]
            last = len(one.tokens) - self.block - 1
            if last > one.prompt:
                tokens, rows = torch.from_numpy(one.tokens), torch.from_numpy(one.features).float()
                found.append(self.hits(self.net, tokens, rows, torch.arange(one.prompt, last)))
        right = np.concatenate(found)
        chain = np.cumprod(right, axis=1).sum(axis=1)
        by_slot = [round(float(h), 4) for h in right.mean(axis=0)]
        return {"hits": by_slot, "tokens_per_step": round(1 + float(chain.mean()), 4)}

    def _example(self, step: int) -> Example:
        """Each epoch in another order, which depends on the seed and the step alone."""
        epoch, place = divmod(step, len(self.train_on))
        order = np.random.default_rng((self.recipe.seed, epoch)).permutation(len(self.train_on))
        return self.features[self.train_on[order[place]]]

    def _anchors(self, one: Example, step: int) -> Tensor | None:
        first, last = max(one.prompt - 1, 1), len(one.tokens) - self.block - 1
        if last <= first:
            return None
        rng = np.random.default_rng((self.recipe.seed, step, 1))
        count = max(4, (last - first) // self.recipe.anchors)
        places = rng.permutation(np.arange(first, last))[:count]
        return torch.from_numpy(np.sort(places))

    # -- on disk -------------------------------------------------------------------------------------------------

    @property
    def _checkpoint(self) -> Path:
        return self.folder / "checkpoint.safetensors"

    def keep(self) -> None:
        """Write a checkpoint beside the old one and put it in its place: a kill leaves one of the two."""
        tensors = {f"net.{name}": value.detach().contiguous() for name, value in self.net.named_parameters()}
        for name, value in self.net.named_parameters():
            for key in _MOMENTS:
                if value in self.optimizer.state:
                    tensors[f"{key}.{name}"] = self.optimizer.state[value][key].contiguous()
        new = self._checkpoint.with_suffix(".new")
        save_file(tensors, new, {"state": json.dumps(asdict(self.state)), "recipe": json.dumps(asdict(self.recipe))})
        os.replace(new, self._checkpoint)

    def _load(self) -> None:
        if not self._checkpoint.exists():
            return
        with safe_open(self._checkpoint, "pt") as file:
            about = file.metadata()
            names, held = {name for name, _ in self.net.named_parameters()}, set(file.keys())
            if about is None or {key[4:] for key in held if key.startswith("net.")} != names:
                raise ParameterError(f"{self._checkpoint} is of another head: name another folder")
            before, now = json.loads(about["recipe"]), asdict(self.recipe)
            for name in now.keys() - _MAY_CHANGE:
                if before.get(name) != now[name]:
                    raise ParameterError(
                        f"{self.folder} was begun with {name}={before.get(name)}, not {now[name]}: go on with the "
                        "same, or name another folder"
                    )
            for name, value in self.net.named_parameters():
                if (shape := tuple(file.get_slice(f"net.{name}").get_shape())) != tuple(value.shape):
                    raise ParameterError(
                        f"{self._checkpoint} has {name} of shape {shape}, not {tuple(value.shape)}: go on with the "
                        "same block, rank, layers and hot tokens, or name another folder"
                    )
            self.state = State(**json.loads(about["state"]))
            for name, value in self.net.named_parameters():
                with torch.no_grad():
                    value.copy_(file.get_tensor(f"net.{name}"))
                if f"exp_avg.{name}" in held:
                    self.optimizer.state[value] = {key: file.get_tensor(f"{key}.{name}") for key in _MOMENTS}
