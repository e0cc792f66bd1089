"""The small kernels of a decode step, one new token a sequence: rotary + cache write, attention, norms.

Made to be captured in CUDA graphs: every call launches one kernel with a fixed grid on fixed addresses and allocates
nothing; lengths are read from device memory. `positions` (int32 [S]) holds the position of each sequence's new token,
-1 for a slot that is padding. See decode.cu.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal

import torch

from multitensor.config import KV_GROUP
from multitensor.kernels.cache_tensor import CacheTensor, QuantCache
from multitensor.kernels.cuda.program import Program, launch
from multitensor.kernels.cuda.small_batch import PackedRows

MAX_SEQUENCES = 64
MAX_UNITS = 64  # pieces that one sequence is cut into; one block adds them up. As in decode.cu
MIN_KEYS = 128  # of a piece: one tile a warp
KEY_TILE = 16  # KV blocks are multiples of it
WARPS, FEW_WARPS = 8, 4
HEAD_DIMS = (64, 80, 96, 128, 256)
MAX_HIDDEN = 16384
SHARED_BYTES = 48 << 10  # that a kernel may declare
KINDS: dict[torch.dtype | str, int] = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2, "q8": 3, "q4": 4}
SLOT_TYPES = {torch.int32: "int", torch.int64: "long long"}
_NULL = torch.empty(0)  # its data_ptr() is 0


class DecodeKernels:
    """The kernels of decode.cu on one device, each variant compiled when first asked for."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.processors = torch.cuda.get_device_properties(device).multi_processor_count
        self._programs: dict[tuple[tuple[str, object], ...], Program] = {}

    @cached_property
    def overlap(self) -> bool:
        """Programmatic dependent launch exists from compute capability 9.0 on."""
        return torch.cuda.get_device_capability(self.device) >= (9, 0)

    def program(self, **defines: object) -> Program:
        key = tuple(defines.items())
        if key not in self._programs:
            self._programs[key] = Program("decode.cu", defines, self.device)
        return self._programs[key]

    def add_rms_norm(
        self,
        residual: torch.Tensor,
        partial: torch.Tensor | None,
        weight: torch.Tensor,
        eps: float,
        out: torch.Tensor,
        *,
        post_weight: torch.Tensor | None = None,
        offset: float = 0.0,
        early: bool = True,
        packed: PackedRows | None = None,
    ) -> None:
        """residual (float32 [S, H]) += partial ([S, H] float32 or out's type; None: nothing), through its own RMS norm
        first where post_weight is given; out = rms_norm(residual) * (weight + offset), float16 or bfloat16 [S, H].

        Weights are float32 [H]; H a multiple of 4, at most 16384. As Group.reduce_add_norm after its sum. early: may be
        launched before the kernel before it on the stream has ended, for which it then waits itself, and for no other.
        packed: takes `out` as well, whose rows it then stands for; H a multiple of 256.
        """
        tokens, hidden = residual.shape
        if hidden % 4 or hidden > MAX_HIDDEN:
            raise ValueError(f"hidden size {hidden}: the norm kernel wants a multiple of 4 up to {MAX_HIDDEN}")
        threads = min(1024, -(-hidden // 4 // 32) * 32)
        kind = KINDS[out.dtype if partial is None else partial.dtype]
        program = self.program(HIDDEN=hidden, NTHREADS=threads, X_KIND=KINDS[out.dtype], PARTIAL_KIND=kind)
        rest = (weight, out, float(eps), float(offset))
        arguments: tuple[Any, ...] = (residual, or_null(partial), or_null(post_weight), *rest)
        name = "add_rms_norm"
        if packed is not None:
            name = "add_rms_norm_packed"
            arguments += (packed.operands, packed.scales, packed.tiles, int(packed.wide))
        launch(program.kernel(name), tokens, threads, 0, arguments, overlap=early and self.overlap)

    def norm_takes(self, residual: torch.Tensor, partial: torch.Tensor, *weights: torch.Tensor | None) -> bool:
        """Whether `add_rms_norm` can do it with an `out` of partial's type, which is float16 or bfloat16."""
        hidden = residual.shape[-1]
        return (
            partial.dtype in (torch.float16, torch.bfloat16)
            and residual.dim() == 2
            and residual.shape == partial.shape
            and residual.numel() > 0
            and hidden % 4 == 0
            and hidden <= MAX_HIDDEN
            and all([w is None or (w.shape == (hidden,) and _is_plain(w)) for w in weights])
            and _is_plain(residual)
            and partial.is_contiguous()
            and partial.data_ptr() % 8 == 0
        )


class DecodeAttention:
    """Rotary embedding, cache writes and attention of the layers of one kind: same heads, types and window.

    kv_map[i]: local KV head of local query head i. Caches: [blocks, block_size, kv_heads, head_dim] of kv_dtype, or
    QuantCaches ("q8", "q4": heads in multiples of 32); q in `dtype` (float16 or bfloat16). Layers share the scratch, so
    their calls must follow one another on one stream.

    early: attention reads positions, block tables, angles and the keys before the new token's while the kernels before
    it still run. They must be complete when the chain of overlapped launches that leads to it begins: written by an
    earlier graph launch, or by kernels that a launch without overlap followed.

    min_keys: a sequence is cut into pieces no shorter. warps: of a block; 16 only for heads up to 128 in groups up to
    8; None: 8, or 4 where there are more sequences and KV heads than blocks of 8 that run at once, so that none has to
    wait for another to end. blocks_per_processor: that run at once.
    """

    def __init__(
        self,
        kernels: DecodeKernels,
        kv_map: Sequence[int],
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        kv_dtype: torch.dtype | Literal["q8", "q4"],
        block_size: int,
        sequences: int,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        min_keys: int = MIN_KEYS,
        early: bool = True,
        warps: int | None = None,
        blocks_per_processor: int | None = None,
    ) -> None:
        takes = head_dim in HEAD_DIMS and (isinstance(kv_dtype, torch.dtype) or head_dim % KV_GROUP == 0)
        if not kv_map or not takes or block_size % KEY_TILE or not 0 < sequences <= MAX_SEQUENCES:
            raise ValueError(
                f"no decode attention for {len(kv_map)} heads of {head_dim}, blocks of {block_size} and {sequences} "
                f"sequences: heads of {HEAD_DIMS}, blocks in multiples of {KEY_TILE}, 1 to {MAX_SEQUENCES} sequences"
            )
        self.kernels, self.kv_heads, self.head_dim = kernels, kv_heads, head_dim
        self.query_heads, self.sequences = len(kv_map), sequences
        self.scale, self.window, self.softcap, self.min_keys = scale, window or 0, softcap or 0.0, min_keys
        wide = _uses_tensor_cores(kv_dtype, kernels.device) and head_dim <= 128 and _longest_run(kv_map) > 8
        head_tiles = 2 if wide else 1
        jobs = head_jobs(kv_map, 8 * head_tiles)
        warps_at_once = 16 if head_dim <= 128 and head_tiles == 1 else 8  # of a processor, as registers allow
        if warps is None:
            warps = WARPS if sequences * len(jobs) <= kernels.processors * warps_at_once // WARPS else FEW_WARPS
        if blocks_per_processor is None:
            blocks_per_processor = max(1, warps_at_once // warps)
        if warps // 2 * 8 * head_tiles * head_dim * 4 > SHARED_BYTES * 3 // 4:
            raise ValueError(f"{warps} warps are too many for heads of {head_dim} in groups of {8 * head_tiles}")
        self.target = max(1, kernels.processors * blocks_per_processor // len(jobs))
        device = kernels.device
        self._jobs = torch.tensor(jobs, dtype=torch.int32, device=device)
        units = (self._units(sequences), len(jobs), 8 * head_tiles)
        self._partials = torch.empty((*units, head_dim), dtype=torch.float32, device=device)
        self._stats = torch.empty((*units, 2), dtype=torch.float32, device=device)
        self._counters = torch.zeros((sequences, len(jobs)), dtype=torch.int32, device=device)
        self.nbytes = sum(t.nbytes for t in (self._jobs, self._partials, self._stats, self._counters))
        self._threads = 32 * warps
        self._defines = {
            "HEAD_DIM": head_dim,
            "BLOCK_SIZE": block_size,
            "X_KIND": KINDS[dtype],
            "KV_KIND": KINDS[kv_dtype],
            "HEAD_TILES": head_tiles,
            "NWARPS": warps,
            "MIN_BLOCKS": blocks_per_processor,
            "EARLY": int(early),
        }

    def rope_write_kv(
        self,
        qkv: torch.Tensor,
        k_cache: CacheTensor,
        v_cache: CacheTensor,
        positions: torch.Tensor,
        slot_mapping: torch.Tensor,
        cosines: torch.Tensor,
        sines: torch.Tensor,
        *,
        style: Literal["interleaved", "half"],
        bias: torch.Tensor | None = None,
        q_norm: torch.Tensor | None = None,
        k_norm: torch.Tensor | None = None,
        eps: float = 0.0,
    ) -> None:
        """qkv [S, (query heads + 2 KV heads) * head_dim]: adds bias (float32, a whole row), normalises q and k (float32
        weights [head_dim]), rotates both, leaves q in place and puts k and v into the caches' slots.

        slot_mapping: int32 or int64 [S], flat slot of the new token. cosines, sines: float32 [positions, R / 2], R the
        numbers of a head that are rotated.
        """
        rope = self._rope(cosines, sines, style, bias, q_norm, k_norm, eps)
        places = (positions, slot_mapping, *addresses(k_cache, v_cache), self.query_heads, self.kv_heads)
        grid = (-(-(self.query_heads + 2 * self.kv_heads) // 4), qkv.shape[0])
        kernel = self._program(slot_mapping.dtype).kernel("rope_write_kv")
        launch(kernel, grid, 128, 0, (qkv, *rope, *places), overlap=self.kernels.overlap)

    def attend(
        self,
        q: torch.Tensor,
        k_cache: CacheTensor,
        v_cache: CacheTensor,
        positions: torch.Tensor,
        block_tables: torch.Tensor,
        out: torch.Tensor,
        *,
        rows: torch.Tensor | None = None,
        overlap: bool = True,
    ) -> None:
        """q: row s starts with the query heads of sequence s (qkv itself will do); out [S, query heads * head_dim].

        Sequence s sees keys (position - window, position]. block_tables: int32 [S, blocks], contiguous. A sequence's
        result depends on the lengths of the others in its last bits: they decide where its sum is cut. rows: int32 [S],
        which rows of q and out are the sequences'; the others are left alone. overlap: may be launched before the
        kernel before it on the stream has ended.
        """
        arguments = self._attention(q, k_cache, v_cache, positions, block_tables, out, rows)
        kernel = self._program(torch.int64).kernel("attention_decode")
        self._launch(kernel, positions.shape[0], arguments, overlap=overlap)

    def rope_attend(
        self,
        qkv: torch.Tensor,
        k_cache: CacheTensor,
        v_cache: CacheTensor,
        positions: torch.Tensor,
        block_tables: torch.Tensor,
        slot_mapping: torch.Tensor,
        cosines: torch.Tensor,
        sines: torch.Tensor,
        out: torch.Tensor,
        *,
        style: Literal["interleaved", "half"],
        bias: torch.Tensor | None = None,
        q_norm: torch.Tensor | None = None,
        k_norm: torch.Tensor | None = None,
        eps: float = 0.0,
    ) -> None:
        """`rope_write_kv` and `attend` in one launch; qkv stays as it is."""
        attention = self._attention(qkv, k_cache, v_cache, positions, block_tables, out)
        rope = self._rope(cosines, sines, style, bias, q_norm, k_norm, eps)
        kernel = self._program(slot_mapping.dtype).kernel("rope_attention_decode")
        self._launch(kernel, positions.shape[0], (*attention, *rope, slot_mapping), overlap=True)

    def _program(self, slot_dtype: torch.dtype) -> Program:
        return self.kernels.program(**self._defines, SLOT=SLOT_TYPES[slot_dtype])

    def _units(self, sequences: int) -> int:
        """That so many sequences are cut into at most."""
        return min(self.target, MAX_UNITS) if sequences == 1 else self.target + sequences

    def _launch(self, kernel: Any, sequences: int, arguments: tuple[Any, ...], *, overlap: bool) -> None:
        grid = (self._jobs.shape[0], self._units(sequences), 1)
        launch(kernel, grid, self._threads, 0, arguments, overlap=overlap and self.kernels.overlap)

    def _rope(
        self,
        cosines: torch.Tensor,
        sines: torch.Tensor,
        style: Literal["interleaved", "half"],
        bias: torch.Tensor | None,
        q_norm: torch.Tensor | None,
        k_norm: torch.Tensor | None,
        eps: float,
    ) -> tuple[Any, ...]:
        norms = (or_null(bias), or_null(q_norm), or_null(k_norm), float(eps))
        return (*norms, cosines, sines, cosines.shape[-1], int(style == "interleaved"))

    def _attention(
        self,
        q: torch.Tensor,
        k_cache: CacheTensor,
        v_cache: CacheTensor,
        positions: torch.Tensor,
        block_tables: torch.Tensor,
        out: torch.Tensor,
        rows: torch.Tensor | None = None,
    ) -> tuple[Any, ...]:
        sequences = positions.shape[0]
        if sequences > self.sequences:
            raise ValueError(f"{sequences} sequences where {self.sequences} were announced")
        caches = addresses(k_cache, v_cache)
        places = (q, q.stride(0), *caches, self._jobs, positions, or_null(rows), block_tables, block_tables.shape[1])
        heads = (sequences, self.kv_heads, self.query_heads)
        rules = (float(self.scale), float(self.softcap), self.window, self.target, self.min_keys)
        return (*places, *heads, *rules, out, self._partials, self._stats, self._counters)


def head_jobs(kv_map: Sequence[int], size: int) -> list[tuple[int, int, int]]:
    """(KV head, first query head, query heads) of runs of up to `size` consecutive query heads on one KV head."""
    jobs: list[tuple[int, int, int]] = []
    for head, kv_head in enumerate(kv_map):
        if jobs and jobs[-1][0] == kv_head and jobs[-1][2] < size:
            jobs[-1] = (kv_head, jobs[-1][1], jobs[-1][2] + 1)
        else:
            jobs.append((kv_head, head, 1))
    return jobs


def _longest_run(kv_map: Sequence[int]) -> int:
    return max(count for _, _, count in head_jobs(kv_map, len(kv_map)))


def _uses_tensor_cores(kv_dtype: torch.dtype | str, device: torch.device) -> bool:
    """As TENSOR_CORES of decode.cu."""
    if kv_dtype == torch.bfloat16:
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return kv_dtype != torch.float32


def cache_kind(cache: CacheTensor) -> torch.dtype | Literal["q8", "q4"]:
    """As DecodeAttention wants to know it."""
    return cache.kind if isinstance(cache, QuantCache) else cache.dtype


def addresses(k_cache: CacheTensor, v_cache: CacheTensor) -> tuple[torch.Tensor, ...]:
    """Keys, values, and the scales of both."""
    if isinstance(k_cache, QuantCache) and isinstance(v_cache, QuantCache):
        return k_cache.codes, v_cache.codes, k_cache.scales, v_cache.scales
    if isinstance(k_cache, QuantCache) or isinstance(v_cache, QuantCache):
        raise ValueError("key and value caches must be alike")
    return k_cache, v_cache, _NULL, _NULL


def _is_plain(x: torch.Tensor) -> bool:
    """float32 numbers in a row, as vectors of four."""
    return x.dtype == torch.float32 and x.is_contiguous() and x.data_ptr() % 16 == 0


def or_null(tensor: torch.Tensor | None) -> torch.Tensor:
    return _NULL if tensor is None else tensor
