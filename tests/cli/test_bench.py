"""`bench`: what it reports, and that no test of it is short of memory by its own plan."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from multitensor import LLM
from multitensor.architectures.registry import resolve
from multitensor.cli.bench import Work, _decode
from multitensor.formats.checkpoint import open_checkpoint
from multitensor.sharding.solve import solve
from multitensor.sharding.topology import Device
from synthetic import write_gguf

DIMS = {"hidden": 64, "ffn": 128, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab": 320, "context": 512}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_gguf(tmp_path_factory.mktemp("model") / "tiny.gguf", types="Q8_0", **DIMS))


def bench(model: str, arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "multitensor", "bench", model, *arguments.split()]
    return subprocess.run(command, capture_output=True, text=True, timeout=150)


def report_of(model: str, arguments: str) -> dict[str, Any]:
    done = bench(model, f"{arguments} --json")
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def test_figures_of_two_ranks(model: str) -> None:
    report = report_of(model, "-p 16 -n 12 -b 1,3 --devices cpu:2 -r 2")
    (load,) = report["loads"]
    assert load["ranks"] == 2 and load["load_seconds"] > 0
    assert len(load["memory_bytes_per_second"]) == 2 and min(load["memory_bytes_per_second"]) > 0
    for stages in load["stages"]:
        assert set(stages) == {"start", "weights", "cache", "reductions", "others"}
        assert all(0 <= seconds <= load["load_seconds"] for seconds in stages.values())
    prefill, one, three = report["results"]
    assert (prefill["test"], prefill["tokens"], prefill["floor_percent"]) == ("prefill", 16, None)
    for row, batch in ((one, 1), (three, 3)):
        assert (row["test"], row["batch"], row["tokens"], row["depth"]) == ("decode", batch, 12, 0)
        assert row["slowest"] <= row["tokens_per_second"] <= row["fastest"]
        assert row["first_token_seconds"] > 0
        steps = row["tokens_per_second"] / batch
        assert row["bytes_per_second"] == pytest.approx(row["bytes_per_step"] * steps)
        slowest = min(load["memory_bytes_per_second"])
        assert row["floor_percent"] <= 100 * row["bytes_per_second"] / slowest * (1 + 1e-9)
        assert row["reduction_percent"] > 0
    # Two sequences more, of 7.5 tokens on average: one KV head of 16 a rank, f16, two layers.
    assert three["bytes_per_step"] - one["bytes_per_step"] == 2 * 7.5 * 2 * 2 * 16 * 2


def test_a_deep_cache_is_filled_once(model: str) -> None:
    """Nine whole blocks of 32 of each sequence's 300 tokens are found again in both repetitions."""
    with LLM._open(model, devices="cpu:1", max_num_seqs=2, max_model_len=400, prefix_cache="shared") as llm:
        result = _decode(llm, 2, 12, 300, 2)
        assert result.tokens_per_second > 0
        assert llm.stats.prefix_hits == 2 * 2 * 288
        assert llm.stats.preemptions == 0


def test_a_deep_cache_is_read(model: str) -> None:
    shallow, deep = (report_of(model, f"-p 0 -n 12 -b 2 -d {depth} --tp 1 -r 2")["results"][0] for depth in (0, 300))
    assert (shallow["depth"], deep["depth"]) == (0, 300)
    assert deep["reduction_percent"] == 0
    assert deep["bytes_per_step"] - shallow["bytes_per_step"] == 2 * 299 * 2 * 2 * 2 * 16 * 2


def test_a_table_for_people(model: str) -> None:
    done = bench(model, "-p 16 -n 8 -d 64 --tp 1 -r 1")
    assert done.returncode == 0, done.stderr
    assert "| decode 8 at 64 |" in done.stdout and "| prefill 16" in done.stdout
    assert "memory is read at" in done.stdout


def test_a_batch_has_sequences(model: str) -> None:
    done = bench(model, "-b 0")
    assert done.returncode == 2 and "-b" in done.stderr


@pytest.mark.parametrize(("batches", "depth"), [((1,), 0), ((1, 4), 1000), ((32,), 0), ((32,), 700), ((9, 64), 33)])
def test_the_pool_holds_the_largest_batch(model: str, batches: tuple[int, ...], depth: int) -> None:
    """Else sequences would be put off while the others are timed."""
    work = Work((512,), (128,), batches, depth, 1)
    gpu = Device("cuda:0", "cuda", 0, 80 << 30, 80 << 30)
    sizes = {"max_num_seqs": max(batches), "max_batch_tokens": 2048, "block_size": 32}
    plan = solve(resolve(open_checkpoint(Path(model))), [gpu], context=work.context, **sizes)
    of_a_sequence = -(-(max(depth, 1) + 128 + 1) // 32) * 32
    assert plan.kv_tokens >= max(batches) * of_a_sequence
    assert plan.context >= max(512, depth + 128) + 1
