"""Fixtures of the tests of the native CPU kernels: every instruction level that this machine has."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from multitensor.kernels.cpu.binding import LEVELS, load_library
from multitensor.kernels.cpu.native import NativeKernels, load

LIBRARY = load_library()
if LIBRARY is None:
    pytest.skip("native CPU kernels are not built: python setup.py build_ext --inplace", allow_module_level=True)
AVAILABLE = LEVELS[: LIBRARY.mt_best_level() + 1]


@pytest.fixture(scope="module", params=LEVELS)
def kernels(request: pytest.FixtureRequest) -> Iterator[NativeKernels]:
    if request.param not in AVAILABLE:
        pytest.skip(f"this machine has no {request.param}")
    made = load(threads=2, level=request.param)
    assert made is not None and made.level == request.param
    yield made
    made.close()


@pytest.fixture(autouse=True)
def poisoned_outputs() -> Iterator[None]:
    """torch.empty gives NaN, so that an output that is not written shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relative_error(got: torch.Tensor, expected: np.ndarray) -> float:
    assert tuple(got.shape) == expected.shape
    if expected.size == 0:
        return 0.0
    return float(np.abs(got.double().numpy() - expected).max() / max(np.abs(expected).max(), 1e-30))
