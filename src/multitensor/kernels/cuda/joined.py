"""Float matrices that take the same activations, one behind the other in memory: one product instead of several."""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping, Sequence
from dataclasses import replace

import torch

from multitensor.kernels.quant_tensor import QuantTensor


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
