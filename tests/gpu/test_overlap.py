"""Sums that travel while products are computed, on real GPUs: the same results, whatever takes long."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from test_two_gpus import mean_kl, scores

from conftest import find_model
from model_harness import BLOCK, cpu_plan, random_prompts, shuffled_tables
from multitensor import LLM
from multitensor.config import EngineConfig
from multitensor.engine.runner import ModelRunner
from multitensor.formats.checkpoint import open_checkpoint
from multitensor.kernels.attention_inputs import AttentionInputs
from multitensor.kernels.rows import Here
from multitensor.model.row_cuts import OVERLAP_TOKENS, RowCut, halves, uncut
from multitensor.parallel.torch_group import TorchGroup
from synthetic import tiny_hf, write_gguf

GPU = torch.device("cuda", 0)
ROUNDING = {torch.float16: 4e-3, torch.bfloat16: 3e-2}  # of a few layers
LATE_CYCLES = 2_000_000  # about a millisecond: longer than the products of these small models
TYPES = {"*attn_v*": "Q6_K", "*ffn_down*": "Q6_K", "*": "Q4_K"}


class LateSums(TorchGroup):
    """A rank alone, whose sums, of its own part, take a millisecond on the stream on which a group's travel. Meanwhile
    the partial sums hold NaN, so that whoever reads them too early shows."""

    def __init__(self) -> None:
        self.rank, self.size, self.device, self.backend = 0, 1, GPU, "nccl"
        self.overlaps, self._side, self._peers = True, None, "alone"
        self.sums = 0

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        self.sums += 1
        total = x.clone()
        x.fill_(float("nan"))
        torch.cuda._sleep(LATE_CYCLES)
        x.copy_(total)
        return x

    def all_gather_last(self, x: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        return x

    def gather_objects(self, value: object) -> list[object]:
        return [value]

    def barrier(self) -> None:
        torch.cuda.synchronize()

    def open_peer_memory(self, nbytes: int) -> None:
        return None

    def open_host_memory(self, nbytes: int) -> None:
        return None

    def choose_reductions(self, *arguments: Any) -> None:
        return None


def hidden_states(runner: ModelRunner, steps: Sequence[Any], tables: Any, cut_rows: RowCut) -> list[torch.Tensor]:
    runner.decoder.cut_rows = cut_rows
    found = []
    with torch.inference_mode():
        for chunks, contexts in steps:
            inputs = AttentionInputs.build([len(ids) for ids in chunks], contexts, tables, BLOCK, GPU)
            ids = torch.tensor([token for chunk in chunks for token in chunk], device=GPU)
            found.append(runner.decoder.forward(ids, inputs, runner.caches))
        torch.cuda.synchronize()
    return found


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("architecture", "types", "kv_type"),
    [("llama", TYPES, "f16"), ("qwen3", TYPES, "q8"), ("gemma3", "Q8_0", "f16"), ("qwen2", "F16", "f16")],
)
def test_nothing_runs_ahead_of_its_sum(
    tmp_path: Path, architecture: str, types: Any, kv_type: str, dtype: torch.dtype
) -> None:
    """Two prompts and a decode, then their next chunks; twenty times, as a race need not show at once."""
    shape = {"hidden": 512, "ffn": 1024, "n_heads": 8, "n_kv_heads": 4, "head_dim": 64, "n_layers": 3}
    path = write_gguf(tmp_path / "m.gguf", architecture, types=types, context=4096, **shape)
    checkpoint = open_checkpoint(path)
    plan = cpu_plan(checkpoint, (1.0,), context=4096, kv_tokens=8192, kv_type=kv_type)
    name = str(dtype).removeprefix("torch.")
    group = LateSums()
    runner = ModelRunner(checkpoint, plan, 0, EngineConfig(str(path), name, False, 0, 8, 4096, BLOCK), group, GPU)
    runner.load()
    prompts = random_prompts(320, [1500, 601, 40])
    first = [ids[:count] for ids, count in zip(prompts, (900, 300, 39), strict=True)]
    second = [ids[count:] for ids, count in zip(prompts, (900, 300, 39), strict=True)]
    steps = [(first, (0, 0, 0)), ([second[0], second[1], second[2]], (900, 300, 39))]
    tables = shuffled_tables([len(ids) for ids in prompts], plan.kv_tokens // BLOCK)
    wanted = hidden_states(runner, steps, tables, uncut)
    assert group.sums == len(steps) * 2 * plan.spec.n_layers
    cuts: list[RowCut] = [halves, lambda tokens: (tokens // 3, tokens - tokens // 3)]
    for turn in range(20):
        before = group.sums
        found = hidden_states(runner, steps, tables, cuts[turn % 2])
        parts = sum(len(cuts[turn % 2](sum(map(len, chunks)))) for chunks, _ in steps)
        assert group.sums - before == 2 * plan.spec.n_layers * parts
        for some, right in zip(found, wanted, strict=True):
            assert not some.isnan().any()
            assert float((some.double() - right.double()).norm() / right.double().norm()) < ROUNDING[dtype]
    runner.close()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scratch", [1 << 28, 300 * 1024 * 2])  # all weights at once; some rows at a time
def test_products_of_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, scratch: int) -> None:
    from multitensor.kernels.cuda import cuda_kernels

    monkeypatch.setattr(cuda_kernels, "EXPAND_BYTES", scratch)
    path = write_gguf(tmp_path / "m.gguf", hidden=1024, ffn=1536, n_heads=8, n_kv_heads=2, n_layers=1, types=TYPES)
    checkpoint = open_checkpoint(path)
    plan = cpu_plan(checkpoint, (1.0,), kv_type="f16")
    name = str(dtype).removeprefix("torch.")
    runner = ModelRunner(checkpoint, plan, 0, EngineConfig(str(path), name, False, 0, 8, 256, BLOCK), LateSums(), GPU)
    runner.load()
    kernels, block = runner.kernels, runner.decoder.layers[0].feed_forward
    x = torch.randn(513, 1024, device=GPU).to(dtype) * 0.1
    with torch.inference_mode():
        inner = kernels.gated_linear(x, block.gate, block.up, "silu")
        out = kernels.linear(inner, block.down)
        for sizes in ((256, 257), (1, 512), (400, 100, 13)):
            parts = [Here(rows) for rows in x.split(sizes)]
            found = kernels.gated_linear_of_parts(parts, block.gate, block.up, "silu")
            assert float((found.double() - inner.double()).norm() / inner.double().norm()) < ROUNDING[dtype] / 4
            pieces = torch.cat(list(kernels.linear_in_parts(inner, sizes, block.down)))
            assert float((pieces.double() - out.double()).norm() / out.double().norm()) < ROUNDING[dtype] / 4
    runner.close()


def score_both_ways(path: Path, texts: list[list[int]], dtype: str, **options: Any) -> float:
    """KL divergence of what two GPUs say with sums that travel || without, in nats a position."""
    found = []
    for overlap in (False, True):
        with LLM(path, devices="cuda:0,cuda:1", dtype=dtype, max_model_len=4096, overlap=overlap, **options) as llm:
            assert llm.reductions()["overlapped_from"] == (OVERLAP_TOKENS if overlap else None)
            found.append(scores(llm, texts))
            if overlap:
                planned, held = llm.memory_plan, llm.memory()
                for plan, memory in zip(planned, held, strict=True):
                    outside = sum(plan.buffer_parts[name] for name in ("cuda_context", "nccl", "peer_memory"))
                    assert memory["reserved_bytes"] <= plan.total - outside
    return mean_kl(*found)


@pytest.mark.gpu2
@pytest.mark.parametrize("p2p", [None, False])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gemma3"])
def test_tiny_models_on_two_gpus(tmp_path: Path, architecture: str, p2p: bool | None) -> None:
    path = tiny_hf(tmp_path / architecture, architecture, context=4096)
    assert score_both_ways(path, random_prompts(320, [3000, 1400]), "float16", p2p=p2p) <= 1e-3


@pytest.mark.gpu2
@pytest.mark.parametrize("ratio", [None, "3,1"])
@pytest.mark.parametrize("kv_type", [None, "q8"])
def test_quantised_weights_on_two_gpus(tmp_path: Path, ratio: str | None, kv_type: str | None) -> None:
    shape = {"hidden": 512, "ffn": 1536, "n_heads": 8, "n_kv_heads": 2, "head_dim": 64, "n_layers": 4, "vocab": 512}
    path = write_gguf(tmp_path / "m.gguf", types=TYPES, context=4096, **shape)
    assert score_both_ways(path, random_prompts(512, [3000, 900]), "bfloat16", ratio=ratio, kv_type=kv_type) <= 1e-3


@pytest.mark.gpu2
@pytest.mark.models
@pytest.mark.parametrize("name", ["smollm2-135m", "gemma3-270m"])
def test_real_models_on_two_gpus(name: str) -> None:
    path = find_model(name)
    assert score_both_ways(path, random_prompts(40000, [2600]), "float16") <= 1e-3
