"""Small models of every architecture, with weights of many types: name -> what writes it to a path."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from synthetic import write_gguf

MODELS: dict[str, Callable[[Path], Path]] = {
    "llama-odd-heads": lambda path: write_gguf(path, hidden=96, n_heads=9, n_kv_heads=3, head_dim=32, types="Q4_1"),
    "llama-K-quants": lambda path: write_gguf(
        path,
        hidden=256,
        ffn=768,
        n_heads=8,
        n_kv_heads=2,
        types={"*attn_v*": "Q6_K", "*ffn_down*": "Q6_K", "token_embd*": "Q6_K", "*": "Q4_K"},
    ),
    "qwen2-small-blocks": lambda path: write_gguf(
        path, "qwen2", n_heads=4, n_kv_heads=4, head_dim=32, types={"*ffn*": "Q8_0", "*": "Q5_0"}
    ),
    "qwen3-half-precision": lambda path: write_gguf(
        path, "qwen3", n_heads=6, n_kv_heads=2, head_dim=16, types={"*ffn*": "BF16", "*": "F16"}
    ),
    "gemma3": lambda path: write_gguf(
        path, "gemma3", n_layers=7, n_heads=4, n_kv_heads=1, head_dim=32, sliding_window=8, types="Q8_0"
    ),
    "llama-rope-factors": lambda path: write_gguf(path, rope_factors=True, tied=True, types="IQ4_NL"),
}
