"""Which tensors a model must have, and of what shape: every loader checks its file against this.

Shapes: `V` vocabulary, `D` model width, `F` MLP width, `Hq`/`Hkv` query/KV heads, `C` head width.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ..errors import CorruptModel, UnsupportedModel
from .config import ModelConfig

Shape = tuple[int, ...]


def expected_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Canonical name -> shape of every tensor that a checkpoint of this configuration holds."""
    width = config.hidden_size
    shapes: dict[str, Shape] = {
        "model.embed_tokens.weight": (config.vocab_size, width),
        "model.norm.weight": (width,),
    }
    if not config.tie_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, width)
    block = _block_shapes(config)
    for layer in range(config.num_layers):
        shapes.update({f"model.layers.{layer}.{name}": shape for name, shape in block.items()})
    return shapes


def _block_shapes(config: ModelConfig) -> dict[str, Shape]:
    width, mlp = config.hidden_size, config.intermediate_size
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes: dict[str, Shape] = {
        "self_attn.q_proj.weight": (q, width),
        "self_attn.k_proj.weight": (kv, width),
        "self_attn.v_proj.weight": (kv, width),
        "self_attn.o_proj.weight": (width, q),
        "mlp.gate_proj.weight": (mlp, width),
        "mlp.up_proj.weight": (mlp, width),
        "mlp.down_proj.weight": (width, mlp),
        "input_layernorm.weight": (width,),
        "post_attention_layernorm.weight": (width,),
    }
    if config.qkv_bias:
        shapes |= {
            "self_attn.q_proj.bias": (q,),
            "self_attn.k_proj.bias": (kv,),
            "self_attn.v_proj.bias": (kv,),
        }
    if config.qk_norm:
        shapes |= {f"self_attn.{p}_norm.weight": (config.head_dim,) for p in "qk"}
    if config.post_norms:
        shapes |= {f"{p}_feedforward_layernorm.weight": (width,) for p in ("pre", "post")}
    return shapes


def check_layout(source: str, config: ModelConfig, found: Mapping[str, Shape], unknown: Iterable[str] = ()) -> None:
    """Raises CorruptModel for a missing tensor or a wrong shape, UnsupportedModel for one that has no place.

    `unknown` are tensors of the file that have no canonical name.
    """
    expected = expected_shapes(config)
    if missing := [name for name in expected if name not in found]:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise CorruptModel(f"{source}: tensors are missing: {', '.join(missing[:3])}{more}")
    for name, shape in expected.items():
        if tuple(found[name]) != shape:
            raise CorruptModel(
                f"{source}: {name} has the shape {tuple(found[name])}, the configuration asks for {shape}"
            )
    if extra := sorted(set(unknown) | (set(found) - set(expected))):
        raise UnsupportedModel(
            f"{source}: tensors that a {config.architecture} model does not have here: {', '.join(extra[:3])}"
            f"{' …' if len(extra) > 3 else ''}; ignoring them would change what the model says"
        )
