"""The network of the block head, in torch: for training, and as the reference of what `decoding/heads/spark.py` runs.

A small causal decoder reads what the target's hidden states say of each token of the text, one row a token, and then
`block` slots, rows of their own, one for each of the next tokens: all of a draft in one pass. What a slot cannot know
is the token that was drafted before it; an edge of low rank adds that to its logits (the Markov head of DSpark).

Shapes: `T` tokens of a text, `L` tapped layers, `D` width, `A` anchors (last tokens to draft behind), `G` slots, `V`
hot vocabulary, `R` rank of the edge.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..models.config import ModelConfig, rope_inv_freq


@dataclass(frozen=True)
class SparkConfig:
    """A block head. DFlash (arXiv:2602.06036) and DSpark (arXiv:2607.05147): 5 to 6 accepted tokens on mathematics, 3
    on chat, with five layers and over a million answers.

    Parameters: `taps` layers of the target after which its residual stream is read; `layers` of the head; `block`
    slots; `rank` of the edge.
    """

    taps: tuple[int, ...] = (14, 26, 29)
    layers: int = 1
    block: int = 6
    rank: int = 128


def rms(x: Tensor, weight: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    scaled = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    return scaled if weight is None else scaled * weight


class Layer(nn.Module):
    """One layer of the target's own shape, without biases."""

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        d, c = model.hidden_size, model.head_dim
        self.heads, self.kv_heads, self.c, self.eps = model.num_heads, model.num_kv_heads, c, model.rms_norm_eps
        sizes = {"q": (self.heads * c, d), "k": (self.kv_heads * c, d), "v": (self.kv_heads * c, d)}
        sizes |= {"o": (d, self.heads * c), "gate": (model.intermediate_size, d), "up": (model.intermediate_size, d)}
        sizes |= {"down": (d, model.intermediate_size)}
        for name, (rows, columns) in sizes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(rows, columns) * columns**-0.5))
        self.norm1, self.norm2 = nn.Parameter(torch.ones(d)), nn.Parameter(torch.ones(d))

    def forward(self, context: Tensor, slots: Tensor, anchors: Tensor, rope: tuple[Tensor, Tensor], last: bool) -> Any:
        """context f32[T, D], slots f32[A, G, D], anchors i64[A]: the place of each block's first slot. Returns both,
        further on; the context only if there is another layer to read it."""
        t, (a, g, d) = len(context), slots.shape
        rows, groups = torch.cat([context, slots.reshape(a * g, d)]), self.heads // self.kv_heads
        x = rms(rows, self.norm1, self.eps)
        places = torch.cat([torch.arange(t), (anchors[:, None] + torch.arange(g)).reshape(-1)])
        k = rotated((x @ self.k.T).view(-1, self.kv_heads, self.c), places, rope)
        v = (x @ self.v.T).view(-1, self.kv_heads, self.c)
        kc, vc = (y[:t].repeat_interleave(groups, 1) for y in (k, v))
        ks, vs = (y[t:].view(a, g, self.kv_heads, self.c).repeat_interleave(groups, 2) for y in (k, v))
        first = t if last else 0
        q = rotated((x[first:] @ self.q.T).view(-1, self.heads, self.c), places[first:], rope) * self.c**-0.5
        qs = q[t - first :].view(a, g, self.heads, self.c)
        seen = (torch.arange(t) >= anchors[:, None])[None, :, None]  # [1, A, 1, T]
        old = torch.einsum("aghc,thc->hagt", qs, kc).masked_fill(seen, -torch.inf)
        own = torch.einsum("aghc,akhc->hagk", qs, ks).masked_fill(~torch.ones(g, g).tril().bool(), -torch.inf)
        weights = torch.softmax(torch.cat([old, own], -1), -1)
        mixed = torch.einsum("hagt,thc->aghc", weights[..., :t], vc)
        mixed = (mixed + torch.einsum("hagk,akhc->aghc", weights[..., t:], vs)).reshape(a * g, -1)
        if not last:
            scores = torch.einsum("qhc,thc->hqt", q[:t], kc).masked_fill(~torch.ones(t, t).tril().bool(), -torch.inf)
            mixed = torch.cat([torch.einsum("hqt,thc->qhc", torch.softmax(scores, -1), vc).reshape(t, -1), mixed])
        y = rows[first:] + mixed @ self.o.T
        x = rms(y, self.norm2, self.eps)
        y = y + (F.silu(x @ self.gate.T) * (x @ self.up.T)) @ self.down.T
        return (None if last else y[:t]), y[t - first :].view(a, g, d)


def rotated(x: Tensor, places: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """x f32[N, H, C] turned by its places; the halves of a head are the two parts of each pair."""
    cos, sin = (table[places][:, None] for table in rope)
    half = x.shape[-1] // 2
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class Spark(nn.Module):
    """Frozen from the target: `embed` f32[all, D], its hot rows `head` f32[V, D], its final norm for the teacher."""

    hot: Tensor
    embed: Tensor
    head: Tensor
    teacher_norm: Tensor

    def __init__(self, config: SparkConfig, model: ModelConfig, embed: Tensor, hot: Tensor, final_norm: Tensor) -> None:
        super().__init__()
        d, width = model.hidden_size, len(config.taps) * model.hidden_size
        self.config, self.model = config, model
        self.register_buffer("hot", hot, persistent=False)
        self.register_buffer("embed", embed, persistent=False)
        self.register_buffer("head", embed[hot].contiguous(), persistent=False)
        self.register_buffer("teacher_norm", final_norm, persistent=False)
        angles = torch.arange(model.max_position)[:, None] * torch.from_numpy(rope_inv_freq(model, "full"))
        self.rope = angles.cos().float(), angles.sin().float()
        self.fuse = nn.Parameter(torch.randn(d, width) * 0.1 * width**-0.5)
        self.token = nn.Parameter(torch.eye(d))
        self.slots = nn.Parameter(torch.randn(config.block, d) * 0.02)
        self.each_layer = [Layer(model) for _ in range(config.layers)]
        self.layers = nn.ModuleList(self.each_layer)
        self.norm = nn.Parameter(final_norm.clone())
        self.prev = nn.Parameter(torch.randn(config.rank, d) * d**-0.5)
        self.gate = nn.Parameter(torch.randn(config.rank, d) * d**-0.5)
        self.edge = nn.Parameter(torch.randn(len(hot), config.rank) * 0.02)
        with torch.no_grad():
            for i in range(len(config.taps)):
                part = 0.6 if i == len(config.taps) - 1 else 0.2
                self.fuse[:, i * d : (i + 1) * d] += part * torch.eye(d)

    def fused(self, features: Tensor) -> Tensor:
        """f32[T, L, D] -> f32[T, D]: what the head reads of each token."""
        return rms(rms(features).flatten(1) @ self.fuse.T)

    def forward(
        self, tokens: Tensor, features: Tensor, anchors: Tensor, rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """What the slots behind each anchor say: hidden states f32[A, G, D] and logits f32[A, G, V] of the tokens that
        follow, given the true ones before them; of some `rows` of the hot vocabulary alone if they are given. tokens
        i64[T]; an anchor is the place of a last token, above 0."""
        context = self.fused(features)
        first = context[anchors - 1] + self.embed[tokens[anchors]] @ self.token.T
        x = first[:, None] + self.slots
        for layer in self.each_layer:
            context, x = layer(context, x, anchors, self.rope, layer is self.each_layer[-1])
        y = rms(x, self.norm, self.model.rms_norm_eps)
        before = tokens[anchors[:, None] + torch.arange(self.config.block)]
        head, edge = (self.head, self.edge) if rows is None else (self.head[rows], self.edge[rows])
        return y, y @ head.T + self.edges(y, before) @ edge.T

    def edges(self, y: Tensor, before: Tensor) -> Tensor:
        """What the token before a slot adds, as coefficients of `edge`. f32[..., R]"""
        return (rms(self.embed[before]) @ self.prev.T) * torch.sigmoid(y @ self.gate.T)

    def teacher(self, features: Tensor) -> Tensor:
        """The target's logits of the hot vocabulary after each token. f32[T, V]"""
        return rms(features[:, -1], self.teacher_norm, self.model.rms_norm_eps) @ self.head.T


#: Rows of the hot vocabulary that a step trains on: the likely ones of its text and others by chance. All of them
#: would take twice the time.
SOME_ROWS, LIKELY = 2048, 4


def loss(net: Spark, tokens: Tensor, features: Tensor, anchors: Tensor) -> Tensor:
    """Cross entropy against the target's own distributions, later slots with less weight: they are reached less often.

    The rows of the vocabulary that are there by chance stand for all the others, so their logits are raised by the log
    of how many each stands for.
    """
    slots, size = torch.arange(net.config.block), len(net.hot)
    with torch.no_grad():
        first = int(anchors.min())
        teacher = net.teacher(features[first:])
        likely = torch.unique(teacher.topk(LIKELY).indices)
        chance = torch.ones(size)
        chance[likely] = 0
        others = torch.multinomial(chance, min(max(SOME_ROWS - len(likely), 64), size - len(likely)))
        rows = torch.cat([likely, others])
        raised = torch.zeros(len(rows))
        raised[len(likely) :] = math.log((size - len(likely)) / len(others))
        goal = torch.softmax(teacher[:, rows] + raised, -1)[anchors[:, None] + slots - first]
    _, logits = net(tokens, features, anchors, rows)
    entropy = -(goal * torch.log_softmax(logits + raised, -1)).sum(-1)
    weight = torch.exp(-slots / 4)
    return (entropy * weight).sum() / weight.sum() / len(anchors)


@torch.no_grad()
def hits(net: Spark, tokens: Tensor, features: Tensor, anchors: Tensor) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Whether each slot's likeliest token is the text's, given the true tokens before it. bool[A, G]"""
    _, logits = net(tokens, features, anchors)
    found = net.hot[logits.argmax(-1)]
    return np.asarray(found == tokens[anchors[:, None] + 1 + torch.arange(net.config.block)])
