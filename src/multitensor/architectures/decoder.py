"""What the decoders have in common: their dimensions, their tensors, and how each of those may be cut."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from multitensor.architectures.cut_rules import CutColumns, CutHeads, CutRows, CutRule, Replicate
from multitensor.architectures.fields import Fields
from multitensor.architectures.spec import TensorDecl
from multitensor.errors import InputError
from multitensor.formats.checkpoint import Checkpoint

_VECTOR = Replicate("every rank norms the whole hidden state")
_HEAD_NORM = Replicate("one norm serves all heads")
_SUM_BIAS = Replicate("added once, to the sum over ranks")


@dataclass(frozen=True)
class Dimensions:
    hidden_size: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    ffn_size: int
    vocab_size: int
    train_context: int
    norm_eps: float

    def for_spec(self) -> dict[str, Any]:
        """The fields that ModelSpec has too (it counts its layers itself)."""
        return {name: value for name, value in vars(self).items() if name != "n_layers"}


def read_dimensions(
    checkpoint: Checkpoint, fields: Fields, names: Mapping[str, str], defaults: Mapping[str, int] | None = None
) -> Dimensions:
    """Dimensions from GGUF keys or config.json; the vocabulary is as large as the embedding. `defaults`: values of
    keys that config.json may leave out. Raises InputError when a key is missing or they contradict each other."""
    if "token_embd.weight" not in names:
        raise InputError(f"{checkpoint.path.name}: tensor token_embd.weight is missing")
    vocab_size = checkpoint.tensors[names["token_embd.weight"]].shape[0]
    own = _gguf_dimensions(fields, vocab_size) if checkpoint.format == "gguf" else None
    dims = own or _config_dimensions(fields, vocab_size, defaults or {})
    if dims.n_heads % dims.n_kv_heads:
        raise InputError(
            f"{checkpoint.path.name}: {dims.n_heads} query heads cannot share {dims.n_kv_heads} KV heads evenly"
        )
    # Checked before anything of that size is made; the shapes of the tensors are checked against them later.
    if dims.n_layers > len(checkpoint.tensors) or dims.head_dim > 1 << 16:
        raise InputError(
            f"{checkpoint.path.name}: {dims.n_layers} layers with heads of {dims.head_dim} do not go with the "
            f"{len(checkpoint.tensors)} tensors of the file"
        )
    return dims


def _gguf_dimensions(fields: Fields, vocab_size: int) -> Dimensions:
    if (fields.raw("expert_count") or 0) > 0:
        raise fields.error("expert_count", f"is {fields.raw('expert_count')}: mixture of experts is not supported yet")
    hidden, heads = fields.integer("embedding_length"), fields.integer("attention.head_count")
    head_dim = fields.integer("attention.key_length", max(1, hidden // heads))
    if fields.integer("attention.value_length", head_dim) != head_dim:
        raise fields.error("attention.value_length", "differs from attention.key_length, which is not supported yet")
    return Dimensions(
        hidden_size=hidden,
        n_layers=fields.integer("block_count"),
        n_heads=heads,
        n_kv_heads=fields.integer("attention.head_count_kv", heads),
        head_dim=head_dim,
        ffn_size=fields.integer("feed_forward_length"),
        vocab_size=vocab_size,
        train_context=fields.integer("context_length"),
        norm_eps=fields.number("attention.layer_norm_rms_epsilon", minimum=0.0),
    )


def _config_dimensions(fields: Fields, vocab_size: int, defaults: Mapping[str, int]) -> Dimensions:
    def integer(name: str, otherwise: int | None = None) -> int:
        return fields.integer(name, defaults.get(name, otherwise))

    hidden, heads = integer("hidden_size"), integer("num_attention_heads")
    return Dimensions(
        hidden_size=hidden,
        n_layers=integer("num_hidden_layers"),
        n_heads=heads,
        n_kv_heads=integer("num_key_value_heads", heads),
        head_dim=integer("head_dim", max(1, hidden // heads)),
        ffn_size=integer("intermediate_size"),
        vocab_size=vocab_size,
        train_context=integer("max_position_embeddings", 2048),
        norm_eps=fields.number("rms_norm_eps", 1e-6, minimum=0.0),
    )


def is_tied(checkpoint: Checkpoint, names: Mapping[str, str], fields: Fields) -> bool:
    """Whether the LM head is the embedding: in GGUF when there is no output.weight; in a Hugging Face folder as
    config.json says, else likewise."""
    said = None if checkpoint.format == "gguf" else checkpoint.metadata.get("tie_word_embeddings")
    if said is None and checkpoint.format != "gguf":
        said = fields.raw("tie_word_embeddings")
    return "output.weight" not in names if said is None else bool(said)


def read_activation(fields: Fields, key: str, default: str) -> Literal["silu", "gelu_tanh"]:
    """The FFN's activation (GGUF does not name it). Raises InputError for one that is not supported."""
    name = fields.text(key, default)
    if name in ("silu", "swish"):
        return "silu"
    if name in ("gelu_pytorch_tanh", "gelu_new", "gelu_tanh"):
        return "gelu_tanh"
    raise fields.error(key, f"is {name[:40]!r}, which is not supported yet; supported: silu, gelu_pytorch_tanh")


@dataclass(frozen=True)
class _Wanted:
    name: str
    shape: tuple[int, ...]
    rule: CutRule
    group: str
    optional: bool = False


def _block(d: Dimensions, qk_norm: bool, post_norms: bool, qkv_bias: bool) -> Iterator[_Wanted]:
    """The tensors of one block in the order of the computation, without the "blk.N." before them."""
    q, kv = d.n_heads * d.head_dim, d.n_kv_heads * d.head_dim
    query, key_value = CutHeads("query"), CutHeads("kv")
    yield _Wanted("attn_norm.weight", (d.hidden_size,), _VECTOR, "shared")
    for letter, size, rule in (("q", q, query), ("k", kv, key_value), ("v", kv, key_value)):
        yield _Wanted(f"attn_{letter}.weight", (size, d.hidden_size), rule, "attention")
        yield _Wanted(f"attn_{letter}.bias", (size,), rule, "attention", optional=not qkv_bias)
    if qk_norm:
        yield _Wanted("attn_q_norm.weight", (d.head_dim,), _HEAD_NORM, "shared")
        yield _Wanted("attn_k_norm.weight", (d.head_dim,), _HEAD_NORM, "shared")
    yield _Wanted("attn_output.weight", (d.hidden_size, q), CutHeads("output"), "attention")
    yield _Wanted("attn_output.bias", (d.hidden_size,), _SUM_BIAS, "shared", optional=True)
    if post_norms:
        yield _Wanted("post_attention_norm.weight", (d.hidden_size,), _VECTOR, "shared")
    yield _Wanted("ffn_norm.weight", (d.hidden_size,), _VECTOR, "shared")
    for part in ("gate", "up"):
        yield _Wanted(f"ffn_{part}.weight", (d.ffn_size, d.hidden_size), CutRows(), "ffn")
        yield _Wanted(f"ffn_{part}.bias", (d.ffn_size,), CutRows(), "ffn", optional=True)
    yield _Wanted("ffn_down.weight", (d.hidden_size, d.ffn_size), CutColumns(), "ffn")
    yield _Wanted("ffn_down.bias", (d.hidden_size,), _SUM_BIAS, "shared", optional=True)
    if post_norms:
        yield _Wanted("post_ffw_norm.weight", (d.hidden_size,), _VECTOR, "shared")


def declare_tensors(
    checkpoint: Checkpoint,
    names: Mapping[str, str],
    dims: Dimensions,
    *,
    tied: bool,
    qk_norm: bool = False,
    post_norms: bool = False,
    qkv_bias: bool = False,
    rope_factors: int = 0,
) -> tuple[TensorDecl, ...]:
    """Every tensor of the model, in the order of the computation. rope_factors: length of rope_freqs.weight, 0 when
    there is none. Raises InputError naming a tensor that is missing or misshapen."""
    vocabulary = (dims.vocab_size, dims.hidden_size)
    outside = [_Wanted("token_embd.weight", vocabulary, CutRows(), "vocabulary")]
    if rope_factors:
        outside.append(_Wanted("rope_freqs.weight", (rope_factors,), Replicate("every rank rotates by it"), "shared"))
    found = [_declare(checkpoint, names, wanted, None) for wanted in outside]
    block = tuple(_block(dims, qk_norm, post_norms, qkv_bias))
    for layer in range(dims.n_layers):
        found += [_declare(checkpoint, names, wanted, layer) for wanted in block]
    found.append(
        _declare(checkpoint, names, _Wanted("output_norm.weight", (dims.hidden_size,), _VECTOR, "shared"), None)
    )
    if not tied:
        found.append(_declare(checkpoint, names, _Wanted("output.weight", vocabulary, CutRows(), "vocabulary"), None))
    return tuple(decl for decl in found if decl is not None)


def _declare(checkpoint: Checkpoint, names: Mapping[str, str], wanted: _Wanted, layer: int | None) -> TensorDecl | None:
    name = wanted.name if layer is None else f"blk.{layer}.{wanted.name}"
    own = names.get(name)
    if own is None:
        if wanted.optional:
            return None
        raise InputError(f"{checkpoint.path.name}: tensor {name} is missing; it should be {_times(wanted.shape)}")
    info = checkpoint.tensors[own]
    if info.shape != wanted.shape:
        raise InputError(
            f"{checkpoint.path.name}: tensor {own} is {_times(info.shape)}; the model's dimensions ask for "
            f"{_times(wanted.shape)}"
        )
    return TensorDecl(name, info, wanted.rule, wanted.group, layer)


def _times(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
