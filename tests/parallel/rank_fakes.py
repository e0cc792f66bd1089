"""A plan of CPU ranks without a model, and a runner that is asked for things a model would not do."""

from __future__ import annotations

import os
import pickle
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from multitensor.architectures.spec import LayerSpec, ModelSpec
from multitensor.config import EngineConfig
from multitensor.engine.batch import StepInput, StepOutput
from multitensor.sharding.plan import Plan, RankPlan, Ratios, Slice
from multitensor.sharding.topology import Device

FACTORY = "rank_fakes:make_runner"


def make_plan(size: int, kind: str = "cpu") -> Plan:
    spec = ModelSpec(
        architecture="fake",
        hidden_size=8,
        n_heads=size,
        n_kv_heads=size,
        head_dim=8,
        ffn_size=8 * size,
        vocab_size=16,
        train_context=64,
        norm_eps=1e-5,
        layers=(LayerSpec(),),
        ropes=(),
        activation="silu",
        attention_scale=1.0,
        tied_embeddings=True,
        tensors=(),
    )
    ranks = tuple(
        RankPlan(
            rank,
            Device(f"{kind}:{rank}", kind, rank, 1 << 30, 1 << 30),
            query_heads=Slice(rank, rank + 1),
            kv_heads=Slice(rank, rank + 1),
            kv_map=(0,),
            ffn=Slice(8 * rank, 8 * rank + 8),
            vocabulary=Slice(0, 16),
        )
        for rank in range(size)
    )
    even = (1.0,) * size
    return Plan(spec, ranks, Ratios(even, even, even, even), {}, 64, 64, "f32", 16, 4, 64, "float32")


def make_config(behaviour: str = "", step_timeout: float = 0.0) -> EngineConfig:
    """behaviour: what the fake runner does while loading, in place of a model's path."""
    return EngineConfig(behaviour, "float32", True, 0, 4, 64, 16, step_timeout=step_timeout)


def make_step(number: int, tokens: int = 4) -> StepInput:
    one = np.zeros(1, dtype=np.int32)
    ids = np.arange(tokens, dtype=np.int32)
    return StepInput(
        number,
        slots=one,
        query_lens=np.array([tokens], dtype=np.int32),
        context_lens=one,
        token_ids=ids,
        block_tables=one.reshape(1, 1),
        sample=np.ones(1, dtype=bool),
        uniforms=np.zeros(1),
        score_top=one,
        score_next=np.full(tokens, -1, dtype=np.int32),
    )


class FakeRunner:
    def __init__(self, rank: int, config: EngineConfig, group: Any) -> None:
        self.rank = rank
        self.group = group
        self.behaviour = config.model
        self.steps: list[int] = []

    def load(self, progress: Callable[[int, int], None] | None = None) -> None:
        from multitensor.errors import InputError

        if self.behaviour == "input error" and self.rank == 1:
            raise InputError("tensor blk.0.ffn_up.weight has an unknown type 99")
        if self.behaviour == "out of memory" and self.rank == 0:
            raise MemoryError("cannot allocate 12 GiB")
        if self.behaviour == "exit":
            sys.stderr.write("the library says goodbye\n")
            sys.stderr.flush()
            os._exit(7)
        if self.behaviour == "sleep":
            time.sleep(600)
        if self.behaviour == "stop" and self.rank == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        if progress is not None:
            progress(100 + self.rank, 200)
        self.group.barrier()

    def step(self, step: StepInput) -> StepOutput:
        """Token ids: the sum of the step's ids over all ranks, which shows that all took part."""
        import torch

        self.steps.append(step.step)
        total = self.group.all_reduce(torch.tensor([float(step.token_ids.sum())]))
        return StepOutput(step.step, np.array([int(total[0])], dtype=np.int32))

    def memory(self) -> int:
        return self.rank

    def warm_up(self) -> None:
        time.sleep(600)

    def pid(self) -> int:
        return os.getpid()

    def steps_seen(self) -> list[int]:
        return self.steps

    def echo(self, value: Any) -> tuple[int, Any]:
        return self.rank, value

    def threads(self) -> int:
        import torch

        return torch.get_num_threads()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def reduce_for_ever(self) -> None:
        import torch

        x = torch.ones(4096)
        while True:
            self.group.all_reduce(x)

    def fail(self, rank: int) -> None:
        """One rank raises while the others wait for it in a reduction."""
        import torch

        if self.rank == rank:
            raise ValueError("this rank has\nhad enough")
        self.group.all_reduce(torch.ones(1))

    def close(self) -> None:
        pass


def make_runner(plan: Plan, rank: int, config: EngineConfig, group: Any, device: Any) -> FakeRunner:
    return FakeRunner(rank, config, group)


def run_forked(size: int, work: Callable[[int], Any], timeout: float = 60.0) -> list[Any]:
    """work(rank) in `size` forked processes (they need not import torch anew); their results in rank order."""
    children: list[tuple[int, int]] = []
    try:
        for rank in range(size):
            read, write = os.pipe()
            pid = os.fork()
            if pid == 0:
                os.close(read)
                _child(work, rank, write)
            os.close(write)
            children.append((pid, read))
        return [_result_of(pid, read, time.monotonic() + timeout) for pid, read in children]
    finally:
        for pid, read in children:
            os.close(read)
            try:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            except (ProcessLookupError, ChildProcessError):
                continue


def _child(work: Callable[[int], Any], rank: int, write: int) -> None:
    import torch

    status = 1
    try:
        torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
        data = pickle.dumps(("ok", work(rank)))
        status = 0
    except BaseException:
        data = pickle.dumps(("error", traceback.format_exc()))
    with open(write, "wb") as file:
        file.write(data)
    os._exit(status)


def _result_of(pid: int, read: int, deadline: float) -> Any:
    import select

    data = b""
    while True:
        ready, _, _ = select.select([read], [], [], max(0.0, deadline - time.monotonic()))
        assert ready, f"process {pid} does not answer"
        piece = os.read(read, 1 << 20)
        if not piece:
            break
        data += piece
    kind, value = pickle.loads(data)
    assert kind == "ok", value
    return value


def is_running(pid: int) -> bool:
    """Neither gone nor a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def wait_gone(pids: list[int], seconds: float) -> list[int]:
    """Those that are still there after so long."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and any(is_running(pid) for pid in pids):
        time.sleep(0.02)
    return [pid for pid in pids if is_running(pid)]
