"""Every kernel source compiles for every architecture it is meant for. Needs NVIDIA's run-time compiler, but no GPU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
from cuda_requests import REQUESTS, Asked, recorded
from nvrtc import Nvrtc, compile_text, find_nvrtc

from multitensor.kernels.cuda.program import SOURCES, source_text
from multitensor.kernels.cuda.tiles import TILE_BYTES

ARCHITECTURES = (75, 86, 89, 90, 120)
EVERY_KERNEL = "MULTITENSOR_EVERY_KERNEL"  # an environment variable


@pytest.fixture(scope="module")
def compiler() -> Nvrtc:
    found = find_nvrtc()
    if found is None:
        pytest.skip("NVRTC is not here: pip install --no-deps nvidia-cuda-nvrtc")
    return found


@pytest.fixture(scope="module")
def processes() -> Iterator[ProcessPoolExecutor]:
    with ProcessPoolExecutor(min(os.cpu_count() or 1, 8), mp_context=get_context("spawn")) as pool:
        yield pool


def everything(architecture: int, turn: int) -> list[Asked]:
    """Programs that the Python side asks for on such a GPU; which types meet in them depends on the turn.

    A source that cuda_requests.py asks nothing of is compiled as it stands, without defines.
    """
    with recorded(architecture) as programs:
        for request in REQUESTS:
            request(turn)
    asked = {source for program in programs for source in program.sources}
    alone = sorted(path.name for path in SOURCES.glob("*.cu") if path.name not in asked)
    return programs + [Asked((name,), {}) for name in alone]


def asked_for(architecture: int) -> list[Asked]:
    """One of five of each source, since a program takes up to two seconds: every one on some architecture, and every
    source on each. All of them, and other combinations a turn, where EVERY_KERNEL is set."""
    turn = ARCHITECTURES.index(architecture)
    if EVERY_KERNEL in os.environ:
        return everything(architecture, turn)
    by_source: dict[str, list[Asked]] = {}
    for program in everything(architecture, 0):
        by_source.setdefault(program.sources[-1], []).append(program)
    return [
        program
        for programs in by_source.values()
        for number, program in enumerate(programs)
        if number % len(ARCHITECTURES) == turn or (number == turn % len(programs) and len(programs) <= turn)
    ]


def test_requests_cover_types_and_sources() -> None:
    programs = everything(90, 0)
    assert {"gemv.cu", "gemv_float.cu", "decode.cu"} <= {program.sources[0] for program in programs if program.kernels}
    tiled = [program for program in programs if "TYPE" in program.defines]
    assert {program.defines[name] for program in tiled for name in ("TYPE", "TYPE_B")} == set(TILE_BYTES)
    assert {program.defines["BFLOAT_MODE"] for program in tiled} == {"true", "false"}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_compiles(architecture: int, compiler: Nvrtc, processes: ProcessPoolExecutor) -> None:
    if architecture not in compiler.architectures:
        pytest.skip(f"NVRTC {compiler.version[0]}.{compiler.version[1]} does not know sm_{architecture}")
    jobs = []
    for program in asked_for(architecture):
        text = source_text(program.sources, program.defines)
        kernels = frozenset(program.kernels)
        jobs.append((program, processes.submit(compile_text, text, architecture, kernels, program.features)))
    failures = [f"{program}: {job.result()}" for program, job in jobs if job.result()]
    assert jobs and not failures, "\n".join(failures)


def test_an_error_is_told(compiler: Nvrtc) -> None:
    with pytest.raises(AssertionError, match="nothing_of_this_name"):
        compiler.compile('extern "C" __global__ void k(int* p) { *p = nothing_of_this_name; }', 90)


def test_a_missing_kernel_is_told(compiler: Nvrtc) -> None:
    assert compile_text('extern "C" __global__ void k() {}', 90, frozenset({"k"})) == ""
    assert compile_text('extern "C" __global__ void k() {}', 90, frozenset({"q"})) == "no kernel q"
