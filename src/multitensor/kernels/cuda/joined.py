"""Matrices that take the same activations, one behind the other in memory: of floats, one product instead of several;
in tiles, one expansion."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from dataclasses import replace

import torch

from multitensor.kernels.cuda.tiles import ROWS, TiledTensor
from multitensor.kernels.quant_tensor import QuantTensor


def join_tiles(weights: MutableMapping[str, QuantTensor | torch.Tensor], groups: Iterable[Sequence[str]]) -> None:
    """Moves the tiles of neighbours in each group of names next to each other, in place, where `run_on` lets them be
    one matrix: the tensors become views of one. Only one group is in memory twice."""
    for names in groups:
        tiled = {name: w for name in names if isinstance(w := weights.get(name), TiledTensor)}
        for run in _runs(tiled):
            whole = torch.cat([tiled[name].tiles for name in run])
            parts = whole.split([tiled[name].tiles.shape[0] for name in run])
            for name, tiles in zip(run, parts, strict=True):
                weights[name] = replace(tiled.pop(name), planes={"tiles": tiles})
            if whole.is_cuda:
                torch.cuda.empty_cache()


def _runs(tiled: Mapping[str, TiledTensor]) -> list[list[str]]:
    """Names of two and more neighbours that can be one matrix."""
    runs: list[list[str]] = []
    for name, w in tiled.items():
        if runs and run_on(tiled[runs[-1][-1]], w):
            runs[-1].append(name)
        else:
            runs.append([name])
    return [run for run in runs if len(run) > 1]


def run_on(first: TiledTensor, second: TiledTensor) -> bool:
    """Whether the second one's rows could follow the first one's as if both were one matrix."""
    alike = first.type.name == second.type.name and first.cols == second.cols and first.phase == second.phase
    return alike and first.rows % ROWS == 0


def tile_runs(weights: Sequence[TiledTensor]) -> list[tuple[TiledTensor, int]]:
    """The matrices, with those whose tiles do follow one another as one: (the first of them, rows of all)."""
    runs: list[tuple[TiledTensor, int]] = []
    last, end = weights[0], -1
    for w in weights:
        at = w.tiles.data_ptr()
        if at == end and run_on(last, w):
            runs[-1] = (runs[-1][0], runs[-1][1] + w.rows)
        else:
            runs.append((w, w.rows))
        last, end = w, at + w.tiles.numel()
    return runs


def join_planes(weights: MutableMapping[str, QuantTensor | torch.Tensor], groups: Iterable[Sequence[str]]) -> None:
    """Moves the float planes of each group of names next to each other, in place: the tensors become views of one.

    A group of which something is missing, quantised, or of another type or width is left as it is. The old planes'
    memory goes back to the device group by group, so that only one group is there twice.
    """
    for names in groups:
        found = [w for w in map(weights.get, names) if isinstance(w, QuantTensor) and "weight" in w.planes]
        if len(found) < len(names) or len({(w.planes["weight"].dtype, w.cols) for w in found}) != 1:
            continue
        whole = torch.cat([w.planes["weight"] for w in found])
        for name, w, plane in zip(names, found, whole.split([w.rows for w in found]), strict=True):
            weights[name] = replace(w, planes={"weight": plane})
        found.clear()
        del w
        if whole.is_cuda:
            torch.cuda.empty_cache()


def joined_plane(weights: Sequence[QuantTensor]) -> torch.Tensor | None:
    """[all rows, cols] where the weights' planes lie one behind the other, in this order; else None."""
    planes = [w.planes.get("weight") for w in weights]
    first = planes[0]
    if first is None or not first.is_contiguous():
        return None
    end = first.data_ptr()
    for plane in planes:
        alike = plane is not None and plane.dtype == first.dtype and plane.shape[1] == first.shape[1]
        if plane is None or not alike or plane.data_ptr() != end or not plane.is_contiguous():
            return None
        end += plane.numel() * plane.element_size()
    storage = first.untyped_storage()
    if end > storage.data_ptr() + storage.nbytes():
        return None  # neighbours by chance, in allocations of their own
    return first.as_strided((sum(w.rows for w in weights), first.shape[1]), (first.shape[1], 1))
