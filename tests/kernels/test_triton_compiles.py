"""Triton's kernels compile for AMD's and NVIDIA's GPUs, as the Python side launches them. Needs Triton, but no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed: pip install --no-deps triton")

EVERY_KERNEL = "MULTITENSOR_EVERY_KERNEL"  # an environment variable
FEW, ALL = "gfx942,gfx1100,sm_90", "gfx90a,gfx942,gfx1100,gfx1201,sm_80,sm_90"


def test_every_kernel_compiles(tmp_path: Path) -> None:
    """All kernels with some types of weights, each for one target; all of both for all targets where EVERY_KERNEL is
    set."""
    every = EVERY_KERNEL in os.environ
    script = Path(__file__).with_name("triton_compile.py")
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    found = subprocess.run(
        [sys.executable, script, ALL if every else FEW, *(["every"] if every else [])],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    done = json.loads(found.stdout)
    assert [result for result in done if result["error"]] == []
    assert {result["kernel"] for result in done} == {
        *("_multiply_vector", "_multiply_batch", "_expand"),
        *("_attend_part", "_add_parts", "_norm", "_place_heads"),
    }
