"""Ranks that sum and gather through each other's memory, in a process that may be lost: run by test_peer_kernels.py.

    peer_ranks.py together RANKS [mailbox]      all ranks on one GPU, each with a stream and buffers of its own
    peer_ranks.py alone                         one rank of two, whose peer never comes: has to end with an error
    peer_ranks.py lonely                        the same with mailboxes, on trial: has to give up and say so
    peer_ranks.py rank R SIZE STORE [mailbox]   rank R of SIZE, a GPU each, through the real group

mailbox: as through the host's memory; together, the mailboxes lie on the GPU.

Prints one line of JSON: {"errors": {what: largest}, "wrong": [...], "digest": of all results, ...}.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "32"  # streams that share a queue would wait for each other

import torch

from multitensor.kernels.cuda.reduce import PeerGather, PeerReduction
from multitensor.parallel.peer_memory import PeerMemory
from multitensor.parallel.rank_memory import NOTHING, RankMemory

EPS = 1e-5
LIMIT_MS = 20000  # by the clock, so what other processes take of the GPU counts too
AT_ONCE = 50  # launches that are queued before anything is waited for
GATE_CYCLES = 30_000_000  # some 20 ms, in which one process queues what all the ranks do at once
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
TOKENS = (1, 1, 2, 3, 4, 7, 8, 16, 33, 64)


class Rank:
    """One rank's end: its memory, its kernels by blocks a token, its stream."""

    def __init__(self, memory: RankMemory, hidden: int, tokens: int, sizes: tuple[int, ...], mailbox: bool) -> None:
        device = memory.device
        self.number, self.stream = memory.rank, torch.cuda.Stream(device)
        place = memory.table(memory.carve(PeerReduction.nbytes(memory.size, hidden, tokens, mailbox=mailbox)))
        whole = PeerReduction(place, memory.rank, hidden, tokens, mailbox=mailbox)
        whole.limit_ms = LIMIT_MS
        many = (2, 4, 8) if torch.cuda.get_device_capability(device) >= (9, 0) else ()
        self.reductions = [whole, *(whole.split(parts) for parts in many)]
        place = memory.table(memory.carve(PeerGather.nbytes(sizes, 8, mailbox=mailbox)))
        self.gather = PeerGather(place, memory.rank, sizes, 8, mailbox=mailbox)
        self.gather.limit_ms = LIMIT_MS


def load_everything(ranks: list[Rank]) -> None:
    """Loads every kernel, once for all ranks: the first launch of one may wait for the GPU to be idle, which it is not
    while another rank's kernel waits for this one. Words that are all there already let a lone rank through."""
    torch.cuda._sleep(1)
    first = ranks[0]
    for rank in ranks[1:]:
        rank.gather._kernel = first.gather._kernel
        for own, shared in zip(rank.reductions, first.reductions, strict=True):
            own._programs = shared._programs
    model, gather = first.reductions[0], first.gather
    size, hidden, tokens, device = model.ranks, model.hidden, model.tokens, model.device
    mailbox = model.mailbox
    sums = PeerReduction.nbytes(size, hidden, tokens, mailbox=mailbox)
    nbytes = max(sums, PeerGather.nbytes(gather.sizes, 1, mailbox=mailbox))
    for dtype in DTYPES:
        for partial in {dtype, torch.float32}:
            for reduction in first.reductions:
                words = torch.zeros(nbytes // 4, device=device)
                places = torch.tensor([words.data_ptr()] * size).to(device)
                lone = PeerReduction(places, 0, hidden, tokens, parts=reduction.parts, mailbox=mailbox)
                lone._programs, lone.limit_ms = reduction._programs, LIMIT_MS
                x, weight = torch.zeros(1, hidden, device=device), torch.zeros(hidden, device=device)
                part, out = torch.zeros_like(x, dtype=partial), torch.zeros_like(x, dtype=dtype)
                lone.reduce_add_norm(part, x, weight, EPS, out, post_weight=weight)
                torch.cuda.synchronize()
    words = torch.zeros(nbytes // 4, device=device)
    lonely = PeerGather(torch.tensor([words.data_ptr()] * size).to(device), 0, gather.sizes, 1, mailbox=mailbox)
    lonely._kernel, lonely.limit_ms = gather._kernel, LIMIT_MS
    lonely.gather(torch.zeros(1, gather.sizes[0], device=device), torch.zeros(1, gather.columns, device=device))
    torch.cuda.synchronize()


class Report:
    """What was found. Numbers stay on the device until `settle`: a GPU that others use too answers seldom."""

    def __init__(self) -> None:
        self.errors: dict[str, float] = {}
        self.wrong: list[str] = []
        self.hash = hashlib.sha256()
        self._open: list[tuple[str, str, float, torch.Tensor]] = []  # what, of which launch, limit, error
        self._kept: list[torch.Tensor] = []

    def compare(self, what: str, case: str, found: torch.Tensor, wanted: torch.Tensor, limit: float) -> None:
        self._open.append((what, case, limit, (found.double() - wanted).norm() / wanted.norm()))

    def equal(self, what: str, case: str, found: torch.Tensor, wanted: torch.Tensor) -> None:
        self._open.append((f"{what}: numbers that differ", case, 0.0, (found != wanted).sum().double()))

    def keep(self, result: torch.Tensor) -> None:
        self._kept.append(result.contiguous().view(torch.uint8).flatten())

    def settle(self) -> None:
        if self._open:
            errors = torch.stack([error for *_, error in self._open]).tolist()
            for (what, case, limit, _), error in zip(self._open, errors, strict=True):
                self.errors[what] = max(self.errors.get(what, 0.0), error)
                if not error <= limit:
                    self.wrong.append(f"{what} {error:.2e}, {case}")
        if self._kept:
            self.hash.update(torch.cat(self._kept).cpu().numpy().tobytes())
        self._open, self._kept = [], []

    def told(self) -> dict[str, Any]:
        self.settle()
        return {"errors": self.errors, "wrong": self.wrong, "digest": self.hash.hexdigest()}


def stage(what: str) -> None:
    """Where a process that ends early was."""
    sys.stderr.write(f"{what}\n")
    sys.stderr.flush()


class Sum:
    """A launch's inputs, the same for whoever makes them of the same seed, and its results by rank."""

    def __init__(self, seed: int, ranks: list[Rank], size: int, most: int) -> None:
        hidden = ranks[0].reductions[0].hidden
        device = ranks[0].reductions[0].device
        random = torch.Generator().manual_seed(seed)
        sizes = [tokens for tokens in TOKENS if tokens <= most]
        self.tokens = sizes[int(torch.randint(0, len(sizes), (1,), generator=random))]
        self.way = int(torch.randint(0, len(ranks[0].reductions), (1,), generator=random))
        self.post = bool(torch.randint(0, 2, (1,), generator=random))
        self.late = int(torch.randint(0, 8 * size, (1,), generator=random))  # a rank that sleeps first, often none
        self.dtype = DTYPES[seed % 3]
        kind = torch.float32 if seed % 2 else self.dtype
        self.case = f"launch {seed}: {self.tokens} tokens, way {self.way}, {kind} parts"
        shape = (self.tokens, hidden)
        made = torch.randn((size + 1, *shape), generator=random).to(device)
        self.parts = [part.to(kind, copy=True) for part in made[1:]]
        for part in self.parts:
            part[:, seed % 5 :: 7] = -0.0
        self.residual = 3 * made[0]
        self.weight, post = (1 + torch.rand(2, hidden, generator=random)).to(device)
        self.post_weight = post if self.post else None
        self.streams = {rank.number: self.residual.clone() for rank in ranks}
        self.outs = {rank.number: torch.full(shape, float("nan"), dtype=self.dtype, device=device) for rank in ranks}

    def launch(self, rank: Rank) -> None:
        if rank.number == self.late:
            torch.cuda._sleep(300_000)
        rank.reductions[self.way].reduce_add_norm(
            self.parts[rank.number],
            self.streams[rank.number],
            self.weight,
            EPS,
            self.outs[rank.number],
            post_weight=self.post_weight,
        )

    def check(self, report: Report) -> None:
        total = self.parts[0].float()
        for part in self.parts[1:]:
            total = total + part.float()
        wide = torch.stack([part.double() for part in self.parts]).sum(0)
        if self.post_weight is not None:
            wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS) * self.post_weight.double()
        wide = self.residual.double() + wide
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS) * self.weight.double()
        bound = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 2e-6}[self.dtype]
        for number in self.streams:
            report.compare(f"norm {self.dtype}", self.case, self.outs[number], normed, bound)
            report.compare("residual", self.case, self.streams[number], wide, 2e-6)
            if self.post_weight is None:  # the ranks' order of addition, to the last bit
                report.equal("order", self.case, self.streams[number], self.residual + total)
            report.equal("ranks agree", self.case, self.outs[number], next(iter(self.outs.values())))
        first = next(iter(self.streams))
        report.keep(self.streams[first])
        report.keep(self.outs[first])


class Gathered:
    """As Sum, of a gather."""

    def __init__(self, seed: int, ranks: list[Rank], size: int, most: int) -> None:
        gather = ranks[0].gather
        random = torch.Generator().manual_seed(seed)
        self.tokens = int(torch.randint(1, min(most, 8) + 1, (1,), generator=random))
        self.late = int(torch.randint(0, 8 * size, (1,), generator=random))
        self.case = f"gather {seed}: {self.tokens} tokens"
        columns = [torch.randn(self.tokens, n, generator=random).to(gather.device) for n in gather.sizes]
        for part in columns:
            part[:, ::11] = -0.0
        self.columns = columns
        shape = (self.tokens, gather.columns)
        self.outs = {rank.number: torch.full(shape, float("nan"), device=gather.device) for rank in ranks}

    def launch(self, rank: Rank) -> None:
        if rank.number == self.late:
            torch.cuda._sleep(300_000)
        rank.gather.gather(self.columns[rank.number], self.outs[rank.number])

    def check(self, report: Report) -> None:
        wanted = torch.cat(self.columns, dim=1)
        for out in self.outs.values():
            report.equal("gather", self.case, out, wanted)
        report.keep(next(iter(self.outs.values())))


def queue(ranks: list[Rank], work: Callable[[Rank], None]) -> None:
    """Runs `work` for every rank on its own stream, after everything before and before everything after. Several ranks
    begin when all of them have queued what they do: no kernel's patience hangs on how fast one process feeds them."""
    torch.cuda.synchronize()
    gate = torch.cuda.Event()
    if len(ranks) > 1:
        torch.cuda._sleep(GATE_CYCLES)
    gate.record()
    for rank in ranks:
        with torch.cuda.stream(rank.stream):
            rank.stream.wait_event(gate)
            work(rank)
    torch.cuda.synchronize()


def many(ranks: list[Rank], size: int, most: int, launches: int, report: Report) -> None:
    """Launch after launch with data, rows, types and blocks that change, sums and gathers mixed."""
    for first in range(0, launches, AT_ONCE):
        cases: list[Any] = [Sum(first + i, ranks, size, most) for i in range(AT_ONCE)]
        cases[3::7] = [Gathered(first + i, ranks, size, most) for i in range(len(cases[3::7]))]

        def work(rank: Rank, cases: list[Any] = cases) -> None:
            for case in cases:
                case.launch(rank)

        stage(f"rows of {ranks[0].reductions[0].hidden}: launches from {first} on")
        queue(ranks, work)
        for case in cases:
            case.check(report)
        report.settle()


def replayed(ranks: list[Rank], size: int, most: int, replays: int, report: Report) -> None:
    """The same through a CUDA graph a rank, whose addresses stay while data change. The number of sums in it is no
    multiple of the sets."""
    cases: list[Any] = [Sum(7000 + i, ranks, size, most) for i in range(5)]
    cases += [Gathered(8000, ranks, size, most), Sum(7005, ranks, size, most), Sum(7006, ranks, size, 1)]
    for case in cases:
        case.late = -1
    graphs: dict[int, torch.cuda.CUDAGraph] = {}

    def work(rank: Rank) -> None:
        for case in cases:
            case.launch(rank)

    queue(ranks, work)  # everything is compiled and loaded
    for rank in ranks:
        graphs[rank.number] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[rank.number], stream=rank.stream, capture_error_mode="thread_local"):
            work(rank)
    for replay in range(replays):
        for case in cases:
            if isinstance(case, Sum):
                for stream in case.streams.values():
                    stream.copy_(case.residual)
            for tensor in case.parts if isinstance(case, Sum) else case.columns:
                tensor.copy_(tensor.roll(1 + replay % 3, dims=-1))

        def replay_twice(rank: Rank) -> None:
            if (replay + rank.number) % 4 == 0:  # noqa: B023 - called at once
                torch.cuda._sleep(1_000_000)
            graphs[rank.number].replay()

        stage(f"rows of {ranks[0].reductions[0].hidden}: replay {replay}")
        queue(ranks, replay_twice)
        for case in cases:
            case.check(report)
        report.settle()


def together(size: int, mailbox: bool) -> dict[str, Any]:
    device = torch.device("cuda:0")
    torch.cuda.set_device(device)
    report = Report()
    # All ranks' blocks, and those of the launch after that start early, must be resident at once: else who waits keeps
    # out who is waited for.
    wide = {2: 8, 3: 2}.get(size, 1)
    for hidden, most in ((576, 8), (8192, wide)):
        sizes = (*(700 + 131 * r for r in range(size - 1)), 1)
        nbytes = PeerReduction.nbytes(size, hidden, 8) + PeerGather.nbytes(sizes, 8) + 1024
        nbytes += PeerGather.nbytes(sizes, 8, mailbox=True)
        buffers = [torch.full((nbytes // 4,), NOTHING, dtype=torch.int32, device=device) for _ in range(size)]
        addresses = tuple(buffer.data_ptr() for buffer in buffers)
        memories = [PeerMemory(r, buffers[r].view(torch.uint8), addresses) for r in range(size)]
        ranks = [Rank(memory, hidden, 8, sizes, mailbox) for memory in memories]
        stage(f"rows of {hidden}: loading kernels")
        load_everything(ranks)
        many(ranks, size, most, 300, report)
        replayed(ranks, size, most, 20, report)
    return report.told()


def alone(mailbox: bool) -> dict[str, Any]:
    """A launch whose peer never comes, within half a second; with mailboxes it is a trial, which only gives up."""
    device = torch.device("cuda:0")
    buffers = [torch.full((1 << 20,), NOTHING, dtype=torch.int32, device=device) for _ in range(2)]
    addresses = tuple(buffer.data_ptr() for buffer in buffers)
    rank = Rank(PeerMemory(0, buffers[0].view(torch.uint8), addresses), 576, 8, (64, 64), mailbox)
    rank.reductions[0].limit_ms = -500 if mailbox else 500
    case = Sum(2, [rank], 2, 1)
    case.way = 0
    torch.cuda.synchronize()
    began = time.monotonic()
    try:
        case.launch(rank)
        torch.cuda.synchronize()
    except RuntimeError as error:
        return {"seconds": time.monotonic() - began, "error": str(error).splitlines()[0]}
    return {"seconds": time.monotonic() - began, "error": None, "given_up": rank.reductions[0].given_up}


def one_of(rank: int, size: int, store: str, mailbox: bool) -> dict[str, Any]:
    from multitensor.kernels.dispatch import make_kernels
    from multitensor.parallel.torch_group import make_torch_group

    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    began = time.monotonic()
    group = make_torch_group(rank, size, device, store, p2p=False if mailbox else None)
    group.kernels = make_kernels(device, exact=False)
    made = time.monotonic()
    group.open_peer_memory(192 << 20)
    group.open_host_memory(128 << 20)
    times = {"group": made - began, "memory": time.monotonic() - made}
    report = Report()
    memory = group.host_memory if mailbox else group.peer_memory
    if memory is None:
        return {"why": group.no_host_memory if mailbox else group.no_peer_memory, "times": times}
    hidden, sizes = 8192, (64128, 64127, *[1] * (size - 2))
    ranks = [Rank(memory, hidden, 64, sizes, mailbox)]
    load_everything(ranks)
    group.barrier()
    many(ranks, size, 64, 1000, report)
    replayed(ranks, size, 64, 50, report)
    began = time.monotonic()
    group.choose_reductions(hidden, sizes, torch.float16)
    times["choice"] = time.monotonic() - began
    partial = torch.randn(2, hidden, device=device, generator=torch.Generator(device).manual_seed(rank))
    residual = torch.zeros(2, hidden, device=device)
    normed, residual = group.reduce_add_norm(partial, residual, torch.ones(hidden, device=device), EPS)
    report.compare("group", "two rows", residual, group.all_reduce(partial.clone()).double(), 2e-6)
    report.keep(normed)
    answer = {**report.told(), "times": times, "why": None, "reductions": group.describe_reductions()}
    group.close()
    return answer


if __name__ == "__main__":
    with torch.inference_mode():
        if sys.argv[1] == "together":
            result = together(int(sys.argv[2]), "mailbox" in sys.argv)
        elif sys.argv[1] in ("alone", "lonely"):
            result = alone(sys.argv[1] == "lonely")
        else:
            result = one_of(int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], "mailbox" in sys.argv)
    sys.stdout.write(json.dumps(result) + "\n")
    sys.stdout.flush()
    os._exit(0)
