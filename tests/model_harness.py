"""Runs a model on ranks that are threads of this process, step by step, without an engine."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from multitensor.architectures.registry import resolve
from multitensor.formats.checkpoint import Checkpoint, open_checkpoint
from multitensor.kernels.attention_inputs import AttentionInputs
from multitensor.kernels.cache_tensor import make_cache
from multitensor.kernels.dispatch import make_kernels
from multitensor.loading.loader import load_rank
from multitensor.model.decoder import Decoder
from multitensor.model.row_cuts import RowCut, uncut
from multitensor.parallel.group import Group, SingleGroup
from multitensor.parallel.local_group import LocalGroup
from multitensor.sharding.plan import Plan, Ratios, make_plan
from multitensor.sharding.topology import Device

BLOCK = 16
CPU = torch.device("cpu")


def cpu_plan(
    checkpoint: Checkpoint, ratio: Sequence[float], *, context: int = 128, kv_tokens: int = 1024, kv_type: str = "f32"
) -> Plan:
    """One CPU rank a part of the ratio, everything cut by it, float32 throughout."""
    devices = [Device(f"cpu:{i}", "cpu", i, 1 << 40, 1 << 40) for i in range(len(ratio))]
    return make_plan(
        resolve(checkpoint),
        devices,
        Ratios.uniform(ratio),
        context=context,
        kv_tokens=kv_tokens,
        kv_type=kv_type,
        dtype="float32",
        block_size=BLOCK,
        max_num_seqs=8,
        max_batch_tokens=256,
    )


def on_ranks(size: int, work: Callable[[Group], Any]) -> list[Any]:
    """work(group) on each of `size` ranks; their results in rank order. The first exception is raised here."""
    if size == 1:
        return [work(SingleGroup())]
    results: list[Any] = [None] * size
    errors: list[BaseException] = []

    def run(group: LocalGroup) -> None:
        torch.set_num_threads(1)  # of this rank: ranks that share cores must not spin for each other
        try:
            results[group.rank] = work(group)
        except BaseException as error:
            errors.append(error)
            group.abort(f"rank {group.rank}: {error}")

    before = torch.get_num_threads()
    threads = [threading.Thread(target=run, args=(group,)) for group in LocalGroup.make(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.set_num_threads(before)
    if errors:
        raise errors[0]
    return results


def shuffled_tables(lengths: Sequence[int], n_blocks: int, seed: int = 0) -> np.ndarray:
    """Block tables [S, B] for sequences of these lengths: blocks in random order, 0 past each end."""
    free = np.random.default_rng(seed).permutation(n_blocks).tolist()
    needed = [-(-length // BLOCK) for length in lengths]
    tables = np.zeros((len(lengths), max(needed)), dtype=np.int32)
    for sequence, count in enumerate(needed):
        tables[sequence, :count] = [free.pop() for _ in range(count)]
    return tables


class RankModel:
    """One rank's decoder with its caches; `step` runs a flat batch and returns the logits of every position."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        plan: Plan,
        group: Group,
        device: torch.device = CPU,
        cut_rows: RowCut = uncut,
        *,
        exact: bool = True,
    ) -> None:
        self.plan = plan
        self.device = device
        kernels = make_kernels(device, exact=exact)
        group.kernels = kernels
        own = plan.ranks[group.rank]
        self.weights = load_rank(checkpoint, plan, group.rank, device)
        self.decoder = Decoder(plan, group.rank, self.weights, kernels, group, torch.float32, device, cut_rows)
        shape = (plan.kv_tokens // BLOCK, BLOCK, own.kv_heads.size, plan.spec.head_dim)
        self.caches = [
            (make_cache(plan.kv_type, shape, device), make_cache(plan.kv_type, shape, device)) for _ in plan.spec.layers
        ]

    @torch.inference_mode()
    def step(self, chunks: Sequence[Sequence[int]], contexts: Sequence[int], tables: np.ndarray) -> list[torch.Tensor]:
        """chunks[s]: the next ids of sequence s, after contexts[s] that are cached -> float32 logits [len, V] each."""
        lengths = [len(chunk) for chunk in chunks]
        inputs = AttentionInputs.build(lengths, contexts, tables, BLOCK, self.device)
        ids = torch.tensor([token for chunk in chunks for token in chunk], device=self.device)
        hidden = self.decoder.forward(ids, inputs, self.caches)
        return list(self.decoder.logits(hidden).to(CPU, copy=True).split(lengths))


def logits_in_steps(
    path: Path,
    ratio: Sequence[float],
    prompts: Sequence[Sequence[int]],
    chunks: Sequence[int],
    device: torch.device = CPU,
    kv_type: str = "f32",
) -> list[list[torch.Tensor]]:
    """Every rank's logits [len, V] of each prompt, when each step takes the next chunks[i] ids of every prompt (the
    last step takes the rest)."""
    checkpoint = open_checkpoint(path)
    plan = cpu_plan(checkpoint, ratio, kv_type=kv_type)
    tables = shuffled_tables([len(prompt) for prompt in prompts], plan.kv_tokens // BLOCK)

    def work(group: Group) -> list[torch.Tensor]:
        model = RankModel(checkpoint, plan, group, device)
        done = [0] * len(prompts)
        parts: list[list[torch.Tensor]] = [[] for _ in prompts]
        for count in [*chunks, 1 << 30]:
            live = [s for s, prompt in enumerate(prompts) if done[s] < len(prompt)]
            pieces = [list(prompts[s][done[s] : done[s] + count]) for s in live]
            if not live:
                break
            for s, piece, logits in zip(
                live, pieces, model.step(pieces, [done[s] for s in live], tables[live]), strict=True
            ):
                parts[s].append(logits)
                done[s] += len(piece)
        return [torch.cat(part) for part in parts]

    return on_ranks(plan.size, work)


def random_prompts(vocab: int, lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocab, length).tolist() for length in lengths]


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Largest difference over the largest magnitude wanted."""
    return float((found.double() - wanted.double()).abs().max() / wanted.double().abs().max())
