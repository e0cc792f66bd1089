"""Where Triton's kernels run in this run of the tests: in its interpreter, or on an NVIDIA GPU (see tests/conftest.py).

Importing it skips the module where they can run nowhere, with the reason.
"""

from __future__ import annotations

import os
import shutil

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed: pip install --no-deps triton")

from multitensor.kernels.triton.device import INTERPRETED  # noqa: E402
from multitensor.kernels.triton.trials import Job, Trials  # noqa: E402

DEVICE = "cpu" if INTERPRETED else "cuda"
MARKS = [] if INTERPRETED else [pytest.mark.gpu]

if not INTERPRETED and not any(os.environ.get("CC") or shutil.which(name) for name in ("cc", "gcc", "clang")):
    pytest.skip("Triton needs a C compiler at run time; set TRITON_INTERPRET=1", allow_module_level=True)

if INTERPRETED and tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7):
    pytest.skip("the interpreter of Triton before 3.7 fails with NumPy 2.4", allow_module_level=True)

# Relative to the largest result. The interpreter cuts numbers off where a GPU rounds them to bfloat16.
TOLERANCE = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2 if INTERPRETED else 1e-2}


class Scripted(Trials):
    """Trials whose clock shows what it is told: seconds of plain torch's jobs and of ours, the jobs being run all the
    same. `tried`: families in the order of their trials."""

    def __init__(self, plain: float, ours: float) -> None:
        super().__init__(torch.device(DEVICE))
        self._told = {True: plain, False: ours}
        self._turn = 0
        self.tried: list[str] = []

    def _try(self, family: str, plain: Job, ours: object) -> str:
        self.tried.append(family)
        self._plain = plain
        return super()._try(family, plain, ours)  # type: ignore[arg-type]

    def seconds(self, job: Job) -> float:
        super().seconds(job)
        return self._told[job is self._plain]


def always_ours() -> Scripted:
    return Scripted(plain=2.0, ours=1.0)


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference over the largest number expected."""
    difference = (got.cpu().double() - expected.cpu().double()).abs().max()
    return float(difference / expected.cpu().double().abs().max())
