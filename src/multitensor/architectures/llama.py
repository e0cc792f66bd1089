"""Llama, and the many models that are Llama by another name (SmolLM2, TinyLlama, Mistral in GGUF)."""

from __future__ import annotations

from multitensor.architectures.decoder import declare_tensors, is_tied, read_activation, read_dimensions
from multitensor.architectures.fields import Fields
from multitensor.architectures.naming import canonical_names
from multitensor.architectures.rope import make_rope, read_config_rope, read_gguf_rope
from multitensor.architectures.spec import LayerSpec, ModelSpec
from multitensor.formats.checkpoint import Checkpoint


def declare_llama(checkpoint: Checkpoint) -> ModelSpec:
    fields = Fields.of(checkpoint)
    names = canonical_names(checkpoint)
    dims = read_dimensions(checkpoint, fields, names)
    # GGUF files keep the rows of q and k so permuted that neighbours rotate together, and Llama 3.1's scaling as a
    # tensor of factors.
    factors = 0
    if checkpoint.format == "gguf":
        parameters = read_gguf_rope(fields, dims.head_dim, dims.train_context)
        factors = parameters.dim // 2 if "rope_freqs.weight" in names else 0
        rope = make_rope(parameters, "interleaved", use_factors_tensor=factors > 0)
    else:
        rope = make_rope(read_config_rope(fields, dims.head_dim, dims.train_context), "half")
    tied = is_tied(checkpoint, names, fields)
    return ModelSpec(
        architecture="llama",
        **dims.for_spec(),
        layers=(LayerSpec(),) * dims.n_layers,
        ropes=(rope,),
        activation=read_activation(fields, "hidden_act", "silu"),
        attention_scale=dims.head_dim**-0.5,
        tied_embeddings=tied,
        tensors=declare_tensors(checkpoint, names, dims, tied=tied, rope_factors=factors),
    )
