"""THE ONLY SPLITTER: stage, rank and slice of every tensor, as plain data (never imports torch).

THE DATA CLASSES BELOW ARE FIXED (other parts are written against them).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from multitensor.architectures.spec import ModelSpec, TensorDecl
from multitensor.sharding.topology import Device


class Slice(NamedTuple):
    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Ratios:
    """One weight a rank, for each kind of tensor on its own."""

    attention: tuple[float, ...]
    ffn: tuple[float, ...]
    experts: tuple[float, ...]
    vocabulary: tuple[float, ...]


@dataclass(frozen=True)
class TensorPlan:
    """axis: 0 rows, 1 columns, None replicated. slices[rank]: the ranges of that axis the rank holds, in order
    (one range, or one a segment; an empty tuple when the rank holds nothing; the whole axis 0 when replicated).
    reason: why it is replicated, wholly or in part; "" when it is cut cleanly."""

    decl: TensorDecl
    axis: int | None
    slices: tuple[tuple[Slice, ...], ...]
    reason: str = ""
    stage: int = 0

    @property
    def name(self) -> str:
        return self.decl.name

    def local_shape(self, rank: int) -> tuple[int, ...]:
        raise NotImplementedError

    def owned_bytes(self, rank: int) -> float: ...
    def read_bytes(self, rank: int) -> int: ...
    def resident_bytes(self, rank: int) -> int: ...


@dataclass(frozen=True)
class RankPlan:
    """What rank `rank` computes. kv_heads: the KV heads it holds (global numbers, contiguous). kv_map[i]: local KV
    head that local query head i attends to. ffn, vocabulary: its share of those axes (may be empty)."""

    rank: int
    device: Device
    query_heads: Slice
    kv_heads: Slice
    kv_map: tuple[int, ...]
    ffn: Slice
    vocabulary: Slice
    stage: int = 0


@dataclass(frozen=True)
class Plan:
    spec: ModelSpec
    ranks: tuple[RankPlan, ...]
    ratios: Ratios
    tensors: Mapping[str, TensorPlan]  # by canonical name, in the model's order
    context: int  # tokens one sequence may have at most
    kv_tokens: int  # tokens the KV pool holds, all sequences together (a multiple of block_size)
    kv_type: str  # "f32", "f16", "bf16"
    block_size: int
    max_num_seqs: int
    max_batch_tokens: int
    dtype: str
    warnings: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        return len(self.ranks)

    def to_json(self) -> dict[str, Any]:
        raise NotImplementedError
