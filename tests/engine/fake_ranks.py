"""An executor without a model: the next token is a hash of all tokens before it, read back through the block tables.

So a wrong block, position, slot, late token or chunk changes the text, and nothing else does: batching, chunking,
preemption and lateness must not. It also checks what every step promises.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np

from multitensor.config import EngineConfig
from multitensor.engine.batch import SamplingSetup, StepInput, StepMasks, StepOutput, TokenLogprobs
from multitensor.engine.engine import Engine
from multitensor.engine.request import SamplingParams
from multitensor.engine.uniforms import derive_seed, uniform
from multitensor.errors import RankFailed

VOCAB = 40
EOS = 0


def digest(*values: object) -> int:
    return int.from_bytes(hashlib.blake2b(repr(values).encode(), digest_size=8).digest(), "little")


def next_token(context: list[int], share: float | None, mask: np.ndarray | None = None) -> int:
    """share: None for greedy. mask: what a grammar allows."""
    if mask is None:
        return digest("token", context, share) % VOCAB
    tokens = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist()
    return int(tokens[digest("token", context, share) % len(tokens)])


def next_score(context: list[int], following: int, top: int) -> tuple[list[int], list[float], float | None]:
    best = [digest("top", context, k) % VOCAB for k in range(top)]
    after = None if following < 0 else -float(digest("next", context, following) % 100)
    return best, [-float(k) for k in range(top)], after


def hidden_state(context: list[int]) -> np.ndarray:
    return np.array([digest("hidden", context, k) % 100 for k in range(6)], np.float32)


def grammar_ends(taken: list[int]) -> bool:
    return digest("end", taken) % 13 == 0


class FakeGrammar:
    """A third of the vocabulary, chosen by what came before, and an end somewhere."""

    def __init__(self) -> None:
        self.taken: list[int] = []
        self.finished = False
        self.error: str | None = None
        self.fill()

    def fill(self) -> None:
        bits = np.array([digest("allowed", self.taken, token) % 3 == 0 for token in range(64)], bool)
        bits[VOCAB:] = False
        bits[1 + len(self.taken) % 5] = True
        self.mask = np.packbits(bits, bitorder="little").view(np.uint32)

    def accept(self, token: int) -> None:
        assert self.mask[token // 32] >> (token % 32) & 1, "a token that the grammar does not allow"
        self.taken.append(token)
        self.finished = grammar_ends(self.taken)


class FakeGrammars:
    """A compiler of such grammars: to be put into an Engine."""

    def compile(self, spec: Any) -> None: ...

    def start(self, spec: Any, **options: Any) -> FakeGrammar:
        return FakeGrammar()

    def fill_masks(self, states: list[FakeGrammar]) -> None:
        for state in states:
            state.fill()


def oracle(
    prompt: list[int],
    params: SamplingParams,
    *,
    context: int,
    engine_seed: int = 0,
    number: int = 0,
    constrained: bool = False,
) -> list[list[int]]:
    """Output ids of every continuation, one token at a time, nothing batched."""
    seed = derive_seed(0, params.seed) if params.seed is not None else derive_seed(1, engine_seed, number)
    limit = context - len(prompt)
    limit = limit if params.max_tokens is None else min(limit, params.max_tokens)
    results = []
    for index in range(params.n):
        ids = list(prompt)
        grammar = FakeGrammar() if constrained else None
        while len(ids) - len(prompt) < limit:
            share = None if params.greedy else uniform(derive_seed(seed, index), len(ids))
            ids.append(next_token(ids, share, grammar.mask if grammar else None))
            if ids[-1] in params.stop_ids or (ids[-1] == EOS and not params.ignore_eos):
                break
            if grammar:
                grammar.accept(ids[-1])
                grammar.fill()
                if grammar.finished:
                    break
        results.append(ids[len(prompt) :])
    return results


class FakeExecutor:
    """One rank, computed when its result is collected. fail_at: the step whose collection fails."""

    def __init__(self, n_blocks: int, block_size: int, max_batch_tokens: int, max_num_seqs: int) -> None:
        self.block_size = block_size
        self.max_batch_tokens = max_batch_tokens
        self.max_num_seqs = max_num_seqs
        self.cache = np.full((n_blocks, block_size), -7, np.int64)
        self.last_tokens = np.full(max_num_seqs, -5, np.int64)
        self.setups: dict[int, SamplingSetup] = {}
        self.sampled: dict[int, list[int]] = {}  # by slot: what penalties see of its text
        self.queue: deque[StepInput] = deque()
        self.late_masks: dict[int, dict[int, np.ndarray]] = {}  # by step
        self.steps: list[StepInput] = []
        self.fail_at: int | None = None
        self.closed = 0
        self.lost = False
        self.on_submit: Callable[[StepInput], None] = lambda step: None

    def start(self, plan: Any, config: Any, progress: Any = None) -> None: ...

    def submit(self, step: StepInput) -> None:
        self.check_step(step)
        self.queue.append(step)
        self.steps.append(step)
        self.on_submit(step)

    def rank_seconds(self) -> tuple[tuple[float, float | None], ...]:
        return ((0.5, 0.25),)

    def send_masks(self, masks: StepMasks) -> None:
        (step,) = self.queue  # the one before has been collected, the next one not been submitted
        assert masks.step == step.step and step.step not in self.late_masks
        assert set(masks.masks) <= set(step.late_masks)
        self.late_masks[step.step] = masks.masks

    def check(self) -> None:
        if self.lost:
            raise RankFailed("rank 1 of 2 was killed (signal 9)")

    def check_step(self, step: StepInput) -> None:
        assert len(self.queue) < 2, "more than one step ahead"
        assert step.step == len(self.steps)
        assert 1 <= step.query_lens.sum() <= self.max_batch_tokens
        assert len(step.token_ids) == len(step.score_next) == step.query_lens.sum()
        assert (step.query_lens > 0).all()
        assert len(set(step.slots.tolist())) == len(step.slots) <= self.max_num_seqs
        assert not set(step.masks) & set(step.late_masks)
        assert all(under_way.step in self.late_masks for under_way in self.queue if under_way.late_masks)
        used, written = self.blocks(step)
        for under_way in self.queue:
            used_there, written_there = self.blocks(under_way)
            for block, owner in written.items():
                assert used_there.get(block, {owner}) == {owner}, "a block changed hands while a step used it"
            for block, owner in written_there.items():
                assert used.get(block, {owner}) == {owner}, "a block was shared before the step that fills it had ended"

    def blocks(self, step: StepInput) -> tuple[dict[int, set[tuple[int, int]]], dict[int, tuple[int, int]]]:
        """Block -> everyone who uses it, as (slot, logical number); and block -> the one who writes to it."""
        used: dict[int, set[tuple[int, int]]] = {}
        written: dict[int, tuple[int, int]] = {}
        for row, slot in enumerate(step.slots.tolist()):
            cached = int(step.context_lens[row])
            n_blocks = -(-(cached + int(step.query_lens[row])) // self.block_size)
            table = step.block_tables[row, :n_blocks].tolist()
            assert len(set(table)) == len(table)
            for number, block in enumerate(table):
                used.setdefault(block, set()).add((slot, number))
                if number >= cached // self.block_size:
                    written[block] = (slot, number)
        assert all(len(used[block]) == 1 for block in written), "a block that is written to is shared"
        return used, written

    def collect(self) -> StepOutput:
        step = self.queue.popleft()
        if step.step == self.fail_at:
            raise RankFailed("rank 1 of 2 was killed (signal 9)")
        for setup in step.setups:
            self.setups[setup.slot] = setup
            self.sampled[setup.slot] = list(setup.output_ids)
        tokens = np.full(len(step.slots), -1, np.int32)
        output = StepOutput(step.step, tokens)
        starts = np.concatenate([[0], np.cumsum(step.query_lens)])
        for row, slot in enumerate(step.slots.tolist()):
            self.run_row(step, row, slot, int(starts[row]), output)
        return output

    def run_row(self, step: StepInput, row: int, slot: int, first: int, output: StepOutput) -> None:
        n_cached, n_new = int(step.context_lens[row]), int(step.query_lens[row])
        table = step.block_tables[row]
        for i in range(n_new):
            token = int(step.token_ids[first + i])
            position = n_cached + i
            value = token if token >= 0 else int(self.last_tokens[slot])
            self.cache[table[position // self.block_size], position % self.block_size] = value
        used = -(-(n_cached + n_new) // self.block_size)
        context = self.cache[table[:used]].reshape(-1)[: n_cached + n_new].tolist()
        if step.score_top[row]:
            output.scores[row] = [
                next_score(context[: n_cached + i + 1], int(step.score_next[first + i]), int(step.score_top[row]))
                for i in range(n_new)
            ]
        if row in step.pooled:
            vectors = [hidden_state(context[: n_cached + i + 1]) for i in range(n_new)]
            output.sums[row] = np.sum(vectors, axis=0, dtype=np.float32)
        if step.sample[row]:
            setup = self.setups[slot]
            if len(setup.prompt_ids):
                assert [*setup.prompt_ids, *self.sampled[slot]] == context, "penalties look at another text"
            masks = {**step.masks, **(self.late_masks[step.step] if step.late_masks else {})}
            share = None if setup.temperature == 0 else float(step.uniforms[row])
            token = next_token(context, share, masks.get(row))
            output.token_ids[row] = token
            self.last_tokens[slot] = token
            self.sampled[slot].append(token)
            if setup.logprobs >= 0:
                best = [(token + k) % VOCAB for k in range(setup.logprobs)]
                output.logprobs[row] = TokenLogprobs(-0.5, best, [-0.5 - k for k in range(setup.logprobs)], 1)

    def call(self, method: str, **arguments: Any) -> list[Any]:
        assert not self.queue, "called between submit and collect"
        return [(method, arguments)]

    def close(self) -> None:
        self.closed += 1


class FakeTokenizer:
    """Token t is the letter number t ("a" for 1 ...), or a digit; EOS is a control token."""

    eos_ids = frozenset({EOS})
    bos_id = 39
    add_bos = True
    vocab_size = VOCAB

    def token_bytes(self, token: int) -> bytes:
        if token == EOS:
            return b"</s>"
        return (
            b"<s>"
            if token == self.bos_id
            else chr(ord("a") + token - 1).encode()
            if token <= 26
            else b"%d" % (token % 10)
        )

    def encode(self, text: str, *, special: bool = False, bos: bool = False) -> list[int]:
        ids = [ord(c) - ord("a") + 1 for c in text]
        return [self.bos_id, *ids] if bos else ids

    def decode(self, ids: list[int], *, skip_special: bool = True) -> str:
        stream = self.stream(skip_special=skip_special)
        return "".join(stream.push(token) for token in ids) + stream.flush()

    def stream(self, *, skip_special: bool = True, continuation: bool = False) -> Any:
        hidden = (EOS, self.bos_id) if skip_special else ()
        return SimpleNamespace(
            push=lambda token: "" if token in hidden else self.token_bytes(token).decode(), flush=lambda: ""
        )


def make_plan(context: int, n_blocks: int, block_size: int, max_batch_tokens: int = 16) -> Any:
    return SimpleNamespace(
        context=context,
        kv_tokens=n_blocks * block_size,
        block_size=block_size,
        max_batch_tokens=max_batch_tokens,
        spec=SimpleNamespace(vocab_size=VOCAB),
    )


def make_config(
    max_num_seqs: int,
    max_batch_tokens: int,
    block_size: int,
    seed: int = 0,
    prefix_cache: Any = "shared",
    mixed_batch_tokens: int | None = None,
) -> EngineConfig:
    sizes = max_num_seqs, max_batch_tokens, block_size
    return EngineConfig(
        *("fake", "float32", True, seed, *sizes, prefix_cache),
        mixed_batch_tokens=mixed_batch_tokens,
    )


def make_engine(
    *,
    context: int = 64,
    n_blocks: int = 64,
    block_size: int = 4,
    max_num_seqs: int = 4,
    max_batch_tokens: int = 16,
    seed: int = 0,
    tokenizer: Any = None,
    prefix_cache: str = "shared",
    mixed_batch_tokens: int | None = None,
) -> tuple[Engine, FakeExecutor]:
    executor = FakeExecutor(n_blocks, block_size, max_batch_tokens, max_num_seqs)
    config = make_config(max_num_seqs, max_batch_tokens, block_size, seed, prefix_cache, mixed_batch_tokens)
    plan = make_plan(context, n_blocks, block_size, max_batch_tokens)
    return Engine(executor, plan, config, tokenizer or FakeTokenizer()), executor
