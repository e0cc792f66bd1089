"""Sums over ranks fused with residual add and norm, and gathers, through memory that all the ranks' GPUs see.

Made to be captured in CUDA graphs, as decode.py's kernels are. All ranks make the same calls in the same order on one
stream each; which of its sets a call uses is counted on the device. See reduce.cu.

mailbox: the memory is the host's, see parallel/host_memory.py. Has run for ranks that share one GPU, not yet for two.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from multitensor.kernels.cuda.program import Program, launch

MAX_RANKS = 16
PATIENCE_SECONDS = 30.0  # after which a call whose peers did not come ends the process with a CUDA error
_SETS, _MAILBOX_GATHER_SETS = 3, 4
_KINDS = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}
_SOURCES = ("decode.cu", "reduce.cu")
_GATHER_THREADS, _GATHER_ITEMS = 256, 4
_NULL = torch.empty(0)  # its data_ptr() is 0


class PeerReduction:
    """`reduce_add_norm` of rows [T, hidden], T <= tokens, on one rank.

    places: int64 [ranks] on the device, the address of every rank's buffer or mailbox, in rank order; each is `nbytes`
    long, 16-byte aligned, and all -0.0 when it is first used. parts: blocks that share a token, 1, 2, 4 or 8; above 1
    only from compute capability 9.0 on (thread block clusters). limit_ms: after so long a call whose peers did not come
    ends the process; below 0, it gives up instead and counts that (`given_up`).
    """

    def __init__(
        self, places: torch.Tensor, rank: int, hidden: int, tokens: int, *, parts: int = 1, mailbox: bool = False
    ) -> None:
        ranks, self.device = places.numel(), places.device
        capability = torch.cuda.get_device_capability(self.device)
        if hidden % 4 or not 2 <= ranks <= MAX_RANKS or not 0 <= rank < ranks or tokens < 1:
            raise ValueError(
                f"no reduction of rows of {hidden} over {ranks} ranks: rows in fours, 2 to {MAX_RANKS} ranks"
            )
        if parts not in (1, 2, 4, 8) or (parts > 1 and capability < (9, 0)):
            raise ValueError(f"a token cannot be shared by {parts} blocks on a GPU of capability {capability}")
        self.rank, self.ranks, self.hidden, self.tokens, self.parts = rank, ranks, hidden, tokens, parts
        self.mailbox = mailbox
        self.limit_ms = int(1000 * PATIENCE_SECONDS)
        self._overlap = capability >= (9, 0)
        self._places = places
        self._turns = torch.zeros(tokens + 1, dtype=torch.int32, device=self.device)
        self._programs: dict[tuple[torch.dtype, torch.dtype], Program] = {}
        # More registers a thread where more ranks' words are under way.
        most = 1024 if ranks == 2 else 512
        self._threads = min(most, -(-hidden // 4 // parts // 32) * 32 or 32)

    @staticmethod
    def nbytes(ranks: int, hidden: int, tokens: int, *, mailbox: bool = False) -> int:
        """Of a buffer: float32 [3 sets, ranks, tokens, hidden]; of a mailbox: [3 sets, tokens, hidden]."""
        return _SETS * (1 if mailbox else ranks) * tokens * hidden * 4

    @property
    def given_up(self) -> int:
        """Threads that waited in vain so far. Waits for the device."""
        return int(self._turns[-1])

    def split(self, parts: int) -> PeerReduction:
        """The same buffer and turns with another number of blocks a token: calls of both may be mixed."""
        other = PeerReduction(self._places, self.rank, self.hidden, self.tokens, parts=parts, mailbox=self.mailbox)
        other._turns = self._turns
        other.limit_ms = self.limit_ms
        return other

    def prepare(self, out: torch.dtype, partial: torch.dtype) -> None:
        """Compiles and loads what calls of these types need."""
        self._program(out, partial).kernel("reduce_add_norm")

    def takes(self, partial: torch.Tensor, residual: torch.Tensor) -> bool:
        """Whether shapes, types and layout are what the kernel is made for."""
        return (
            partial.shape == residual.shape == (partial.shape[0], self.hidden)
            and 0 < partial.shape[0] <= self.tokens
            and partial.dtype in _KINDS
            and residual.dtype == torch.float32
            and partial.is_contiguous()
            and residual.is_contiguous()
        )

    def reduce_add_norm(
        self,
        partial: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        out: torch.Tensor,
        *,
        post_weight: torch.Tensor | None = None,
    ) -> None:
        """residual (float32 [T, hidden]) += the ranks' `partial` (any float [T, hidden]) summed in rank order in
        float32, through its own RMS norm first where post_weight is given; out = rms_norm(residual) * weight, any float
        [T, hidden]. Weights are float32 [hidden]. As Group.reduce_add_norm."""
        if not self.takes(partial, residual) or out.shape != partial.shape or not out.is_contiguous():
            raise ValueError(f"no reduction of {tuple(partial.shape)} into {tuple(residual.shape)}, {tuple(out.shape)}")
        post = _NULL if post_weight is None else post_weight
        arguments = (
            self._places,
            self._turns,
            partial,
            residual,
            post,
            weight,
            out,
            float(eps),
            self.rank,
            self.limit_ms,
        )
        kernel = self._program(out.dtype, partial.dtype).kernel("reduce_add_norm")
        launch(kernel, self.parts * partial.shape[0], self._threads, 0, arguments, overlap=self._overlap)

    def _program(self, out: torch.dtype, partial: torch.dtype) -> Program:
        if (out, partial) not in self._programs:
            defines = {
                "RANKS": self.ranks,
                "ROW": self.hidden,
                "PARTS": self.parts,
                "NTHREADS": self._threads,
                "MAX_TOKENS": self.tokens,
                "X_KIND": _KINDS[out],
                "PARTIAL_KIND": _KINDS[partial],
            } | ({"MAILBOX": 1} if self.mailbox else {})
            self._programs[out, partial] = Program(_SOURCES, defines, self.device)
        return self._programs[out, partial]


class PeerGather:
    """Every rank's columns of float32 rows, T <= tokens, on all ranks. sizes: columns of each rank, in rank order.

    places: as PeerReduction's, of `nbytes`. With mailboxes every rank needs a column.
    """

    def __init__(
        self, places: torch.Tensor, rank: int, sizes: Sequence[int], tokens: int, *, mailbox: bool = False
    ) -> None:
        if mailbox and min(sizes) < 1:
            raise ValueError(f"no gather through mailboxes of {tuple(sizes)} columns: every rank needs one")
        if len(sizes) != places.numel() or not 2 <= len(sizes) <= MAX_RANKS or min(sizes) < 0 or sum(sizes) < 1:
            raise ValueError(f"no gather of {tuple(sizes)} columns over {places.numel()} ranks")
        self.device, self.rank, self.sizes, self.tokens = places.device, rank, tuple(sizes), tokens
        self.columns, self._first = sum(sizes), sum(sizes[:rank])
        self.limit_ms = int(1000 * PATIENCE_SECONDS)
        self._overlap = torch.cuda.get_device_capability(self.device) >= (9, 0)
        self._places = places
        self._blocks = -(-self.columns // (_GATHER_THREADS * _GATHER_ITEMS))
        self._turns = torch.zeros(tokens * self._blocks + 1, dtype=torch.int32, device=self.device)
        defines: dict[str, object] = {"RANKS": len(sizes), "NTHREADS": _GATHER_THREADS, "ITEMS": _GATHER_ITEMS}
        self._mailbox: tuple[torch.Tensor, int] | tuple[()] = ()
        if mailbox:
            defines["MAILBOX"] = 1
            starts = torch.tensor([sum(sizes[:r]) for r in range(len(sizes) + 1)], dtype=torch.int32)
            self._mailbox = starts.to(self.device), max(sizes)
        self._kernel = Program(_SOURCES, defines, self.device).kernel("gather_columns")

    @staticmethod
    def nbytes(sizes: Sequence[int], tokens: int, *, mailbox: bool = False) -> int:
        """Of a buffer: float32 [3 sets, tokens, all columns]; of a mailbox: [4 sets, tokens, the most of any rank]."""
        return 4 * tokens * (_MAILBOX_GATHER_SETS * max(sizes) if mailbox else _SETS * sum(sizes))

    @property
    def given_up(self) -> int:
        """As PeerReduction's."""
        return int(self._turns[-1])

    def takes(self, local: torch.Tensor, sizes: Sequence[int]) -> bool:
        return (
            tuple(sizes) == self.sizes
            and local.shape == (local.shape[0], self.sizes[self.rank])
            and 0 < local.shape[0] <= self.tokens
            and local.dtype == torch.float32
            and local.is_contiguous()
        )

    def gather(self, local: torch.Tensor, out: torch.Tensor) -> None:
        """local float32 [T, sizes[rank]] -> out float32 [T, sum(sizes)], ranks' columns in rank order; -0.0 becomes
        +0.0."""
        tokens = local.shape[0]
        if not self.takes(local, self.sizes) or out.shape != (tokens, self.columns) or not out.is_contiguous():
            raise ValueError(f"no gather of {tuple(local.shape)} into {tuple(out.shape)}")
        extent = (self._first, self.sizes[self.rank], self.columns, self.tokens, self.rank, self.limit_ms)
        arguments = (self._places, self._turns, local, out, *self._mailbox, *extent)
        launch(self._kernel, (self._blocks, tokens), _GATHER_THREADS, 0, arguments, overlap=self._overlap)
