"""`TritonKernels` as a model calls them, when they are chosen, and the trials that decide: nothing wrong or slow is
used."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest
import torch
from paged_case import Case
from random_weights import random_tensor
from triton_here import DEVICE, INTERPRETED, MARKS, Scripted, always_ours

import model_harness
from model_harness import logits_in_steps, random_prompts, relative_error
from multitensor.kernels import dispatch
from multitensor.kernels.quant_tensor import QuantTensor
from multitensor.kernels.triton import attention, norm, products, rotary
from multitensor.kernels.triton.trials import PLAIN, Trials, agree
from multitensor.kernels.triton.triton_kernels import TritonKernels
from synthetic import write_gguf

pytestmark = MARKS
HERE = torch.device(DEVICE)


def kernels_with(trials: Trials) -> TritonKernels:
    return TritonKernels(HERE, False, trials)


def weights(name: str = "Q4_K", rows: int = 40, cols: int = 256) -> QuantTensor:
    w, _ = random_tensor(name, rows, cols, seed=1)
    return QuantTensor(w.type, w.rows, w.cols, {key: plane.to(HERE) for key, plane in w.planes.items()}, w.phase)


def test_a_model_through_them_gives_the_same_logits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks, prefill, then decode beside a prefill, and decode alone."""
    path = write_gguf(tmp_path / "model.gguf", n_layers=1, vocab=96, types={"*ffn*": "Q4_1", "*": "Q5_0"})
    prompts, chunks = random_prompts(96, (6, 4)), [3, 1]
    wanted = logits_in_steps(path, (1.0,), prompts, chunks)[0]
    made: list[Scripted] = []
    one_at_a_time = threading.RLock()  # the interpreter knows one kernel only
    for module in (attention, norm, products, rotary):
        monkeypatch.setattr(module, "on", lambda device: one_at_a_time)

    def triton_kernels(device: torch.device, exact: bool) -> TritonKernels:
        made.append(always_ours())
        return TritonKernels(device, exact, made[-1])

    monkeypatch.setattr(model_harness, "make_kernels", triton_kernels)
    monkeypatch.setattr("multitensor.kernels.triton.trials.ROUNDS", 1)
    ratio = (1.0, 1.0) if INTERPRETED else (1.0,)  # ranks that are threads share their sums in a CPU's memory
    for found in logits_in_steps(path, ratio, prompts, chunks, HERE):
        for mine, expected in zip(found, wanted, strict=True):
            assert relative_error(mine, expected) < 1e-4
    assert len(made) == len(ratio)
    for trials in made:
        assert set(trials.tried) == {"products of few tokens", "norms", "rotation", "attention"}


def test_many_tokens_are_multiplied_by_expanded_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("multitensor.kernels.triton.triton_kernels.GPU_CHUNK_BYTES", 7 * 256 * 4)  # seven rows a part
    w, trials = weights(), always_ours()
    x, bias = torch.randn(70, 256, device=HERE), torch.randn(40, device=HERE)
    expected = dispatch.Kernels(HERE, False).linear(x, w, bias)
    assert relative_error(kernels_with(trials).linear(x, w, bias), expected) < 1e-5
    assert trials.tried == ["expansion of weights"]


def test_a_mixed_batch_is_shared_out() -> None:
    case = Case([1, 4, 1], [30, 2, 0], (1, 0, 0), 2, seed=3, device=DEVICE)
    for window in (None, 7):
        got = kernels_with(always_ours()).paged_attention(
            case.q, case.k_cache, case.v_cache, case.inputs, case.kv_map, 0.3, window
        )
        expected = torch.from_numpy(case.dense(0.3, window, None))
        torch.testing.assert_close(got.cpu().double(), expected, rtol=0, atol=3e-6)


def test_what_is_slower_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    w, x = weights(), torch.randn(2, 256, device=HERE)
    kernels, calls = kernels_with(Scripted(plain=1.0, ours=2.0)), []
    multiply = products.multiply
    monkeypatch.setattr(products, "multiply", lambda *args: calls.append(1) or multiply(*args))
    first = kernels.linear(x, w)
    tried = len(calls)
    assert tried > 0
    assert torch.equal(kernels.linear(x, w), first)
    assert len(calls) == tried


def test_what_is_wrong_is_told_and_not_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    w, x = weights(), torch.randn(2, 256, device=HERE)
    trials = always_ours()
    kernels = kernels_with(trials)
    multiply = products.multiply
    monkeypatch.setattr(products, "multiply", lambda *args: multiply(*args) * 1.01)
    expected = dispatch.Kernels(HERE, False).linear(x, w)
    with pytest.warns(UserWarning, match=r"products of few tokens gives another result than plain torch; plain torch"):
        assert torch.equal(kernels.linear(x, w), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(kernels.linear(x, w), expected)
        kernels.linear(x, weights("Q8_0"))  # of the same family: not even tried
        assert trials.tried == ["products of few tokens"]
        kernels.rms_norm(x, torch.ones(256, device=HERE), 1e-5)
    assert trials.tried == ["products of few tokens", "norms"]


def test_what_fails_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compiler(*args: object) -> None:
        raise RuntimeError("Failed to find C compiler.\nSet CC.")

    monkeypatch.setattr(products, "multiply", no_compiler)
    w, x = weights(), torch.randn(2, 256, device=HERE)
    with pytest.warns(UserWarning, match=r"fails: RuntimeError: Failed to find C compiler\.; plain torch") as told:
        got = kernels_with(always_ours()).linear(x, w)
    assert "\n" not in str(told[0].message)
    assert torch.equal(got, dispatch.Kernels(HERE, False).linear(x, w))


def test_the_fastest_of_several_right_ways_is_taken() -> None:
    class Clock(Trials):
        def seconds(self, job: object) -> float:
            return times[job]

    def plain() -> list[torch.Tensor]:
        return [torch.ones(3)]

    def slow() -> list[torch.Tensor]:
        return [torch.ones(3)]

    def fast() -> list[torch.Tensor]:
        return [torch.ones(3) * 1.00001]

    times = {plain: 2.0, slow: 3.0, fast: 1.0}
    trials = Clock(HERE)
    assert trials.best("some", 1, plain, {"slow": slow, "fast": fast}) == "fast"
    assert trials.best("some", 2, plain, {"slow": slow}) == PLAIN
    assert trials.best("some", 1, plain, {}) == "fast"  # as known


def test_agreement() -> None:
    ones = torch.ones(4)
    nan = torch.tensor([1.0, 1.0, 1.0, float("nan")])
    assert agree([ones, ones[:0]], [ones, ones[:0]])
    assert not agree([nan], [ones])
    assert not agree([nan], [nan])
    assert not agree([ones[:3]], [ones])
    assert not agree([ones.half()], [ones])
    assert not agree([ones + 1e-3], [ones])
    assert agree([(ones + 1e-3).half()], [ones.half()])
    assert agree([ones.half(), ones + 1e-3], [ones.half(), ones])
    assert not agree([ones.half(), ones + 1e-2], [ones.half(), ones])


@pytest.mark.parametrize(("kind", "hip"), [("cuda", "7.1"), ("xpu", None)])
def test_amd_and_intel_get_them(kind: str, hip: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", hip)
    device = torch.device(kind, 0)
    assert dispatch.make_kernels(device, exact=False).name == "triton"
    assert dispatch.make_kernels(device, exact=True).name == "torch"
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else find_spec(name))
    with pytest.warns(UserWarning, match="triton is not installed"):
        assert dispatch.make_kernels(device, exact=False).name == "torch"


def test_others_never_import_them() -> None:
    program = (
        "import sys, torch; from multitensor.kernels.dispatch import make_kernels\n"
        "import multitensor.engine.worker\n"
        "make_kernels(torch.device('cpu'), False)\n"
        "sys.exit(any(name.startswith('multitensor.kernels.triton') for name in sys.modules))"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
