"""`verify`: right models pass, and a single wrong bit anywhere is found, named, and laid at the right rank."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from model_harness import BLOCK, CPU, cpu_plan, on_ranks, random_prompts
from multitensor.config import EngineConfig
from multitensor.engine.runner import ModelRunner
from multitensor.errors import InputError
from multitensor.formats.checkpoint import open_checkpoint
from multitensor.kernels.quant_tensor import QuantTensor
from multitensor.loading import streamed
from multitensor.parallel.group import Group
from synthetic import tiny_hf, write_gguf

PROMPTS = random_prompts(320, [19, 6, 30])
RATIO = (2.0, 1.0, 1.0)


def verify(
    path: Path,
    damage: Callable[[ModelRunner], None] | None = None,
    *,
    ratio: tuple[float, ...] = RATIO,
    dtype: str = "float32",
    kv_type: str = "f32",
    exact: bool = True,
    prompts: list[list[int]] = PROMPTS,
) -> dict[str, Any]:
    """The report, which must be the same on all ranks. damage(runner) on every rank after loading."""
    checkpoint = open_checkpoint(path)
    plan = replace(cpu_plan(checkpoint, ratio), dtype=dtype, kv_type=kv_type)
    config = EngineConfig(str(path), dtype, exact, 0, plan.max_num_seqs, plan.max_batch_tokens, BLOCK)

    def work(group: Group) -> dict[str, Any]:
        runner = ModelRunner(checkpoint, plan, group.rank, config, group, CPU)
        runner.load()
        if damage is not None:
            damage(runner)
        return runner.verify(prompts)

    reports = on_ranks(plan.size, work)
    assert all(report == reports[0] for report in reports)
    return reports[0]


@pytest.fixture(scope="module")
def quantised(tmp_path_factory: pytest.TempPathFactory) -> Path:
    types = {"*attn_v*": "Q6_K", "*ffn_down*": "Q5_K", "*": "Q4_K"}
    path = tmp_path_factory.mktemp("model") / "m.gguf"
    return write_gguf(path, hidden=256, ffn=512, n_layers=3, n_heads=8, n_kv_heads=4, types=types)


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gemma") / "model"
    return tiny_hf(path, "gemma3", n_layers=3, sliding_window=8, tied=True, dtype="bfloat16")


@pytest.mark.parametrize("ratio", [(1.0,), (1.0, 1.0), RATIO], ids=str)
def test_a_right_model_passes(quantised: Path, ratio: tuple[float, ...]) -> None:
    report = verify(quantised, ratio=ratio)
    assert report["ok"] and report["first_bad_tensor"] is None
    assert [entry["layer"] for entry in report["layers"]] == [0, 1, 2]
    assert all(entry["error"] < 2e-5 and entry["drift"] < 2e-5 for entry in report["layers"])
    assert report["kl_mean"] < 1e-9 and report["top1_agreement"] == 1.0
    assert [len(ids) for ids in report["whole_top1"]] == [19, 6, 30]
    assert report["whole_top1"] == report["split_top1"]
    json.dumps(report, allow_nan=False)


def test_streaming_by_single_rows_gives_the_same(quantised: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = verify(quantised, ratio=(1.0, 1.0))["whole_top1"]
    monkeypatch.setattr(streamed, "CHUNK_BYTES", 20_000)
    report = verify(quantised, ratio=(1.0, 1.0))
    assert report["ok"] and report["whole_top1"] == wanted


def test_norm_offset_and_tied_embedding(gemma: Path) -> None:
    report = verify(gemma)
    assert report["ok"] and report["kl_mean"] < 1e-9


@pytest.mark.parametrize(
    ("dtype", "kv_type", "exact"),
    [
        ("float16", "f16", False),
        ("bfloat16", "bf16", False),
        ("float32", "f16", True),
        ("float32", "f32", False),
        ("float32", "q8", True),
        ("bfloat16", "q8", False),
        ("float32", "q4", False),
    ],
)
def test_low_precision_is_within_its_own_tolerance(gemma: Path, dtype: str, kv_type: str, exact: bool) -> None:
    """What runs rounded is judged as such; the cut itself is judged in float32 all the same."""
    report = verify(gemma, dtype=dtype, kv_type=kv_type, exact=exact)
    assert report["ok"]
    assert all(entry["error"] < 2e-5 for entry in report["layers"])
    kept = max(entry["cache_error"] for entry in report["layers"])
    assert kept == 0 if kv_type == "f32" else kept > 1e-5
    if dtype != "float32":
        assert max(entry["run_error"] for entry in report["layers"]) > 1e-5  # it really ran at that precision


@pytest.mark.parametrize("kv_type", ["f32", "f16", "bf16", "q8", "q4"])
def test_what_a_cache_rounds_hides_no_wrong_computation(quantised: Path, kv_type: str) -> None:
    """Scores a hundredth too large are far below what four bits of keys do to a layer."""

    def damage(runner: ModelRunner) -> None:
        runner.decoder.layers[1].attention.scale *= 1.01

    right = verify(quantised, kv_type=kv_type)
    assert all(entry["run_error"] < right["run_tolerance"] == 1e-4 for entry in right["layers"])
    report = verify(quantised, damage, kv_type=kv_type)
    assert not report["ok"] and report["first_bad_tensor"] is None
    assert [entry["run_error"] > report["run_tolerance"] for entry in report["layers"]] == [False, True, False]
    assert all(entry["cache_error"] < report["cache_tolerance"] for entry in report["layers"])


@pytest.mark.parametrize(
    ("kv_type", "factor"), [("f32", 1.0001), ("f16", 1.002), ("bf16", 1.01), ("q8", 1.03), ("q4", 1.2)]
)
def test_what_is_written_wrongly_into_a_cache_is_seen(
    quantised: Path, kv_type: str, factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damage(runner: ModelRunner) -> None:
        write = runner.kernels.write_kv

        def wrong(k: torch.Tensor, v: torch.Tensor, *where: Any) -> None:
            write(k, v * factor, *where)

        if runner.rank == 1:
            monkeypatch.setattr(runner.kernels, "write_kv", wrong)

    report = verify(quantised, damage, kv_type=kv_type)
    assert not report["ok"] and report["first_bad_tensor"] is None
    assert all(entry["cache_error"] > report["cache_tolerance"] for entry in report["layers"])
    assert all(entry["run_error"] < report["run_tolerance"] for entry in report["layers"])


def test_a_wrong_bit_is_found_whatever_the_precision(quantised: Path) -> None:
    """One 4-bit weight in 131,072 is wrong: far below what bfloat16's roundings would hide."""
    damage = flip_bit("blk.1.ffn_up.weight", "quants", 1)
    report = verify(quantised, damage, dtype="bfloat16", kv_type="bf16", exact=False)
    assert not report["ok"]
    assert (report["first_bad_tensor"], report["first_bad_rank"]) == ("blk.1.ffn_up.weight", 1)
    assert all(entry["run_error"] < report["run_tolerance"] for entry in report["layers"])


def flip_bit(name: str, plane: str, rank: int) -> Callable[[ModelRunner], None]:
    """Flips the second-highest bit of a byte in the middle of a plane, or of a float's highest mantissa byte."""

    def damage(runner: ModelRunner) -> None:
        if runner.rank == rank:
            weight = runner.weights[name]
            tensor = weight.planes[plane] if isinstance(weight, QuantTensor) else weight
            flat = tensor.view(torch.uint8).view(-1)
            middle = flat.numel() // 2
            flat[middle | 2 if tensor.dtype == torch.float32 else middle | 1] ^= 0x40

    return damage


@pytest.mark.parametrize(
    ("name", "plane", "rank"),
    [
        ("blk.0.attn_q.weight", "quants", 2),
        ("blk.1.attn_k.weight", "d", 0),
        ("blk.1.attn_v.weight", "scales", 1),
        ("blk.2.attn_output.weight", "mins", 2),
        ("blk.0.ffn_gate.weight", "dmin", 0),
        ("blk.1.ffn_up.weight", "quants", 1),
        ("blk.2.ffn_down.weight", "high", 2),
        ("blk.1.ffn_norm.weight", "", 1),
        ("blk.2.attn_norm.weight", "", 2),
        ("output_norm.weight", "", 0),
        ("output.weight", "quants", 1),
    ],
)
def test_one_wrong_bit_is_named(quantised: Path, name: str, plane: str, rank: int) -> None:
    report = verify(quantised, flip_bit(name, plane, rank))
    assert not report["ok"]
    assert (report["first_bad_tensor"], report["first_bad_rank"]) == (name, rank)


def test_a_wrong_embedding_is_named(quantised: Path) -> None:
    """The rows that the prompts use: a bit elsewhere changes nothing that is computed."""

    def damage(runner: ModelRunner) -> None:
        rows = runner.plan.ranks[1].vocabulary
        used = next(token for prompt in PROMPTS for token in prompt if rows.start <= token < rows.stop)
        weight = runner.weights["token_embd.weight"]
        if runner.rank == 1 and isinstance(weight, QuantTensor):
            weight.planes["d"][used - rows.start] *= 1.5

    report = verify(quantised, damage)
    assert not report["ok"]
    assert (report["first_bad_tensor"], report["first_bad_rank"]) == ("token_embd.weight", 1)
    assert report["embedding_error"] > 0.1
    assert all(entry["error"] < 1e-4 for entry in report["layers"])  # the layers themselves are right


def test_a_wrong_computation_has_no_bad_tensor(quantised: Path) -> None:
    def damage(runner: ModelRunner) -> None:
        runner.decoder.layers[1].attention.scale *= 1.1

    report = verify(quantised, damage)
    assert not report["ok"] and report["first_bad_tensor"] is None
    assert [entry["run_error"] > report["run_tolerance"] for entry in report["layers"]] == [False, True, False]


def test_not_a_number_is_an_error(quantised: Path) -> None:
    def damage(runner: ModelRunner) -> None:
        weight = runner.weights["blk.1.ffn_down.weight"]
        if runner.rank == 0 and isinstance(weight, QuantTensor):
            weight.planes["d"][3] = float("nan")

    report = verify(quantised, damage)
    assert not report["ok"] and report["first_bad_tensor"] == "blk.1.ffn_down.weight"
    assert report["kl_mean"] is report["kl_max"] is report["top1_agreement"] is None
    json.dumps(report, allow_nan=False)


def with_numbers(path: Path, name: str, value: float, target: Path) -> Path:
    """A copy of a GGUF file with `value` in the middle of an F32 tensor, or as the scale of a quantised block there."""
    checkpoint = open_checkpoint(path)
    info = checkpoint.tensors[name]
    content = bytearray(path.read_bytes())
    if info.type.name == "F32":
        place = info.offset + info.nbytes // 8 * 4
        content[place : place + 4] = struct.pack("<f", value)
    else:  # Q4_K and Q5_K blocks begin with a float16 scale
        block = info.type.block_bytes
        place = info.offset + info.nbytes // block // 2 * block
        content[place : place + 2] = struct.pack("<e", value)
    target.write_bytes(content)
    return target


@pytest.mark.parametrize(
    ("name", "value", "rank"),
    [
        ("blk.1.ffn_down.weight", float("nan"), None),
        ("blk.2.attn_q.weight", float("inf"), None),
        ("blk.1.ffn_norm.weight", float("-inf"), 0),
        ("output.weight", float("nan"), None),
    ],
)
def test_a_file_that_is_not_finite_is_told_from_a_wrong_cut(
    quantised: Path, tmp_path: Path, name: str, value: float, rank: int | None
) -> None:
    report = verify(with_numbers(quantised, name, value, tmp_path / "m.gguf"))
    assert not report["ok"] and report["first_bad_tensor"] is None
    assert report["not_finite_tensor"] == name
    assert rank is None or report["not_finite_rank"] == rank  # every rank holds the norms
    assert report["kl_mean"] is report["kl_max"] is report["top1_agreement"] is None
    json.dumps(report, allow_nan=False)


def test_a_bit_that_is_wrong_in_a_file_with_nan_is_named_too(quantised: Path, tmp_path: Path) -> None:
    path = with_numbers(quantised, "blk.2.ffn_down.weight", float("nan"), tmp_path / "m.gguf")
    report = verify(path, flip_bit("blk.0.attn_q.weight", "quants", 2))
    assert (report["first_bad_tensor"], report["not_finite_tensor"]) == ("blk.0.attn_q.weight", "blk.2.ffn_down.weight")


def test_prompts_beyond_the_context_are_refused(quantised: Path) -> None:
    with pytest.raises(InputError, match="129"):
        verify(quantised, prompts=[[1] * 129])
