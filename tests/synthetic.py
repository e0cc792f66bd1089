"""Models of random weights for tests: GGUF files of any shape and type, and tiny Hugging Face folders.

Activations neither vanish nor explode: matrices have a standard deviation of about 1 / sqrt(inputs), norm weights lie
around 1. Everything depends on `seed` alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType, RopeScalingType

# Tensors above this many weights repeat random rows, so that a file of many gigabytes is written at disk speed.
_MAX_RANDOM_WEIGHTS = 1 << 24

# float16 fields of the super-blocks: (offset of d, offset of dmin or None). Source: ggml-common.h.
_SUPER_BLOCK_FIELDS: Mapping[str, tuple[int, int | None]] = {
    "Q2_K": (80, 82),
    "Q3_K": (108, None),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208, None),
    "IQ4_NL": (0, None),
    "IQ4_XS": (0, None),
    "IQ2_XXS": (0, None),
    "IQ2_XS": (0, None),
    "IQ2_S": (0, None),
    "IQ3_XXS": (0, None),
    "IQ3_S": (0, None),
    "IQ1_S": (0, None),
}


@dataclass(frozen=True)
class Matrix:
    """A random matrix to be written: (rows, columns), standard deviation, and whether it is a norm or a bias."""

    name: str
    shape: tuple[int, ...]
    std: float
    mean: float = 0.0


def random_blocks(rng: np.random.Generator, type_name: str, rows: int, columns: int, std: float) -> np.ndarray:
    """Random valid blocks of any type that the table above lists, or MXFP4: uint8 (rows, bytes).

    Every bit of quants and sub-block scales is random; the float16 factors are such that the values have about the
    standard deviation `std` and a mean near 0, and differ by a factor of up to 2 from block to block.
    """
    kind = GGMLQuantizationType[type_name]
    weights, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = rng.integers(0, 256, (rows * columns // weights, size), dtype=np.uint8)
    if type_name == "MXFP4":
        # The table's values have a standard deviation of about 5.6 halves: choose the exponent nearest to std.
        blocks[:, 0] = 127 + round(np.log2(std / 2.8)) + rng.integers(-1, 1, len(blocks))
        return blocks.reshape(rows, -1)
    d_at, dmin_at = _SUPER_BLOCK_FIELDS[type_name]
    mins = {"Q4_K": 7.5, "Q5_K": 15.5, "Q2_K": 1.5}

    def put(offset: int, values: np.ndarray) -> None:
        blocks[:, offset : offset + 2] = values.astype("<f2").view(np.uint8).reshape(-1, 2)

    def fill(d: np.ndarray) -> None:
        put(d_at, d)
        if dmin_at is not None:
            put(dmin_at, d * mins[type_name])

    fill(np.full(len(blocks), 2.0**-6, np.float32))
    measured = float(gguf.quants.dequantize(blocks[:256], kind).std())
    fill((rng.uniform(0.7, 1.4, len(blocks)) * 2.0**-6 * std / measured).astype(np.float32))
    return blocks.reshape(rows, -1)


def encode(rng: np.random.Generator, matrix: Matrix, type_name: str) -> np.ndarray:
    """The matrix's random weights in the given type: float arrays as they are, others uint8 (rows, bytes)."""
    *outer, columns = matrix.shape
    rows = int(np.prod(outer, dtype=np.int64))
    n_random = max(1, min(rows, _MAX_RANDOM_WEIGHTS // columns))
    kind = GGMLQuantizationType[type_name]
    if type_name in _SUPER_BLOCK_FIELDS or type_name == "MXFP4":
        base = random_blocks(rng, type_name, n_random, columns, matrix.std)
    else:
        values = rng.standard_normal((n_random, columns), dtype=np.float32) * np.float32(matrix.std)
        values += np.float32(matrix.mean)
        base = gguf.quants.quantize(values, kind)
    if n_random < rows:
        base = base[rng.integers(0, n_random, rows)]
    return base.reshape(*outer, -1)


def _matrices(arch: str, dims: Mapping[str, int], tied: bool, qkv_bias: bool) -> list[Matrix]:
    """Every tensor of the model, in the order in which llama.cpp's converter writes them."""
    hidden, ffn, head_dim = dims["hidden"], dims["ffn"], dims["head_dim"]
    queries, keys = dims["n_heads"] * head_dim, dims["n_kv_heads"] * head_dim

    def norm(name: str, size: int) -> Matrix:
        return Matrix(name, (size,), 0.1, 1.0)

    def weight(name: str, rows: int, columns: int, gain: float = 1.0) -> Matrix:
        return Matrix(name, (rows, columns), gain / columns**0.5)

    # Gemma multiplies its embeddings by sqrt(hidden): small ones, or the tied head would repeat the last token.
    gemma = arch == "gemma3"
    out = [weight("token_embd.weight", dims["vocab"], hidden, 0.125 if gemma and tied else 4.0)]
    for layer in range(dims["n_layers"]):
        block = [
            norm("attn_norm.weight", hidden),
            weight("attn_q.weight", queries, hidden, 1.5),
            weight("attn_k.weight", keys, hidden, 1.5),
            weight("attn_v.weight", keys, hidden),
        ]
        if qkv_bias:
            block += [Matrix(f"attn_{n}.bias", (s,), 0.3) for n, s in (("q", queries), ("k", keys), ("v", keys))]
        if arch in ("qwen3", "gemma3"):
            block += [norm("attn_q_norm.weight", head_dim), norm("attn_k_norm.weight", head_dim)]
        block.append(weight("attn_output.weight", hidden, queries))
        if gemma:
            block.append(norm("post_attention_norm.weight", hidden))
        block += [
            norm("ffn_norm.weight", hidden),
            weight("ffn_gate.weight", ffn, hidden),
            weight("ffn_up.weight", ffn, hidden),
            weight("ffn_down.weight", hidden, ffn),
        ]
        if gemma:
            block.append(norm("post_ffw_norm.weight", hidden))
        out += [Matrix(f"blk.{layer}.{m.name}", m.shape, m.std, m.mean) for m in block]
    out.append(
        Matrix("output_norm.weight", (hidden,), 2.0, 32.0) if gemma and tied else norm("output_norm.weight", hidden)
    )
    if not tied:
        out.append(weight("output.weight", dims["vocab"], hidden, 4.0))
    return out


def _type_of(name: str, shape: tuple[int, ...], types: str | Mapping[str, str]) -> str:
    if len(shape) == 1:
        return "F32"
    if isinstance(types, str):
        return types
    return next((kind for pattern, kind in types.items() if fnmatchcase(name, pattern)), "F32")


def _add_rope_scaling(writer: gguf.GGUFWriter, scaling: Mapping[str, Any]) -> None:
    """Keys: type ("linear", "yarn"), factor, and optionally original_context, attn_factor, yarn_ext_factor,
    yarn_attn_factor, beta_fast, beta_slow, yarn_log_mul."""
    setters = {
        "factor": writer.add_rope_scaling_factor,
        "original_context": writer.add_rope_scaling_orig_ctx_len,
        "attn_factor": writer.add_rope_scaling_attn_factors,
        "yarn_ext_factor": writer.add_rope_scaling_yarn_ext_factor,
        "yarn_attn_factor": writer.add_rope_scaling_yarn_attn_factor,
        "beta_fast": writer.add_rope_scaling_yarn_beta_fast,
        "beta_slow": writer.add_rope_scaling_yarn_beta_slow,
        "yarn_log_mul": writer.add_rope_scaling_yarn_log_mul,
    }
    for key, value in scaling.items():
        if key == "type":
            writer.add_rope_scaling_type(RopeScalingType(value))
        else:
            setters[key](value)


def byte_level_alphabet() -> list[str]:
    """The 256 printable characters that stand for bytes in GPT-2's vocabulary, in order of the byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    return [chr(byte if byte in printable else next(spare)) for byte in range(256)]


def _add_vocabulary(writer: gguf.GGUFWriter, model: str, size: int) -> None:
    """A vocabulary of exactly `size` >= 300 tokens: control tokens, every byte, some merges or pieces, then unused."""
    if size < 300:
        raise ValueError(f"a vocabulary needs at least 300 tokens, not {size}")
    words = ["th", "the", "in", "er", "an", "re", "on", "he", "is", "it", "or", "and"]
    normal, control, unused, byte = 1, 3, 5, 6
    if model == "gpt2":
        tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *byte_level_alphabet(), *words]
        kinds = [control] * 3 + [normal] * (len(tokens) - 3)
        merges = [f"{word[:-1]} {word[-1]}" for word in words if len(word) == 2 or word[:-1] in words]
        scores = None
        bos, eos, unk = 0, 0, 0
    elif model == "llama":
        pieces = [
            "\u2581",
            *"etaoinshrdlucmfwypvbgkjqxz",
            *(word for word in words),
            *("\u2581" + word for word in words),
        ]
        tokens = ["<unk>", "<s>", "</s>", *(f"<0x{value:02X}>" for value in range(256)), *pieces]
        tokens = tokens[:size]
        kinds = [2, control, control] + [byte] * 256 + [normal] * (len(tokens) - 259)
        scores = [0.0] * 259 + [-float(i) for i in range(len(tokens) - 259)]
        merges = None
        unk, bos, eos = 0, 1, 2
    else:
        raise ValueError(f"no vocabulary of model {model!r}")
    spare = size - len(tokens)
    tokens += [f"<unused{i}>" for i in range(spare)]
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre("smollm" if model == "gpt2" else "default")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds + [unused] * spare)
    if scores is not None:
        writer.add_token_scores(scores + [-1000.0] * spare)
    if merges is not None:
        writer.add_token_merges(merges)
    writer.add_bos_token_id(bos)
    writer.add_eos_token_id(eos)
    writer.add_unk_token_id(unk)
    writer.add_add_bos_token(model == "llama")


def write_gguf(
    path: str | Path,
    architecture: str = "llama",
    *,
    hidden: int = 64,
    ffn: int = 128,
    n_layers: int = 2,
    n_heads: int = 4,
    n_kv_heads: int = 2,
    head_dim: int | None = None,
    vocab: int = 320,
    context: int = 512,
    types: str | Mapping[str, str] = "F32",
    seed: int = 0,
    tied: bool | None = None,
    qkv_bias: bool | None = None,
    norm_eps: float = 1e-5,
    rope_freq_base: float = 10000.0,
    rope_scaling: Mapping[str, Any] | None = None,
    rope_factors: bool = False,
    sliding_window: int | None = None,
    no_vocab: bool = True,
    tokenizer: str = "gpt2",
    chat_template: str | None = None,
    alignment: int | None = None,
    split_max_tensors: int = 0,
    metadata: Mapping[str, Any] | None = None,
) -> Path:
    """Writes a GGUF model of random weights (llama, qwen2, qwen3, gemma3) and returns the path of its first file.

    types: one type for every matrix, or patterns over tensor names ({"*ffn*": "Q4_K", "*": "Q8_0"}, the first match
    counts, F32 where none does); vectors are F32. A type whose block does not divide the columns is an error.
    head_dim: hidden / n_heads unless given. tied: no output.weight (default: gemma3 only). qkv_bias: default qwen2.
    rope_scaling: see `_add_rope_scaling`. rope_factors: writes rope_freqs.weight (between 1 and 8).
    sliding_window: gemma3's, 512 unless given. no_vocab False: a small vocabulary of the kind `tokenizer`
    ("gpt2" or "llama"). split_max_tensors: several files of so many tensors each. metadata: further keys
    (whole numbers are written as UINT32).
    """
    if architecture not in ("llama", "qwen2", "qwen3", "gemma3"):
        raise ValueError(f"no such architecture: {architecture}")
    path, head_dim = Path(path), head_dim or hidden // n_heads
    tied = architecture == "gemma3" if tied is None else tied
    qkv_bias = architecture == "qwen2" if qkv_bias is None else qkv_bias
    dims = {"hidden": hidden, "ffn": ffn, "n_layers": n_layers, "n_heads": n_heads, "n_kv_heads": n_kv_heads}
    dims |= {"head_dim": head_dim, "vocab": vocab}

    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=split_max_tensors)
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    writer.add_name(f"random {architecture}")
    writer.add_quantization_version(2)
    writer.add_context_length(context)
    writer.add_embedding_length(hidden)
    writer.add_block_count(n_layers)
    writer.add_feed_forward_length(ffn)
    writer.add_head_count(n_heads)
    writer.add_head_count_kv(n_kv_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(norm_eps)
    writer.add_rope_freq_base(rope_freq_base)
    if architecture == "llama":
        writer.add_rope_dimension_count(head_dim)
    writer.add_vocab_size(vocab)
    if architecture == "gemma3":
        writer.add_sliding_window(sliding_window or 512)
    if rope_scaling is not None:
        _add_rope_scaling(writer, rope_scaling)
    if no_vocab:
        writer.add_tokenizer_model("no_vocab")
    else:
        _add_vocabulary(writer, tokenizer, vocab)
    if chat_template is not None:
        writer.add_chat_template(chat_template)
    for key, value in (metadata or {}).items():
        whole = isinstance(value, int) and not isinstance(value, bool) and value >= 0
        kind = gguf.GGUFValueType.UINT32 if whole else gguf.GGUFValueType.get_type(value)
        writer.add_key_value(key, value, kind)
    rng = np.random.default_rng(seed)
    factors = rng.uniform(1.0, 8.0, head_dim // 2).astype(np.float32) if rope_factors else None
    matrices = _matrices(architecture, dims, tied, qkv_bias)
    _write_tensors(writer, matrices, factors, types, rng)
    if split_max_tensors and not path.exists():
        return sorted(path.parent.glob(f"{path.stem}-00001-of-*.gguf"))[0]
    return path


def _write_tensors(
    writer: gguf.GGUFWriter,
    matrices: list[Matrix],
    factors: np.ndarray | None,
    types: str | Mapping[str, str],
    rng: np.random.Generator,
) -> None:
    """Declares all tensors, then makes and writes one after the other, so that memory holds one at a time."""
    if factors is not None:
        writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
    for matrix in matrices:
        kind = GGMLQuantizationType[_type_of(matrix.name, matrix.shape, types)]
        weights, size = gguf.GGML_QUANT_SIZES[kind]
        if matrix.shape[-1] % weights:
            raise ValueError(f"{matrix.name}: {matrix.shape[-1]} columns are no multiple of {kind.name}'s {weights}")
        nbytes = int(np.prod(matrix.shape, dtype=np.int64)) // weights * size
        writer.add_tensor_info(matrix.name, matrix.shape, np.dtype(np.float32), nbytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if factors is not None:
        writer.write_tensor_data(factors)
    for matrix in matrices:
        writer.write_tensor_data(encode(rng, matrix, _type_of(matrix.name, matrix.shape, types)))
    writer.close()


def tiny_hf(
    path: str | Path,
    architecture: str = "llama",
    *,
    hidden: int = 64,
    ffn: int = 128,
    n_layers: int = 2,
    n_heads: int = 4,
    n_kv_heads: int = 2,
    head_dim: int | None = None,
    vocab: int = 320,
    context: int = 512,
    tied: bool = False,
    seed: int = 0,
    dtype: str = "float32",
    max_shard_size: str | int | None = None,
    **config: Any,
) -> Path:
    """Saves a tiny random `transformers` model (llama, qwen2, qwen3, gemma3) as safetensors; returns the folder.

    config: further fields of the configuration class (rope_parameters, sliding_window, layer_types, ...).
    max_shard_size: "100KB" writes several shards and an index.
    """
    import torch
    import transformers

    kinds = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
        "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
        "gemma3": (transformers.Gemma3TextConfig, transformers.Gemma3ForCausalLM),
    }
    config_class, model_class = kinds[architecture]
    head_dim = head_dim or hidden // n_heads
    gemma = architecture == "gemma3"
    if gemma:
        config = {"query_pre_attn_scalar": head_dim, "sliding_window": 16} | config
    settings = config_class(
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=n_layers,
        num_attention_heads=n_heads,
        num_key_value_heads=n_kv_heads,
        head_dim=head_dim,
        vocab_size=vocab,
        max_position_embeddings=context,
        tie_word_embeddings=tied,
        **({"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0} | config),
    )
    model = model_class(settings)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            if "norm" in name:
                mean = 0.0 if gemma else 1.0
                if name == "model.norm.weight" and gemma and tied:
                    noise, mean = noise * 20, 31.0
                parameter.copy_(0.1 * noise + mean)
            elif parameter.ndim == 1:
                parameter.copy_(0.3 * noise)
            else:
                vocabulary = 0.125 if gemma and tied else 4.0  # see _matrices
                gain = vocabulary if "embed" in name or "lm_head" in name else 1.5 if "q_proj" in name else 1.0
                parameter.copy_(noise * gain / parameter.shape[-1] ** 0.5)
    folder = Path(path)
    extra = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
    model.to(getattr(torch, dtype)).save_pretrained(folder, **extra)
    return folder
