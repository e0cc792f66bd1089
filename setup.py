"""The optional native CPU kernels: built when a C compiler is at hand, left out (with a warning) when not."""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "multitensor.kernels.cpu._native",
            sources=["src/multitensor/kernels/cpu/native.c"],
            extra_compile_args=["-O3", "-std=gnu11", "-fno-math-errno", "-pthread"],
            extra_link_args=["-pthread"],
            optional=True,
        )
    ]
)
