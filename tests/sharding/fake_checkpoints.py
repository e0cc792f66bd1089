"""Checkpoints that are headers only: any dimensions and types, no file behind them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from multitensor.architectures.registry import resolve
from multitensor.architectures.spec import ModelSpec
from multitensor.formats.checkpoint import Checkpoint, TensorInfo
from multitensor.formats.quant_types import quant_type
from multitensor.sharding.topology import Device

GB = 10**9


def llama_shapes(
    *, hidden: int, ffn: int, n_layers: int, n_heads: int, n_kv_heads: int, head_dim: int, vocab: int, tied: bool
) -> dict[str, tuple[int, ...]]:
    """Canonical name -> shape, (rows, columns)."""
    q, kv = n_heads * head_dim, n_kv_heads * head_dim
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (vocab, hidden), "output_norm.weight": (hidden,)}
    if not tied:
        shapes["output.weight"] = (vocab, hidden)
    for layer in range(n_layers):
        block = {
            "attn_norm.weight": (hidden,),
            "ffn_norm.weight": (hidden,),
            "attn_q.weight": (q, hidden),
            "attn_k.weight": (kv, hidden),
            "attn_v.weight": (kv, hidden),
            "attn_q.bias": (q,),
            "attn_k.bias": (kv,),
            "attn_output.weight": (hidden, q),
            "attn_output.bias": (hidden,),
            "ffn_gate.weight": (ffn, hidden),
            "ffn_up.weight": (ffn, hidden),
            "ffn_up.bias": (ffn,),
            "ffn_down.weight": (hidden, ffn),
        }
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in block.items()}
    return shapes


def fake_llama(
    *,
    hidden: int = 64,
    ffn: int = 256,
    n_layers: int = 2,
    n_heads: int = 4,
    n_kv_heads: int = 2,
    head_dim: int = 64,
    vocab: int = 320,
    tied: bool = False,
    context: int = 8192,
    type_of: Callable[[str], str] = lambda name: "F16",
    metadata: Mapping[str, Any] | None = None,
) -> Checkpoint:
    """A GGUF llama with biases here and there. type_of: the type of a matrix by its name; vectors are F32."""
    shapes = llama_shapes(
        hidden=hidden,
        ffn=ffn,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        vocab=vocab,
        tied=tied,
    )
    tensors, offset = {}, 0
    for name, shape in shapes.items():
        kind = quant_type(type_of(name) if len(shape) > 1 else "F32")
        rows = shape[0] if len(shape) > 1 else 1
        nbytes = rows * kind.row_bytes(shape[-1])
        tensors[name] = TensorInfo(name, shape, kind, 0, offset, nbytes)
        offset += nbytes
    keys = {
        "llama.block_count": n_layers,
        "llama.context_length": context,
        "llama.embedding_length": hidden,
        "llama.feed_forward_length": ffn,
        "llama.attention.head_count": n_heads,
        "llama.attention.head_count_kv": n_kv_heads,
        "llama.attention.key_length": head_dim,
        "llama.attention.value_length": head_dim,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 10000.0,
    }
    path = Path("fake.gguf")
    return Checkpoint("gguf", path, (path,), "llama", {**keys, **(metadata or {})}, tensors)


def fake_spec(**dims: Any) -> ModelSpec:
    return resolve(fake_llama(**dims))


def llama3_70b(type_of: Callable[[str], str] = lambda name: "F16") -> ModelSpec:
    """The dimensions of Llama-3 70B: 141 GB in F16."""
    return fake_spec(
        hidden=8192,
        ffn=28672,
        n_layers=80,
        n_heads=64,
        n_kv_heads=8,
        head_dim=128,
        vocab=128256,
        context=8192,
        type_of=type_of,
    )


def planned(*sizes: int) -> tuple[Device, ...]:
    """Devices of so many bytes."""
    return tuple(Device(f"device:{i}", "any", i, size, size) for i, size in enumerate(sizes))
