"""Runs the CUDA C++ sources on a CPU, built by the machine's own C++ compiler with simt.h in place of a GPU.

PTX statements become calls of simt.h; one that is not known here is an error. What this shows: arithmetic, indices, and
whether exchanges between threads, blocks and ranks hold at any speeds. What it does not show: missing fences, races
within an instruction, speed.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from multitensor.kernels.cuda.program import source_text

_HERE = Path(__file__).parent
_OPTIONS = ("-O1", "-std=c++17", "-w", "-shared", "-fPIC", "-ffp-contract=off")
_DRIVER = """
extern "C" int run(int ranks, int launches, const int (*shapes)[4], void* const* arguments, unsigned seed) {
    std::vector<std::vector<Launch>> all(ranks);
    for (int i = 0; i < ranks * launches; i++) {
        void* const* a = arguments + (size_t)i * COUNT;
        const int* s = shapes[i];
        all[i / launches].push_back({s[0], s[1], s[2], (size_t)s[3], [a] { call(KERNEL, a); }});
    }
    return run_ranks(all, seed);
}
"""
_CALL = """
template <class... Types, size_t... I>
void spread(void (*kernel)(Types...), void* const* a, std::index_sequence<I...>) { kernel(*(Types*)a[I]...); }
template <class... Types>
void call(void (*kernel)(Types...), void* const* a) {
    static_assert(sizeof...(Types) == COUNT, "as many arguments as the kernel has");
    spread(kernel, a, std::index_sequence_for<Types...>());
}
"""

# Of a PTX statement, by how it begins (white space and labels aside): its operands -> C++.
_Translation = Callable[..., str]
_PTX: dict[str, _Translation] = {
    "cvt.f32.f16": lambda to, x: f"{to} = half_bits_to_float({x});",
    "cvt.rn.f16.f32": lambda to, x: f"{to} = float_to_half_bits({x});",
    "cvt.rn.f16x2.f32": lambda to, high, low: (
        f"{to} = float_to_half_bits({low}) | (unsigned)float_to_half_bits({high}) << 16;"
    ),
    "cvt.rn.bf16x2.f32": lambda to, high, low: (
        f"{to} = float_to_bfloat_bits({low}) | (unsigned)float_to_bfloat_bits({high}) << 16;"
    ),
    "griddepcontrol.": lambda: "",
    "fence.proxy.async": lambda: "",
    "trap": lambda: "abort();",
    "wgmma.fence": lambda: "",
    "wgmma.commit_group": lambda: "",
    "wgmma.wait_group": lambda left: "",
    "wgmma.mma_async.sync.aligned.m64n": lambda *o: (
        f"float* sums_[] = {{{', '.join('&' + x for x in o[:-6])}}}; "
        f"wide_multiply_add(sums_, {len(o[:-6]) // 4}, {', '.join(o[-6:])});"
    ),
    "mov.u32 %0, %%smid": lambda to: f"{to} = blockIdx.x;",
    "nanosleep.u32": lambda: "pause_();",
    "mov.u64 %0, %globaltimer": lambda to: f"{to} = 0;",
    "mov.u64 %0, %%globaltimer": lambda to: f"{to} = 0;",
    "mbarrier.init": lambda at, all_="1": f"copy_barrier_init(at_shared({at}), {all_});",
    "mbarrier.arrive.shared": lambda at: f"copy_expect(at_shared({at}), 0);",
    "mbarrier.arrive.expect_tx": lambda at, size: f"copy_expect(at_shared({at}), {size});",
    "cp.async.bulk.shared": lambda to, source, size, at: (
        f"copy_bulk(at_shared({to}), {source}, {size}, at_shared({at}));"
    ),
    "mbarrier.try_wait.parity": lambda at, parity: f"copy_wait(at_shared({at}), {parity});",
    "movmatrix.sync.aligned.m8n8.trans.b16": lambda to, v: f"{to} = transposed({v});",
    "ex2.approx.ftz.f32": lambda to, v: f"{to} = exp2f({v});",
    "atom.acq_rel.gpu.global.add.u32": lambda to, at, n: f"{to} = atomicAdd({at}, {n});",
    "lop3.b32 %0, %1, %2, %3, 0xea": lambda to, a, b, c: f"{to} = (({a}) & ({b})) | ({c});",
    "add.rn.f16x2": lambda to, a, b: f"{to} = both_halves({a}, {b}, 0, [](auto a, auto b, auto) {{ return a + b; }});",
    "sub.rn.f16x2": lambda to, a, b: f"{to} = both_halves({a}, {b}, 0, [](auto a, auto b, auto) {{ return a - b; }});",
    "mul.rn.f16x2": lambda to, a, b: f"{to} = both_halves({a}, {b}, 0, [](auto a, auto b, auto) {{ return a * b; }});",
    "fma.rn.f16x2": lambda to, *o: (
        f"{to} = both_halves({', '.join(o)}, [](auto a, auto b, auto c) {{ return a * b + c; }});"
    ),
    "ld.relaxed.gpu.u32": lambda to, at: f"{to} = *(const u32*)({at});",
    "ld.global.nc.L1::no_allocate.v4.u32": lambda x, y, z, w, at: (
        f"const uint4 four = *(const uint4*)({at}); {x} = four.x; {y} = four.y; {z} = four.z; {w} = four.w;"
    ),
    "ld.volatile.global.v4.u32": lambda x, y, z, w, at: (
        f"const uint4 four = *(const uint4*)({at}); {x} = four.x; {y} = four.y; {z} = four.z; {w} = four.w;"
    ),
    # What comes over a link takes its time: others go on meanwhile.
    "ld.relaxed.sys.global.f32": lambda v, at: f"pause_(); {v} = *(const float*)({at});",
    "ld.relaxed.sys.global.v4.f32": lambda x, y, z, w, at: (
        f"pause_(); const float4 four = *(const float4*)({at}); {x} = four.x; {y} = four.y; {z} = four.z; {w} = four.w;"
    ),
    "ld.relaxed.sys.global.u32": lambda v, at: f"pause_(); {v} = *(const u32*)({at});",
    "st.relaxed.sys.global.u32": lambda at, x: f"*(u32*)({at}) = {x}; progress++;",
    "st.relaxed.sys.global.f32": lambda at, x: f"*(float*)({at}) = {x}; progress++;",
    "st.relaxed.sys.global.v4.f32": lambda at, *v: f"*(float4*)({at}) = make_float4({', '.join(v)}); progress++;",
    "st.volatile.global.f32": lambda at, x: f"*({at}) = {x}; progress++;",
    "st.volatile.global.u16": lambda at, x: f"*({at}) = {x}; progress++;",
    "st.volatile.global.v4.u32": lambda at, *v: f"*(uint4*)({at}) = make_uint4({', '.join(v)}); progress++;",
}


def compiler() -> str | None:
    return shutil.which("g++") or shutil.which("c++")


def build(
    sources: str | tuple[str, ...], defines: Mapping[str, object], kernel: str, count: int, folder: Path
) -> ctypes.CDLL:
    """The kernel of that name, with `count` arguments, as `run(ranks, launches, [blocks, rows of blocks, threads of a
    block, bytes of shared memory] of every launch of every rank, addresses of every argument of each, seed)`: 0, or 1
    where all threads wait for ever."""
    found = compiler()
    assert found is not None
    # First the preprocessor: a PTX statement may be cut by conditions.
    preprocess = [found, "-E", "-P", "-x", "c++", "-D__CUDA_ARCH__=900", "-"]
    program = source_text(sources, defines)
    program = subprocess.run(preprocess, input=program, capture_output=True, text=True, check=True).stdout
    text = "\n".join(
        (
            '#include "simt.h"\n#include <utility>',
            to_host(program),
            f"#define COUNT {count}\n#define KERNEL {kernel}",
            _CALL + _DRIVER,
        )
    )
    library = _compiled(text, folder, kernel)
    loaded = ctypes.CDLL(str(library))
    loaded.run.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint]
    return loaded


def _compiled(text: str, folder: Path, name: str) -> Path:
    """The library of this C++, compiled once for all the tests of a run, whatever process they are in: beside the
    folders of tests that pytest makes, of which `folder` is one."""
    found = compiler()
    assert found is not None
    shared = folder.parent
    if shared.name.startswith("popen-"):  # a worker's, when several run
        shared = shared.parent
    digest = hashlib.sha256(text.encode()).hexdigest()[:32]
    library = shared / f"{name}-{digest}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=shared) as own:
            cpp, made = Path(own) / f"{name}.cpp", Path(own) / f"{name}.so"
            cpp.write_text(text)
            command = [found, *_OPTIONS, f"-I{_header(found, shared)}", str(cpp), "-o", str(made)]
            result = subprocess.run(command, capture_output=True, text=True)
            assert result.returncode == 0, result.stderr[:4000]
            os.replace(made, library)
    return library


def _header(found: str, shared: Path) -> Path:
    """Where simt.h lies, with what the compiler has made of it in advance. One that cannot do so reads it anew."""
    folder = shared / "simt"
    if not folder.exists():
        with tempfile.TemporaryDirectory(dir=shared) as own:
            made = Path(own) / "simt"
            made.mkdir()
            header = shutil.copy(_HERE / "simt.h", made)
            command = [found, *_OPTIONS, "-x", "c++-header", header, "-o", f"{header}.gch"]
            subprocess.run(command, capture_output=True, check=False)
            with contextlib.suppress(OSError):  # another process was first
                made.rename(folder)
    return folder


def to_host(text: str) -> str:
    """CUDA C++ -> C++. Shared memory comes from the running block; a loop that only waits lets others run."""
    text = re.sub(r"extern __shared__ [^;]*?(\w+)\s+(\w+)\[\];", r"\1* \2 = running->block->shared;", text)
    text = re.sub(r"(while \([^\n]*\)) \{\}", r"\1 pause_();", text)
    text = re.sub(
        r"__shared__ (?:__align__\(\d+\) )?([\w: ]+?) ((?:\w+(?:\[[^\]]*\])*(?:, )?)+);", _shared_arrays, text
    )
    pieces, at = [], 0
    for match in re.finditer(r"\basm(?: volatile)?\(", text):
        end = _closing(text, match.end())
        pieces += [text[at : match.start()], "{ " + _translated(text[match.end() : end]) + " }"]
        at = text.index(";", end) + 1
    return "".join([*pieces, text[at:]])


def _shared_arrays(declaration: re.Match[str]) -> str:
    kind, result = declaration.group(1), []
    for number, (name, sizes) in enumerate(re.findall(r"(\w+)((?:\[[^\]]*\])*)(?:, |$)", declaration.group(2))):
        place = f"running->block->array({declaration.start() * 8 + number}, sizeof({kind}{sizes}))"
        result.append(f"{kind} (&{name}){sizes} = *({kind}(*){sizes}){place};")
    return " ".join(result)


def _closing(text: str, at: int) -> int:
    """Where the parenthesis that opened before `at` closes."""
    depth, quoted = 1, False
    while True:
        letter = text[at]
        if letter == '"':
            quoted = not quoted
        elif not quoted:
            depth += {"(": 1, ")": -1}.get(letter, 0)
        if depth == 0:
            return at
        at += 1


def _translated(statement: str) -> str:
    """'"text" : outputs : inputs : clobbers' -> C++; the text may be several literals."""
    literals = re.match(r'\s*((?:"[^"]*"\s*)+)', statement)
    assert literals is not None, statement
    ptx = " ".join(re.findall(r'"([^"]*)"', literals.group(1))).replace("\\n", " ")
    operands, at = [], literals.end()
    for match in re.finditer(r'"[=+]?[a-z]"\(', statement[at:]):
        start = at + match.end()
        operands.append(statement[start : _closing(statement, start)])
    words = re.sub(r"\s+", " ", ptx).strip()
    if not words:
        return ""  # only tells a compiler what changes
    waiting = re.search(r"mbarrier\.try_wait\S*", words)
    words = waiting.group(0) if waiting else words
    if re.match(r"mma\.sync\.aligned\.m16n8k(16|32)\.row\.col\.(s32\.s8\.s8\.s32|f32\.b?f16\.b?f16\.f32) ", words):
        return _multiply_add(words, operands)
    for beginning, translate in _PTX.items():
        if words.startswith(beginning):
            return translate(*operands)
    return f"UNKNOWN_PTX({words.split(';')[0]})"  # does not compile, where it is compiled at all


def _multiply_add(words: str, operands: list[str]) -> str:
    """D, A, B and C by the numbers in braces; a product of fewer columns is the first part of one of more."""
    d, a, b, c = ([operands[int(n)] for n in re.findall(r"%(\d+)", part)] for part in re.findall(r"{([^}]*)}", words))
    kind = "<true>" if ".bf16.bf16." in words else "<false>" if ".f16.f16." in words else ""
    fragments = a + ["0"] * (4 - len(a)) + b + ["0"] * (2 - len(b))
    names = " ".join(f"{x} = four[{i}];" for i, x in enumerate(d))
    type_ = "float" if kind else "int"
    return f"{type_} four[4] = {{{', '.join(c)}}}; multiply_add{kind}(four, {', '.join(fragments)}); {names}"


@dataclass
class Asked:
    """A program that the Python side asked for, in place of program.Program."""

    sources: str | tuple[str, ...]
    defines: dict[str, object]
    device: object = None
    features: str = ""

    def kernel(self, name: str) -> tuple[Asked, str]:
        return self, name


@dataclass
class Queue:
    """Takes launches in place of program.launch, and runs those of several ranks beside each other."""

    folder: Path
    launches: list[tuple[Any, ...]] = field(default_factory=list)
    libraries: dict[str, ctypes.CDLL] = field(default_factory=dict)

    def launch(
        self, kernel: Any, grid: int | tuple[int, ...], threads: int, shared: int, arguments: tuple[Any, ...], **_: Any
    ) -> None:
        columns, rows, layers = (*(grid if isinstance(grid, tuple) else (grid,)), 1, 1)[:3]
        assert layers == 1
        self.launches.append((*kernel, (columns, rows, threads, shared), arguments))

    def run(self, ranks: int, seed: int) -> bool:
        """All that was launched, in equal parts by rank, each rank's in a row. False: they wait for each other for
        ever. All must be of one kernel."""
        program, name, _, first = self.launches[0]
        key = repr((program.sources, program.defines, name))
        if key not in self.libraries:
            self.libraries[key] = build(program.sources, program.defines, name, len(first), self.folder)
        values = [[_c_value(a) for a in arguments] for *_, arguments in self.launches]
        flat = [ctypes.addressof(value) for row in values for value in row]
        table = (ctypes.c_void_p * len(flat))(*flat)
        numbers = [number for _, _, shape, _ in self.launches for number in shape]
        shapes = (ctypes.c_int * len(numbers))(*numbers)
        each = len(self.launches) // ranks
        result = self.libraries[key].run(ranks, each, ctypes.addressof(shapes), ctypes.addressof(table), seed)
        self.launches.clear()
        return bool(result == 0)


class AtOnce(Queue):
    """Runs every launch before the next is made, as kernels of several kinds on one stream follow one another."""

    def launch(self, *arguments: Any, **options: Any) -> None:
        super().launch(*arguments, **options)
        assert self.run(1, seed=1), "all wait for ever"


def replace_gpu(
    monkeypatch: pytest.MonkeyPatch,
    queue: Queue,
    *modules: ModuleType,
    processors: int = 3,
    shared_limit: int = 99 << 10,
) -> None:
    """The programs and launches of these modules of kernels/cuda go to the queue; torch tells of a GPU of compute
    capability 9.0 with so many multiprocessors, whose blocks have so many bytes of shared memory."""
    properties = SimpleNamespace(multi_processor_count=processors, shared_memory_per_multiprocessor=shared_limit + 1024)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    for module in modules:
        monkeypatch.setattr(module, "Program", Asked)
        monkeypatch.setattr(module, "launch", queue.launch)
        if hasattr(module, "shared_limit"):
            monkeypatch.setattr(module, "shared_limit", lambda device: shared_limit)


def _c_value(value: Any) -> Any:
    """As program.launch passes it."""
    if isinstance(value, torch.Tensor):
        return ctypes.c_void_p(value.data_ptr())
    return ctypes.c_float(value) if isinstance(value, float) else ctypes.c_int(value)
