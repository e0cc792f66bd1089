"""Canonical tensor names (GGUF's) and what Hugging Face folders call the same tensors."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from multitensor.errors import InputError
from multitensor.formats.checkpoint import Checkpoint

# The part of a Hugging Face name between the layer number and ".weight" or ".bias", for all decoders so far.
_BLOCK = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
# The norm after attention feeds the FFN in most decoders; with norms on both sides of each sub-layer it does not.
PRE_NORMS = {"post_attention_layernorm": "ffn_norm"}
SANDWICH_NORMS = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_EXPERTS = re.compile(r"_exps\.|\.experts\.|\.block_sparse_moe\.|ffn_gate_inp\.|\.mlp\.gate\.weight$")


def canonical_names(checkpoint: Checkpoint, norms: Mapping[str, str] = PRE_NORMS) -> dict[str, str]:
    """Canonical name -> name in the file, for every tensor of the decoder; others (a vision tower, stored rotary
    frequencies) are left out. Raises InputError for a mixture of experts."""
    if any(_EXPERTS.search(name) for name in checkpoint.tensors):
        raise InputError(f"{checkpoint.path.name}: mixture of experts is not supported yet")
    if checkpoint.format == "gguf":
        return {name: name for name in checkpoint.tensors}
    prefix = _prefix(checkpoint.tensors)
    found: dict[str, str] = {}
    for name in checkpoint.tensors:
        canonical = _from_hugging_face(name, prefix, norms)
        if canonical is not None:
            found[canonical] = name
    return found


def _prefix(names: Iterable[str]) -> str:
    """What stands before "embed_tokens.weight": "model.", or "language_model.model." beside a vision tower."""
    ending = "embed_tokens.weight"
    return next((name.removesuffix(ending) for name in names if name.endswith(ending)), "model.")


def _from_hugging_face(name: str, prefix: str, norms: Mapping[str, str]) -> str | None:
    if name.removeprefix("language_model.") == "lm_head.weight":
        return "output.weight"
    if not name.startswith(prefix):
        return None
    inner = name.removeprefix(prefix)
    if inner == "embed_tokens.weight":
        return "token_embd.weight"
    if inner == "norm.weight":
        return "output_norm.weight"
    match = re.fullmatch(r"layers\.([0-9]+)\.(.+)\.(weight|bias)", inner)
    part = match and (_BLOCK.get(match[2]) or norms.get(match[2]))
    return f"blk.{int(match[1])}.{part}.{match[3]}" if match and part else None
