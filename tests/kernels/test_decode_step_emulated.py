"""A GPU rank's whole decode step (decode_graph.py) on an emulated GPU, against the plain model in float32: embedding,
layers as one launch or as separate kernels, cache, logits, and the likeliest token, which the next step starts from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import emulated_cuda
import numpy as np
import pytest
import torch

from model_harness import BLOCK, RankModel, cpu_plan, shuffled_tables
from multitensor.formats.checkpoint import open_checkpoint
from multitensor.kernels.cache_tensor import make_cache
from multitensor.kernels.cuda import decode, float_matrix, layer, matrix, prefill, sample, small_batch
from multitensor.kernels.cuda.cuda_kernels import CudaKernels
from multitensor.loading.loader import load_rank
from multitensor.model.decode_graph import DecodeGraphs
from multitensor.model.decoder import Decoder
from multitensor.model.linear import joint_matrices
from multitensor.parallel.group import SingleGroup
from multitensor.sharding.memory import GRAPH_BUCKETS, graph_bytes
from synthetic import write_gguf

pytestmark = pytest.mark.skipif(emulated_cuda.compiler() is None, reason="there is no C++ compiler")
CPU = torch.device("cpu")
STEPS = 3

# architecture, weights, KV cache, sequences
CASES = {
    "one launch a layer": ("llama", "Q8_0", "f16", 2),
    "one launch a layer of floats, 8-bit cache": ("gemma3", "F16", "q8", 1),
    "separate kernels, biases": ("qwen2", "Q4_1", "f16", 3),
    "small batch, norms of heads": ("qwen3", "Q8_0", "f16", 7),
}


class Replay:
    """In place of torch.cuda.CUDAGraph: nothing is recorded, so a replay computes anew."""

    forward: Callable[[], object]

    def pool(self) -> None:
        return None

    def replay(self) -> None:
        self.forward()


class Unrecorded(emulated_cuda.AtOnce):
    """Nothing runs while a graph is recorded."""

    recording = False

    def launch(self, *arguments: Any, **options: Any) -> None:
        if not self.recording:
            super().launch(*arguments, **options)


@pytest.fixture(autouse=True)
def emulated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    queue = Unrecorded(tmp_path)

    @contextmanager
    def record(*arguments: Any, **options: Any) -> Iterator[None]:
        queue.recording = True
        yield
        queue.recording = False

    modules = (decode, float_matrix, layer, matrix, prefill, sample, small_batch)
    emulated_cuda.replace_gpu(monkeypatch, queue, *modules, processors=2)
    plain_empty = torch.empty
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Replay)
    monkeypatch.setattr(torch.cuda, "graph", record)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    event = SimpleNamespace(synchronize=lambda: None, record=lambda: None)
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)
    monkeypatch.setattr(torch, "empty", lambda *a, pin_memory=False, **k: plain_empty(*a, **k))


def graphs_of(plain: RankModel, path: Path, last: torch.Tensor) -> DecodeGraphs:
    """Over a copy of the plain model's weights in tiles."""
    plan, kernels, group = plain.plan, CudaKernels(CPU, exact=False), SingleGroup()
    group.kernels = kernels
    weights = load_rank(open_checkpoint(path), plan, 0, CPU, None, kernels.adopt)
    kernels.join(weights, joint_matrices(plan.spec.n_layers))
    decoder = Decoder(plan, 0, weights, kernels, group, torch.float16, CPU)
    for rope in decoder.ropes:
        rope.at(torch.arange(plan.context))  # on CPUs tables are made when they are asked for
    shape = (plan.kv_tokens // BLOCK, BLOCK, plan.ranks[0].kv_heads.size, plan.spec.head_dim)
    caches = [(make_cache(plan.kv_type, shape, CPU), make_cache(plan.kv_type, shape, CPU)) for _ in plan.spec.layers]
    return DecodeGraphs(decoder, plan, 0, caches, kernels, group, last)


@pytest.mark.parametrize("name", CASES)
def test_steps_from_an_empty_cache(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    architecture, types, kv_type, sequences = CASES[name]
    shape = {"hidden": 128, "ffn": 256, "n_heads": 2, "n_kv_heads": 1, "head_dim": 64, "vocab": 320}
    path = write_gguf(tmp_path / "m.gguf", architecture, types=types, **shape)  # type: ignore[arg-type]
    plan = cpu_plan(open_checkpoint(path), (1,), context=64, kv_tokens=256, kv_type=kv_type)
    plain = RankModel(open_checkpoint(path), plan, SingleGroup())
    last = torch.zeros(8, dtype=torch.int64)
    graphs = graphs_of(plain, path, last)
    monkeypatch.setattr(Replay, "forward", lambda self: forward(graphs), raising=False)
    tables = shuffled_tables([STEPS] * sequences, plan.kv_tokens // BLOCK)
    slots = np.random.default_rng(0).permutation(8)[:sequences].astype(np.int32)
    ids = np.arange(5, 5 + sequences, dtype=np.int32)
    told = [ids.tolist()]
    for step in range(STEPS):
        context = np.full(sequences, step, dtype=np.int32)
        given = ids if step == 0 else np.full(sequences, -1, dtype=np.int32)  # what the slot found last
        logits, likeliest = graphs.run(given, slots, context, tables)
        wanted = plain.step([[token] for token in told[-1]], context.tolist(), tables)
        error = (logits - torch.cat(wanted)).norm() / torch.cat(wanted).norm()
        assert float(error) < (5e-3 if kv_type == "f16" else 2e-2)
        assert torch.equal(likeliest, logits.argmax(-1))
        assert torch.equal(last[torch.from_numpy(slots).long()], likeliest)
        told.append(likeliest.tolist())
    bucket = next(size for size in GRAPH_BUCKETS if size >= sequences)
    assert 4 * bucket * plan.spec.vocab_size < graphs.nbytes <= graph_bytes(plan, plan.ranks[0], (bucket,))


def forward(graphs: DecodeGraphs) -> None:
    """What the graph that is being replayed would do, into the same logits."""
    (graph,) = graphs._graphs.values()
    logits = graph._forward()
    assert graph.logits is not None
    graph.logits.copy_(logits)
