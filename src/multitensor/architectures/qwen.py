"""Qwen2 (biases on q, k and v) and Qwen3 (norms on each query and key head instead)."""

from __future__ import annotations

from multitensor.architectures.decoder import declare_tensors, is_tied, read_activation, read_dimensions
from multitensor.architectures.fields import Fields
from multitensor.architectures.naming import canonical_names
from multitensor.architectures.rope import make_rope, read_config_rope, read_gguf_rope
from multitensor.architectures.spec import LayerSpec, ModelSpec
from multitensor.formats.checkpoint import Checkpoint


def declare_qwen2(checkpoint: Checkpoint) -> ModelSpec:
    return _declare(checkpoint, "qwen2", qkv_bias=True, qk_norm=False)


def declare_qwen3(checkpoint: Checkpoint) -> ModelSpec:
    return _declare(checkpoint, "qwen3", qkv_bias=False, qk_norm=True)


def _declare(checkpoint: Checkpoint, architecture: str, *, qkv_bias: bool, qk_norm: bool) -> ModelSpec:
    fields = Fields.of(checkpoint)
    names = canonical_names(checkpoint)
    dims = read_dimensions(checkpoint, fields, names, {"head_dim": 128} if qk_norm else {})
    read_rope = read_gguf_rope if checkpoint.format == "gguf" else read_config_rope
    tied = is_tied(checkpoint, names, fields)
    return ModelSpec(
        architecture=architecture,
        **dims.for_spec(),
        layers=_layers(fields, dims.n_layers),
        ropes=(make_rope(read_rope(fields, dims.head_dim, dims.train_context), "half"),),
        activation=read_activation(fields, "hidden_act", "silu"),
        attention_scale=dims.head_dim**-0.5,
        tied_embeddings=tied,
        tensors=declare_tensors(checkpoint, names, dims, tied=tied, qkv_bias=qkv_bias, qk_norm=qk_norm),
        qk_norm=qk_norm,
    )


def _layers(fields: Fields, count: int) -> tuple[LayerSpec, ...]:
    """Full attention, but for the upper layers where config.json asks for a sliding window (GGUF never does)."""
    if not fields.flag("use_sliding_window", False):
        return (LayerSpec(),) * count
    window = fields.integer("sliding_window", 4096)
    first = fields.integer("max_window_layers", 28, minimum=0)
    return tuple(
        LayerSpec(window if sliding else None)
        for sliding in fields.sliding_layers(count, [layer >= first for layer in range(count)])
    )
