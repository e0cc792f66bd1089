"""Plan + checkpoint -> this rank's weights on its device, streamed (layer 6).

A rank reads only the file bytes of its own slices: a range of rows is one contiguous range of the file, a range of
columns is a strided set of blocks, widened to whole file blocks. They pass through the host a chunk at a time: for a
GPU through a few pinned buffers, which reader threads fill while the chunks before are repacked on the device; on a CPU
each thread reads and repacks chunks of its own. A complete tensor is put into the kernels' layout at once, while
the next ones are read. Not one bit of a weight is changed.
"""

from __future__ import annotations

import mmap
import os
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import torch

from multitensor.errors import InputError
from multitensor.formats.checkpoint import Checkpoint, TensorInfo
from multitensor.formats.quant_types import QuantType
from multitensor.kernels.quant_tensor import QuantTensor
from multitensor.kernels.repack import repack, slice_phase
from multitensor.sharding.plan import Plan, Slice, TensorPlan

Progress = Callable[[int, int], None]
Weight = QuantTensor | torch.Tensor
Adopt = Callable[[Mapping[str, Weight]], Mapping[str, Weight]]  # as Kernels.adopt
Finish = Callable[[str, Weight], Weight]  # from a tensor that is complete to what is kept of it

CUDA_CHUNK_BYTES = 32 << 20
CUDA_READERS = 8  # threads at most: one copies 4 to 8 GB/s out of the page cache, a link takes 55
MAPPED_BYTES = 4 << 20  # of the file, mapped at a time by a thread that picks columns
CPU_CHUNK_BYTES = 1 << 20  # repacking makes temporaries of a few times the chunk, in each thread
CPU_THREADS = 16  # at most


@dataclass(frozen=True)
class _Chunk:
    """Rows [row, row + rows) of a tensor, file bytes [start_byte, stop_byte) of each; they become rows from
    `target_row` on of the tensor `name`."""

    name: str
    info: TensorInfo
    row: int
    rows: int
    row_bytes: int
    start_byte: int
    stop_byte: int
    target_row: int

    @property
    def nbytes(self) -> int:
        return self.rows * (self.stop_byte - self.start_byte)


_Step = Callable[[_Chunk, torch.Tensor], None]  # what is done with a chunk and its bytes


@dataclass
class _Staging:
    """A pinned host buffer, and the event after which it may be filled anew."""

    host: torch.Tensor
    free: torch.cuda.Event


def load_rank(
    checkpoint: Checkpoint,
    plan: Plan,
    rank: int,
    device: torch.device,
    progress: Progress | None = None,
    adopt: Adopt | None = None,
) -> dict[str, Weight]:
    """This rank's weights by canonical name: matrices as QuantTensor in their file's type, vectors as float32 tensors.

    The spec's norm_offset is added to norm weights here, so nothing after the loader knows of it. A tensor of which
    the rank holds nothing is absent. progress(bytes read, bytes to read) after each chunk. adopt: called with each
    tensor, alone, as soon as it is complete; what it returns is kept instead.
    Raises InputError when a type has no kernel yet or a file ends early.
    """
    wanted = [(tensor, tensor.slices[rank]) for tensor in plan.tensors.values()]
    held = 0

    def finish(name: str, weight: Weight) -> Weight:
        nonlocal held
        held += weight.nbytes
        return weight if adopt is None else adopt({name: weight})[name]

    weights = load_tensors(checkpoint, wanted, device, plan.spec.norm_offset, progress, finish)
    planned = sum(tensor.resident_bytes(rank) for tensor in plan.tensors.values())
    if held != planned:
        raise AssertionError(f"rank {rank} holds {held} bytes of weights where the plan has {planned}")
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the staging area and the repacker's temporaries
    return weights


def load_tensors(
    checkpoint: Checkpoint,
    wanted: Sequence[tuple[TensorPlan, tuple[Slice, ...]]],
    device: torch.device,
    norm_offset: float,
    progress: Progress | None = None,
    finish: Finish | None = None,
) -> dict[str, Weight]:
    """As `load_rank`, for any choice of tensors and slices; `verify` streams the whole model through it."""
    on_gpu = device.type == "cuda"
    chunk_bytes = CUDA_CHUNK_BYTES if on_gpu else CPU_CHUNK_BYTES
    weights: dict[str, Weight] = {}
    columns: dict[str, Slice] = {}
    heights: dict[str, int] = {}
    chunks: list[_Chunk] = []
    for tensor, slices in wanted:
        if sum(s.size for s in slices) == 0:
            continue
        rows, columns[tensor.name] = _ranges(tensor, slices)
        _require_kernel(tensor.decl.info)
        heights[tensor.name] = sum(r.size for r in rows)
        chunks.extend(_chunks(tensor, rows, columns[tensor.name], chunk_bytes))

    def allocate(chunk: _Chunk) -> None:
        if chunk.name not in weights:
            weights[chunk.name] = _allocate(chunk.info, heights[chunk.name], columns[chunk.name], device)

    if not on_gpu:  # on a GPU one after the other: what a tensor leaves behind when it is finished serves the next
        for chunk in chunks:
            allocate(chunk)
    total = sum(chunk.nbytes for chunk in chunks)
    done = 0
    left = Counter(chunk.name for chunk in chunks)
    with ExitStack() as stack:
        fds = [stack.enter_context(open(path, "rb", buffering=0)).fileno() for path in checkpoint.files]

        def read(chunk: _Chunk, target: torch.Tensor) -> None:
            _read(checkpoint, fds[chunk.info.file], chunk, target.numpy())

        def store(chunk: _Chunk, raw: torch.Tensor) -> None:
            allocate(chunk)
            _store(weights[chunk.name], chunk, raw, columns[chunk.name])

        for chunk in _through_gpu(chunks, read, store, device) if on_gpu else _through_cpu(chunks, read, store):
            done += chunk.nbytes
            left[chunk.name] -= 1
            if not left[chunk.name]:
                _complete(weights, chunk.name, norm_offset, finish)
            if progress is not None:
                progress(done, total)
    return weights


def _complete(weights: dict[str, Weight], name: str, norm_offset: float, finish: Finish | None) -> None:
    weight = weights.pop(name)  # so that `finish` can give up what it replaces
    if norm_offset and isinstance(weight, torch.Tensor) and name.endswith("_norm.weight"):
        weight += norm_offset
    weights[name] = weight if finish is None else finish(name, weight)


def _matrix_shape(info: TensorInfo) -> tuple[int, int]:
    """(rows, columns); leading axes of a stack of matrices are counted as rows, a vector is one row."""
    return int(np.prod(info.shape[:-1], dtype=np.int64)), info.shape[-1]


def _ranges(tensor: TensorPlan, slices: tuple[Slice, ...]) -> tuple[tuple[Slice, ...], Slice]:
    """(ranges of rows, range of columns) of the file's matrix that the slices of the tensor's axis stand for."""
    info = tensor.decl.info
    rows, cols = _matrix_shape(info)
    if len(info.shape) == 1:
        if len(slices) != 1:
            raise InputError(f"{tensor.name}: a vector cut in {len(slices)} segments cannot be loaded")
        return (Slice(0, 1),), slices[0]
    if tensor.axis is None:
        return (Slice(0, rows),), Slice(0, cols)
    if tensor.axis == 1 and len(slices) == 1:
        return (Slice(0, rows),), slices[0]
    if tensor.axis == 0 and len(info.shape) == 2:
        return tuple(s for s in slices if s.size), Slice(0, cols)
    raise InputError(f"{tensor.name}: a cut of axis {tensor.axis} in {len(slices)} segments cannot be loaded")


def _require_kernel(info: TensorInfo) -> None:
    if not info.type.computable:
        raise InputError(f"{info.name}: no kernel computes with type {info.type.name} yet; use a file in another type")


def _allocate(info: TensorInfo, rows: int, cols: Slice, device: torch.device) -> Weight:
    kind = info.type
    if len(info.shape) == 1:
        return torch.empty(cols.size, dtype=torch.float32, device=device)
    planes = {
        p.name: torch.empty(rows, p.row_items(cols.start, cols.stop), dtype=getattr(torch, p.dtype), device=device)
        for p in kind.planes
    }
    return QuantTensor(kind, rows, cols.size, planes, phase=slice_phase(kind, cols.start))


def _chunks(tensor: TensorPlan, rows: tuple[Slice, ...], cols: Slice, limit: int) -> Iterator[_Chunk]:
    info = tensor.decl.info
    kind = info.type
    first, last = kind.read_columns(cols.start, cols.stop) if len(info.shape) > 1 else cols
    row_bytes = info.nbytes // _matrix_shape(info)[0]
    start, stop = kind.row_bytes(first), min(kind.row_bytes(last), row_bytes)
    step = max(1, limit // max(1, stop - start))
    target = 0
    for part in rows:
        for row in range(part.start, part.stop, step):
            count = min(step, part.stop - row)
            yield _Chunk(tensor.name, info, row, count, row_bytes, start, stop, target)
            target += count


def _through_cpu(chunks: list[_Chunk], read: _Step, store: _Step) -> Iterator[_Chunk]:
    """Reads and stores the chunks, several at a time; yields each, in order, when it is done."""

    @torch.inference_mode()  # a thread has a mode of its own; `verify` allocates in inference mode
    def work(chunk: _Chunk) -> _Chunk:
        raw = torch.empty(chunk.nbytes, dtype=torch.uint8)
        read(chunk, raw)
        store(chunk, raw.view(chunk.rows, -1))
        return chunk

    # Chunks are too small for torch's own threads, which would spin against each other.
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(min(threads, CPU_THREADS), "weights", torch.set_num_threads, (1,)) as pool:
            yield from pool.map(work, chunks)
    finally:
        torch.set_num_threads(threads)


def _through_gpu(chunks: list[_Chunk], read: _Step, store: _Step, device: torch.device) -> Iterator[_Chunk]:
    """Reads the chunks into pinned buffers ahead, as many as there are; copies and stores one after the other.

    A buffer is handed to its reader again at once; the reader waits for the event that says that the copy has ended.
    All of the device's work is on one stream, so that one buffer there is enough.
    """
    if not chunks:
        return
    nbytes = max(chunk.nbytes for chunk in chunks)
    readers = max(2, min(CUDA_READERS, torch.get_num_threads()))
    pending: deque[tuple[_Chunk, _Staging, Future[None]]] = deque()
    upcoming = iter(chunks)

    def fill(chunk: _Chunk, buffer: _Staging) -> None:
        buffer.free.synchronize()
        read(chunk, buffer.host[: chunk.nbytes])

    with torch.cuda.device(device), ThreadPoolExecutor(readers, "weights") as pool:

        def read_ahead(buffer: _Staging) -> None:
            chunk = next(upcoming, None)
            if chunk is not None:
                pending.append((chunk, buffer, pool.submit(fill, chunk, buffer)))

        for _ in range(min(readers + 2, len(chunks))):
            read_ahead(_Staging(torch.empty(nbytes, dtype=torch.uint8, pin_memory=True), torch.cuda.Event()))
        staged = torch.empty(nbytes, dtype=torch.uint8, device=device)
        while pending:
            chunk, buffer, future = pending.popleft()
            future.result()
            raw = staged[: chunk.nbytes]
            raw.copy_(buffer.host[: chunk.nbytes], non_blocking=True)
            buffer.free.record()
            read_ahead(buffer)
            store(chunk, raw.view(chunk.rows, -1))
            yield chunk
        torch.cuda.synchronize(device)


def _read(checkpoint: Checkpoint, fd: int, chunk: _Chunk, target: np.ndarray) -> None:
    """Fills `target` with the chunk's bytes. Raises InputError when the file ends early."""
    begin = chunk.row * chunk.row_bytes
    if chunk.nbytes == chunk.rows * chunk.row_bytes:
        _read_contiguous(fd, chunk, target, chunk.info.offset + begin)
        return
    # Out of the mapped file: for columns that is faster than reading whole rows, or each row's piece by a call.
    rows = target.reshape(chunk.rows, -1)
    step = max(1, MAPPED_BYTES // chunk.row_bytes)
    for row in range(0, chunk.rows, step):
        part = rows[row : row + step]
        first = begin + row * chunk.row_bytes
        view = checkpoint.raw(chunk.info, first, first + len(part) * chunk.row_bytes)
        source = np.frombuffer(view, dtype=np.uint8).reshape(len(part), chunk.row_bytes)
        part[...] = source[:, chunk.start_byte : chunk.stop_byte]
        _drop_pages(view, chunk.info.offset + first)


def _read_contiguous(fd: int, chunk: _Chunk, target: np.ndarray, offset: int) -> None:
    done = 0
    while done < chunk.nbytes:
        got = os.preadv(fd, [target.data[done:]], offset + done)
        if got == 0:
            raise InputError(f"{chunk.name}: the file ends {chunk.nbytes - done} bytes early; it changed after opening")
        done += got


def _drop_pages(view: memoryview, offset: int) -> None:
    """Unmaps the pages just read from this process (they stay in the page cache), so that its memory stays small."""
    mapping = view.obj
    if isinstance(mapping, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        first = -(-offset // mmap.PAGESIZE) * mmap.PAGESIZE
        length = (offset + view.nbytes - first) // mmap.PAGESIZE * mmap.PAGESIZE
        if length > 0:
            mapping.madvise(mmap.MADV_DONTNEED, first, length)


def _store(weight: Weight, chunk: _Chunk, raw: torch.Tensor, cols: Slice) -> None:
    kind: QuantType = chunk.info.type
    if isinstance(weight, torch.Tensor):
        values = repack(kind, raw, cols.start, cols.start, cols.stop)
        weight.copy_(_vector(kind, values))
        return
    first = kind.read_columns(cols.start, cols.stop)[0]
    rows = slice(chunk.target_row, chunk.target_row + chunk.rows)
    for name, part in repack(kind, raw, first, cols.start, cols.stop).items():
        weight.planes[name][rows].copy_(part)


def _vector(kind: QuantType, planes: Mapping[str, torch.Tensor]) -> torch.Tensor:
    if not kind.is_float:
        raise InputError(f"a vector of type {kind.name} is unknown; norms and biases are float32, float16 or bfloat16")
    return planes["weight"][0].float()
