"""A prompt's step is queued on a GPU without waiting for what is queued there already."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from multitensor.engine.batch import SamplingSetup, StepInput
from multitensor.engine.prepare import prepare
from multitensor.engine.runner import ModelRunner
from multitensor.kernels.host_copy import to_device
from multitensor.parallel.group import SingleGroup
from synthetic import write_gguf

SHAPE = {"hidden": 512, "ffn": 1024, "n_heads": 8, "n_kv_heads": 4, "head_dim": 64, "vocab": 512}
SLEEP = 2_000_000_000  # cycles of the GPU: a second or so
TOKENS, STEPS = 100, 3


@pytest.fixture
def gpu() -> Iterator[torch.device]:
    device = torch.device("cuda", 0)
    with torch.cuda.device(device):
        yield device
        torch.cuda.synchronize()


def asleep() -> torch.cuda.Event:
    """A long sleep on the current stream, and its end."""
    torch.cuda._sleep(SLEEP)
    end = torch.cuda.Event()
    end.record()
    return end


@pytest.mark.gpu
def test_a_copy_does_not_wait(gpu: torch.device) -> None:
    numbers = np.random.default_rng(0).integers(0, 1 << 40, (64, 9))
    to_device(numbers, gpu)  # makes the pinned memory that the next copy takes
    torch.cuda.synchronize()
    end = asleep()
    copy = to_device(numbers, gpu)
    assert not end.query()
    assert np.array_equal(copy.cpu().numpy(), numbers)


def prompt_step(number: int, first: int, samples: bool) -> StepInput:
    """One sequence's TOKENS tokens from position `first` on."""
    blocks = -(-(first + TOKENS) // 32)
    setup = SamplingSetup(0, 0.0, 0, 1.0, 0.0, 1.0, 0.0, 0.0, {}, -1, np.zeros(0, np.int32))
    return StepInput(
        step=number,
        slots=np.zeros(1, np.int32),
        query_lens=np.full(1, TOKENS, np.int32),
        context_lens=np.full(1, first, np.int32),
        token_ids=(np.arange(TOKENS, dtype=np.int32) * 7 + first) % 500,
        block_tables=np.arange(blocks, dtype=np.int32)[None],
        sample=np.full(1, samples),
        uniforms=np.zeros(1),
        score_top=np.zeros(1, np.int32),
        score_next=np.full(TOKENS, -1, np.int32),
        setups=(setup,) if first == 0 else (),
    )


@pytest.mark.gpu
@pytest.mark.parametrize("types", ["Q4_K", "BF16"])
def test_a_prompt_does_not_wait_and_says_the_same(tmp_path: Path, gpu: torch.device, types: str) -> None:
    path = write_gguf(tmp_path / "m.gguf", types=types, context=1024, **SHAPE)
    made = prepare(path, devices="cuda:0", max_model_len=512, max_num_seqs=2)
    runner = ModelRunner(made.checkpoint, made.plan, 0, made.config, SingleGroup(), gpu)
    runner.load()

    def tokens_of(steps: list[StepInput]) -> tuple[list[int], bool]:
        """And whether all were queued before the GPU came to the first."""
        end = asleep()
        begun = [runner.sample(runner.forward(step), {}) for step in steps]
        early = not end.query()
        return [int(runner.finish(each).token_ids[0]) for each in begun], early

    steps = [prompt_step(i, i * TOKENS, i == STEPS - 1) for i in range(STEPS)]
    first, _ = tokens_of(steps)  # compiles, and makes the memory that copies go through
    again, early = tokens_of(steps)
    assert again == first
    assert first[:-1] == [-1] * (STEPS - 1)
    assert first[-1] >= 0
    assert early
