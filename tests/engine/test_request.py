"""Sampling parameters refuse what makes no sense, in one line; importing the package costs nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import multitensor
from multitensor.engine.request import RequestMetrics, SamplingParams
from multitensor.errors import InputError


@pytest.mark.parametrize(
    "wrong",
    [
        {"n": 0},
        {"n": 1.5},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_k": -2},
        {"top_k": 2.0},
        {"min_p": 1.5},
        {"repetition_penalty": 0.0},
        {"presence_penalty": 3.0},
        {"frequency_penalty": -3.0},
        {"seed": 0.5},
        {"seed": True},
        {"max_tokens": 0},
        {"min_tokens": -1},
        {"min_tokens": 17},
        {"logprobs": -1},
        {"logprobs": 10_000},
        {"stop": ["a", ""]},
        {"stop": ""},
        {"stop_token_ids": [-1]},
        {"logit_bias": {-1: 0.0}},
        {"logit_bias": {1: 101.0}},
        {"logit_bias": {1: float("nan")}},
    ],
)
def test_wrong_values_are_refused_in_one_line(wrong: dict) -> None:
    with pytest.raises(InputError) as caught:
        SamplingParams(**wrong)
    message = str(caught.value)
    assert "\n" not in message and next(iter(wrong)).split("_")[0] in message


def test_unknown_names_are_a_type_error() -> None:
    with pytest.raises(TypeError):
        SamplingParams(prompt_logprobs=1)  # type: ignore[call-arg]


def test_defaults_and_numpy_numbers() -> None:
    params = SamplingParams()
    assert (params.n, params.temperature, params.top_p, params.top_k, params.max_tokens) == (1, 1.0, 1.0, 0, 16)
    assert not params.greedy and SamplingParams(temperature=0).greedy
    assert SamplingParams(stop="x").stop_strings == ("x",)
    SamplingParams(top_k=-1, seed=np.int64(3), temperature=np.float32(0.5), max_tokens=None)  # type: ignore[arg-type]


def test_metrics_count_decode_after_the_first_step() -> None:
    metrics = RequestMetrics(arrival_time=1.0, prompt_tokens=100)
    assert metrics.prefill_tokens_per_second is None and metrics.decode_tokens_per_second is None
    metrics.first_scheduled_time, metrics.first_token_time, metrics.last_token_time = 2.0, 4.0, 8.0
    metrics.output_tokens, metrics.first_tokens = 22, 2
    assert metrics.prefill_tokens_per_second == 50.0
    assert metrics.decode_tokens_per_second == 5.0


def test_names_of_the_package() -> None:
    for name in multitensor.__all__:
        assert getattr(multitensor, name) is not None
    assert multitensor.InputError is InputError
    with pytest.raises(AttributeError, match="nothing_such"):
        _ = multitensor.nothing_such


def test_the_engine_side_never_imports_torch() -> None:
    source = Path(multitensor.__file__).parents[1]
    code = (
        f"import sys; sys.path.insert(0, {str(source)!r}); import multitensor; "
        "assert 'numpy' not in sys.modules, 'importing multitensor alone imports nothing heavy'; "
        "multitensor.LLM, multitensor.SamplingParams, multitensor.RankFailed; "
        "import multitensor.engine.engine, multitensor.engine.prepare, multitensor.engine.process_executor; "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
