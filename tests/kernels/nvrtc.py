"""NVIDIA's run-time compiler, called without a GPU: for tests that the kernels compile."""

from __future__ import annotations

import ctypes
import re
import sys
from functools import cache
from pathlib import Path


class Nvrtc:
    """A loaded libnvrtc. version: (major, minor). architectures: the numbers it compiles for, 90 for sm_90."""

    def __init__(self, library: Path) -> None:
        for builtins in library.parent.glob("libnvrtc-builtins.so*"):
            ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)
        self._library = ctypes.CDLL(str(library))
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._call("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
        self.version = (major.value, minor.value)
        count = ctypes.c_int()
        self._call("nvrtcGetNumSupportedArchs", ctypes.byref(count))
        numbers = (ctypes.c_int * count.value)()
        self._call("nvrtcGetSupportedArchs", numbers)
        self.architectures = frozenset(numbers)

    def compile(self, text: str, architecture: int, features: str = "") -> bytes:
        """The cubin of a source that includes nothing. features: as program.Program's. Raises AssertionError with the
        compiler's words."""
        program = ctypes.c_void_p()
        self._call("nvrtcCreateProgram", ctypes.byref(program), text.encode(), b"kernels.cu", 0, None, None)
        try:
            options = [f"--gpu-architecture=sm_{architecture}{features}".encode(), b"--std=c++17"]
            failed = self._library.nvrtcCompileProgram(
                program, len(options), (ctypes.c_char_p * len(options))(*options)
            )
            if failed:
                log = self._bytes("nvrtcGetProgramLogSize", "nvrtcGetProgramLog", program)
                raise AssertionError(log.rstrip(b"\0").decode())
            return self._bytes("nvrtcGetCUBINSize", "nvrtcGetCUBIN", program)
        finally:
            self._call("nvrtcDestroyProgram", ctypes.byref(program))

    def _bytes(self, size_of: str, get: str, program: ctypes.c_void_p) -> bytes:
        size = ctypes.c_size_t()
        self._call(size_of, program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        self._call(get, program, buffer)
        return buffer.raw

    def _call(self, name: str, *arguments: object) -> None:
        if code := getattr(self._library, name)(*arguments):
            raise RuntimeError(f"{name}: error {code}")


@cache
def find_nvrtc() -> Nvrtc | None:
    """The newest of those that the packages nvidia-cuda-nvrtc* have put beside this Python's packages."""
    found: list[tuple[int, Path]] = []
    for folder in sys.path:
        for path in Path(folder or ".").glob("nvidia/*/lib/libnvrtc.so.*"):
            number = re.fullmatch(r"libnvrtc\.so\.(\d+)", path.name)
            if number:
                found.append((int(number[1]), path))
    return Nvrtc(max(found)[1]) if found else None


def compile_text(text: str, architecture: int, kernels: frozenset[str], features: str = "") -> str:
    """What is wrong, or "". In a process of its own, since the compiler takes turns within one."""
    compiler = find_nvrtc()
    if compiler is None:
        return "NVRTC is gone"
    try:
        cubin = compiler.compile(text, architecture, features)
    except AssertionError as error:
        return str(error)
    missing = sorted(name for name in kernels if b"\0.text." + name.encode() + b"\0" not in cubin)
    return f"no kernel {', '.join(missing)}" if missing else ""
