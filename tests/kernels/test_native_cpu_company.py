"""With 8-bit activations a token's result must not depend, not by a bit, on what is computed beside it: the next
layer's rounding makes a whole step of a last digit, and a text then parts from the same request's alone."""

from __future__ import annotations

import pytest
import torch
from native_levels import kernels, poisoned_outputs, random
from random_weights import QUANTISED, random_tensor
from test_native_cpu_decoder import Sequences

from multitensor.kernels.attention_inputs import AttentionInputs
from multitensor.kernels.cache_tensor import make_cache
from multitensor.kernels.cpu.native import NativeKernels, load

__all__ = ["kernels", "poisoned_outputs"]  # fixtures

COMPANY = (1, 2, 3, 8, 9, 33, 64, 300)
WATCHED = (0, 1, 2, 4, 6, 7, 8, 20, 32, 40, 63, 150, 299)


@pytest.mark.parametrize("name", QUANTISED)
@pytest.mark.parametrize("cols", [256, 768, 4096 + 1280])
def test_a_row_is_the_same_alone_and_in_company(kernels: NativeKernels, name: str, cols: int) -> None:
    w, _ = random_tensor(name, 45, cols, seed=3)
    x, bias = random(max(COMPANY), cols, seed=4), random(45, seed=5)
    alone = {i: kernels.linear(x[i : i + 1], w, bias)[0] for i in WATCHED}
    for tokens in COMPANY:
        together = kernels.linear(x[:tokens], w, bias)
        for i in WATCHED:
            assert i >= tokens or torch.equal(together[i], alone[i])


@pytest.mark.parametrize("tokens", [2, 5, 33])
def test_gated_and_joint_products_are_the_same_in_company(kernels: NativeKernels, tokens: int) -> None:
    gate, up = (random_tensor("Q4_K", 77, 512, seed=seed)[0] for seed in (1, 2))
    x = random(tokens, 512, seed=3)
    gated = kernels.gated_linear(x, gate, up, "silu")
    joint = kernels.linears(x, [gate, up])
    for i in range(tokens):
        assert torch.equal(kernels.gated_linear(x[i : i + 1], gate, up, "silu")[0], gated[i])
        for got, wanted in zip(kernels.linears(x[i : i + 1], [gate, up]), joint, strict=True):
            assert torch.equal(got[0], wanted[i])


def cut_inputs(case: Sequences, begin: int, end: int) -> AttentionInputs:
    """Only the first sequence of the case: its queries [begin, end)."""
    inputs = case.inputs
    context = inputs.context_lens[0] + begin
    tables = inputs.block_tables[:1].numpy()
    return AttentionInputs.build([end - begin], [context], tables, inputs.block_size, torch.device("cpu"))


@pytest.mark.parametrize("kind", ["f16", "q8"])
@pytest.mark.parametrize(
    ("heads", "window", "softcap"), [((0, 0, 0, 1, 1, 1), None, None), ((0, 1), 300, None), ((0,) * 9, 33, 5.0)]
)
def test_attention_is_the_same_in_chunks_and_in_company(
    kernels: NativeKernels, kind: str, heads: tuple[int, ...], window: int | None, softcap: float | None
) -> None:
    """A prompt of 90 tokens after 500: whole, in chunks, token by token; beside others; by one thread and by many."""
    case = Sequences([90, 1, 20], [500, 700, 3], max(heads) + 1, 64, dtype=torch.float16)
    blocks, size, n_kv, head_dim = case.k_cache.shape
    k_cache, v_cache = (make_cache(kind, (blocks, size, n_kv, head_dim), torch.device("cpu")) for _ in range(2))
    k, v = (cache.nan_to_num(0.25).float().flatten(0, 1) for cache in (case.k_cache, case.v_cache))
    kernels.write_kv(k, v, k_cache, v_cache, torch.arange(len(k)))
    q = random(111, len(heads), 64, seed=1)

    def attend(made: NativeKernels, queries: torch.Tensor, inputs: AttentionInputs) -> torch.Tensor:
        return made.paged_attention(queries, k_cache, v_cache, inputs, heads, 0.125, window, softcap)

    together = attend(kernels, q, case.inputs)[:90]
    for step in (90, 31, 1):
        for begin in range(0, 90, step):
            end = min(90, begin + step)
            assert torch.equal(attend(kernels, q[begin:end], cut_inputs(case, begin, end)), together[begin:end])
    for threads in (1, 7):
        made = load(threads=threads, level=kernels.level)
        assert made is not None
        assert torch.equal(attend(made, q, case.inputs)[:90], together)
        assert torch.equal(attend(made, q[60:61], cut_inputs(case, 60, 61)), together[60:61])
        made.close()
