"""Matrices that stay on disk and pass the device a few rows at a time: a whole model where only a slice fits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from multitensor.formats.checkpoint import Checkpoint
from multitensor.kernels import reference
from multitensor.kernels.dispatch import Kernels
from multitensor.kernels.quant_tensor import QuantTensor
from multitensor.loading.loader import Weight, load_tensors
from multitensor.sharding.plan import Plan, Slice, TensorPlan

CHUNK_BYTES = 64 << 20


@dataclass(frozen=True)
class StreamedTensor(QuantTensor):
    """A whole matrix without planes; only StreamingKernels can compute with it."""

    source: TensorPlan | None = None


class StreamingKernels(Kernels):
    """Plain torch in float32 whose matrices are StreamedTensors. Slow: every use reads the file."""

    def __init__(self, device: torch.device, checkpoint: Checkpoint) -> None:
        super().__init__(device, exact=True)
        self.checkpoint = checkpoint

    def linear(self, x: torch.Tensor, w: QuantTensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        out = torch.empty((*x.shape[:-1], w.rows), dtype=x.dtype, device=x.device)
        for rows, part in whole_rows(self.checkpoint, _source(w), Slice(0, w.rows), self.device):
            out[..., rows.start : rows.stop] = reference.linear(x, part)
        return out if bias is None else out + bias

    def embedding(self, ids: torch.Tensor, w: QuantTensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        needed, places = torch.unique(ids, return_inverse=True)
        source = _source(w)
        wanted = tuple(Slice(row, row + 1) for row in needed.tolist())
        part = load_tensors(self.checkpoint, [(source, wanted)], self.device, 0.0)[source.name]
        if not isinstance(part, QuantTensor):
            raise TypeError(f"{source.name} is no matrix")
        return reference.embedding(places, part, dtype)


def _source(w: QuantTensor) -> TensorPlan:
    if not isinstance(w, StreamedTensor) or w.source is None:
        raise TypeError("streaming kernels compute with streamed matrices only")
    return w.source


def stream_weights(checkpoint: Checkpoint, whole: Plan, device: torch.device) -> dict[str, Weight]:
    """Weights for a decoder on StreamingKernels: vectors on the device, matrices on disk. whole: a plan of one rank."""
    vectors = [t for t in whole.tensors.values() if len(t.decl.info.shape) == 1]
    weights = load_tensors(checkpoint, [(t, t.slices[0]) for t in vectors], device, whole.spec.norm_offset)
    for tensor in whole.tensors.values():
        if tensor.name not in weights:
            info = tensor.decl.info
            weights[tensor.name] = StreamedTensor(info.type, info.shape[0], info.shape[1], {}, source=tensor)
    return weights


def whole_rows(
    checkpoint: Checkpoint, tensor: TensorPlan, rows: Slice, device: torch.device
) -> Iterator[tuple[Slice, QuantTensor]]:
    """The rows of a matrix with all their columns, a bounded number at a time, as (rows, slice of the matrix)."""
    uncut = TensorPlan(tensor.decl, 0, ())
    step = max(1, CHUNK_BYTES // tensor.decl.info.type.resident_bytes(1, 0, tensor.decl.info.shape[-1]))
    for start in range(rows.start, rows.stop, step):
        part = Slice(start, min(start + step, rows.stop))
        loaded = load_tensors(checkpoint, [(uncut, (part,))], device, 0.0)[tensor.name]
        if not isinstance(loaded, QuantTensor):
            raise TypeError(f"{tensor.name} is no matrix")
        yield part, loaded
