"""Products of few tokens with float weights (gemv_float.cu) on an emulated GPU, by float64."""

from __future__ import annotations

from pathlib import Path

import emulated_cuda
import pytest
import torch

from multitensor.kernels.cuda import float_matrix
from multitensor.kernels.cuda.float_matrix import LARGE, SMALL, FloatKernels, Shape

pytestmark = pytest.mark.skipif(emulated_cuda.compiler() is None, reason="there is no C++ compiler")
HALF, BFLOAT, FLOAT = torch.float16, torch.bfloat16, torch.float32


@pytest.fixture(autouse=True)
def emulated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    emulated_cuda.replace_gpu(monkeypatch, emulated_cuda.AtOnce(tmp_path), float_matrix)


@pytest.mark.parametrize(
    ("x_type", "w_type", "shape"),
    [(BFLOAT, BFLOAT, SMALL), (HALF, HALF, LARGE), (HALF, BFLOAT, SMALL), (BFLOAT, FLOAT, SMALL)],
)
def test_products(x_type: torch.dtype, w_type: torch.dtype, shape: Shape) -> None:
    """Tensor cores where both are of one 16-bit type, else plain arithmetic; rows fill no group, columns no chunk."""
    random = torch.Generator().manual_seed(1)
    kernels = FloatKernels(torch.device("cpu"), shape)
    w = torch.randn(45, 1112, generator=random).to(w_type)
    for tokens in (1, 2, 4):
        x = torch.randn(tokens, 1112, generator=random).to(x_type)
        assert kernels.takes(x, w)
        wanted = x.double() @ w.double().T
        y = kernels.multiply(x, w, float_out=True)
        assert float((y.double() - wanted).norm() / wanted.norm()) < 1e-5
    rows = w[:, :1001]  # neither aligned nor in eights
    wanted = x[:, :1001].double() @ rows.double().T
    assert float((kernels.multiply(x[:, :1001], rows).double() - wanted).norm() / wanted.norm()) < 5e-3
