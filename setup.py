"""The optional native CPU kernels: built when a C compiler is at hand, left out (with a warning) when not."""

from setuptools import Extension, setup

FOLDER = "src/multitensor/kernels/cpu"
HEADERS = (
    *("native", "pool", "paged"),
    *("level", "weights", "rows", "tiles", "matmul", "transformer", "attention"),
)

setup(
    ext_modules=[
        Extension(
            "multitensor.kernels.cpu._native",
            sources=[f"{FOLDER}/{name}.c" for name in ("native", "level_scalar", "level_avx2", "level_avx512")],
            depends=[f"{FOLDER}/{name}.h" for name in HEADERS],
            # No -march: each level_*.c names its instructions itself, and native.c chooses at run time. No contraction:
            # weights must come out bit for bit as ggml computes them.
            extra_compile_args=[
                "-O3",
                "-std=gnu11",
                "-fno-math-errno",
                "-ffp-contract=off",
                "-fvisibility=hidden",
                "-pthread",
            ],
            extra_link_args=["-pthread", "-lm"],
            optional=True,
        )
    ]
)
