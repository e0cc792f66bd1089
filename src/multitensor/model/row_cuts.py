"""Where the rows of a step are cut in two: the sums over ranks of one half travel while the other half is multiplied.

What it costs: each product in two halves, so smaller ones, and twice the launches; what it hides: the time of two
sums a layer, or nearly. So it takes many tokens. Not yet run on two GPUs: it has to be asked for, and the number of
tokens from which it is done is a guess.
"""

from __future__ import annotations

from collections.abc import Callable

from multitensor.parallel.group import Group

RowCut = Callable[[int], tuple[int, ...]]  # tokens of a step -> sizes of its parts, each above 0

OVERLAP_TOKENS = 1024
_ALIGNMENT = 128  # rows that a tile of cuBLAS's products has


def uncut(tokens: int) -> tuple[int, ...]:
    return (tokens,)


def halves(tokens: int) -> tuple[int, ...]:
    """Two halves, the first of whole tiles, where there are enough tokens."""
    if tokens < OVERLAP_TOKENS:
        return (tokens,)
    first = -(-tokens // (2 * _ALIGNMENT)) * _ALIGNMENT
    return (first, tokens - first)


def row_cut(group: Group, *, wanted: bool) -> RowCut:
    """How the steps of a rank of this group are cut. wanted: as EngineConfig.overlap."""
    return halves if wanted and group.size > 1 and group.overlaps else uncut
