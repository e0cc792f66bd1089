"""Gemma 3: five layers with a sliding window to one with full attention, norms on both sides of each sub-layer and
on each query and key head, embeddings scaled by the square root of the hidden size."""

from __future__ import annotations

from collections.abc import Mapping

from multitensor.architectures.decoder import Dimensions, declare_tensors, is_tied, read_activation, read_dimensions
from multitensor.architectures.fields import Fields
from multitensor.architectures.naming import SANDWICH_NORMS, canonical_names
from multitensor.architectures.rope import RopeParameters, make_rope, read_config_rope, read_gguf_rope
from multitensor.architectures.spec import LayerSpec, ModelSpec, RopeSpec
from multitensor.errors import InputError
from multitensor.formats.checkpoint import Checkpoint

_PATTERN = 6  # every sixth layer sees everything
_LOCAL_BASE, _GLOBAL_BASE = 10_000.0, 1_000_000.0
_LAYERS_27B = 62
# Values that config.json may leave out: the defaults of Gemma 3's text configuration.
_DEFAULTS = {
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131072,
}


def declare_gemma3(checkpoint: Checkpoint) -> ModelSpec:
    fields = Fields.of(checkpoint, "text_config")
    if fields.flag("use_bidirectional_attention", False):
        raise InputError(f"{checkpoint.path.name}: Gemma 3 with bidirectional attention is not supported")
    names = canonical_names(checkpoint, SANDWICH_NORMS)
    dims = read_dimensions(checkpoint, fields, names, _DEFAULTS)
    from_gguf = checkpoint.format == "gguf"
    tied = is_tied(checkpoint, names, fields)
    return ModelSpec(
        architecture="gemma3",
        **dims.for_spec(),
        layers=_layers(fields, dims.n_layers, None if from_gguf else 4096),
        ropes=_gguf_ropes(fields, dims) if from_gguf else _config_ropes(fields, dims),
        activation=read_activation(fields, "hidden_activation", "gelu_pytorch_tanh"),
        attention_scale=_attention_scale(fields, dims, from_gguf),
        tied_embeddings=tied,
        tensors=declare_tensors(checkpoint, names, dims, tied=tied, qk_norm=True, post_norms=True),
        # The converter to GGUF adds the 1 that Hugging Face's norms add when they run.
        norm_offset=0.0 if from_gguf else 1.0,
        embedding_scale=dims.hidden_size**0.5,
        qk_norm=True,
        post_norms=True,
        # Gemma 2's cap on attention scores has a setting here too (attn_logit_softcapping), but neither transformers'
        # Gemma 3 nor llama.cpp's applies it: the norms of queries and keys took its place.
        logit_softcap=_optional(fields, "final_logit_softcapping"),
    )


def _optional(fields: Fields, name: str) -> float | None:
    return fields.number(name, 0.0) or None


def _layers(fields: Fields, count: int, default_window: int | None) -> tuple[LayerSpec, ...]:
    """Rope 0 belongs to full attention, rope 1 to the window. Without a window all layers see everything."""
    key = "attention.sliding_window" if default_window is None else "sliding_window"
    window = fields.integer(key, default_window or 0, minimum=0)
    if window == 0:
        return (LayerSpec(),) * count
    pattern = fields.integer("sliding_window_pattern", fields.integer("_sliding_window_pattern", _PATTERN))
    sliding = fields.sliding_layers(count, [(layer + 1) % pattern != 0 for layer in range(count)])
    return tuple(LayerSpec(window, 1) if slides else LayerSpec() for slides in sliding)


def _gguf_ropes(fields: Fields, dims: Dimensions) -> tuple[RopeSpec, RopeSpec]:
    everywhere = read_gguf_rope(fields, dims.head_dim, dims.train_context, _GLOBAL_BASE)
    local = RopeParameters(everywhere.dim, fields.number("rope.freq_base_swa", _LOCAL_BASE, minimum=1.0))
    return make_rope(everywhere, "half"), make_rope(local, "half")


def _config_ropes(fields: Fields, dims: Dimensions) -> tuple[RopeSpec, RopeSpec]:
    everywhere = read_config_rope(fields, dims.head_dim, dims.train_context, default_base=_GLOBAL_BASE)
    settings = fields.raw("rope_parameters")
    if isinstance(settings, Mapping) and isinstance(settings.get("sliding_attention"), Mapping):
        local = read_config_rope(
            fields, dims.head_dim, dims.train_context, layer_type="sliding_attention", default_base=_LOCAL_BASE
        )
    else:
        # Scaling, in the form of configurations before transformers 5, is for full attention only.
        local = RopeParameters(dims.head_dim, fields.number("rope_local_base_freq", _LOCAL_BASE, minimum=1.0))
    return make_rope(everywhere, "half"), make_rope(local, "half")


def _attention_scale(fields: Fields, dims: Dimensions, from_gguf: bool) -> float:
    """GGUF has no key for query_pre_attn_scalar: it is the head size, but in the 27B model hidden size / heads."""
    scalar: float = dims.head_dim
    if not from_gguf:
        scalar = fields.number("query_pre_attn_scalar", 256.0, minimum=1e-6)
    elif dims.n_layers == _LAYERS_27B:
        scalar = dims.hidden_size / dims.n_heads
    return scalar**-0.5
