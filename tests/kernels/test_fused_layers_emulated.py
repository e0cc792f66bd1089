"""All launches of a decode step between attentions (fused_layers.py), made from a model's decoders, on emulated GPUs
against the plain decoder's arithmetic in float64: which weights, norms and biases belong to which launch."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import emulated_cuda
import pytest
import torch
from random_weights import error

from model_harness import cpu_plan
from multitensor.config import HOST_RELAY
from multitensor.formats.checkpoint import open_checkpoint
from multitensor.kernels.cuda import layer as layer_module
from multitensor.kernels.cuda.cuda_kernels import CudaKernels
from multitensor.kernels.cuda.tiles import TILE_BYTES, to_tiles
from multitensor.kernels.dequantize import dequantize
from multitensor.kernels.dispatch import make_kernels
from multitensor.kernels.quant_tensor import QuantTensor
from multitensor.loading.loader import load_rank
from multitensor.model.decoder import Decoder
from multitensor.model.fused_layers import FusedLayers
from multitensor.model.linear import joint_matrices
from multitensor.parallel.rank_memory import NOTHING, RankMemory
from multitensor.sharding.plan import Plan
from synthetic import write_gguf

pytestmark = pytest.mark.skipif(emulated_cuda.compiler() is None, reason="there is no C++ compiler")
CPU = torch.device("cpu")
STEPS = 5

# architecture, types, ratio, how sums travel, tokens
CASES = {
    "llama, one rank": ("llama", "Q8_0", (1,), "alone", 2),
    "qwen2 with biases, two ranks": ("qwen2", "Q4_0", (1, 1), "peers", 1),
    "gemma3 with norms after, float16, through the host": ("gemma3", "F16", (3, 1), "host", 2),
    "qwen3, bfloat16, three ranks": ("qwen3", "BF16", (1, 1, 1), "peers", 1),
}


class Ranks:
    """A group in name only: what is asked for is answered alike; memory as all ranks share it."""

    def __init__(self, size: int, way: str) -> None:
        def shared() -> list[RankMemory]:
            buffers = [torch.full((1 << 20,), NOTHING, dtype=torch.int32).view(torch.uint8) for _ in range(size)]
            addresses = tuple(buffer.data_ptr() for buffer in buffers)
            return [RankMemory(rank, buffer, addresses, CPU) for rank, buffer in enumerate(buffers)]

        memory: list[Any] = shared() if way != "alone" else [None] * size
        nothing = [None] * size
        self.groups: list[Any] = [
            SimpleNamespace(
                rank=rank,
                size=size,
                gather_objects=lambda value: [value] * size,
                peer_memory=(memory if way == "peers" else nothing)[rank],
                host_memory=(memory if way == "host" else nothing)[rank],
            )
            for rank in range(size)
        ]


class Rank:
    def __init__(self, path: Path, plan: Plan, group: Any, tokens: int, dtype: torch.dtype) -> None:
        kernels = make_kernels(CPU, exact=True)
        weights = load_rank(open_checkpoint(path), plan, group.rank, CPU)
        tiled = {
            name: to_tiles(w) if isinstance(w, QuantTensor) and w.type.name in TILE_BYTES else w
            for name, w in weights.items()
        }
        CudaKernels.join(kernels, tiled, joint_matrices(plan.spec.n_layers))  # type: ignore[arg-type]
        self.plain = Decoder(plan, group.rank, weights, kernels, group, torch.float32, CPU)
        self.decoder = Decoder(plan, group.rank, tiled, kernels, group, dtype, CPU)
        gpu: Any = SimpleNamespace(
            tile_kernels=SimpleNamespace(device=CPU, blocks=3, shared_limit=72 << 10, overlap=True)
        )
        fused = FusedLayers.make(self.decoder, plan, group.rank, gpu, group, tokens, frozenset((HOST_RELAY,)))
        assert fused is not None
        self.fused = fused
        self.heads = plan.ranks[group.rank].query_heads.size * plan.spec.head_dim


def product(x: torch.Tensor, w: QuantTensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    y = x.double() @ dequantize(w).double().T
    return y if bias is None else y + bias.double()


def normed(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + eps) * weight.double()


def wanted(
    ranks: list[Rank], number: int, mixed: list[torch.Tensor], residual: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """(residual stream, every rank's result) of launch `number`, by the plain decoders' weights."""

    def added(residual: torch.Tensor, parts: list[torch.Tensor], post: torch.Tensor | None) -> torch.Tensor:
        total = torch.stack(parts).sum(0)
        return residual + (total if post is None else normed(total, post, eps))

    eps = ranks[0].plain.eps
    layers = [rank.plain.layers[number] for rank in ranks]
    attentions = [layer.attention for layer in layers]
    parts = [product(x, a.output, a.output_bias) for x, a in zip(mixed, attentions, strict=True)]
    residual = added(residual.double(), parts, layers[0].post_attention_norm)
    x = normed(residual, layers[0].ffn_norm, eps).to(dtype)
    parts = []
    for f in (layer.feed_forward for layer in layers):
        gate, up = product(x, f.gate, f.gate_bias), product(x, f.up, f.up_bias)
        gelu = torch.nn.functional.gelu(gate, approximate="tanh")
        inner = (gelu if f.activation == "gelu_tanh" else torch.nn.functional.silu(gate)) * up
        parts.append(product(inner.to(dtype), f.down, f.down_bias))
    residual = added(residual, parts, layers[0].post_ffn_norm)
    x = normed(residual, layers[0].next_norm, eps).to(dtype)
    results = []
    for rank in ranks:
        if number + 1 == len(rank.plain.layers):
            assert rank.plain.lm_head.weight is not None
            results.append(product(x, rank.plain.lm_head.weight))
        else:
            a = rank.plain.layers[number + 1].attention
            biases = a.qkv_biases or (None, None, None)
            results.append(torch.cat([product(x, w, b) for w, b in zip(a.qkv, biases, strict=True)], dim=1))
    return residual, results


@pytest.mark.parametrize("name", CASES)
def test_a_models_launches(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    architecture, types, ratio, way, tokens = CASES[name]
    queue = emulated_cuda.Queue(tmp_path)
    emulated_cuda.replace_gpu(monkeypatch, queue, layer_module)
    path = write_gguf(tmp_path / "m.gguf", architecture, hidden=128, ffn=256, n_heads=4, n_kv_heads=2, types=types)
    plan = cpu_plan(open_checkpoint(path), ratio)
    dtype = torch.bfloat16 if types == "BF16" else torch.float16
    ranks = [Rank(path, plan, group, tokens, dtype) for group in Ranks(len(ratio), way).groups]
    random = torch.Generator().manual_seed(1)
    launches = []
    for step in range(STEPS):
        for number in range(plan.spec.n_layers):
            mixed = [torch.randn(tokens, rank.heads, generator=random).to(dtype) for rank in ranks]
            launches.append((step, number, mixed, torch.randn(tokens, plan.spec.hidden_size, generator=random)))
    found: list[list[tuple[torch.Tensor, torch.Tensor]]] = []
    for r, rank in enumerate(ranks):
        found.append([])
        for step, number, mixed, residual in launches:
            after = torch.full_like(residual, float("nan"))
            out = rank.fused.run(number, mixed[r], residual, after, torch.tensor([step], dtype=torch.int32))
            found[-1].append((after, out))
    assert queue.run(len(ranks), seed=2), "all wait for ever"
    for i, (_, number, mixed, residual) in enumerate(launches):
        stream, results = wanted(ranks, number, mixed, residual, dtype)
        for r in range(len(ranks)):
            assert error(found[r][i][0], stream) < 1e-2
            assert error(found[r][i][1], results[r]) < 1e-2
