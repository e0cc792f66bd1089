"""Ranks on GPUs: torch.distributed with NCCL, or gloo (through host memory) where this torch has no NCCL; small sums
over the GPUs' view of each other's memory, where that works and is faster (peer_reductions.py).

NCCL gives all ranks of one reduction the same bits (its rings and trees compute each element once and hand it on), in
an order of its own. NVLink multicast stays off: it reduces inside the switch, and is not available everywhere.
"""

from __future__ import annotations

import base64
import os
import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from multitensor.errors import InputError
from multitensor.kernels.cuda.reduce import PeerReduction
from multitensor.parallel.group import Group, SingleGroup, check_gather, wire_dtype
from multitensor.parallel.host_memory import open_host_memory
from multitensor.parallel.large_choice import LargeChoice, make_large_choice
from multitensor.parallel.peer_memory import PeerMemory, open_peer_memory
from multitensor.parallel.peer_probe import PeerProbe
from multitensor.parallel.peer_reductions import PeerReductions, make_peer_reductions
from multitensor.parallel.reduction import Reduction
from multitensor.parallel.wire import WireName

_LOADING = timedelta(hours=24)  # ranks may load for very different times; the engine, not a timeout, ends the hopeless
_NOT_ASKED = "not asked for"
_MAPPING = timedelta(seconds=60)  # for mapping peers' memory, after which a rank that failed at it is not waited for


def make_torch_group(
    rank: int,
    size: int,
    device: torch.device,
    store_path: str,
    backend: str | None = None,
    p2p: bool | None = None,
) -> Group:
    """The group of this process's device. store_path: a file that all ranks open, empty at first (a memfd's /proc path
    will do, so that no file is left behind). backend: "nccl" or "gloo"; None: NCCL if this torch has it. p2p: whether
    GPUs use each other's memory; None: where that works. With one rank a SingleGroup."""
    if size == 1:
        return SingleGroup()
    if not dist.is_available():
        raise InputError("this build of torch has no torch.distributed; several CUDA ranks need it")
    chosen = backend or ("nccl" if device.type == "cuda" and dist.is_nccl_available() else "gloo")
    return TorchGroup(rank, size, device, store_path, chosen, p2p)


class TorchGroup(Group):
    """Uses the process's default torch.distributed group, so there can be one at a time in a process."""

    def __init__(
        self, rank: int, size: int, device: torch.device, store_path: str, backend: str, p2p: bool | None = None
    ) -> None:
        self.rank = rank
        self.size = size
        self.device = device
        self.backend = backend
        self._p2p = p2p
        self._probe: PeerProbe | None = None
        self._peers: PeerReductions | str = _NOT_ASKED
        self._large: LargeChoice | str = _NOT_ASKED
        self._side: torch.cuda.Stream | None = None
        self.overlaps = backend == "nccl"
        os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
        if p2p is False:
            os.environ["NCCL_P2P_DISABLE"] = "1"
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
        if backend == "nccl" and p2p is not False:
            uuids = self.gather_objects(str(getattr(torch.cuda.get_device_properties(device), "uuid", "")))
            self._probe = PeerProbe([str(uuid) for uuid in uuids]) if rank == 0 else None

    def open_peer_memory(self, nbytes: int) -> None:
        found = self._open_peer_memory(nbytes) if self.peer_memory is None else self.peer_memory
        if isinstance(found, str):
            self.no_peer_memory = found
            if self._p2p:
                raise InputError(f"peer-to-peer access was demanded, but {found}; leave the demand out to use NCCL")
        else:
            self.peer_memory = found

    def _open_peer_memory(self, nbytes: int) -> PeerMemory | str:
        if self._p2p is False:
            return "peer-to-peer access is forbidden by --no-p2p"
        if self.backend != "nccl":
            return f"the ranks talk through {self.backend}"
        reason = self.gather_objects(self._probe.reason() if self._probe else None)[0]
        if reason is not None:
            return str(reason)
        world, share = dist.group.WORLD, self.gather_objects
        return open_peer_memory(self.rank, self.device, nbytes, world, share, self._impatient())

    def open_host_memory(self, nbytes: int) -> None:
        if self.host_memory is not None:
            return
        if self.peer_memory is not None:
            self.no_host_memory = "the GPUs reach each other's memory"
        elif self.backend != "nccl":
            self.no_host_memory = f"the ranks talk through {self.backend}"
        else:
            found = open_host_memory(self.rank, self.size, self.device, nbytes, self.gather_objects)
            if isinstance(found, str):
                self.no_host_memory = found
            else:
                self.host_memory = found

    @contextmanager
    def _impatient(self) -> Iterator[None]:
        """Within, the store is waited for a minute at most."""
        self._store.set_timeout(_MAPPING)
        try:
            yield
        finally:
            self._store.set_timeout(_LOADING)

    def choose_reductions(
        self, hidden: int, vocabulary: Sequence[int], dtype: torch.dtype, wire: WireName = "exact"
    ) -> None:
        self._peers = make_peer_reductions(self, hidden, vocabulary, dtype)
        self._large = make_large_choice(self, hidden, dtype, wire)

    def fuses(self, partial: torch.Tensor, residual: torch.Tensor) -> bool:
        return self._peers_for(partial, residual) is not None

    def describe_reductions(self) -> dict[str, Any]:
        name = "NCCL" if self.backend == "nccl" else self.backend
        large: dict[str, Any] = {"large": name, "large_why": None, "large_microseconds": {}}
        if not isinstance(self._large, str):
            large |= self._large.describe(name)
        elif self.host_memory is not None:
            large["large_why"] = self._large
        return {**self._describe_small(name), **large}

    def _describe_small(self, name: str) -> dict[str, Any]:
        if not isinstance(self._peers, str) and self.host_memory is None:
            return self._peers.describe(name)
        told: dict[str, Any] = {"small": name, "why": self._peers, "warning": None, "microseconds": {}}
        if not isinstance(self._peers, str):
            told = self._peers.describe(name)
            told["why"] = self.no_peer_memory + (f"; {told['why']}" if told["why"] else "")
        elif self.peer_memory is None and name == "NCCL" and self._peers != _NOT_ASKED:
            told["why"] = f"{self._peers}; {self.no_host_memory}"
        if self._p2p is None and name == "NCCL" and self._peers != _NOT_ASKED:
            told["warning"] = f"GPUs do not use each other's memory, sums take {told['small']} instead: {told['why']}"
        return told

    def reduce_add_norm(
        self,
        partial: torch.Tensor,
        residual: torch.Tensor,
        norm_weight: torch.Tensor,
        eps: float,
        post_norm_weight: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        partial = partial.contiguous()  # or one rank might find it unfit, alone
        peers = self._peers_for(partial, residual)
        if peers is None:
            return super().reduce_add_norm(partial, residual, norm_weight, eps, post_norm_weight)
        out = torch.empty_like(partial)
        peers.reduce_add_norm(partial, residual, norm_weight, eps, out, post_weight=post_norm_weight)
        return out, residual

    def start_reduce_add_norm(
        self,
        partial: torch.Tensor,
        residual: torch.Tensor,
        norm_weight: torch.Tensor,
        eps: float,
        post_norm_weight: torch.Tensor | None = None,
    ) -> Reduction:
        """Large sums travel on a stream of their own, whose few blocks go before those of the products beside them. The
        host waits for nothing: the streams wait for each other's events. Not yet run on two GPUs."""
        partial = partial.contiguous()
        if not self.overlaps or self._peers_for(partial, residual) is not None:
            return super().start_reduce_add_norm(partial, residual, norm_weight, eps, post_norm_weight)
        if self._side is None:
            self._side = torch.cuda.Stream(self.device, priority=-1)
        self._side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._side):
            total = self.all_reduce(partial)
            summed = self._side.record_event()

        def finish() -> torch.Tensor:
            torch.cuda.current_stream(self.device).wait_event(summed)
            return self.kernels.add_rms_norm(total, residual, norm_weight, eps, post_weight=post_norm_weight)[0]

        return Reduction(partial, residual, finish)

    def reduce_add_norm_into(
        self,
        partial: torch.Tensor,
        residual: torch.Tensor,
        norm_weight: torch.Tensor,
        eps: float,
        out: torch.Tensor,
        post_norm_weight: torch.Tensor | None = None,
    ) -> None:
        partial = partial.contiguous()
        peers = self._peers_for(partial, residual)
        if peers is None:
            super().reduce_add_norm_into(partial, residual, norm_weight, eps, out, post_norm_weight)
        else:
            peers.reduce_add_norm(partial, residual, norm_weight, eps, out, post_weight=post_norm_weight)

    def _peers_for(self, partial: torch.Tensor, residual: torch.Tensor) -> PeerReduction | None:
        return None if isinstance(self._peers, str) else self._peers.reduction(partial, residual)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """NCCL: in x's own type, in place; large ones through the host's memory, where that has been chosen. gloo:
        every rank adds all parts in rank order, in float32."""
        if x.numel() == 0:
            return x
        if self.backend == "nccl":
            x = x.contiguous()
            chunk = None if isinstance(self._large, str) else self._large.chunk_for(x)
            if isinstance(self._large, str) or chunk is None or torch.cuda.is_current_stream_capturing():
                dist.all_reduce(x)
                return x
            return self._large.all_reduce(x, chunk)
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
        """Through NCCL or gloo padded to the widest part: they move equal sizes."""
        check_gather(x, sizes, self.rank, self.size)
        gathered = None if isinstance(self._peers, str) else self._peers.gather(x.contiguous(), sizes)
        if gathered is not None:
            return gathered
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
            self._peers, self._large, self.peer_memory = "the group is closed", "the group is closed", None
            if self.host_memory is not None:
                torch.cuda.synchronize(self.device)
                self.host_memory.close()
                self.host_memory = None
            dist.destroy_process_group()
