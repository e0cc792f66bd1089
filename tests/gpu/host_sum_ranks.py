"""Large sums through the host's memory, in a process that may be lost: run by test_host_sums.py.

    host_sum_ranks.py together RANKS WIRE MATHS  all ranks on one GPU, with lanes and mailboxes of their own; MATHS:
                                                 "kernels" or "torch"
    host_sum_ranks.py rank R SIZE STORE WIRE     rank R of SIZE, a GPU each, through the real group
    host_sum_ranks.py dies R SIZE STORE          the same; the last rank leaves after a few sums

Prints one line of JSON: {"wrong": [...], "digest": of all results, ...}.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from typing import Any, cast

os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "32"  # streams that share a queue would wait for each other

import torch

from multitensor.kernels.cuda.chunks import ChunkKernels
from multitensor.kernels.cuda.flags import Flags
from multitensor.parallel.cuda_lanes import CudaLanes
from multitensor.parallel.host_memory import HostMemory, _lock, section_bytes
from multitensor.parallel.large_sums import LargeSums
from multitensor.parallel.shared_region import SharedRegion
from multitensor.parallel.wire import TorchMath, WireName
from multitensor.sharding.memory import HOST_CHUNK_BYTES, HOST_SLOTS, MIB

NBYTES = 2 * HOST_SLOTS * HOST_CHUNK_BYTES + MIB
LIMIT_MS = 10000
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Numbers, bytes of a chunk: one number; less than a chunk; many chunks with a rest; a step of 2,048 rows of 8,192.
CASES = ((1, MIB), (1000, MIB), (700_001, MIB // 8), (3_000_000, MIB), (2048 * 8192, HOST_CHUNK_BYTES))


def parts_of(size: int, count: int, dtype: torch.dtype, seed: int, device: torch.device) -> list[torch.Tensor]:
    random = torch.Generator(device).manual_seed(seed)
    return [torch.randn(count, generator=random, device=device).mul_(3).to(dtype) for _ in range(size)]


def wrong(found: torch.Tensor, parts: list[torch.Tensor], wire: WireName) -> str | None:
    total = parts[0].float()
    for part in parts[1:]:
        total = total + part.float()
    error = float((found.float() - total).abs().max())
    if wire == "exact" or found.dtype == torch.float32:
        return None if torch.equal(found, total.to(found.dtype)) else f"{found.numel()} {found.dtype}: off by {error}"
    largest = max(float(part.abs().max()) for part in [*parts, total])
    limit = (len(parts) + 1) * largest / 254 * 1.01 + torch.finfo(found.dtype).eps * largest
    return None if error <= limit else f"{found.numel()} {found.dtype}: off by {error}, more than {limit}"


def digest(results: list[torch.Tensor]) -> str:
    hashed = hashlib.sha256()
    for result in results:
        hashed.update(result.view(torch.uint8).cpu().numpy().tobytes())
    return hashed.hexdigest()


def together(size: int, wire: WireName, maths: str) -> dict[str, Any]:
    device = torch.device("cuda:0")
    torch.cuda.set_device(device)
    torch.zeros(1, device=device)
    region = SharedRegion.create("test", size * section_bytes(NBYTES))
    address = _lock(region.address, region.size)
    memories = [HostMemory(rank, size, region, address, device) for rank in range(size)]
    lanes = [CudaLanes(memory) for memory in memories]
    sums = [
        LargeSums(lane, memory, slots=HOST_SLOTS, slot_bytes=HOST_CHUNK_BYTES, wire=wire)
        for lane, memory in zip(lanes, memories, strict=True)
    ]
    kernels = ChunkKernels(size, device)
    for lane, own in zip(lanes, sums, strict=True):
        lane.place_flags(own.flags)
        own.math = kernels if maths == "kernels" else TorchMath()
    results: list[list[torch.Tensor]] = [[] for _ in range(size)]
    found: list[str] = []
    for warm in (True, False):
        # First with waits that give up at once: loads every kernel, which else might wait for those that run.
        for lane in lanes:
            lane.flags.limit_ms = -1 if warm else LIMIT_MS
        for number, (count, chunk) in enumerate(CASES[:-1] * 2):
            dtype = DTYPES[number % 3]
            parts = parts_of(size, count, dtype, number, device)
            copies = [part.clone() for part in parts]
            for rank in range(size):
                with torch.cuda.stream(torch.cuda.Stream(device)):
                    torch.cuda.current_stream().wait_stream(torch.cuda.default_stream(device))
                    if not warm and number % size == rank:
                        torch.cuda._sleep(3_000_000)
                    sums[rank].all_reduce(copies[rank], chunk)
            torch.cuda.synchronize()
            if not warm:
                found += filter(None, [wrong(x, parts, wire) for x in copies])
                for rank, x in enumerate(copies):
                    results[rank].append(x)
    digests = {digest(kept) for kept in results}
    return {
        "wrong": found + ([] if len(digests) == 1 else ["ranks differ"]),
        "late": [lane.flags.late for lane in lanes],
    }


def one_of(rank: int, size: int, store: str, wire: WireName) -> dict[str, Any]:
    from multitensor.kernels.dispatch import make_kernels
    from multitensor.parallel.large_choice import LargeChoice
    from multitensor.parallel.torch_group import TorchGroup, make_torch_group

    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    group = cast(TorchGroup, make_torch_group(rank, size, device, store, p2p=False))
    group.kernels = make_kernels(device, exact=False)
    group.open_peer_memory(MIB)
    group.open_host_memory(NBYTES + 64 * MIB)
    began = time.monotonic()
    group.choose_reductions(8192, [4096] * size, torch.float16, wire)
    seconds = time.monotonic() - began
    told = {"seconds": seconds, "why": group.no_host_memory, "reductions": group.describe_reductions()}
    choice = group._large
    if not isinstance(choice, LargeChoice):
        return {**told, "wrong": [f"not tried: {choice}"], "digest": ""}
    results: list[torch.Tensor] = []
    found: list[str] = []
    other = torch.randn(4096, 4096, device=device, dtype=torch.float16)
    for number, (count, chunk) in enumerate(CASES * 3):
        parts = parts_of(size, count, DTYPES[number % 3], number, torch.device("cuda", rank))
        x = parts[rank].clone()
        if number % 4 == rank:
            torch.cuda._sleep(5_000_000)
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):  # as with --overlap: the sum beside products
            choice.all_reduce(x, chunk)
        for _ in range(8):
            torch.mm(other, other)
        torch.cuda.current_stream(device).wait_stream(side)
        found += filter(None, [wrong(x, parts, wire)])
        results.append(x.cpu())
    group.barrier()
    answer = {**told, "wrong": found, "digest": digest(results)}
    group.close()
    return answer


def dies(rank: int, size: int, store: str) -> dict[str, Any]:
    """The last rank leaves; the others' waits must fail, within their limit, rather than hang."""
    from multitensor.parallel.host_memory import open_host_memory
    from multitensor.parallel.torch_group import TorchGroup, make_torch_group

    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    group = cast(TorchGroup, make_torch_group(rank, size, device, store, p2p=False))
    memory = open_host_memory(rank, size, device, NBYTES, group.gather_objects)
    if isinstance(memory, str):
        return {"error": None, "why": memory}
    lanes = CudaLanes(memory)
    flags: Flags = lanes.flags
    flags.limit_ms = 1000
    sums = LargeSums(lanes, memory, slots=HOST_SLOTS, slot_bytes=HOST_CHUNK_BYTES)
    lanes.place_flags(sums.flags)
    group.barrier()
    x = torch.ones(100_000, device=device)
    sums.all_reduce(x)
    torch.cuda.synchronize(device)
    group.gather_objects(None)
    if rank == size - 1:
        return {"error": "left", "seconds": 0.0}
    began = time.monotonic()
    try:
        sums.all_reduce(x)
        torch.cuda.synchronize(device)
    except RuntimeError as error:
        return {"error": str(error).splitlines()[0], "seconds": time.monotonic() - began}
    return {"error": None, "seconds": time.monotonic() - began}


if __name__ == "__main__":
    with torch.inference_mode():
        if sys.argv[1] == "together":
            result = together(int(sys.argv[2]), cast(WireName, sys.argv[3]), sys.argv[4])
        elif sys.argv[1] == "dies":
            result = dies(int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
        else:
            result = one_of(int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], cast(WireName, sys.argv[5]))
    sys.stdout.write(json.dumps(result) + "\n")
    sys.stdout.flush()
    os._exit(0)
