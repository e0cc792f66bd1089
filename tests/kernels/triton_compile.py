"""Compiles what the Python side of Triton's kernels launches, for GPUs that are not here. A program of its own, since
Triton is interpreted elsewhere in the tests: python triton_compile.py TARGET,TARGET [every]

Prints a JSON list of what was compiled: kernel, target, error (null where there was none), and spilled registers of
AMD's.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from typing import Any

import torch
import triton
from paged_case import Case
from random_weights import QUANTISED, random_tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from multitensor.kernels.projection import Projection
from multitensor.kernels.triton import attention, norm, products, rotary

TARGETS = {
    "gfx90a": GPUTarget("hip", "gfx90a", 64),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx1100": GPUTarget("hip", "gfx1100", 32),
    "gfx1201": GPUTarget("hip", "gfx1201", 32),
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
}
TYPES = {
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
}
HALVES = (torch.float16, torch.bfloat16)

Request = Callable[[], object]


def products_of(name: str, tokens: int, dtype: torch.dtype) -> Request:
    w, _ = random_tensor(name, 32, 1024, seed=1)
    return lambda: products.multiply(torch.zeros(tokens, 1024, dtype=dtype), w, torch.zeros(32))


def expansion_of(name: str, dtype: torch.dtype) -> Request:
    w, _ = random_tensor(name, 32, 1024, seed=1)
    return lambda: products.expand(w, dtype)


def attention_of(
    head_dim: int, dtype: torch.dtype, cache: torch.dtype, window: int | None, cap: float | None
) -> Request:
    case = Case([1, 1], [700, 3], (0, 0, 1), 2, head_dim, 16, dtype=dtype, cache_dtype=cache)
    decodes = attention.Decodes.of(case.inputs)
    heads = attention.HeadTable(case.kv_map, 2, torch.device("cpu"))
    if decodes is None:
        raise ValueError("both sequences have one new token")
    return lambda: attention.attend(case.q, case.k_cache, case.v_cache, decodes, heads, 0.1, window, cap)


def norm_of(columns: int, dtype: torch.dtype, post: bool) -> Request:
    weight = torch.ones(columns)
    x, residual = torch.zeros(3, columns, dtype=dtype), torch.zeros(3, columns)
    return lambda: norm.add_rms_norm(x, residual, weight, 1e-5, 0.0, weight if post else None)


def rotation_of(style: Any, kv_heads: int, dtype: torch.dtype, normed: bool) -> Request:
    weight = torch.ones(128) if normed else None
    projection = Projection((None,) * 3, None, 128, style, weight, weight, 1e-5)  # type: ignore[arg-type]
    q, k = torch.zeros(5, 4, 128, dtype=dtype), torch.zeros(5, kv_heads, 128, dtype=dtype)
    caches = [torch.zeros(2, 16, kv_heads, 128, dtype=dtype) for _ in range(2)]
    angles = torch.zeros(5, 64)
    return lambda: rotary.place_heads(q, k, k, projection, angles, angles, *caches, torch.arange(5))


def requests() -> tuple[list[Request], list[Request]]:
    """Every kernel with every type of weights (three kernels a type), and what is not about types."""
    found: list[Request] = []
    for turn, name in enumerate(QUANTISED):
        half, other = HALVES[turn % 2], HALVES[1 - turn % 2]
        found += [products_of(name, 1, half), products_of(name, 16, other), expansion_of(name, half)]
    return found, [
        products_of("Q4_K", 64, torch.float16),
        products_of("Q6_K", 5, torch.float32),
        attention_of(128, torch.float16, torch.float16, None, None),
        attention_of(256, torch.bfloat16, torch.bfloat16, 512, None),
        attention_of(80, torch.bfloat16, torch.float16, None, 30.0),
        norm_of(8192, torch.bfloat16, False),
        norm_of(640, torch.float16, True),
        rotation_of("half", 2, torch.bfloat16, True),
        rotation_of("interleaved", 1, torch.float16, False),
    ]


def compile_instead(target: str, done: list[dict[str, Any]]) -> None:
    """From now on launches compile for that target instead, and are written down."""

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **given: Any) -> None:
        signature, constants, divisible = {}, {}, {}
        for parameter in kernel.params:
            value, key = given.pop(parameter.name), (parameter.num,)
            if parameter.is_constexpr or (type(value) is int and value == 1):  # as Triton itself takes a one
                signature[parameter.name], constants[key] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[parameter.name] = f"*{TYPES[value.dtype]}"
                divisible[key] = [["tt.divisibility", 16]]
            else:
                signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
                if isinstance(value, int) and value % 16 == 0:
                    divisible[key] = [["tt.divisibility", 16]]
        result = {"kernel": kernel.__name__, "target": target, "error": None, "spilled": 0}
        try:
            source = ASTSource(kernel, signature, constants, divisible)
            assembly = triton.compile(source, target=TARGETS[target], options=given).asm
            spills = re.findall(r"spill_count: +(\d+)", assembly.get("amdgcn", ""))
            result["spilled"] = sum(map(int, spills))
        except Exception as error:
            result["error"] = repr(error)
        done.append(result)

    triton.runtime.JITFunction.run = run


def main() -> None:
    targets, every = sys.argv[1].split(","), sys.argv[2:] == ["every"]
    of_weights, others = requests()
    asked = [*of_weights, *others] if every else [*of_weights[::4], *others]
    done: list[dict[str, Any]] = []
    for number, target in enumerate(targets):
        compile_instead(target, done)
        for request in asked if every else asked[number :: len(targets)]:
            request()
    print(json.dumps(done))


if __name__ == "__main__":
    main()
