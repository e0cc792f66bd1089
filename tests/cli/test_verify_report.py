"""What `multitensor verify` prints: every figure with its arithmetic, tolerance and verdict, and a failure's cause."""

from __future__ import annotations

from typing import Any

import pytest

from multitensor import LLM
from multitensor.cli.verify import _print
from multitensor.engine.verify import NOT_FINITE
from multitensor.kernels.cpu import native

FINE: dict[str, Any] = {
    "ok": True,
    "layers": [
        {"layer": 0, "error": 2e-6, "run_error": 0.04, "cache_error": 1e-3},
        {"layer": 1, "error": 3e-6, "run_error": 0.02, "cache_error": 2e-3},
    ],
    "embedding_error": 0.0,
    "output_norm_error": 1e-7,
    "lm_head_error": 1e-6,
    "kl_mean": 4e-3,
    "kl_max": 2e-2,
    "top1_agreement": 0.95,
    "first_bad_tensor": None,
    "first_bad_rank": None,
    "not_finite_tensor": None,
    "not_finite_rank": None,
    "arithmetic": "activations in float32, KV cache in f16",
    "tolerance": 1e-4,
    "run_tolerance": 0.3,
    "cache_tolerance": 0.01,
    "kl_tolerance": 0.02,
}


def printed(capsys: pytest.CaptureFixture[str], **changes: Any) -> list[str]:
    _print(FINE | changes)
    return capsys.readouterr().out.splitlines()


def test_four_figures_with_their_tolerances(capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(capsys)
    assert "exact float32, resident weights: 3.00e-06 (layer 1), tolerance 1.0e-04: ok" in lines
    assert "as the engine runs: 4.00e-02 (layer 0), tolerance 3.0e-01: ok" in lines
    assert "keys and values in the cache: 2.00e-03 (layer 1), tolerance 1.0e-02: ok" in lines
    assert "logits as the engine runs: 4.00e-03 (mean KL in nats), tolerance 2.0e-02: ok" in lines
    assert "the engine runs with activations in float32, KV cache in f16" in lines
    assert lines[-2:] == ["largest KL 2.00e-02, top-1 agreement 95.0%", "ok"]


@pytest.mark.parametrize(
    ("changes", "failing", "cause"),
    [
        (
            {"lm_head_error": 0.5},
            "exact float32, resident weights: 5.00e-01 (output matrix)",
            "the computation differs",
        ),
        ({"kl_mean": 0.5}, "logits as the engine runs: 5.00e-01", "the computation differs"),
        (
            {"embedding_error": 0.5, "first_bad_tensor": "token_embd.weight", "first_bad_rank": 1},
            "exact float32, resident weights: 5.00e-01 (embedding)",
            "token_embd.weight on rank 1 is not what the file holds",
        ),
        (
            {"layers": [{"layer": 0, "error": 2e-6, "run_error": 0.4, "cache_error": 0.0}]},
            "as the engine runs: 4.00e-01 (layer 0), tolerance 3.0e-01",
            "the computation differs",
        ),
    ],
)
def test_what_fails_says_so(
    capsys: pytest.CaptureFixture[str], changes: dict[str, Any], failing: str, cause: str
) -> None:
    lines = printed(capsys, ok=False, **changes)
    judged = [line for line in lines if "tolerance" in line]
    assert len(judged) == 4 and [line.endswith(": FAILED") for line in judged].count(True) == 1
    assert next(line for line in judged if line.endswith(": FAILED")).startswith(failing)
    assert lines[-1].startswith("FAILED: ") and lines[-1].endswith(cause)


def test_what_is_not_finite_has_no_figures(capsys: pytest.CaptureFixture[str]) -> None:
    gone = {"ok": False, "kl_mean": None, "kl_max": None, "top1_agreement": None}
    layers = [
        {"layer": 0, "error": 1e-6, "run_error": 0.1, "cache_error": 0.0},
        {"layer": 1, "error": NOT_FINITE, "run_error": NOT_FINITE, "cache_error": NOT_FINITE},
    ]
    lines = printed(capsys, **gone, layers=layers, not_finite_tensor="blk.1.ffn_down.weight", not_finite_rank=1)
    assert not any("e+30" in line or "%" in line for line in lines)
    assert "exact float32, resident weights: not finite (layer 1), tolerance 1.0e-04: FAILED" in lines
    assert "logits as the engine runs: not available (mean KL in nats), tolerance 2.0e-02: FAILED" in lines
    assert lines[-1] == "FAILED: not finite: blk.1.ffn_down.weight holds NaN or infinity in the file itself"
    assert printed(capsys, **gone, layers=layers)[-1] == "FAILED: values are not finite, though all weights are"


@pytest.mark.models
@pytest.mark.processes
@pytest.mark.parametrize("model", ["smollm2_path", "gemma3_path"])
def test_real_models_are_well_within_the_default_tolerances(model: str, request: pytest.FixtureRequest) -> None:
    """And not so far within that the tolerances mean nothing."""
    with LLM(request.getfixturevalue(model), devices="cpu:2", max_model_len=128) as llm:
        report = llm.verify()
    assert report["ok"]
    assert max(entry["error"] for entry in report["layers"]) < report["tolerance"] / 2
    run_error = max(entry["run_error"] for entry in report["layers"])
    assert run_error < report["run_tolerance"] / 2
    assert report["kl_mean"] < report["kl_tolerance"] / 2
    rounds = native.load() is not None
    assert ("8 bits" in report["arithmetic"]) == rounds
    if rounds:
        assert run_error > report["run_tolerance"] / 10
        assert report["kl_mean"] > report["kl_tolerance"] / 15
