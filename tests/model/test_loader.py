"""What a rank loads: the right bits, the planned bytes, nothing else of the file, little host memory."""

from __future__ import annotations

import copy
import subprocess
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from model_harness import CPU, cpu_plan
from multitensor.errors import InputError
from multitensor.formats.checkpoint import Checkpoint, open_checkpoint
from multitensor.kernels.dequantize import dequantize
from multitensor.kernels.quant_tensor import QuantTensor
from multitensor.loading import loader
from multitensor.loading.loader import load_rank
from multitensor.sharding.plan import TensorPlan
from synthetic import tiny_hf, write_gguf

TYPES = {"*attn_q*": "Q5_K", "*attn_v*": "Q6_K", "*ffn_down*": "Q3_K", "*ffn_up*": "IQ4_XS", "*embd*": "Q8_0"}


def oracle_values(checkpoint: Checkpoint, tensor: TensorPlan) -> np.ndarray:
    """The whole tensor as the gguf package dequantises it, float32."""
    info = tensor.decl.info
    raw = np.frombuffer(checkpoint.raw(info), dtype=np.uint8)
    kind = gguf.GGMLQuantizationType[info.type.name]
    rows = raw.reshape(-1, info.type.row_bytes(info.shape[-1]))
    return gguf.quants.dequantize(rows, kind).reshape(info.shape)


def expected_slice(checkpoint: Checkpoint, tensor: TensorPlan, rank: int) -> np.ndarray:
    whole = oracle_values(checkpoint, tensor)
    parts = [np.take(whole, range(*part), axis=tensor.axis or 0) for part in tensor.slices[rank]]
    return np.concatenate(parts, axis=tensor.axis or 0)


@pytest.mark.parametrize("ratio", [(1.0,), (1.0, 1.0), (5.0, 2.0, 1.0), (1.0,) * 5], ids=str)
@pytest.mark.parametrize("chunk_bytes", [1, 5000, 4 << 20])
def test_every_slice_bit_for_bit(
    ratio: Sequence[float], chunk_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the gguf package, through chunks of one row, of a few rows, and of everything."""
    monkeypatch.setattr(loader, "CPU_CHUNK_BYTES", chunk_bytes)
    path = write_gguf(
        tmp_path / "m.gguf", hidden=256, ffn=768, n_layers=1, types=TYPES | {"*": "Q4_K"}, rope_factors=True
    )
    checkpoint = open_checkpoint(path)
    plan = cpu_plan(checkpoint, ratio)
    for rank in range(plan.size):
        weights = load_rank(checkpoint, plan, rank, CPU)
        held = {name for name, tensor in plan.tensors.items() if tensor.slices[rank]}
        assert set(weights) == held
        for name, weight in weights.items():
            tensor = plan.tensors[name]
            wanted = torch.from_numpy(expected_slice(checkpoint, tensor, rank))
            if isinstance(weight, QuantTensor):
                assert (weight.rows, weight.cols) == tensor.local_shape(rank)
                assert weight.type is tensor.decl.info.type
                found = dequantize(weight)
            else:
                assert weight.dtype == torch.float32
                found = weight
            assert torch.equal(found.view(torch.int32), wanted.view(torch.int32)), name


def test_resident_bytes_are_the_plans(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", hidden=256, ffn=768, types=TYPES | {"*": "Q4_K"})
    checkpoint = open_checkpoint(path)
    plan = cpu_plan(checkpoint, (5.0, 2.0, 1.0))
    for rank in range(plan.size):
        weights = load_rank(checkpoint, plan, rank, CPU)
        measured = sum(weight.nbytes for weight in weights.values())
        assert measured == sum(tensor.resident_bytes(rank) for tensor in plan.tensors.values())


def test_progress_counts_the_bytes_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "CPU_CHUNK_BYTES", 4096)
    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", hidden=256, ffn=768, types="Q4_K"))
    plan = cpu_plan(checkpoint, (1.0, 1.0))
    for rank in range(2):
        calls: list[tuple[int, int]] = []
        load_rank(checkpoint, plan, rank, CPU, lambda done, total, calls=calls: calls.append((done, total)))
        done = [call[0] for call in calls]
        assert len(calls) > 50 and done == sorted(done)
        assert calls[-1][0] == calls[-1][1] == sum(tensor.read_bytes(rank) for tensor in plan.tensors.values())


def test_half_precision_folder_keeps_its_type(tmp_path: Path) -> None:
    """Matrices stay bfloat16, vectors become float32, and Gemma's norms get the 1 that its formula adds."""
    checkpoint = open_checkpoint(tiny_hf(tmp_path / "model", "gemma3", dtype="bfloat16", tied=True))
    plan = cpu_plan(checkpoint, (2.0, 1.0))
    weights = load_rank(checkpoint, plan, 1, CPU)
    down = weights["blk.1.ffn_down.weight"]
    assert isinstance(down, QuantTensor) and down.planes["weight"].dtype == torch.bfloat16
    tensor = plan.tensors["blk.1.ffn_norm.weight"]
    raw = torch.frombuffer(bytearray(checkpoint.raw(tensor.decl.info)), dtype=torch.bfloat16)
    assert plan.spec.norm_offset == 1.0
    norm = weights["blk.1.ffn_norm.weight"]
    assert isinstance(norm, torch.Tensor) and torch.equal(norm, raw.float() + 1.0)


def test_tied_embedding_is_held_once(tmp_path: Path) -> None:
    from model_harness import RankModel
    from multitensor.parallel.group import SingleGroup

    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", tied=True))
    model = RankModel(checkpoint, cpu_plan(checkpoint, (1.0,)), SingleGroup())
    assert model.decoder.embedding.weight is model.decoder.lm_head.weight
    assert "output.weight" not in model.weights


def test_a_type_without_kernel_is_named(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", hidden=256, ffn=256, types={"*ffn_up*": "IQ3_XXS"}))
    with pytest.raises(InputError, match=r"blk\.0\.ffn_up\.weight.*IQ3_XXS"):
        load_rank(checkpoint, cpu_plan(checkpoint, (1.0,)), 0, CPU)


def test_a_file_that_shrank_is_reported(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf")
    checkpoint = open_checkpoint(path)
    plan = cpu_plan(checkpoint, (1.0,))
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size - 4096)
    with pytest.raises(InputError, match=r"ends [0-9]+ bytes early"):
        load_rank(checkpoint, plan, 0, CPU)


def test_host_memory_stays_small(tmp_path: Path) -> None:
    """Beside the weights themselves a load takes little anonymous memory, however large the file is."""
    path = write_gguf(
        tmp_path / "m.gguf", hidden=2048, ffn=8192, n_layers=3, n_heads=16, n_kv_heads=4, vocab=8192, types="Q4_K"
    )
    script = f"""
        import sys
        sys.path[:0] = [{str(Path(__file__).parents[1])!r}]
        import torch
        from model_harness import CPU, cpu_plan
        from multitensor.formats.checkpoint import open_checkpoint
        from multitensor.loading.loader import load_rank

        def anonymous():
            with open("/proc/self/status") as file:
                return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))

        checkpoint = open_checkpoint({str(path)!r})
        plan = cpu_plan(checkpoint, (1.0, 1.0))
        resident = sum(t.resident_bytes(0) for t in plan.tensors.values())
        before = peak = anonymous()

        def look(done, total):
            global peak
            peak = max(peak, anonymous())

        weights = load_rank(checkpoint, plan, 0, CPU, look)
        print(resident, peak - before)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True)
    resident, grown = map(int, done.stdout.split())
    assert resident > 50 << 20
    assert grown < resident + (96 << 20)


@pytest.mark.parametrize("chunk_bytes", [1, 4 << 20])
def test_tensors_are_adopted_one_by_one_when_complete(
    chunk_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is handed over is whole, norm offset included, and what comes back is kept."""
    monkeypatch.setattr(loader, "CPU_CHUNK_BYTES", chunk_bytes)
    path = write_gguf(tmp_path / "m.gguf", hidden=256, ffn=768, n_layers=1, types="Q4_K")
    checkpoint = open_checkpoint(path)
    plan = cpu_plan(checkpoint, (1.0, 2.0))
    plan = replace(plan, spec=replace(plan.spec, norm_offset=1.0))
    plain = load_rank(checkpoint, plan, 1, CPU)
    seen: dict[str, QuantTensor | torch.Tensor] = {}

    def adopt(weights: Mapping[str, QuantTensor | torch.Tensor]) -> dict[str, QuantTensor | torch.Tensor]:
        ((name, weight),) = weights.items()
        assert name not in seen
        seen[name] = copy.deepcopy(weight)
        return {name: torch.tensor([float(len(seen))])}

    kept = load_rank(checkpoint, plan, 1, CPU, adopt=adopt)
    assert list(kept) == list(seen) == list(plain)
    assert [float(kept[name]) for name in kept] == [float(i + 1) for i in range(len(kept))]
    for name, weight in plain.items():
        other = seen[name]
        if isinstance(weight, QuantTensor):
            assert isinstance(other, QuantTensor)
            assert all(torch.equal(plane, other.planes[key]) for key, plane in weight.planes.items())
        else:
            assert torch.equal(weight, other)


def test_columns_are_picked_piece_by_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However little of the file is mapped at a time."""
    path = write_gguf(tmp_path / "m.gguf", hidden=256, ffn=768, n_layers=1, types="Q8_0")
    checkpoint = open_checkpoint(path)
    plan = cpu_plan(checkpoint, (1.0, 1.0))
    whole = load_rank(checkpoint, plan, 1, CPU)["blk.0.ffn_down.weight"]
    monkeypatch.setattr(loader, "MAPPED_BYTES", 1000)
    pieces = load_rank(checkpoint, plan, 1, CPU)["blk.0.ffn_down.weight"]
    assert isinstance(whole, QuantTensor) and isinstance(pieces, QuantTensor)
    assert all(torch.equal(plane, pieces.planes[key]) for key, plane in whole.planes.items())
