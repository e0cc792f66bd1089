"""A rank driven by steps: prefill, decode with unknown tokens, mixed batches, sampling, scores, memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from late_sums import LateSums
from model_harness import BLOCK, CPU, cpu_plan, logits_in_steps, on_ranks, random_prompts, shuffled_tables
from multitensor.architectures.registry import resolve
from multitensor.config import EngineConfig
from multitensor.engine import runner as runner_module
from multitensor.engine.batch import SamplingSetup, StepInput, StepOutput
from multitensor.engine.runner import ModelRunner
from multitensor.engine.warm_up import shapes, warm_up
from multitensor.formats.checkpoint import Checkpoint, open_checkpoint
from multitensor.parallel.group import Group
from multitensor.sharding.memory import device_memory
from multitensor.sharding.plan import Plan
from synthetic import write_gguf

VOCAB = 320
GREEDY = SamplingSetup(0, 0.0, 0, 1.0, 0.0, 1.0, 0.0, 0.0, {}, -1, np.zeros(0, np.int32))


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(
        tmp_path_factory.mktemp("model") / "m.gguf", hidden=64, ffn=96, n_heads=6, n_kv_heads=3, vocab=VOCAB
    )


def make_runner(checkpoint: Checkpoint, plan: Plan, group: Group) -> ModelRunner:
    config = EngineConfig(str(checkpoint.path), "float32", True, 0, plan.max_num_seqs, plan.max_batch_tokens, BLOCK)
    runner = ModelRunner(checkpoint, plan, group.rank, config, group, CPU)
    runner.load()
    return runner


def make_step(
    number: int,
    slots: Sequence[int],
    ids: Sequence[Sequence[int]],
    contexts: Sequence[int],
    tables: np.ndarray,
    *,
    sample: Sequence[bool] | None = None,
    score_top: Sequence[int] | None = None,
    score_next: Sequence[int] | None = None,
    setups: tuple[SamplingSetup, ...] = (),
) -> StepInput:
    flat = [token for part in ids for token in part]
    return StepInput(
        step=number,
        slots=np.array(slots, np.int32),
        query_lens=np.array([len(part) for part in ids], np.int32),
        context_lens=np.array(contexts, np.int32),
        token_ids=np.array(flat, np.int32),
        block_tables=tables,
        sample=np.array(sample if sample is not None else [True] * len(slots)),
        uniforms=np.full(len(slots), 0.5),
        score_top=np.array(score_top if score_top is not None else [0] * len(slots), np.int32),
        score_next=np.array(score_next if score_next is not None else [-1] * len(flat), np.int32),
        setups=setups,
    )


def greedy_continuation(path: Path, prompt: list[int], count: int) -> list[int]:
    """By running the whole text anew for every token, without a sampler."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(logits_in_steps(path, (1.0,), [ids], [])[0][0][-1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("ratio", [(1.0,), (2.0, 1.0), (1.0,) * 4], ids=str)
def test_decode_takes_the_token_it_sampled_last(model_path: Path, ratio: tuple[float, ...]) -> None:
    """Two sequences in slots 5 and 2, one of them admitted while the other decodes; the host never says a token."""
    checkpoint = open_checkpoint(model_path)
    plan = cpu_plan(checkpoint, ratio)
    first, second = random_prompts(VOCAB, [21, 7], seed=3)
    tables = shuffled_tables([60, 60], plan.kv_tokens // BLOCK)

    def work(group: Group) -> list[StepOutput]:
        runner = make_runner(checkpoint, plan, group)
        outputs = [
            # Prefill in two chunks; the first yields nothing.
            runner.step(
                make_step(0, [5], [first[:16]], [0], tables[:1], sample=[False], setups=(replace(GREEDY, slot=5),))
            ),
            runner.step(make_step(1, [5], [first[16:]], [16], tables[:1])),
            # The second prompt joins a decoding sequence.
            runner.step(make_step(2, [5, 2], [[-1], second], [21, 0], tables, setups=(replace(GREEDY, slot=2),))),
        ]
        outputs += [
            runner.step(make_step(3 + i, [2, 5], [[-1], [-1]], [7 + i, 22 + i], tables[::-1])) for i in range(4)
        ]
        return outputs

    by_rank = on_ranks(plan.size, work)
    for outputs in by_rank:
        assert [output.step for output in outputs] == list(range(7))
        assert outputs[0].token_ids.tolist() == [-1]
        steps = [output.token_ids.tolist() for output in outputs]
        found_first = [steps[1][0], steps[2][0], *(step[1] for step in steps[3:])]
        found_second = [steps[2][1], *(step[0] for step in steps[3:])]
        assert found_first == greedy_continuation(model_path, first, 6)
        assert found_second == greedy_continuation(model_path, second, 5)


@pytest.mark.parametrize("scratch", [1, 20 * 3 * 4 * VOCAB, 256 << 20])
def test_scores_are_the_log_softmax_of_every_position(
    model_path: Path, scratch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scored sequence between a sampled one and another scored one; rows by ones, twenties, and all at once."""
    monkeypatch.setattr(runner_module, "SCORE_SCRATCH_BYTES", scratch)
    checkpoint = open_checkpoint(model_path)
    plan = cpu_plan(checkpoint, (1.0, 1.0))
    prompts = random_prompts(VOCAB, [33, 9, 26], seed=4)
    tables = shuffled_tables([33, 9, 26], plan.kv_tokens // BLOCK)
    following = [*prompts[0][1:], -1, *[-1] * 9, *prompts[2][1:], -1]
    setups = tuple(replace(GREEDY, slot=slot) for slot in range(3))
    step = make_step(
        0,
        [0, 1, 2],
        prompts,
        [0, 0, 0],
        tables,
        sample=[False, True, False],
        score_top=[3, 0, 5],
        score_next=following,
        setups=setups,
    )
    for output in on_ranks(2, lambda group: make_runner(checkpoint, plan, group).step(step)):
        assert sorted(output.scores) == [0, 2]
        assert output.token_ids[[0, 2]].tolist() == [-1, -1] and output.token_ids[1] >= 0
        for sequence, top in ((0, 3), (2, 5)):
            prompt = prompts[sequence]
            logits = logits_in_steps(model_path, (1.0,), [prompt], [])[0][0]
            wanted = torch.log_softmax(logits.double(), -1)
            values, ids = wanted.topk(top)
            assert len(output.scores[sequence]) == len(prompt)
            for position, (top_ids, top_values, next_value) in enumerate(output.scores[sequence]):
                assert top_ids == ids[position].tolist()
                assert top_values == pytest.approx(values[position].tolist(), abs=1e-4)
                if position + 1 < len(prompt):
                    assert next_value == pytest.approx(float(wanted[position, prompt[position + 1]]), abs=1e-4)
                else:
                    assert next_value is None


def test_logprobs_are_numbered_by_sequence(model_path: Path) -> None:
    checkpoint = open_checkpoint(model_path)
    prompts = random_prompts(VOCAB, [4, 6, 5], seed=5)
    plan = cpu_plan(checkpoint, (1.0, 1.0))
    tables = shuffled_tables([4, 6, 5], plan.kv_tokens // BLOCK)
    setups = (GREEDY, replace(GREEDY, slot=1, logprobs=2), replace(GREEDY, slot=2, logprobs=2))
    step = make_step(0, [0, 1, 2], prompts, [0] * 3, tables, sample=[True, False, True], setups=setups)
    for output in on_ranks(2, lambda group: make_runner(checkpoint, plan, group).step(step)):
        assert list(output.logprobs) == [2]
        assert output.logprobs[2].top_ids[0] == output.token_ids[2]


@pytest.mark.parametrize(("kv_type", "group_bytes"), [("f16", 64), ("q8", 34), ("q4", 18)])
def test_memory_is_what_the_plan_says(tmp_path: Path, kv_type: str, group_bytes: int) -> None:
    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", hidden=64, n_heads=6, n_kv_heads=3, head_dim=32))
    plan = cpu_plan(checkpoint, (3.0, 1.0), kv_type=kv_type)

    def work(group: Group) -> dict[str, int]:
        return make_runner(checkpoint, plan, group).memory()

    for rank, memory in enumerate(on_ranks(2, work)):
        assert memory["weights_bytes"] == sum(tensor.resident_bytes(rank) for tensor in plan.tensors.values())
        heads = plan.ranks[rank].kv_heads.size
        assert memory["kv_bytes"] == plan.kv_tokens * plan.spec.n_layers * 2 * heads * group_bytes
        assert memory["kv_bytes"] == device_memory(plan)[rank].kv
        assert memory["rss_bytes"] > 0


def test_closing_drops_weights_and_caches(model_path: Path) -> None:
    checkpoint = open_checkpoint(model_path)
    plan = cpu_plan(checkpoint, (1.0,))

    def work(group: Group) -> ModelRunner:
        runner = make_runner(checkpoint, plan, group)
        runner.close()
        return runner

    runner = on_ranks(1, work)[0]
    assert runner.memory()["weights_bytes"] == 0 and runner.memory()["kv_bytes"] == 0
    with pytest.raises(RuntimeError, match="not loaded"):
        _ = runner.decoder


@pytest.mark.parametrize("overlap", [False, True])
def test_long_steps_are_cut_where_it_is_asked_for(model_path: Path, overlap: bool) -> None:
    """A prompt of 1,100 tokens beside a decode, over ranks whose sums can travel by themselves."""
    checkpoint = open_checkpoint(model_path)
    ids, other = random_prompts(VOCAB, [1100, 5])
    setups = tuple(replace(GREEDY, slot=slot) for slot in (0, 1))

    def run(group: Group, ratio: Sequence[float]) -> tuple[list[list[int]], dict[str, Any]]:
        plan = replace(cpu_plan(checkpoint, ratio, context=1200, kv_tokens=2048), max_batch_tokens=2048)
        config = EngineConfig(str(checkpoint.path), "float32", True, 0, 8, 2048, BLOCK, overlap=overlap)
        runner = ModelRunner(checkpoint, plan, group.rank, config, group, CPU)
        runner.load()
        tables = shuffled_tables([1102, 8], plan.kv_tokens // BLOCK)
        steps = [
            make_step(0, [1], [other], [0], tables[1:], setups=setups[1:]),
            make_step(1, [0, 1], [ids, [-1]], [0, 5], tables, setups=setups[:1]),
            make_step(2, [0, 1], [[-1], [-1]], [1100, 6], tables),
        ]
        return [runner.step(step).token_ids.tolist() for step in steps], runner.reductions()

    def over_two(group: Group) -> tuple[list[list[int]], dict[str, Any], list[str]]:
        late = LateSums(group)
        return *run(late, (2.0, 1.0)), late.log

    wanted, alone = on_ranks(1, lambda group: run(group, (1.0,)))[0]
    assert alone["overlapped_from"] is None
    for found, told, log in on_ranks(2, over_two):
        assert found == wanted
        assert told["overlapped_from"] == (1024 if overlap else None)
        sums = 2 * len(resolve(checkpoint).layers)
        assert log.count("start") == log.count("wait") == (2 * sums if overlap else 0)  # of the second step alone


@pytest.mark.parametrize("ratio", [(1.0,), (2.0, 1.0)], ids=str)
def test_warming_up_changes_nothing_that_comes_after(model_path: Path, ratio: tuple[float, ...]) -> None:
    """As on GPUs; a prompt that fills a step, a short one, and decode steps of as many sequences as may run."""
    checkpoint = open_checkpoint(model_path)
    plan = cpu_plan(checkpoint, ratio)
    (prompt,) = random_prompts(VOCAB, [21], seed=5)
    tables = shuffled_tables([60], plan.kv_tokens // BLOCK)

    def work(group: Group) -> tuple[list[tuple[int, int]], list[int]]:
        runner = make_runner(checkpoint, plan, group)
        assert runner.warm_up() == 0.0, "CPU ranks have nothing to gain"
        assert warm_up(runner) > 0.0
        outputs = [runner.step(make_step(0, [0], [prompt], [0], tables, setups=(replace(GREEDY, slot=0),)))]
        outputs += [runner.step(make_step(1 + i, [0], [[-1]], [21 + i], tables)) for i in range(4)]
        return list(shapes(runner)), [int(output.token_ids[0]) for output in outputs]

    for steps, ids in on_ranks(plan.size, work):
        assert steps[0] == (1, min(plan.max_batch_tokens, plan.context, plan.kv_tokens)) and steps[0][1] > steps[1][1]
        assert {tokens for _, tokens in steps[2:]} == {1} and 1 < steps[-1][0] == min(plan.max_num_seqs, 64)
        assert ids == greedy_continuation(model_path, prompt, 5)


@pytest.mark.parametrize("having", [{0}, {0, 1}])
def test_ranks_sample_in_one_launch_only_together(
    model_path: Path, having: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank whose device has no room for it would round weights otherwise: then none does."""
    checkpoint = open_checkpoint(model_path)
    plan = cpu_plan(checkpoint, (1.0, 1.0))
    config = EngineConfig(str(checkpoint.path), "float32", True, 0, plan.max_num_seqs, 64, BLOCK)

    def work(group: Group) -> bool:
        runner = ModelRunner(checkpoint, plan, group.rank, config, group, CPU)
        monkeypatch.setattr(runner.kernels, "token_chooser", lambda columns: object() if group.rank in having else None)
        runner.load()
        return runner.sampler.chooser is not None

    assert on_ranks(2, work) == [having == {0, 1}] * 2


class RecordedSteps:
    """As DecodeGraphs: at most 64 sequences, and what one run yields is gone with the next. Logits name the token, the
    slot, the context and the first block of each sequence."""

    def __init__(self) -> None:
        self.logits, self.ids = torch.zeros(64, 4), torch.zeros(64, dtype=torch.int64)
        self.sizes: list[int] = []

    def run(
        self, token_ids: np.ndarray, slots: np.ndarray, context_lens: np.ndarray, block_tables: np.ndarray
    ) -> tuple[torch.Tensor, torch.Tensor]:
        count = len(slots)
        self.sizes.append(count)
        self.logits.zero_()
        columns = np.stack([token_ids, slots, context_lens, block_tables[:, 0]], 1)
        self.logits[:count] = torch.from_numpy(columns.astype(np.float32))
        self.ids[:count] = torch.from_numpy(slots.astype(np.int64)) * 3
        return self.logits[:count], self.ids[:count]


@pytest.mark.parametrize(("sequences", "sizes"), [(64, [64]), (65, [64, 1]), (150, [64, 64, 22])])
def test_more_sequences_than_a_recorded_step_takes(sequences: int, sizes: list[int]) -> None:
    slots = np.random.default_rng(0).permutation(sequences)
    ids, contexts = [[int(slot) + 5] for slot in slots], [int(slot) + 1 for slot in slots]
    tables = slots.astype(np.int32).reshape(-1, 1) + 7
    step = make_step(0, slots.tolist(), ids, contexts, tables)
    graphs = RecordedSteps()
    logits, likeliest = runner_module._run_graphs(graphs, step)  # type: ignore[arg-type]
    expected = np.stack([slots + 5, slots, slots + 1, slots + 7], 1)
    assert torch.equal(logits, torch.from_numpy(expected).float())
    assert torch.equal(likeliest, torch.from_numpy(slots) * 3)
    assert graphs.sizes == sizes
    assert runner_module._is_small_decode(step, sequences)
    assert not runner_module._is_small_decode(step, sequences - 1)
