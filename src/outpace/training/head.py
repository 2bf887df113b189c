"""From texts to a head's file: hidden states, training, the file with its card and its check."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from ..engine.llm import LLM
from ..errors import ParameterError
from ..models.heads import Check, HeadConfig, target_of, write
from ..models.prepared import open_model
from . import corpus
from .features import Features, Meta
from .spark import Spark, SparkConfig, hits, loss
from .trainer import Recipe, State, Trainer, hot_tokens, parted

Progress = Callable[[str, float, float], None]

_CHECKED = 72  # tokens of the answer that goes into the file
_INIT = (  # parts of a layer, where they are in the target's last one, and how much of them to begin with
    ("q", "self_attn.q_proj", 1.0),
    ("k", "self_attn.k_proj", 1.0),
    ("v", "self_attn.v_proj", 1.0),
    ("o", "self_attn.o_proj", 0.5),
    ("gate", "mlp.gate_proj", 1.0),
    ("up", "mlp.up_proj", 1.0),
    ("down", "mlp.down_proj", 0.3),
    ("norm1", "input_layernorm", 1.0),
    ("norm2", "post_attention_layernorm", 1.0),
)


@dataclass(frozen=True)
class HeadPlan:
    """What to train. `hot`: tokens that it can propose; the others as in SparkConfig."""

    layers: int = 1
    block: int = 6
    rank: int = 128
    hot: int = 8192
    recipe: Recipe = field(default_factory=Recipe)
    threads: int | None = None


def train_head(model: str, texts: Path, folder: Path, plan: HeadPlan, progress: Progress | None = None) -> Path:
    """Train a head for `model` on its own `texts` and return its file, `folder`/head.safetensors, which is there from
    the first test on held-out texts. A folder in which a training was begun goes on.

    Raises ParameterError for too few texts, or a folder of another training; ModelError for a model that cannot be had.
    """
    torch.manual_seed(plan.recipe.seed)
    features = _features(model, texts, folder, plan, progress)
    if plan.threads is not None:
        torch.set_num_threads(plan.threads)
    net = new_net(model, _hot(features, folder, plan, model), features.meta.layers, plan)
    trainer = Trainer(net, net.config.block, loss, hits, features, plan.recipe, folder)
    out, tested = folder / "head.safetensors", [len(trainer.state.history)]

    def told(what: str, done: float, total: float) -> None:
        if len(trainer.state.history) > tested[0]:
            tested[0] = len(trainer.state.history)
            export(out, model, net, trainer)
        if progress is not None:
            progress(what, done, total)

    trainer.run(told)
    export(out, model, net, trainer)
    return out


def _features(model: str, texts: Path, folder: Path, plan: HeadPlan, progress: Progress | None) -> Features:
    wanted = list(corpus.read(texts))
    with LLM(model, method="plain", threads=plan.threads, max_batch=1, progress=progress) as llm:
        layers, width = llm.config.num_layers, llm.config.hidden_size
        taps = sorted({max(layers // 2 - 1, 0), max(layers - 4, 0), layers - 1})  # the head reads the last one
        highest = max((max(text.tokens) for text in wanted), default=0)
        if highest >= llm.config.vocab_size:
            size = llm.config.vocab_size
            raise ParameterError(f"{texts} has token {highest}, {llm.name} has {size}: it is of another model")
        found = Features(folder / "features", Meta(llm.name, llm.precision, tuple(taps), width))
        found.add(
            llm.decoder,
            wanted,
            None if progress is None else lambda n: progress("hidden states: texts", n, len(wanted)),
        )
    return found


def _hot(features: Features, folder: Path, plan: HeadPlan, model: str) -> torch.Tensor:
    """Chosen once for a training."""
    kept = folder / "hot.json"
    if kept.exists():
        found = json.loads(kept.read_text(encoding="utf-8"))
        if len(found) != plan.hot:
            raise ParameterError(f"{folder} was begun with hot={len(found)}: go on with it, or name another folder")
        return torch.tensor(found)
    total = open_model(model).config.vocab_size
    if plan.hot > total:
        raise ParameterError(f"hot={plan.hot} is more than the model's vocabulary of {total} tokens")
    train_on, _ = parted(features, plan.recipe)
    hot = hot_tokens(map(features.tokens, train_on), total, plan.hot)
    kept.write_text(json.dumps(hot.tolist()), encoding="utf-8")
    return hot


def new_net(model: str, hot: torch.Tensor, taps: tuple[int, ...], plan: HeadPlan) -> Spark:
    """A head that begins from the target's last layer, its embedding and its norm."""
    opened = open_model(model)
    checkpoint, config = opened.checkpoint(), opened.config
    if not config.tie_embeddings:
        raise ParameterError(f"{opened.name} has an output head of its own; heads for it cannot be trained yet")

    def tensor(name: str) -> torch.Tensor:
        return torch.from_numpy(np.array(checkpoint.tensor(name), dtype=np.float32))

    chosen = SparkConfig(tuple(taps), plan.layers, plan.block, plan.rank)
    plain = replace(config, qkv_bias=False, qk_norm=False, rope_local_theta=None)
    net = Spark(chosen, plain, tensor("model.embed_tokens.weight"), hot, tensor("model.norm.weight"))
    with torch.no_grad():
        for i, layer in enumerate(net.each_layer):
            source = config.num_layers - len(net.layers) + i
            for part, name, share in _INIT:
                getattr(layer, part).copy_(share * tensor(f"model.layers.{source}.{name}.weight"))
    return net


def export(path: Path, model: str, net: Spark, trainer: Trainer) -> None:
    """The file, with what it was trained on and a text on which its hits were counted."""
    one = trainer.features[trainer.test[0]]
    end = min(len(one.tokens), one.prompt + _CHECKED)
    tokens, rows = torch.from_numpy(one.tokens[:end]), torch.from_numpy(one.features[:end]).float()
    anchors = torch.arange(one.prompt, end - net.config.block - 1)
    right = hits(net, tokens, rows, anchors).mean(axis=0)
    state: State = trainer.state
    trained = {"visits": state.visits, "texts": len(trainer.train_on), "recipe": asdict(trainer.recipe)}
    trained |= {"held_out": state.history[-1] if state.history else {}}
    check = Check(tuple(tokens.tolist()), one.prompt, tuple(round(float(h), 4) for h in right))
    c = net.config
    about = HeadConfig("spark", c.taps, c.layers, c.block, c.rank, target_of(model, net.model), trained, check)
    arrays = {name: value.detach().numpy() for name, value in net.named_parameters()}
    write(path, about, net.hot.numpy(), arrays)
