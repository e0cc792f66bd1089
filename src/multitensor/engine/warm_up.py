"""Steps whose results nobody wants, before the first request: what a GPU's libraries, kernels and allocator do when
they are first used, and the recording of decode steps, would else be waited for by whoever asks first.

Imported by ranks only: it imports torch.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from multitensor.engine.batch import SamplingSetup, StepInput
from multitensor.sharding.memory import buckets_up_to

if TYPE_CHECKING:
    from multitensor.engine.runner import ModelRunner

SHORT_PROMPT = 64  # another way of products and attention than long prompts'


def warm_up(runner: ModelRunner) -> float:
    """Seconds that it took. The KV cache must not hold anything that is wanted: its first blocks are written."""
    began = time.perf_counter()
    for number, (sequences, tokens) in enumerate(shapes(runner)):
        runner.step(_step(runner, number, sequences, tokens))
    return time.perf_counter() - began


def shapes(runner: ModelRunner) -> Iterator[tuple[int, int]]:
    """(sequences, tokens of each) of the steps: the longest of a prompt first, for what the allocator takes then serves
    all others; a short prompt; and decode steps as they are recorded."""
    plan = runner.plan
    room = min(plan.context, plan.kv_tokens)
    longest = min(plan.max_batch_tokens, room)
    for tokens in sorted({longest, min(SHORT_PROMPT, longest)}, reverse=True):
        yield 1, tokens
    most = min(plan.max_num_seqs, plan.kv_tokens // plan.block_size)
    for bucket in buckets_up_to(most):
        yield min(bucket, most), 1


def _step(runner: ModelRunner, number: int, sequences: int, tokens: int) -> StepInput:
    """Greedy, of sequences that begin, each in blocks of its own."""
    plan = runner.plan
    blocks = -(-tokens // plan.block_size)
    none = np.zeros(0, np.int32)
    setups = [SamplingSetup(slot, 0.0, 0, 1.0, 0.0, 1.0, 0.0, 0.0, {}, -1, none) for slot in range(sequences)]
    return StepInput(
        step=number,
        slots=np.arange(sequences, dtype=np.int32),
        query_lens=np.full(sequences, tokens, np.int32),
        context_lens=np.zeros(sequences, np.int32),
        token_ids=np.arange(sequences * tokens, dtype=np.int32) % plan.spec.vocab_size,
        block_tables=np.arange(sequences * blocks, dtype=np.int32).reshape(sequences, blocks),
        sample=np.ones(sequences, bool),
        uniforms=np.zeros(sequences),
        score_top=np.zeros(sequences, np.int32),
        score_next=np.full(sequences * tokens, -1, np.int32),
        setups=tuple(setups),
    )
