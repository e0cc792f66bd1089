"""What a rank needs to begin, and how its failure is put into words; used on both sides (never imports torch)."""

from __future__ import annotations

import json
import os
import pickle
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from multitensor import errors
from multitensor.config import EngineConfig
from multitensor.errors import DoesNotFit, InputError, MultitensorError, RankFailed
from multitensor.sharding.plan import Plan

# "module:callable" that makes a rank's runner: (plan, rank, config, group, device) -> object with load, step and close.
MODEL_RUNNER = "multitensor.engine.rank_loop:make_model_runner"

_LONGEST_MESSAGE = 1000


@dataclass(frozen=True)
class Bootstrap:
    """Travels to every rank as a pickle in a memfd: too large for a command line, and nobody's business in `ps`.

    cpu_threads: what each rank may use for computing on the CPU. debug: also print tracebacks of failures."""

    plan: Plan
    config: EngineConfig
    factory: str
    cpu_threads: int
    debug: bool = False

    def to_memfd(self) -> int:
        """A file descriptor that holds this; the caller closes it."""
        fd = os.memfd_create("multitensor-bootstrap", os.MFD_CLOEXEC)
        try:
            with open(fd, "wb", closefd=False) as file:
                pickle.dump(self, file, protocol=5)
        except BaseException:
            os.close(fd)
            raise
        return fd

    @staticmethod
    def from_memfd(fd: int) -> Bootstrap:
        """Reads from the start without moving the descriptor's position, which the ranks share."""
        loaded = pickle.loads(os.pread(fd, os.fstat(fd).st_size, 0))
        if not isinstance(loaded, Bootstrap):
            raise RankFailed(f"the engine sent a {type(loaded).__name__} to begin with")
        return loaded


def device_kind(plan: Plan) -> str:
    """ "cpu" or "cuda", the one kind of all ranks. Raises InputError for planned devices and for mixtures."""
    kinds = sorted({rank.device.kind for rank in plan.ranks})
    if kinds not in (["cpu"], ["cuda"]):
        names = ", ".join(rank.device.name for rank in plan.ranks)
        why = (
            "mixing CPU and GPU ranks is not supported yet" if kinds == ["cpu", "cuda"] else "these only serve to plan"
        )
        raise InputError(f"cannot run on {names}: {why}; name devices of one kind, as in cuda:0,cuda:1")
    return kinds[0]


def cpu_threads_per_rank(plan: Plan, environ: Mapping[str, str]) -> int:
    """The cores this process may use, dealt to the CPU ranks (to GPU ranks as well, which need few). The user's
    OMP_NUM_THREADS lowers it; torchrun's, which it sets to 1 unasked, does not."""
    share = max(1, len(os.sched_getaffinity(0)) // plan.size)
    asked = environ.get("OMP_NUM_THREADS", "")
    if asked.isdigit() and int(asked) > 0 and "TORCHELASTIC_RUN_ID" not in environ:
        share = min(share, int(asked))
    return share


def rank_environment(environ: Mapping[str, str], cpu_threads: int) -> dict[str, str]:
    """Variables that a rank has to have before it imports torch.

    OpenMP's threads otherwise spin for milliseconds between two parallel loops. On a machine where anything else runs,
    the thread they wait for then does not get a core: a decode that takes 9 s took 160 s beside eight busy processes.
    """
    chosen = {"OMP_NUM_THREADS": str(cpu_threads)}
    chosen["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"  # NVML's numbering, which the plan's devices have
    if not any(name in environ for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")):
        chosen |= {"GOMP_SPINCOUNT": "1000", "KMP_BLOCKTIME": "0"}
    return chosen


@dataclass(frozen=True)
class Failure:
    """Why a rank failed. kind: the name of a class in multitensor.errors. secondary: it only failed because another
    rank had."""

    kind: str
    message: str
    secondary: bool = False

    def error(self) -> MultitensorError:
        """A fresh exception to raise."""
        found = getattr(errors, self.kind, None)
        if isinstance(found, type) and issubclass(found, MultitensorError):
            return found(self.message)
        return RankFailed(self.message)

    def to_bytes(self) -> bytes:
        return json.dumps({"kind": self.kind, "message": self.message, "secondary": self.secondary}).encode()

    @staticmethod
    def from_bytes(data: bytes) -> Failure | None:
        """None when the bytes are not a whole report: the rank died while it wrote."""
        try:
            found = json.loads(data)
            return Failure(str(found["kind"]), str(found["message"]), bool(found["secondary"]))
        except (ValueError, KeyError, TypeError):
            return None


def describe_failure(error: BaseException, rank: int, device: str) -> Failure:
    """Errors of this package keep their type and words; running out of memory becomes DoesNotFit; the rest becomes
    RankFailed with the place where it happened."""
    text = _one_line(str(error))
    who = f"rank {rank} ({device})"
    if isinstance(error, RankFailed):
        return Failure("RankFailed", f"{who}: {text}", secondary=True)
    if isinstance(error, MultitensorError):
        return Failure(type(error).__name__, text)
    if _is_out_of_memory(error, text):
        first = text.split(". ")[0].rstrip(".")
        return Failure(
            DoesNotFit.__name__,
            f"{who} ran out of memory ({first}); take a smaller context, free memory on the device or use more devices",
        )
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    reason = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return Failure(RankFailed.__name__, f"{who} failed: {reason}{place}")


def _is_out_of_memory(error: BaseException, text: str) -> bool:
    # By name, because this module never imports torch; torch's CPU allocator raises a bare RuntimeError.
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and "DefaultCPUAllocator" in text)
    )


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _LONGEST_MESSAGE else line[: _LONGEST_MESSAGE - 3] + "..."
