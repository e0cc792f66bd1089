"""Attention over a long cache holds no more memory than the plan has for it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from multitensor.sharding.memory import ATTENTION_BYTES

SCRIPT = Path(__file__).parent / "attention_peak.py"


@pytest.mark.parametrize(
    ("kv_type", "head_dim", "context"), [("f16", 64, 100_000), ("q8", 128, 100_000), ("q4", 128, 131_072)]
)
def test_a_long_context(kv_type: str, head_dim: int, context: int) -> None:
    """As plain torch works on a CPU, where keys and values are multiplied in float32."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    command = [sys.executable, str(SCRIPT), kv_type, str(head_dim), str(context)]
    peak = int(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)
    keys_and_values = 2 * 4 * head_dim * context
    assert keys_and_values / 2 < peak <= ATTENTION_BYTES + keys_and_values
