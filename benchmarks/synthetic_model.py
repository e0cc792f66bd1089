"""Writes a GGUF file with the real shapes of a known model and random weights, as fast as memory takes them.

    python benchmarks/synthetic_model.py llama3-70b f16 /dev/shm/70b-f16.gguf
    python benchmarks/synthetic_model.py llama3-8b q4_k_m /dev/shm/8b-q4.gguf

The weights are random but sane (standard deviation about 1/sqrt(inputs)), so that activations neither vanish nor
overflow; a file has no vocabulary, only its size. `q4_k_m` mixes Q4_K and Q6_K as llama.cpp's Q4_K_M does.
"""

from __future__ import annotations

import argparse
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np


@dataclass(frozen=True)
class Shape:
    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    context: int
    rope_base: float
    architecture: str = "llama"


SHAPES = {
    "llama3-70b": Shape(80, 8192, 28672, 64, 8, 128, 128256, 8192, 500000.0),
    "llama3-8b": Shape(32, 4096, 14336, 32, 8, 128, 128256, 8192, 500000.0),
    "llama3-1b": Shape(16, 2048, 8192, 32, 8, 64, 128256, 8192, 500000.0),
    "tiny": Shape(2, 256, 768, 8, 2, 32, 512, 512, 10000.0),
}
# Where a block's float16 scale fields lie, and each scale's size for weights of standard deviation 1.
# A field's factor is set so that random quants and sub-block scales give mean 0 (dmin balances d).
BLOCKS = {
    "F16": (1, 2, ()),
    "BF16": (1, 2, ()),
    "Q4_K": (256, 144, ((0, 1 / 205.0), (2, 7.5 / 205.0))),
    "Q6_K": (256, 210, ((208, 1 / 1367.0),)),
    "Q8_0": (32, 34, ((0, 1 / 73.9),)),
    "Q4_0": (32, 18, ((0, 1 / 4.6),)),
}


def tensor_types(mix: str, layers: int, name: str, layer: int | None) -> str:
    """The type of a matrix in a mix; Q4_K_M's "more bits" layers are those of llama.cpp's rule."""
    if mix != "q4_k_m":
        return mix.upper()
    if name == "output.weight":
        return "Q6_K"
    more = layer is not None and (layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2)
    return "Q6_K" if more and ("attn_v" in name or "ffn_down" in name) else "Q4_K"


def declare(shape: Shape, mix: str) -> list[tuple[str, tuple[int, ...], str]]:
    """(name, row-major shape, type) of every tensor, in file order."""
    rows: list[tuple[str, tuple[int, ...], str]] = []

    def matrix(name: str, outputs: int, inputs: int, layer: int | None = None) -> None:
        rows.append((name, (outputs, inputs), tensor_types(mix, shape.layers, name, layer)))

    matrix("token_embd.weight", shape.vocab, shape.hidden)
    for layer in range(shape.layers):
        block = f"blk.{layer}."
        rows.append((block + "attn_norm.weight", (shape.hidden,), "F32"))
        matrix(block + "attn_q.weight", shape.heads * shape.head_dim, shape.hidden, layer)
        matrix(block + "attn_k.weight", shape.kv_heads * shape.head_dim, shape.hidden, layer)
        matrix(block + "attn_v.weight", shape.kv_heads * shape.head_dim, shape.hidden, layer)
        matrix(block + "attn_output.weight", shape.hidden, shape.heads * shape.head_dim, layer)
        rows.append((block + "ffn_norm.weight", (shape.hidden,), "F32"))
        matrix(block + "ffn_gate.weight", shape.ffn, shape.hidden, layer)
        matrix(block + "ffn_up.weight", shape.ffn, shape.hidden, layer)
        matrix(block + "ffn_down.weight", shape.hidden, shape.ffn, layer)
    rows.append(("output_norm.weight", (shape.hidden,), "F32"))
    matrix("output.weight", shape.vocab, shape.hidden)
    return rows


def nbytes_of(shape: tuple[int, ...], kind: str) -> int:
    if kind == "F32":
        return int(np.prod(shape)) * 4
    weights, nbytes, _ = BLOCKS[kind]
    return int(np.prod(shape)) // weights * nbytes


def write_header(path: Path, shape: Shape, mix: str) -> list[tuple[str, tuple[int, ...], str, int]]:
    """Writes everything before the data; returns (name, shape, type, offset in the file)."""
    writer = gguf.GGUFWriter(path, shape.architecture)
    writer.add_block_count(shape.layers)
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.hidden)
    writer.add_feed_forward_length(shape.ffn)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(shape.rope_base)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(shape.vocab)
    writer.add_tokenizer_model("no_vocab")
    declared = declare(shape, mix)
    for name, dims, kind in declared:
        raw = gguf.GGMLQuantizationType[kind]
        # For quantised types the writer wants the byte shape, and turns it back into weights itself.
        given = gguf.quant_shape_to_byte_shape(dims, raw) if kind not in ("F32", "F16") else dims
        dtype = {"F32": np.float32, "F16": np.float16}.get(kind, np.uint8)
        writer.add_tensor_info(name, given, np.dtype(dtype), nbytes_of(dims, kind), raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    assert writer.fout
    start = -(-writer.fout[0].tell() // 32) * 32
    writer.close()
    placed, offset = [], start
    for name, dims, kind in declared:
        placed.append((name, dims, kind, offset))
        offset += -(-nbytes_of(dims, kind) // 32) * 32
    with path.open("r+b") as file:
        file.truncate(offset)
    return placed


def random_bytes(kind: str, inputs: int, count: int, generator: np.random.Generator) -> np.ndarray:
    """`count` bytes (whole blocks) of random weights with standard deviation about 1/sqrt(inputs)."""
    deviation = inputs**-0.5
    if kind in ("F16", "BF16"):
        values = generator.standard_normal(count // 2, dtype=np.float32) * np.float32(deviation)
        bits = (
            values.astype(np.float16).view(np.uint16)
            if kind == "F16"
            else (values.view(np.uint32) >> 16).astype(np.uint16)
        )
        return bits.view(np.uint8)
    weights, nbytes, fields = BLOCKS[kind]
    del weights
    blocks = generator.integers(0, 256, (count // nbytes, nbytes), dtype=np.uint8)
    for at, factor in fields:
        spread = generator.uniform(0.8, 1.2, len(blocks)).astype(np.float32)
        blocks[:, at : at + 2] = (
            (spread * np.float32(factor * deviation)).astype(np.float16).view(np.uint8).reshape(-1, 2)
        )
    return blocks.reshape(-1)


def fill(path: Path, placed: list[tuple[str, tuple[int, ...], str, int]], threads: int) -> None:
    """Fills the data region. Large tensors are tiled from a pool of random blocks at random block offsets, since
    drawing 70 billion numbers would take longer than loading them."""
    data = np.memmap(path, dtype=np.uint8, mode="r+")
    pools: dict[tuple[str, int], np.ndarray] = {}
    for _, dims, kind, _ in placed:
        if kind != "F32" and (kind, dims[1]) not in pools:
            block = BLOCKS[kind][1]
            pools[kind, dims[1]] = random_bytes(
                kind, dims[1], (64 << 20) // block * block, np.random.default_rng(len(pools))
            )

    def one(job: tuple[int, tuple[str, tuple[int, ...], str, int]]) -> None:
        number, (_, dims, kind, offset) = job
        generator = np.random.default_rng(1000 + number)
        size = nbytes_of(dims, kind)
        if kind == "F32":
            values = generator.uniform(0.8, 1.2, dims).astype(np.float32)
            data[offset : offset + size] = values.view(np.uint8).reshape(-1)
            return
        pool, block = pools[kind, dims[1]], BLOCKS[kind][1]
        done = 0
        while done < size:
            at = int(generator.integers(0, len(pool) // block // 2)) * block
            step = min(size - done, len(pool) - at)
            data[offset + done : offset + done + step] = pool[at : at + step]
            done += step

    with ThreadPoolExecutor(threads) as workers:
        list(workers.map(one, enumerate(placed)))
    data.flush()


def make(name: str, mix: str, path: Path, threads: int = 16) -> None:
    started = time.perf_counter()
    placed = write_header(path, SHAPES[name], mix)
    fill(path, placed, threads)
    size = path.stat().st_size
    print(f"{path}: {name} {mix}, {size / 1e9:.1f} GB in {time.perf_counter() - started:.1f} s", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("mix", choices=["f16", "bf16", "q4_k_m", "q8_0", "q4_0"])
    parser.add_argument("path", type=Path)
    parser.add_argument("--threads", type=int, default=16)
    arguments = parser.parse_args()
    make(arguments.shape, arguments.mix, arguments.path, arguments.threads)
