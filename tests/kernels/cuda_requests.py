"""What the Python side asks of the CUDA compiler, found by letting it ask; nothing is compiled, nothing launched."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import product
from types import SimpleNamespace
from typing import Any, get_args
from unittest.mock import patch

import torch

from multitensor.config import KV_GROUP
from multitensor.formats.quant_types import QUANT_TYPES
from multitensor.kernels.cache_tensor import make_cache
from multitensor.kernels.cuda import (
    choose,
    chunks,
    decode,
    flags,
    float_matrix,
    int8,
    layer,
    logprobs,
    matrix,
    prefill,
    reduce,
    sample,
    small_batch,
)
from multitensor.kernels.cuda.choose import CudaTokenChooser
from multitensor.kernels.cuda.chunks import ChunkKernels, WireName
from multitensor.kernels.cuda.decode import HEAD_DIMS, DecodeAttention, DecodeKernels, cache_kind
from multitensor.kernels.cuda.flags import Flags
from multitensor.kernels.cuda.float_matrix import LARGE, SMALL, FloatKernels
from multitensor.kernels.cuda.int8 import Int8Products
from multitensor.kernels.cuda.layer import LayerKernel, LayerShape, Places
from multitensor.kernels.cuda.layer_weights import FloatRows, Tiles
from multitensor.kernels.cuda.matrix import TileKernels
from multitensor.kernels.cuda.prefill import PrefillKernels
from multitensor.kernels.cuda.reduce import PeerGather, PeerReduction
from multitensor.kernels.cuda.sample import GreedySampler
from multitensor.kernels.cuda.small_batch import SmallBatchKernels
from multitensor.kernels.cuda.tiles import TILE_BYTES, TiledTensor
from multitensor.kernels.projection import Projection

CPU = torch.device("cpu")
HALVES = (torch.float16, torch.bfloat16)
FLOATS = (*HALVES, torch.float32)


@dataclass
class Asked:
    """One program. sources: names of .cu files, one behind the other. kernels: those that were looked up in it."""

    sources: tuple[str, ...]
    defines: dict[str, object]
    features: str = ""
    kernels: set[str] = field(default_factory=set)

    def __str__(self) -> str:
        return f"{'+'.join(self.sources)} {' '.join(f'{k}={v}' for k, v in self.defines.items())}"


@contextmanager
def recorded(architecture: int) -> Iterator[list[Asked]]:
    """Within, every Program of these modules is recorded instead of compiled, and launches do nothing."""
    programs: list[Asked] = []

    def program(
        sources: str | tuple[str, ...], defines: dict[str, object], device: torch.device, features: str = ""
    ) -> Any:
        asked = Asked((sources,) if isinstance(sources, str) else tuple(sources), dict(defines), features)
        programs.append(asked)
        return SimpleNamespace(kernel=lambda name: asked.kernels.add(name) or name)

    properties = SimpleNamespace(multi_processor_count=132, shared_memory_per_multiprocessor=228 << 10)
    with ExitStack() as stack:
        enter = stack.enter_context
        enter(patch.object(torch.cuda, "get_device_properties", lambda device: properties))
        enter(patch.object(torch.cuda, "get_device_capability", lambda device=None: divmod(architecture, 10)))
        for module in (
            choose,
            chunks,
            decode,
            flags,
            float_matrix,
            int8,
            layer,
            logprobs,
            matrix,
            prefill,
            reduce,
            sample,
            small_batch,
        ):
            enter(patch.object(module, "Program", program))
            enter(patch.object(module, "launch", lambda *arguments, **options: None))
            enter(patch.object(module, "shared_limit", lambda device: 227 << 10, create=True))
        yield programs


def tile_requests(turn: int) -> None:
    """The types that lie in tiles, two to a program; which two, and with which activations, depends on the turn."""
    kernels = TileKernels(CPU)
    names = sorted(TILE_BYTES)
    shift = 5 * turn % len(names)
    names = names[shift:] + names[:shift]
    pairs = [*zip(names[::2], names[1::2], strict=False), (names[-1], names[-1])]
    for number, pair in enumerate(pairs):
        x = torch.zeros(1, 256, dtype=HALVES[(turn + number) % 2 if pair[0] != pair[1] else 0])
        weights = [_tiled(name) for name in pair]
        kernels.multiply(x, weights)
        kernels.multiply(x, weights, float_out=True)
        kernels.multiply(x, weights, gated="silu")
    for dtype in FLOATS:
        kernels.expand(_tiled(names[-1]), dtype)


def _tiled(name: str, rows: int = 16) -> TiledTensor:
    tiles = torch.zeros(-(-rows // 16), 1, TILE_BYTES[name], dtype=torch.uint8)
    return TiledTensor(QUANT_TYPES[name], rows, 256, {"tiles": tiles})


def small_batch_requests(turn: int) -> None:
    """Two types to a program, all types within the turns; numbers of tokens and activations by turns."""
    kernels = SmallBatchKernels(CPU)
    names = sorted(TILE_BYTES)
    pairs = [(names[at % 13], names[(at + 1) % 13]) for at in range(5 * turn, 5 * turn + 14, 2)]
    for number, pair in enumerate(pairs):
        tokens = (8, 16, 32, 64)[(turn + number) % 4]
        x = torch.zeros(tokens, 256, dtype=HALVES[(turn + number) % 2])
        weights = [_tiled(name) for name in pair]
        kernels.multiply(x, weights, float_out=True)
        if number % 2:
            kernels.multiply(x, weights, gated="silu")


def float_requests(turn: int) -> None:
    """Every pair of types; bound of tokens and shape of a block by turns."""
    pairs = [(x, w) for x in HALVES for w in FLOATS]
    for number, (x_type, w_type) in enumerate(pairs):
        kernels = FloatKernels(CPU, (SMALL, LARGE)[(turn + number) % 2])
        tokens = (1, 2, 4, 8)[(turn + number // 2) % 4]
        x = torch.zeros(tokens, 256, dtype=x_type)
        kernels.multiply(x, torch.zeros(16, 256, dtype=w_type))
        kernels.multiply(x[:, :250], torch.zeros(16, 250, dtype=w_type))


def decode_requests(turn: int) -> None:
    """Attention of the head sizes, with types and groups by turns; norms."""
    kernels = DecodeKernels(CPU)
    for number, head_dim in enumerate(HEAD_DIMS):
        x_type, kv_type = HALVES[(turn + number) % 2], ("f16", "q8", "bf16", "q4", "f32")[(2 * turn + number) % 5]
        if head_dim % KV_GROUP and kv_type in ("q8", "q4"):
            kv_type = "f32"
        group, warps = (1, 4, 16)[(turn + number) % 3], (4, 16, 8)[(turn + 2 * number) % 3]
        cache = make_cache(kv_type, (1, 32, 1, head_dim), CPU)
        attention = DecodeAttention(
            kernels,
            [0] * group,
            1,
            head_dim,
            x_type,
            cache_kind(cache),
            32,
            1,
            scale=1.0,
            early=bool((turn + number) % 2),
            warps=warps if warps < 16 or (group <= 8 and head_dim <= 128) else 8,
        )
        qkv, out = torch.zeros(1, (group + 2) * head_dim, dtype=x_type), torch.zeros(1, group * head_dim, dtype=x_type)
        places = torch.zeros(1, dtype=torch.int32), torch.zeros(1, 1, dtype=torch.int32)
        angles = torch.zeros(1, head_dim // 2)
        slots = torch.zeros(1, dtype=torch.int64)
        attention.rope_write_kv(qkv, cache, cache, places[0], slots, angles, angles, style="half")
        attention.attend(qkv, cache, cache, *places, out)
        attention.rope_attend(qkv, cache, cache, *places, slots, angles, angles, out, style="half")
    for x_type in HALVES:
        for partial in (x_type, torch.float32):
            residual, out = torch.zeros(1, 576), torch.zeros(1, 576, dtype=x_type)
            kernels.add_rms_norm(residual, out.to(partial), torch.zeros(576), 1e-5, out)


def prefill_requests(turn: int) -> None:
    """Rotation and cache writes of many tokens, head sizes and caches by turns; their gate."""
    kernels = PrefillKernels(CPU)
    for number, kv_type in enumerate(("f16", "q8", "bf16", "q4", "f32")):
        head_dim, x = (64, 128, 96)[(turn + number) % 3], torch.zeros(2, 256, dtype=HALVES[(turn + number) % 2])
        cache = make_cache(kv_type, (1, 32, 1, head_dim), CPU)
        matrices = [_tiled("Q8_0", rows=heads * head_dim) for heads in (2, 1, 1)]
        projection = Projection((matrices[0], matrices[1], matrices[2]), None, head_dim, "half", None, None, 1e-5)
        angles, slots = torch.zeros(2, head_dim // 2), torch.zeros(2, dtype=torch.int64)
        assert kernels.project_takes(2, x.dtype, projection, angles, cache, cache)
        qkv = torch.zeros(2, 4 * head_dim, dtype=x.dtype)
        kernels.rope_write_kv(qkv, projection, angles, angles, cache, cache, slots)
    for dtype in HALVES:
        kernels.gated_activation(torch.zeros(1, 8, dtype=dtype), torch.zeros(1, 8, dtype=dtype), "silu")
        Int8Products(CPU, 1 << 20).quantise(torch.zeros(1, 64, dtype=dtype))


def peer_requests(turn: int) -> None:
    """Sums over 2 to 16 ranks with types and sizes by turns, in clusters where there are any; gathers."""
    clusters = torch.cuda.get_device_capability() >= (9, 0)
    for number, ranks in enumerate((2, 3, 8, 16)):
        hidden, x_type = (576, 8192, 16384)[(turn + number) % 3], FLOATS[(turn + number) % 3]
        places = torch.zeros(ranks, dtype=torch.int64)
        residual = torch.zeros(1, hidden)
        for parts, mailbox in product((1, 4) if clusters else (1,), (False, True)):
            reduction = PeerReduction(places, ranks - 1, hidden, 64, parts=parts, mailbox=mailbox)
            for partial in {x_type, torch.float32}:
                out = residual.to(x_type)
                reduction.reduce_add_norm(residual.to(partial), residual, residual[0], 1e-5, out)
        for mailbox in (False, True):
            gather = PeerGather(places, 0, [512] * ranks, 8, mailbox=mailbox)
            gather.gather(torch.zeros(1, 512), torch.zeros(1, 512 * ranks))


def chunk_requests(turn: int) -> None:
    """What large sums through the host's memory compute, and their flags."""
    for number, (wire, dtype) in enumerate((wire, dtype) for wire in get_args(WireName) for dtype in FLOATS):
        ChunkKernels((2, 3, 8, 16)[(turn + number) % 4], CPU).prepare(wire, dtype)
    Flags(0, CPU)


def sampling_requests(turn: int) -> None:
    """Sampling in one launch, log-probabilities in another, and what a recorded step samples."""
    CudaTokenChooser(128256, CPU)
    GreedySampler(1, CPU)


def layer_requests(turn: int) -> None:
    """Launches between attentions, for one and two tokens; types, sizes and ranks by turns."""
    names = sorted(TILE_BYTES)
    for number, ranks in enumerate((1, 2, 5, 16)):
        at = 3 * turn + 5 * number
        types = tuple(names[(at + 4 * i) % len(names)] for i in range(1 + (turn + number) % 4))
        LayerKernel(
            TileKernels(CPU),
            LayerShape(Tiles(types), 1 + (turn + number // 2) % 2, 32, (64, 200, 60, 100)),
            HALVES[(turn + number) % 2],
            hidden=(576, 4096, 8192, 16384)[(turn + number) % 4],
            rank=ranks - 1,
            places=_places(ranks, relay=ranks > 1 and number % 2 == 0),
            inner=512,
            warps=(None, 6, 12)[(turn + number) % 3],
            overlap=False if number % 2 else None,
        )
    for number, columns in enumerate((256, 128, 64)):
        LayerKernel(
            TileKernels(CPU),
            LayerShape(FloatRows(HALVES[(turn + number) % 2], columns), 1 + number % 2, 32, (64, 200, 60, 100)),
            HALVES[turn % 2],
            hidden=(576, 4096, 8192)[(turn + number) % 3],
            rank=0,
            places=_places(1 + number, relay=number == 2),
            inner=512,
            overlap=False if (turn + number) % 3 == 0 else None,
        )


def _places(ranks: int, *, relay: bool) -> Places:
    return Places(torch.zeros(ranks + relay, dtype=torch.int64), None, relay)


# Each takes a turn, which picks some of the many combinations.
REQUESTS = (
    tile_requests,
    small_batch_requests,
    float_requests,
    decode_requests,
    prefill_requests,
    peer_requests,
    chunk_requests,
    sampling_requests,
    layer_requests,
)
