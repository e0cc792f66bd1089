"""Ranks as threads behave as ranks that are processes."""

from __future__ import annotations

import threading

import pytest
from rank_fakes import FACTORY, make_config, make_plan, make_step

from multitensor.engine.local_executor import LocalExecutor
from multitensor.errors import DoesNotFit, InputError, MultitensorError, RankFailed


@pytest.mark.parametrize("size", [1, 3])
def test_steps_calls_progress_and_close(size: int) -> None:
    executor = LocalExecutor(FACTORY)
    progress: list[tuple[int, int]] = []
    executor.start(make_plan(size), make_config(), lambda done, total: progress.append((done, total)))
    for number in range(3):
        executor.submit(make_step(number))
    assert executor.call("echo", value="x") == [(rank, "x") for rank in range(size)]
    outputs = [executor.collect() for _ in range(3)]
    assert [(output.step, output.token_ids.tolist()) for output in outputs] == [(n, [6 * size]) for n in range(3)]
    executor.close()
    executor.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("rank-")]
    with pytest.raises(RankFailed, match="ended"):
        executor.submit(make_step(5))


@pytest.mark.parametrize(
    ("behaviour", "kind", "cause"),
    [("input error", InputError, InputError), ("out of memory", DoesNotFit, MemoryError)],
)
def test_a_failure_while_loading_keeps_its_type(
    behaviour: str, kind: type[MultitensorError], cause: type[BaseException]
) -> None:
    with pytest.raises(kind) as caught:
        LocalExecutor(FACTORY).start(make_plan(2), make_config(behaviour))
    assert type(caught.value.__cause__) is cause


def test_a_failing_rank_frees_the_others() -> None:
    executor = LocalExecutor(FACTORY)
    executor.start(make_plan(3), make_config())
    with pytest.raises(RankFailed, match=r"^rank 2 \(cpu:2\) failed: ValueError: this rank has had enough") as caught:
        executor.call("fail", rank=2)
    assert isinstance(caught.value.__cause__, ValueError)
    executor.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("rank-")]


def test_gpus_are_refused() -> None:
    with pytest.raises(InputError, match="CPU only"):
        LocalExecutor(FACTORY).start(make_plan(2, "cuda"), make_config())
