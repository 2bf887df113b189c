"""What a model is made of, described once: its norms, its projections, and the products that a step computes.

From `describe` derive the names and shapes of checkpoints (models.layout), the names in GGUF files (models.gguf), the
packed weights (models.packed), the layers of the reference (models.torch_decoder) and the kernels' table
(models.native). What a step computes with them is written where it is computed.

A new norm or projection is one line here. Every layer has a Block of its own, so layers may differ. Experts belong into
an `mlp` whose projections have a third axis, and further heads beside `Model.head`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .config import ModelConfig


@dataclass(frozen=True, slots=True)
class Axis:
    """A side of a tensor. The kernels pad each of its heads, or all of it where it has none."""

    size: int
    heads: int = 0


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of a file."""

    name: str  # in a checkpoint
    gguf: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Norm:
    """Weights of an RMS norm."""

    name: str  # in packed weights and in the kernels' table
    source: str  # in a checkpoint
    gguf: str  # in a GGUF file
    axis: Axis

    def tensors(self) -> list[Tensor]:
        return [Tensor(f"{self.source}.weight", f"{self.gguf}.weight", (self.axis.size,))]


@dataclass(frozen=True, slots=True)
class Projection:
    """A matrix of a row for each output."""

    name: str
    source: str
    gguf: str
    outputs: Axis
    inputs: Axis
    bias: bool = False
    rotary: bool = False  # its heads are turned by their positions

    def tensors(self) -> list[Tensor]:
        weight = Tensor(f"{self.source}.weight", f"{self.gguf}.weight", (self.outputs.size, self.inputs.size))
        bias = Tensor(f"{self.source}.bias", f"{self.gguf}.bias", (self.outputs.size,))
        return [weight, bias] if self.bias else [weight]


@dataclass(frozen=True, slots=True)
class Product:
    """Projections of the same rows that are computed as one."""

    name: str
    parts: tuple[Projection, ...]
    in_turn: bool = False  # sixteen outputs of each part in turn; else one part behind the other

    @property
    def bias(self) -> bool:
        return any(part.bias for part in self.parts)


@dataclass(frozen=True, slots=True)
class Sublayer:
    """What is added to the residual stream at once, and left out at once. The first norm is of its input."""

    norms: tuple[Norm, ...]
    products: tuple[Product, ...]

    def names(self) -> set[str]:
        """Of all that is in it, in packed weights."""
        names = {part.name for product in self.products for part in product.parts}
        return names | {product.name for product in self.products} | {norm.name for norm in self.norms}


@dataclass(frozen=True, slots=True)
class Block:
    """A layer."""

    attention: Sublayer
    mlp: Sublayer

    @property
    def norms(self) -> tuple[Norm, ...]:
        return self.attention.norms + self.mlp.norms

    @property
    def products(self) -> tuple[Product, ...]:
        return self.attention.products + self.mlp.products


@dataclass(frozen=True, slots=True)
class Model:
    embedding: Projection  # looked up by rows
    blocks: tuple[Block, ...]
    norm: Norm
    head: Product

    def products(self) -> Iterator[tuple[str, Product]]:
        """The head last; each with what its names begin with in packed weights."""
        for i, block in enumerate(self.blocks):
            yield from ((f"{i}.", product) for product in block.products)
        yield "", self.head

    def norms(self) -> Iterator[tuple[str, Norm]]:
        """The same of norms."""
        for i, block in enumerate(self.blocks):
            yield from ((f"{i}.", norm) for norm in block.norms)
        yield "", self.norm

    def projections(self) -> Iterator[Projection]:
        """The embedding first."""
        yield self.embedding
        for _, product in self.products():
            yield from product.parts

    def tensors(self) -> Iterator[Tensor]:
        """Those of a file. A tied head is the embedding once more."""
        for projection in self.projections():
            yield from projection.tensors()
        for _, norm in self.norms():
            yield from norm.tensors()


def describe(config: ModelConfig) -> Model:
    vocabulary, width = Axis(config.vocab_size), Axis(config.hidden_size)
    embedding = Projection("embedding", "model.embed_tokens", "token_embd", vocabulary, width)
    names = (embedding.source, embedding.gguf) if config.tie_embeddings else ("lm_head", "output")
    return Model(
        embedding,
        tuple(_block(config, i) for i in range(config.num_layers)),
        Norm("norm", "model.norm", "output_norm", width),
        Product("head", (Projection("head", *names, vocabulary, width),)),
    )


def _block(config: ModelConfig, layer: int) -> Block:
    c, at, blk = config, f"model.layers.{layer}.", f"blk.{layer}."
    width, hidden, head = Axis(c.hidden_size), Axis(c.intermediate_size), Axis(c.head_dim, 1)
    queries, keys = Axis(c.num_heads * c.head_dim, c.num_heads), Axis(c.num_kv_heads * c.head_dim, c.num_kv_heads)
    # Where norms follow the sublayers too, "post_attention" is the one behind attention, not the one before the MLP.
    before_mlp = "pre_feedforward_layernorm" if c.post_norms else "post_attention_layernorm"
    norm_1 = Norm("norm_1", at + "input_layernorm", blk + "attn_norm", width)
    q_norm = Norm("q_norm", at + "self_attn.q_norm", blk + "attn_q_norm", head)
    k_norm = Norm("k_norm", at + "self_attn.k_norm", blk + "attn_k_norm", head)
    post_1 = Norm("post_1", at + "post_attention_layernorm", blk + "post_attention_norm", width)
    norm_2 = Norm("norm_2", at + before_mlp, blk + "ffn_norm", width)
    post_2 = Norm("post_2", at + "post_feedforward_layernorm", blk + "post_ffw_norm", width)
    q = Projection("q", at + "self_attn.q_proj", blk + "attn_q", queries, width, c.qkv_bias, rotary=True)
    k = Projection("k", at + "self_attn.k_proj", blk + "attn_k", keys, width, c.qkv_bias, rotary=True)
    v = Projection("v", at + "self_attn.v_proj", blk + "attn_v", keys, width, c.qkv_bias)
    out = Projection("out", at + "self_attn.o_proj", blk + "attn_output", width, queries)
    gate = Projection("gate", at + "mlp.gate_proj", blk + "ffn_gate", hidden, width)
    up = Projection("up", at + "mlp.up_proj", blk + "ffn_up", hidden, width)
    down = Projection("down", at + "mlp.down_proj", blk + "ffn_down", width, hidden)
    attention = Sublayer(
        (norm_1, *((q_norm, k_norm) if c.qk_norm else ()), *((post_1,) if c.post_norms else ())),
        (Product("qkv", (q, k, v)), Product("out", (out,))),
    )
    mlp = Sublayer(
        (norm_2, *((post_2,) if c.post_norms else ())),
        (Product("gate_up", (gate, up), in_turn=True), Product("down", (down,))),
    )
    return Block(attention, mlp)
