"""What a decoder is: dimensions, traits of its blocks, its tensors and their cut rules (never imports torch).

An architecture file turns a Checkpoint's metadata into one `ModelSpec`; everything after it (plan, loader, graph)
reads only this. Canonical tensor names are GGUF's (`blk.0.attn_q.weight`), whatever the file calls them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from multitensor.architectures.cut_rules import CutRule
from multitensor.formats.checkpoint import TensorInfo


@dataclass(frozen=True)
class RopeSpec:
    """Rotary embedding: angle(position, i) = position * inverse_frequencies[i]; cos and sin times `magnitude`.

    style "interleaved" rotates pairs (2i, 2i+1) (GGUF llama), "half" rotates (i, i + dim/2) (Hugging Face).
    All scalings (linear, llama3, yarn) are already inside the frequencies and the magnitude, except the factors of
    the tensor `rope_freqs.weight` of a GGUF file, by which the loader's values divide the frequencies.
    """

    style: Literal["interleaved", "half"]
    inverse_frequencies: tuple[float, ...]
    magnitude: float = 1.0
    use_factors_tensor: bool = False


@dataclass(frozen=True)
class LayerSpec:
    """window: tokens a query sees, itself included, in a sliding-window layer; None for full attention.
    rope: index into ModelSpec.ropes."""

    window: int | None = None
    rope: int = 0


@dataclass(frozen=True)
class TensorDecl:
    """One tensor of the model: canonical name, where it lies, how it may be cut.

    group: "attention", "ffn", "experts", "vocabulary" (whose ratio cuts it) or "shared".
    layer: block number, or None for tensors outside the blocks.
    """

    name: str
    info: TensorInfo
    rule: CutRule
    group: str
    layer: int | None = None


@dataclass(frozen=True)
class ModelSpec:
    architecture: str
    hidden_size: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    ffn_size: int
    vocab_size: int
    train_context: int
    norm_eps: float
    layers: tuple[LayerSpec, ...]
    ropes: tuple[RopeSpec, ...]
    activation: Literal["silu", "gelu_tanh"]
    attention_scale: float
    tied_embeddings: bool  # the LM head is token_embd.weight
    tensors: tuple[TensorDecl, ...]
    norm_offset: float = 0.0  # added to every RMSNorm weight (1.0 for Gemma from safetensors)
    embedding_scale: float = 1.0
    qk_norm: bool = False  # RMSNorm over head_dim on each query and key head, before rope
    post_norms: bool = False  # RMSNorm on each sub-layer's output before the residual add (Gemma)
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    unused_tensors: tuple[str, ...] = ()  # of the file, by the file's names: a vision tower, stored frequencies

    @property
    def n_layers(self) -> int:
        return len(self.layers)


# Canonical names. Outside blocks: token_embd.weight, output.weight (absent when tied), output_norm.weight,
# rope_freqs.weight. In block N, prefix blk.N.: attn_norm.weight, attn_{q,k,v,output}.{weight,bias},
# attn_{q,k}_norm.weight, post_attention_norm.weight, ffn_norm.weight, ffn_{gate,up,down}.{weight,bias},
# post_ffw_norm.weight. Biases are present only where the model has them.
