"""Norms, gates and the likeliest token (decode.cu, prefill.cu, sample.cu) on an emulated GPU against plain torch."""

from __future__ import annotations

from pathlib import Path

import emulated_cuda
import pytest
import torch

from multitensor.kernels import reference
from multitensor.kernels.cuda import decode, prefill, sample
from multitensor.kernels.cuda.decode import DecodeKernels
from multitensor.kernels.cuda.prefill import PrefillKernels
from multitensor.kernels.cuda.sample import GreedySampler

pytestmark = pytest.mark.skipif(emulated_cuda.compiler() is None, reason="there is no C++ compiler")
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def emulated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    emulated_cuda.replace_gpu(monkeypatch, emulated_cuda.AtOnce(tmp_path), decode, prefill, sample)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("post", [False, True])
def test_residual_add_and_norm(dtype: torch.dtype, post: bool) -> None:
    random = torch.Generator().manual_seed(1)
    residual, partial = torch.randn(2, 3, 576, generator=random)
    weight, post_weight = torch.rand(2, 576, generator=random) + 0.5
    partial = partial.to(dtype)
    wanted, after = reference.add_rms_norm(
        partial.float(), residual.clone(), weight, 1e-5, post_weight=post_weight if post else None
    )
    out = torch.full((3, 576), float("nan"), dtype=dtype)
    kernels = DecodeKernels(CPU)
    kernels.add_rms_norm(residual, partial, weight, 1e-5, out, post_weight=post_weight if post else None)
    assert torch.allclose(residual, after, rtol=1e-5, atol=1e-5)
    assert torch.allclose(out.float(), wanted.float(), rtol=1e-2, atol=1e-2)


def likeliest_rows() -> torch.Tensor:
    """float32 [5, 3000]: plain, a tie, not a number, all alike, the largest last."""
    logits = torch.randn(5, 3000, generator=torch.Generator().manual_seed(2))
    logits[1, [70, 2900]] = 50.0
    logits[2, 1234] = float("nan")
    logits[3] = -7.0
    logits[4, 2999] = 60.0
    return logits


def test_the_likeliest_token_goes_where_the_next_step_looks() -> None:
    logits, last = likeliest_rows(), torch.full((8,), -1)
    sampler = GreedySampler(5, CPU)
    positions = torch.tensor([4, 0, 9, -1, 2], dtype=torch.int32)
    sampler.run(logits, positions, torch.tensor([6, 2, 0, 5, 1], dtype=torch.int32), last)
    assert sampler.ids.tolist() == [int(logits[0].argmax()), 70, 1234, 0, 2999]
    assert last.tolist() == [1234, 2999, 70, -1, -1, -1, int(logits[0].argmax()), -1]  # padding writes nothing


@pytest.mark.parametrize("kind", ["silu", "gelu_tanh"])
def test_a_gate_of_rows_with_gaps(kind: str) -> None:
    both = torch.randn(3, 1008, generator=torch.Generator().manual_seed(3)).to(torch.bfloat16)
    gate, up = both[:, :496], both[:, 504:1000]
    kernels = PrefillKernels(CPU)
    assert kernels.gate_takes(gate, up)
    out = kernels.gated_activation(gate, up, kind)  # type: ignore[arg-type]
    x = gate.float()
    acted = torch.nn.functional.gelu(x, approximate="tanh") if kind == "gelu_tanh" else torch.nn.functional.silu(x)
    assert torch.allclose(out.float(), acted * up.float(), rtol=1e-2, atol=1e-2)
