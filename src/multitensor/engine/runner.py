"""One rank: its weights, its part of the KV cache and its decoder, driven a step at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from multitensor.config import Q8_WIRE, EngineConfig
from multitensor.engine.batch import StepInput, StepOutput
from multitensor.engine.executor import Progress
from multitensor.engine.logprobs import Logprobs
from multitensor.engine.rank_clock import RankClock
from multitensor.engine.sampler import Sampler
from multitensor.engine.statistics import Stages
from multitensor.formats.checkpoint import Checkpoint
from multitensor.kernels.attention_inputs import AttentionInputs
from multitensor.kernels.cache_tensor import make_cache
from multitensor.kernels.dispatch import make_kernels
from multitensor.kernels.host_copy import to_device
from multitensor.kernels.quant_tensor import QuantTensor
from multitensor.kernels.token_rows import TokenChooser
from multitensor.loading.loader import load_rank
from multitensor.model.attention import KVCache
from multitensor.model.decoder import Decoder
from multitensor.model.linear import joint_matrices
from multitensor.model.row_cuts import OVERLAP_TOKENS, row_cut, uncut
from multitensor.parallel.group import Group
from multitensor.parallel.wire import WireName
from multitensor.sharding.memory import host_memory_bytes, peer_memory_bytes
from multitensor.sharding.plan import Plan

if TYPE_CHECKING:
    from multitensor.model.decode_graph import DecodeGraphs

SCORE_SCRATCH_BYTES = 256 << 20
MAX_GRAPH_SEQUENCES = 64
MAX_GRAPH_PARTS = 4  # recorded steps, one after the other, that beat a step of launches, where weights are quantised

Score = tuple[list[int], list[float], float | None]


@dataclass(frozen=True)
class ForwardedStep:
    """A step whose forward pass is queued on the device. logits: float32 [sequences `chosen`, vocabulary]. hidden and
    starts: all hidden states and where each sequence's begin; None where nothing but logits is wanted. likeliest: as
    Sampler.sample takes it."""

    step: StepInput
    chosen: np.ndarray
    logits: torch.Tensor | None
    hidden: torch.Tensor | None
    starts: np.ndarray | None
    started: torch.cuda.Event | None
    likeliest: torch.Tensor | None = None


@dataclass(frozen=True)
class BegunStep:
    """A step that is queued on the device. ids: int64 of the sequences `chosen`, and logprobs, by row of these: on the
    host once `copied` is over (None: they are there already)."""

    step: int
    sequences: int
    chosen: np.ndarray
    ids: torch.Tensor
    copied: torch.cuda.Event | None
    started: torch.cuda.Event | None
    logprobs: Logprobs | None
    scores: dict[int, list[Score]]
    sums: dict[int, np.ndarray]


def _is_small_decode(step: StepInput, most: int) -> bool:
    """One new token each for at most so many sequences, and nothing but logits wanted of it."""
    few = len(step.query_lens) <= most
    plain = not step.score_top.any() and not step.pooled
    return few and plain and bool((step.query_lens == 1).all()) and bool(step.sample.any())


def _run_graphs(graphs: DecodeGraphs, step: StepInput) -> tuple[torch.Tensor, torch.Tensor]:
    """As DecodeGraphs.run, of any number of sequences: so many at a time as are recorded."""
    parts: list[tuple[torch.Tensor, torch.Tensor]] = []
    for first in range(0, len(step.slots), MAX_GRAPH_SEQUENCES):
        part = slice(first, first + MAX_GRAPH_SEQUENCES)
        rows, ids = graphs.run(step.token_ids[part], step.slots[part], step.context_lens[part], step.block_tables[part])
        is_last = first + MAX_GRAPH_SEQUENCES >= len(step.slots)  # what others yield is gone after the next run
        parts.append((rows, ids) if is_last else (rows.clone(), ids.clone()))
    if len(parts) == 1:
        return parts[0]
    return torch.cat([rows for rows, _ in parts]), torch.cat([ids for _, ids in parts])


def _sums(step: StepInput, hidden: torch.Tensor, starts: np.ndarray) -> dict[int, np.ndarray]:
    """Float32 sums over positions of the sequences that are pooled; waits for the device if there are any."""
    return {
        number: hidden[starts[number] : starts[number] + step.query_lens[number]].float().sum(0).cpu().numpy()
        for number in step.pooled
    }


class ModelRunner:
    """What an executor runs on each rank. `load` first; then `step`, `memory` and `verify` between steps.

    All ranks make the same calls in the same order, for every one of them takes part in the group's collectives.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        plan: Plan,
        rank: int,
        config: EngineConfig,
        group: Group,
        device: torch.device,
    ) -> None:
        self.checkpoint = checkpoint
        self.plan = plan
        self.rank = rank
        self.config = config
        self.group = group
        self.device = device
        self.clock = RankClock(group, device)
        self.dtype: torch.dtype = getattr(torch, config.dtype)
        self.kernels = make_kernels(device, config.exact)
        self.kernels.try_out(config.experimental)
        group.kernels = self.kernels
        self.weights: dict[str, QuantTensor | torch.Tensor] = {}
        self.caches: list[KVCache] = []
        self.sampler = Sampler(config.max_num_seqs, plan.spec.vocab_size, plan.context, device)
        self._decoder: Decoder | None = None
        self._graphs: DecodeGraphs | None = None
        self.load_stages: dict[str, float] = {}

    @property
    def decoder(self) -> Decoder:
        if self._decoder is None:
            raise RuntimeError("the model is not loaded")
        return self._decoder

    def load(self, progress: Progress | None = None) -> None:
        """Reads this rank's weights and allocates its part of the KV cache; returns when all ranks have done so."""
        stages = Stages()
        adopt = self.kernels.adopt
        self.weights = load_rank(self.checkpoint, self.plan, self.rank, self.device, progress, adopt)
        self.kernels.join(self.weights, joint_matrices(self.plan.spec.n_layers))
        stages.end("weights")
        cut = row_cut(self.group, wanted=self.config.overlap)
        parts = self.plan, self.rank, self.weights, self.kernels, self.group
        self._decoder = Decoder(*parts, self.dtype, self.device, cut)
        shape = (
            self.plan.kv_tokens // self.plan.block_size,
            self.plan.block_size,
            self.plan.ranks[self.rank].kv_heads.size,
            self.plan.spec.head_dim,
        )
        kv_type, device = self.plan.kv_type, self.device
        self.caches = [
            (make_cache(kv_type, shape, device), make_cache(kv_type, shape, device)) for _ in self.plan.spec.layers
        ]
        stages.end("cache")
        if self.kernels.name == "cuda":
            vocabulary = tuple(rank.vocabulary.size for rank in self.plan.ranks)
            self.group.open_peer_memory(peer_memory_bytes(self.plan))
            self.group.open_host_memory(host_memory_bytes(self.plan))
            wire: WireName = "q8" if Q8_WIRE in self.config.experimental else "exact"
            self.group.choose_reductions(self.plan.spec.hidden_size, vocabulary, self.dtype, wire)
        self.sampler.chooser = self._token_chooser()
        self._graphs = self._decode_graphs()
        stages.end("reductions")
        self.group.barrier()
        stages.end("others")
        self.load_stages = stages.seconds

    def _token_chooser(self) -> TokenChooser | None:
        """What samples in one launch, where every rank has such."""
        chooser = self.kernels.token_chooser(self.plan.spec.vocab_size)
        return chooser if all(self.group.gather_objects(chooser is not None)) else None

    def _decode_graphs(self) -> DecodeGraphs | None:
        """CUDA graphs of small decode steps, where kernels and model allow them."""
        if self.kernels.name != "cuda":
            return None
        from multitensor.kernels.cuda.cuda_kernels import CudaKernels
        from multitensor.model.decode_graph import DecodeGraphs, can_capture

        if not isinstance(self.kernels, CudaKernels) or not can_capture(self.plan):
            return None
        parts = self.decoder, self.plan, self.rank, self.caches, self.kernels, self.group
        return DecodeGraphs(*parts, self.sampler.last_tokens, self.config.experimental)

    @torch.inference_mode()
    def step(self, step: StepInput) -> StepOutput:
        """Runs one flat batch; the result is equal on all ranks."""
        return self.finish(self.sample(self.forward(step), {}))

    @torch.inference_mode()
    def forward(self, step: StepInput) -> ForwardedStep:
        """Queues a step on the device up to the logits of what it samples, which are valid until the next one."""
        with self.clock.work():
            return self._forward(step, self.clock.mark())

    def _forward(self, step: StepInput, started: torch.cuda.Event | None) -> ForwardedStep:
        for setup in step.setups:
            self.sampler.admit(setup)
        if self._graphs is not None and _is_small_decode(step, self._most_recorded(self._graphs)):
            rows, likeliest = _run_graphs(self._graphs, step)
            chosen = np.flatnonzero(step.sample)
            if len(chosen) < len(rows):
                places = to_device(chosen, self.device)
                rows, likeliest = rows[places], likeliest[places]
            return ForwardedStep(step, chosen, rows, None, None, started, likeliest)
        inputs = AttentionInputs.build(
            step.query_lens, step.context_lens, step.block_tables, self.plan.block_size, self.device
        )
        hidden = self.decoder.forward(self._token_ids(step), inputs, self.caches)
        starts = np.asarray(inputs.query_starts)
        chosen = np.flatnonzero(step.sample)
        logits = self._logits(hidden, starts[chosen] + step.query_lens[chosen] - 1) if len(chosen) else None
        return ForwardedStep(step, chosen, logits, hidden, starts, started)

    @torch.inference_mode()
    def sample(self, forwarded: ForwardedStep, late_masks: Mapping[int, np.ndarray]) -> BegunStep:
        """Queues the rest. late_masks: as StepInput.masks, of the sequences for which they came late. What is sampled
        is known to the device at once, to the host at `finish`."""
        step, hidden, starts = forwarded.step, forwarded.hidden, forwarded.starts
        with self.clock.work():
            sampled = self._sample(forwarded, {**step.masks, **late_masks})
            scores = {} if hidden is None or starts is None else self._scores(step, hidden, starts)
            sums = {} if hidden is None or starts is None else _sums(step, hidden, starts)
            return self._begun(forwarded, *sampled, scores, sums)

    def is_done(self, begun: BegunStep) -> bool:
        """Whether `finish` would return without waiting."""
        return begun.copied is None or begun.copied.query()

    def finish(self, begun: BegunStep) -> StepOutput:
        """Waits for the step's ids. Steps finish in the order in which they began."""
        if begun.copied is not None:
            begun.copied.synchronize()
            self.clock.add_between(begun.started, begun.copied)
        token_ids = np.full(begun.sequences, -1, dtype=np.int64)
        token_ids[begun.chosen] = begun.ids.numpy()
        logprobs = {} if begun.logprobs is None else begun.logprobs.read()
        by_sequence = {int(begun.chosen[row]): value for row, value in logprobs.items()}
        return StepOutput(begun.step, token_ids, by_sequence, begun.scores, begun.sums)

    def _begun(
        self,
        forwarded: ForwardedStep,
        ids: torch.Tensor,
        logprobs: Logprobs | None,
        scores: dict[int, list[Score]],
        sums: dict[int, np.ndarray],
    ) -> BegunStep:
        """ids: int64 on the device, of the sequences `chosen`."""
        step, chosen, copied = forwarded.step, forwarded.chosen, None
        if self.device.type == "cuda":
            host = torch.empty(ids.shape, dtype=ids.dtype, pin_memory=True)
            host.copy_(ids, non_blocking=True)
            logprobs = None if logprobs is None else logprobs.to_host()
            copied = self.clock.mark()
            ids = host
        return BegunStep(step.step, len(step.slots), chosen, ids, copied, forwarded.started, logprobs, scores, sums)

    @staticmethod
    def _most_recorded(graphs: DecodeGraphs) -> int:
        """Sequences of a step that recorded ones do. In parts they read the weights for each, which beats expanding
        quantised weights to numbers, but hardly reading float weights once."""
        return MAX_GRAPH_SEQUENCES * (MAX_GRAPH_PARTS if graphs.reads_quantised else 1)

    def _token_ids(self, step: StepInput) -> torch.Tensor:
        """int64 [T] on the device; -1 becomes what the sequence's slot sampled last, which the host may not know."""
        ids = to_device(step.token_ids.astype(np.int64), self.device)
        places = np.flatnonzero(step.token_ids < 0)
        if len(places):
            slots = np.repeat(step.slots, step.query_lens)[places].astype(np.int64)
            last = self.sampler.last_tokens[to_device(slots, self.device)]
            ids[to_device(places, self.device)] = last
        return ids

    def _logits(self, hidden: torch.Tensor, rows: np.ndarray) -> torch.Tensor:
        """float32 [len(rows), vocabulary] of some rows of the hidden states."""
        if len(rows) == hidden.shape[0]:
            return self.decoder.logits(hidden)
        return self.decoder.logits(hidden.index_select(0, to_device(rows, self.device)))

    def _sample(
        self, forwarded: ForwardedStep, masks: Mapping[int, np.ndarray]
    ) -> tuple[torch.Tensor, Logprobs | None]:
        """(ids int64 on the device of the sequences that sample, their log-probabilities). masks: by sequence
        number."""
        step, chosen = forwarded.step, forwarded.chosen
        if forwarded.logits is None:
            return torch.zeros(0, dtype=torch.int64, device=self.device), None
        by_row = {row: masks[int(number)] for row, number in enumerate(chosen) if int(number) in masks}
        return self.sampler.sample(
            forwarded.logits, step.slots[chosen], step.uniforms[chosen], by_row, forwarded.likeliest
        )

    def _scores(self, step: StepInput, hidden: torch.Tensor, starts: np.ndarray) -> dict[int, list[Score]]:
        """Log-probabilities at every position of the scored sequences, a bounded number of rows at a time."""
        scored = np.flatnonzero(step.score_top)
        if len(scored) == 0:
            return {}
        rows = np.concatenate([np.arange(starts[s], starts[s] + step.query_lens[s]) for s in scored])
        tops = np.repeat(step.score_top[scored], step.query_lens[scored])
        found: list[Score] = []
        # Logits, the ranks' parts of them, and their logarithms are alive together.
        at_once = max(1, SCORE_SCRATCH_BYTES // (3 * 4 * self.plan.spec.vocab_size))
        for first in range(0, len(rows), at_once):
            part = rows[first : first + at_once]
            found += self._score_rows(
                self._logits(hidden, part), tops[first : first + at_once].tolist(), step.score_next[part]
            )
        result: dict[int, list[Score]] = {}
        done = 0
        for sequence in scored.tolist():
            length = int(step.query_lens[sequence])
            result[sequence] = found[done : done + length]
            done += length
        return result

    def _score_rows(self, logits: torch.Tensor, tops: Sequence[int], following: np.ndarray) -> list[Score]:
        """One (top ids, their log-probabilities, that of the id that follows) a row. following: -1 for none."""
        logprobs = torch.log_softmax(logits, dim=-1)
        values, ids = logprobs.topk(min(max(tops), logprobs.shape[-1]), dim=-1)
        wanted = to_device(following.astype(np.int64), self.device).unsqueeze(1)
        next_values = logprobs.gather(1, wanted.clamp(min=0)).squeeze(1).tolist()
        columns = (ids.tolist(), values.tolist(), next_values, tops, following.tolist())
        return [
            (best[:top], best_values[:top], value if follows >= 0 else None)
            for best, best_values, value, top, follows in zip(*columns, strict=True)
        ]

    def memory(self) -> dict[str, int]:
        """Bytes that this rank holds, as measured: resident weights, KV cache, and on a GPU what torch's allocator
        has handed out and reserved, what peers see of it and what they see of the host's memory, what recorded decode
        steps keep, and what torch has page-locked of the host's memory; on a CPU the resident memory of the process."""
        held = {id(weight): weight.nbytes for weight in self.weights.values()}
        result = {
            "weights_bytes": sum(held.values()),
            "kv_bytes": sum(k.nbytes + v.nbytes for k, v in self.caches),
        }
        if self.device.type == "cuda":
            result["allocated_bytes"] = torch.cuda.memory_allocated(self.device)
            peer_memory = self.group.peer_memory
            result["peer_bytes"] = peer_memory.local.nbytes if peer_memory is not None else 0
            host_memory = self.group.host_memory
            result["host_bytes"] = host_memory.local.nbytes if host_memory is not None else 0
            result["reserved_bytes"] = torch.cuda.memory_reserved(self.device)
            result["graphs_bytes"] = self._graphs.nbytes if self._graphs is not None else 0
            result["pinned_bytes"] = int(torch.cuda.host_memory_stats().get("allocated_bytes.current", 0))
        else:
            import psutil

            result["rss_bytes"] = int(psutil.Process().memory_info().rss)
        return result

    def warm_up(self) -> float:
        """Steps whose results nobody wants, see engine/warm_up.py; seconds. On a CPU none: nothing would be gained.
        Collective; before the first step."""
        if self.device.type == "cpu":
            return 0.0
        from multitensor.engine.warm_up import warm_up

        return warm_up(self)

    def measure(self, batches: list[int]) -> dict[str, Any]:
        """Speed of this rank's memory, and the time of a decode step's reductions, see engine/measure.py; and of what
        loading took. Collective."""
        from multitensor.engine.measure import measure

        return {**measure(self, batches), "load_stages": self.load_stages}

    def reductions(self) -> dict[str, Any]:
        """How this rank's sums over ranks travel, and what was measured to choose it: as Group.describe_reductions, and
        "overlapped_from", the tokens of a step from which they travel while products are computed, or None."""
        overlapped_from = None if self.decoder.cut_rows is uncut else OVERLAP_TOKENS
        return {**self.group.describe_reductions(), "overlapped_from": overlapped_from}

    def verify(self, prompts: list[list[int]], **options: Any) -> dict[str, Any]:
        """The split model against the whole one; see engine/verify.py. Collective; every rank returns the result."""
        from multitensor.engine.verify import verify

        return verify(self, prompts, **options)

    def close(self) -> None:
        """Drops weights and caches; the group stays its maker's to close."""
        self._graphs = None
        self._decoder = None
        self.weights = {}
        self.caches = []
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
