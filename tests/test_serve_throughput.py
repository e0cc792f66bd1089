"""The benchmark of many streams through HTTP, on one CPU rank and a tiny model: that it measures, not how much."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from synthetic import write_gguf

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "serve_throughput.py"


@pytest.mark.processes
def test_streams_are_counted_on_both_sides(tmp_path: Path) -> None:
    sizes = {"hidden": 64, "ffn": 128, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "head_dim": 16, "vocab": 256}
    model = write_gguf(tmp_path / "model.gguf", types="Q4_0", **sizes)
    work = ["--streams", "3", "--prompt", "16", "--generate", "8", "--repetitions", "1"]
    command = [sys.executable, str(SCRIPT), "--model", str(model), "--devices", "cpu:1", *work]
    done = subprocess.run(
        [*command, "--json", str(tmp_path / "result.json")], capture_output=True, text=True, timeout=120
    )
    assert done.returncode in (0, 1), done.stderr  # 1: so little work that HTTP shows
    report = json.loads((tmp_path / "result.json").read_text())
    assert report["engine"]["tokens_per_second"] > 0
    assert 0 < report["http"]["first"]["p50"] <= report["http"]["first"]["p99"]
    assert 0 <= report["http"]["between"]["p50"] <= report["http"]["between"]["p99"]
    assert report["http_over_engine"] == report["http"]["tokens_per_second"] / report["engine"]["tokens_per_second"]
    assert "3 streams, 16 tokens in, 8 out" in done.stdout
