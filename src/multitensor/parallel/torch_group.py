"""Ranks on GPUs: torch.distributed with NCCL, or gloo (through host memory) where this torch has no NCCL.

NCCL gives all ranks of one reduction the same bits (its rings and trees compute each element once and hand it on), in
an order of its own. NVLink multicast stays off: it reduces inside the switch, and is not available everywhere.
"""

from __future__ import annotations

import base64
import os
import pickle
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

from multitensor.errors import InputError
from multitensor.parallel.group import Group, SingleGroup, check_gather, wire_dtype

_LOADING = timedelta(hours=24)  # ranks may load for very different times; the engine, not a timeout, ends the hopeless


def make_torch_group(rank: int, size: int, device: torch.device, store_path: str, backend: str | None = None) -> Group:
    """The group of this process's device. store_path: a file that all ranks open, empty at first (a memfd's /proc path
    will do, so that no file is left behind). backend: "nccl" or "gloo"; None: NCCL if this torch has it. With one rank
    a SingleGroup."""
    if size == 1:
        return SingleGroup()
    if not dist.is_available():
        raise InputError("this build of torch has no torch.distributed; several CUDA ranks need it")
    chosen = backend or ("nccl" if device.type == "cuda" and dist.is_nccl_available() else "gloo")
    return TorchGroup(rank, size, device, store_path, chosen)


class TorchGroup(Group):
    """Uses the process's default torch.distributed group, so there can be one at a time in a process."""

    def __init__(self, rank: int, size: int, device: torch.device, store_path: str, backend: str) -> None:
        self.rank = rank
        self.size = size
        self.device = device
        self.backend = backend
        os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
        # A collective that fails ends this process, whose end the engine sees, instead of leaving it waiting.
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")
        os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "0")
        self._store = dist.FileStore(store_path, size)
        self._store.set_timeout(_LOADING)
        self._gathers = 0
        dist.init_process_group(
            backend,
            store=dist.PrefixStore("group", self._store),
            rank=rank,
            world_size=size,
            timeout=_LOADING,
            device_id=device if backend == "nccl" else None,
        )
        self._open = True

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """NCCL: in x's own type, in place. gloo: every rank adds all parts in rank order, in float32."""
        if x.numel() == 0:
            return x
        if self.backend == "nccl":
            x = x.contiguous()
            dist.all_reduce(x)
            return x
        parts = self._gather_equal(x.to("cpu", wire_dtype(x.dtype)))
        total = parts[0]
        for part in parts[1:]:
            total += part
        return total.to(x.device, x.dtype)

    def _gather_equal(self, x: torch.Tensor) -> list[torch.Tensor]:
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(self.size)]
        dist.all_gather(parts, x.contiguous())
        return parts

    def all_gather_last(self, x: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        """Padded to the widest part: collectives move equal sizes."""
        check_gather(x, sizes, self.rank, self.size)
        tokens, widest = x.shape[0], max(sizes)
        if tokens == 0 or widest == 0:
            return x.new_empty((tokens, sum(sizes)))
        place = x.device if self.backend == "nccl" else torch.device("cpu")
        padded = torch.zeros((tokens, widest), dtype=x.dtype, device=place)
        padded[:, : x.shape[1]] = x
        if self.backend == "nccl":
            everything = torch.empty((self.size, tokens, widest), dtype=x.dtype, device=place)
            dist.all_gather_into_tensor(everything, padded)
            parts = list(everything)
        else:
            parts = self._gather_equal(padded)
        return torch.cat([part[:, :size] for part, size in zip(parts, sizes, strict=True)], dim=1).to(x.device)

    def gather_objects(self, value: object) -> list[object]:
        """Through the store, so that no device memory is touched."""
        self._gathers += 1
        text = base64.b64encode(pickle.dumps(value)).decode()
        self._store.set(f"objects/{self._gathers}/{self.rank}", text)
        # Written by our own ranks: unpickling gives nobody new rights.
        texts = [self._store.get(f"objects/{self._gathers}/{r}") for r in range(self.size)]
        return [pickle.loads(base64.b64decode(text)) for text in texts]

    def barrier(self) -> None:
        self.all_reduce(torch.zeros(1, device=self.device if self.backend == "nccl" else "cpu"))
        if self.backend == "nccl":
            torch.cuda.synchronize(self.device)

    def close(self) -> None:
        if self._open:
            self._open = False
            dist.destroy_process_group()
