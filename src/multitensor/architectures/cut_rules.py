"""How a tensor may be cut over ranks. Declarations only; `sharding/plan.py` is the one place that cuts.

A weight is (rows, columns) = (outputs, inputs). Source of the scheme: Megatron-LM (arXiv:1909.08053).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Replicate:
    """Every rank holds all of it. `why` is printed by the plan."""

    why: str


@dataclass(frozen=True)
class CutRows:
    """Outputs are cut (column-parallel in Megatron's words) by the unit and ratio of the tensor's group.
    `segments`: sizes of parts packed along the rows, each cut on its own (gate_up); () for one part."""

    segments: tuple[int, ...] = ()


@dataclass(frozen=True)
class CutColumns:
    """Inputs are cut (row-parallel): each rank makes a partial sum of the whole output."""


@dataclass(frozen=True)
class CutHeads:
    """Attention tensors cut by heads. side "query": rows follow the rank's query heads; "kv": rows follow its KV
    heads, which may be replicated on several ranks; "output": columns follow the rank's query heads."""

    side: Literal["query", "kv", "output"]


@dataclass(frozen=True)
class CutExperts:
    """(experts, rows, columns): room for mixture of experts."""

    axis: Literal["experts", "rows", "columns"]


CutRule = Replicate | CutRows | CutColumns | CutHeads | CutExperts
