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
THOROUGH = (75, 90)  # the others share their code paths, and a program takes one to two seconds


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


def asked_for(architecture: int) -> list[Asked]:
    """Programs that the Python side asks for on such a GPU. Not all: types meet by turns, a turn an architecture.

    A source that cuda_requests.py asks nothing of is compiled as it stands, without defines.
    """
    with recorded(architecture) as programs:
        for request in REQUESTS:
            request(ARCHITECTURES.index(architecture), architecture in THOROUGH)
    asked = {source for program in programs for source in program.sources}
    alone = sorted(path.name for path in SOURCES.glob("*.cu") if path.name not in asked)
    return programs + [Asked((name,), {}) for name in alone]


def test_requests_cover_types_and_sources() -> None:
    programs = asked_for(90)
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
        jobs.append((program, processes.submit(compile_text, text, architecture, frozenset(program.kernels))))
    failures = [f"{program}: {job.result()}" for program, job in jobs if job.result()]
    assert jobs and not failures, "\n".join(failures)


def test_an_error_is_told(compiler: Nvrtc) -> None:
    with pytest.raises(AssertionError, match="nothing_of_this_name"):
        compiler.compile('extern "C" __global__ void k(int* p) { *p = nothing_of_this_name; }', 90)


def test_a_missing_kernel_is_told(compiler: Nvrtc) -> None:
    assert compile_text('extern "C" __global__ void k() {}', 90, frozenset({"k"})) == ""
    assert compile_text('extern "C" __global__ void k() {}', 90, frozenset({"q"})) == "no kernel q"
