"""Loading, decoding and verifying on a GPU, against the CPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from model_harness import BLOCK, CPU, cpu_plan, logits_in_steps, on_ranks, random_prompts, relative_error
from multitensor import LLM, SamplingParams
from multitensor.config import EngineConfig
from multitensor.engine.runner import ModelRunner
from multitensor.formats.checkpoint import open_checkpoint
from multitensor.kernels.cuda.tiles import TiledTensor, to_tiles
from multitensor.kernels.dispatch import make_kernels
from multitensor.kernels.quant_tensor import QuantTensor
from multitensor.loading import loader
from multitensor.loading.loader import load_rank
from multitensor.parallel.group import Group
from synthetic import tiny_hf, write_gguf

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda", 0)
TYPES = {
    "*attn_q*": "Q5_K",
    "*attn_v*": "Q6_K",
    "*ffn_down*": "Q3_K",
    "*ffn_up*": "IQ4_XS",
    "*embd*": "Q8_0",
    "*": "Q4_K",
}


@pytest.mark.parametrize("chunk_bytes", [5000, 32 << 20])
def test_planes_equal_those_on_the_cpu(chunk_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small chunks go round the ring of pinned buffers hundreds of times: none may be filled while it is in use."""
    monkeypatch.setattr(loader, "CUDA_CHUNK_BYTES", chunk_bytes)
    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", hidden=512, ffn=1536, n_heads=8, types=TYPES))
    plan = cpu_plan(checkpoint, (5.0, 2.0, 1.0))
    for rank in range(plan.size):
        wanted, found = load_rank(checkpoint, plan, rank, CPU), load_rank(checkpoint, plan, rank, GPU)
        assert wanted.keys() == found.keys()
        for name, weight in wanted.items():
            other = found[name]
            if isinstance(weight, QuantTensor) and isinstance(other, QuantTensor):
                for plane, values in weight.planes.items():
                    assert torch.equal(values.view(torch.uint8), other.planes[plane].cpu().view(torch.uint8)), name
            else:
                assert torch.equal(weight, other.cpu()), name


@pytest.mark.parametrize("chunk_bytes", [5000, 32 << 20])
def test_tensors_are_packed_while_others_are_read(
    chunk_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tiles of planes that were loaded and packed on the CPU, one after the other."""
    monkeypatch.setattr(loader, "CUDA_CHUNK_BYTES", chunk_bytes)
    kernels = make_kernels(GPU, exact=False)
    if kernels.name != "cuda":
        pytest.skip("cuda-core is not installed, so nothing is packed")
    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", hidden=512, ffn=1536, n_heads=8, types=TYPES))
    plan = cpu_plan(checkpoint, (2.0, 1.0))
    for rank in range(plan.size):
        planes = load_rank(checkpoint, plan, rank, CPU)
        found = load_rank(checkpoint, plan, rank, GPU, adopt=kernels.adopt)
        assert list(found) == list(planes)
        for name, weight in planes.items():
            other = found[name]
            if isinstance(weight, QuantTensor):
                assert isinstance(other, TiledTensor)
                assert torch.equal(to_tiles(weight).tiles, other.tiles.cpu()), name
            else:
                assert isinstance(other, torch.Tensor) and torch.equal(weight, other.cpu()), name


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_logits_equal_those_of_the_cpu(architecture: str, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", architecture, hidden=256, ffn=768, head_dim=64, n_layers=3, types="Q4_K")
    prompts = random_prompts(320, (34, 12, 31))
    wanted = logits_in_steps(path, (1.0,), prompts, [9, 20, 1, 1])[0]
    for ratio in [(1.0,), (3.0, 1.0)]:
        for logits in logits_in_steps(path, ratio, prompts, [9, 20, 1, 1], GPU):
            assert all(relative_error(a, b) < 1e-4 for a, b in zip(logits, wanted, strict=True))


@pytest.mark.parametrize("types", ["F16", "BF16", "Q4_K", "F32"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_verify_passes_and_finds_a_wrong_bit(types: str, dtype: str, tmp_path: Path) -> None:
    kv_type = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}[dtype]
    path = write_gguf(tmp_path / "m.gguf", hidden=256, ffn=512, head_dim=64, n_layers=3, types=types)
    checkpoint = open_checkpoint(path)
    plan = replace(cpu_plan(checkpoint, (2.0, 1.0)), dtype=dtype, kv_type=kv_type)
    config = EngineConfig(str(path), dtype, dtype == "float32", 0, plan.max_num_seqs, plan.max_batch_tokens, BLOCK)

    def work(group: Group) -> list[dict[str, Any]]:
        runner = ModelRunner(checkpoint, plan, group.rank, config, group, GPU)
        runner.load()
        right = runner.verify(random_prompts(320, (20, 7)))
        down = runner.weights["blk.1.ffn_down.weight"]
        if group.rank == 1 and isinstance(down, QuantTensor):
            if "tiles" in down.planes:
                down.planes["tiles"].zero_()
            else:
                down.planes["d" if types == "Q4_K" else "weight"].mul_(1.5)
        return [right, runner.verify(random_prompts(320, (20, 7)))]

    for right, wrong in on_ranks(2, work):
        assert right["ok"], right
        assert not wrong["ok"]
        assert (wrong["first_bad_tensor"], wrong["first_bad_rank"]) == ("blk.1.ffn_down.weight", 1)


def test_half_precision_folder_needs_no_copies(tmp_path: Path) -> None:
    """A float16 checkpoint in float16: what the allocator holds after loading is the planned weights and cache."""
    path = tiny_hf(tmp_path / "model", hidden=1024, ffn=4096, n_layers=2, n_heads=16, vocab=2048, dtype="float16")
    checkpoint = open_checkpoint(path)
    plan = replace(cpu_plan(checkpoint, (1.0,)), dtype="float16", kv_type="f16")
    config = EngineConfig(str(path), "float16", False, 0, plan.max_num_seqs, plan.max_batch_tokens, BLOCK)

    def work(group: Group) -> tuple[dict[str, int], int]:
        before = torch.cuda.memory_allocated(GPU)
        runner = ModelRunner(checkpoint, plan, group.rank, config, group, GPU)
        runner.load()
        return runner.memory(), torch.cuda.memory_allocated(GPU) - before

    memory, grown = on_ranks(1, work)[0]
    expected = memory["weights_bytes"] + memory["kv_bytes"]
    assert expected <= grown < 1.01 * expected + (1 << 20)


def test_warming_up_changes_no_text(tmp_path: Path) -> None:
    """Prompts and decode steps in every bucket come before, in the blocks that the texts then take."""
    path = write_gguf(tmp_path / "m.gguf", hidden=256, ffn=768, n_heads=4, n_kv_heads=2, head_dim=64, types="Q4_K")
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    prompts = [[7 + i, 3, 90, 41, 5] for i in range(5)]
    texts = []
    for warm in (False, True):
        with LLM(path, devices="cuda:0", dtype="float16", max_model_len=256) as llm:
            if warm:
                (seconds,) = llm._engine.call("warm_up")
                assert seconds > 0
            texts.append([output.outputs[0].token_ids for output in llm.generate(prompts, params)])
    assert texts[0] == texts[1]
