"""Which tokens of which sequences make the next step. Pure bookkeeping: no model, no clock, no torch.

Steps are scheduled one ahead of the results: while step n runs, step n + 1 is made with -1 for tokens that step n will
yield. What can be known beforehand is (the limit of output tokens, hence the end of the context); what cannot (an end
token, a stop string, a cancellation, the end of a grammar's text) makes one token too many, which is dropped when it
arrives. What a grammar allows next is not known beforehand either: the step is submitted without, and the masks follow.

Tokens: every sequence that decodes gets its one, so a long prompt delays nobody's next token by more than one step.
What is left goes to few prompts at a time, those that begin included: the oldest gets on in any case, then keys take
turns, and of each those come first that want least. So a long prompt delays no short one by its length, and many are
done one after the other.

Blocks: whoever started first gets them first; the youngest gives its own back when the pool runs dry and computes them
again later ("preemption with recompute"). It keeps its sampler slot meanwhile: as it will be the next to be admitted,
nobody waits for that slot. The oldest is never preempted, so there is always progress.

Slots: those that wait for their first step are taken by turns of their keys. When no slot is free, the key that holds
most gives slots to keys that wait and hold at least two fewer, so that nobody's many answers make another wait for the
end of one. Its youngest is preempted, gives its slot up, and is its key's next; with a new slot the ranks are told what
it sampled (for penalties). It then keeps that slot for KEPT_TOKENS tokens at least, whoever waits.

Prefixes: a sequence that starts takes over the full blocks of tokens that others (or itself, before a preemption)
computed, as far as its own beginning is the same and the steps that wrote them have ended. At least its last token is
computed anew, for its logits.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace

import numpy as np

from multitensor.engine.batch import SamplingSetup, StepInput, StepMasks, StepOutput, TokenLogprobs
from multitensor.engine.fair_queue import FairQueue
from multitensor.engine.kv_cache import BlockManager
from multitensor.engine.sequence import Sequence
from multitensor.engine.uniforms import uniform


@dataclass(frozen=True)
class Chunk:
    """Tokens [start, start + size) of a sequence in one step; samples: its last token yields a new one.
    fills: the blocks that are full then and were not before, of which the first is number first_filled.
    late: what its grammar allows depends on a token under way."""

    sequence: Sequence
    start: int
    size: int
    samples: bool
    first_filled: int
    fills: list[int]
    life: int  # of the sequence: what it asked for before a preemption is answered again
    late: bool


@dataclass(frozen=True)
class Update:
    """What a step's end brought for one sequence: a token (with its log-probabilities, if asked), or
    news of a text that is read."""

    sequence: Sequence
    token: int | None
    logprobs: TokenLogprobs | None = None


KEPT_TOKENS = 16  # that a sequence makes before it is preempted for another key again
MOST_PROMPTS = 4  # that take whole pieces of a step: attention of a prompt is a launch of its own on GPUs


class Scheduler:
    """max_batch_tokens: query tokens in one step; mixed_batch_tokens: in one in which somebody decodes (None: as many);
    max_num_seqs: sequences that hold a slot; n_blocks of block_size tokens: the KV pool."""

    def __init__(
        self,
        *,
        max_batch_tokens: int,
        max_num_seqs: int,
        n_blocks: int,
        block_size: int,
        mixed_batch_tokens: int | None = None,
    ) -> None:
        self.max_batch_tokens = max_batch_tokens
        self.mixed_batch_tokens = min(max_batch_tokens, mixed_batch_tokens or max_batch_tokens)
        self.max_num_seqs = max_num_seqs
        self.blocks = BlockManager(n_blocks, block_size)
        self.waiting: FairQueue[Sequence] = FairQueue()
        self.running: list[Sequence] = []  # in the order in which they started
        self.preemptions = 0
        self.prefix_queries = 0  # tokens of sequences that started and might have been found in blocks
        self.prefix_hits = 0  # those that were
        self.started: list[Sequence] = []  # those that the last call of schedule() gave a slot
        self._free_slots = list(range(max_num_seqs - 1, -1, -1))
        self._under_way: deque[tuple[int, list[Chunk]]] = deque()
        self._next_step = 0

    @property
    def has_unfinished(self) -> bool:
        return bool(self.waiting or self.running)

    @property
    def n_under_way(self) -> int:
        return len(self._under_way)

    def add(self, sequence: Sequence) -> None:
        if self.blocks.blocks_for(sequence.total + sequence.limit) > self.blocks.n_blocks:
            raise ValueError("the sequence can outgrow the KV pool; its limit must be lower")
        self.waiting.push(sequence)

    def finish(self, sequence: Sequence) -> None:
        """Ended or cancelled; safe to call twice. Tokens under way are dropped when they come."""
        if sequence.finished:
            return
        sequence.finished = True
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)
        self.blocks.release(sequence.table, sequence.last_step)
        if sequence.slot >= 0:  # the ranks take steps in order: a later step may fill the slot anew at once
            self._free_slots.append(sequence.slot)

    def schedule(self) -> StepInput | None:
        """The next step, which counts as under way from now on; None when there is nothing to compute before the
        results of the steps under way are known."""
        self._share_slots()
        preemptions = self.preemptions
        newcomers = self._newcomers()
        running = [(sequence, sequence.remaining) for sequence in self.running]
        decoding = any(want == 1 for _, want in running)
        sizes = _shares(self.mixed_batch_tokens if decoding else self.max_batch_tokens, running, newcomers)
        chunks, starved = self._continue_running(sizes)
        self.started = []
        if not starved and preemptions == self.preemptions:
            chunks += self._admit([sequence for sequence, _ in newcomers], sizes)
        if not chunks:
            return None
        step, self._next_step = self._next_step, self._next_step + 1
        for chunk in chunks:
            chunk.sequence.last_step = step
            chunk.sequence.computed += chunk.size
            chunk.sequence.pending += chunk.samples
        self._under_way.append((step, chunks))
        setups = tuple(
            replace(started.setup, slot=started.slot, output_ids=tuple(started.output_ids))
            for started in self.started
            if started.setup
        )
        return _step_input(step, chunks, setups)

    def late_masks(self) -> StepMasks | None:
        """For the oldest step under way, once the results of the one before are collected and the grammars have taken
        its tokens: the masks that the step waits for, None if it waits for none."""
        if not self._under_way or not any(chunk.late for chunk in self._under_way[0][1]):
            return None
        step, chunks = self._under_way[0]
        waiting = {number: chunk.sequence for number, chunk in enumerate(chunks) if chunk.late}
        masks = {
            number: sequence.grammar.mask
            for number, sequence in waiting.items()
            if sequence.grammar is not None and not sequence.finished
        }
        return StepMasks(step, masks)

    def collect(self, output: StepOutput) -> Iterator[Update]:
        """Takes the result of the oldest step under way. Each update is applied before it is yielded, and sequences
        that the caller finishes meanwhile get no more."""
        step, chunks = self._under_way.popleft()
        if output.step != step:
            raise RuntimeError(f"the ranks answered step {output.step} where step {step} was expected")
        for chunk in chunks:
            self._remember(chunk)
        self.blocks.step_ended(step)
        for number, chunk in enumerate(chunks):
            sequence = chunk.sequence
            if chunk.samples:
                sequence.pending -= 1
            if sequence.finished:
                continue
            if chunk.samples:
                token = int(output.token_ids[number])
                sequence.output_ids.append(token)
                yield Update(sequence, token, output.logprobs.get(number))
            elif sequence.score_top:
                # After a preemption positions come twice; the first answer stays.
                sequence.scores += output.scores[number][len(sequence.scores) - chunk.start :]
                yield Update(sequence, None)
            elif sequence.pooled and chunk.life == sequence.lives:
                sequence.sums.append(output.sums[number])
                sequence.n_summed += chunk.size
                yield Update(sequence, None)

    def _remember(self, chunk: Chunk) -> None:
        """The blocks that the chunk filled can be found from now on. They are held until its step is counted as ended,
        even when the sequence has given them up since."""
        sequence, size = chunk.sequence, self.blocks.block_size
        sequence.n_filled = max(sequence.n_filled, chunk.first_filled + len(chunk.fills))
        if sequence.salt is None or not chunk.fills:
            return
        known = (len(sequence.prompt_ids) + len(sequence.output_ids)) // size  # a cancelled one's last may never be
        stop = min(chunk.first_filled + len(chunk.fills), known)
        hashes = sequence.block_hashes(max(stop, 0), size)[chunk.first_filled :]
        for block, content in zip(chunk.fills, hashes, strict=False):
            self.blocks.remember(block, content)

    def _known_blocks(self, sequence: Sequence) -> list[int]:
        """Blocks that hold its beginning already, the last token left out. It has no token under way."""
        if not sequence.can_share:
            return []
        size = self.blocks.block_size
        return self.blocks.find(sequence.block_hashes((sequence.total - 1) // size, size))

    def _share_slots(self) -> None:
        """Frees a slot for each waiting key that finds none, as long as another key holds two more than it. (Nobody's
        turn comes while blocks are what is wanting.)"""
        heads = self.waiting.heads()[len(self._free_slots) :]
        if not heads:
            return
        held = Counter(sequence.key for sequence in self.running)
        for head in reversed(heads):  # so that the first of them is preferred last, hence most
            richest, most = max(held.items(), key=lambda item: item[1], default=("", 0))
            if most < held[head.key] + 2:
                continue
            victim = self._youngest_of(richest)
            if victim is None:
                continue
            self._preempt(victim)
            self.waiting.push_back(victim)
            self._free_slots.append(victim.slot)
            victim.slot = -1
            victim.keeps_until = len(victim.output_ids) + victim.pending + KEPT_TOKENS
            held[richest] -= 1
            held[head.key] += 1
            self.waiting.prefer(head.key)

    def _youngest_of(self, key: str) -> Sequence | None:
        """That may give its slot up; never the oldest of all."""
        for sequence in reversed(self.running[1:]):
            if sequence.key == key and len(sequence.output_ids) >= sequence.keeps_until:
                return sequence
        return None

    def _newcomers(self) -> list[tuple[Sequence, int]]:
        """Those that could start now, the next first, and how many tokens each wants. One starts when the blocks for
        all tokens it has are free, though it takes them chunk by chunk."""
        found: list[tuple[Sequence, int]] = []
        slots = len(self._free_slots)
        if not self.waiting or (slots == 0 and next(iter(self.waiting)).slot < 0):
            return found
        # Blocks that the running will take for tokens that they have are not free.
        owed = sum(max(0, self.blocks.blocks_for(each.total) - len(each.table)) for each in self.running)
        free = self.blocks.n_free - owed
        filling = {content for sequence in self.running for content in sequence.hashes[sequence.n_filled :]}
        for sequence in self.waiting:
            known = self._known_blocks(sequence) if not sequence.pending else []
            if sequence.can_share and not filling.isdisjoint(sequence.hashes[len(known) : len(known) + 1]):
                continue  # others compute just what it needs next: once they have, it takes it over
            slots -= sequence.slot < 0
            free -= self.blocks.blocks_for(sequence.total) - len(known) + self.blocks.n_idle(known)
            if sequence.pending or slots < 0 or free < 0:
                break
            filling.update(sequence.hashes[len(known) :])
            found.append((sequence, sequence.remaining - len(known) * self.blocks.block_size))
        return found

    def _continue_running(self, sizes: dict[Sequence, int]) -> tuple[list[Chunk], bool]:
        """Chunks of the sequences that run already, and whether one of them waits for blocks, which the younger must
        then leave to it."""
        chunks: list[Chunk] = []
        starved = False
        position = 0
        while position < len(self.running):  # preemption takes from the end
            sequence = self.running[position]
            position += 1
            size = sizes.get(sequence, 0)
            if size == 0:
                continue
            needs_blocks = self.blocks.blocks_for(sequence.computed + size) > len(sequence.table)
            if needs_blocks and (starved or not self._make_room(sequence, sequence.computed + size)):
                starved = True
                continue
            chunks.append(self._chunk(sequence, size))
        return chunks, starved

    def _make_room(self, sequence: Sequence, tokens: int) -> bool:
        """Blocks for `tokens` tokens, at the cost of younger sequences if need be. False: it must wait for blocks
        that steps under way still use, or it was the youngest and lost its own."""
        while not self.blocks.grow(sequence.table, tokens):
            missing = self.blocks.blocks_for(tokens) - len(sequence.table)
            if missing <= self.blocks.n_free + self.blocks.n_waiting:
                return False
            victim = self.running[-1]
            self._preempt(victim)
            self.waiting.push_first(victim)
            if victim is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """It runs no more; the caller puts it where it waits."""
        self.preemptions += 1
        self.running.remove(sequence)
        self.blocks.release(sequence.table, sequence.last_step)
        sequence.computed = sequence.n_filled = sequence.n_summed = 0
        sequence.sums.clear()
        sequence.lives += 1

    def _admit(self, newcomers: list[Sequence], sizes: dict[Sequence, int]) -> list[Chunk]:
        """Chunks of sequences that start, or start again (who must be computed again also knows all its tokens)."""
        chunks: list[Chunk] = []
        promised = 0
        for sequence in newcomers:
            known = self._known_blocks(sequence)  # the running may have taken some meanwhile
            needed = self.blocks.blocks_for(sequence.total) - len(known)
            size = sizes.get(sequence, 0)
            if size == 0 or needed + self.blocks.n_idle(known) > self.blocks.n_free - promised:
                break
            self.waiting.take(sequence)
            self.running.append(sequence)
            self.blocks.share(sequence.table, known)
            sequence.computed = len(known) * self.blocks.block_size
            self.blocks.grow(sequence.table, sequence.computed + size)
            promised += self.blocks.blocks_for(sequence.total) - len(sequence.table)
            if sequence.slot < 0:
                sequence.slot = self._free_slots.pop()
                self.started.append(sequence)
                if sequence.can_share and sequence.lives == 0:
                    self.prefix_queries += len(sequence.prompt_ids)
                    self.prefix_hits += sequence.computed
                    sequence.cached = sequence.computed
            chunks.append(self._chunk(sequence, size))
        return chunks

    def _chunk(self, sequence: Sequence, size: int) -> Chunk:
        start, stop = sequence.computed, sequence.computed + size
        first, last = start // self.blocks.block_size, stop // self.blocks.block_size
        samples = not sequence.is_read and stop == sequence.total
        late = samples and sequence.grammar is not None and sequence.pending > 0
        return Chunk(sequence, start, size, samples, first, sequence.table[first:last], sequence.lives, late)


def _shares(
    budget: int, running: SequenceOf[tuple[Sequence, int]], newcomers: SequenceOf[tuple[Sequence, int]]
) -> dict[Sequence, int]:
    """How many tokens each may compute now, of those it wants. The running that want a single one get it. The rest goes
    to prompts, to few at a time, so that one after the other is done instead of all together at the end: none gets more
    than a MOST_PROMPTS-th while others wait, and what is left then goes to the first."""
    ones = [sequence for sequence, want in running if want == 1][:budget]
    sizes = dict.fromkeys(ones, 1)
    budget -= len(ones)
    turns = _turns([pair for pair in running if pair[1] > 1], newcomers)
    share = -(-budget // min(len(turns), MOST_PROMPTS)) if turns else 0
    for most in (share, budget):
        for sequence, want in turns:
            size = min(want - sizes.get(sequence, 0), most, budget)
            if size > 0:
                sizes[sequence] = sizes.get(sequence, 0) + size
                budget -= size
    return sizes


def _turns(
    running: SequenceOf[tuple[Sequence, int]], newcomers: SequenceOf[tuple[Sequence, int]]
) -> list[tuple[Sequence, int]]:
    """Prompts in the order in which they are computed: the oldest, which thus always gets on; then keys by turns, of
    each those that want least, but newcomers in their own order, and one of them in any case, for a short one may wait
    behind it."""
    turns, new = list(running[:1]), deque(newcomers)
    of_key: Counter[str] = Counter(sequence.key for sequence, _ in turns)
    placed = []
    for sequence, want in sorted(running[1:], key=lambda pair: pair[1]):
        placed.append((of_key[sequence.key], sequence, want))
        of_key[sequence.key] += 1
    waiting = [(sequence, want) for _, sequence, want in sorted(placed, key=lambda entry: (entry[0], entry[2]))]
    admits = not new
    for pair in waiting:
        while new and (new[0][1] < pair[1] or (not admits and len(turns) == MOST_PROMPTS - 1)):
            turns.append(new.popleft())
            admits = True
        turns.append(pair)
    return [*turns, *new]


def _step_input(step: int, chunks: list[Chunk], setups: tuple[SamplingSetup, ...]) -> StepInput:
    """Called after `computed` and `pending` were moved on, so a sampled token's position is total - 1."""
    token_ids: list[int] = []
    score_next: list[int] = []
    tables = np.zeros((len(chunks), max(len(chunk.sequence.table) for chunk in chunks)), np.int32)
    uniforms = np.zeros(len(chunks), np.float64)
    for number, chunk in enumerate(chunks):
        sequence, stop = chunk.sequence, chunk.start + chunk.size
        token_ids += sequence.ids(chunk.start, stop)
        tables[number, : len(sequence.table)] = sequence.table
        if chunk.samples:
            uniforms[number] = uniform(sequence.seed, stop)
        if sequence.score_top:
            following = sequence.prompt_ids[chunk.start + 1 : stop + 1]
            score_next += following + [-1] * (chunk.size - len(following))
        else:
            score_next += [-1] * chunk.size
    return StepInput(
        step=step,
        slots=np.array([chunk.sequence.slot for chunk in chunks], np.int32),
        query_lens=np.array([chunk.size for chunk in chunks], np.int32),
        context_lens=np.array([chunk.start for chunk in chunks], np.int32),
        token_ids=np.array(token_ids, np.int32),
        block_tables=tables,
        sample=np.array([chunk.samples for chunk in chunks], bool),
        uniforms=uniforms,
        score_top=np.array([chunk.sequence.score_top for chunk in chunks], np.int32),
        score_next=np.array(score_next, np.int32),
        setups=setups,
        pooled=tuple(number for number, chunk in enumerate(chunks) if chunk.sequence.pooled),
        masks={
            number: chunk.sequence.grammar.mask
            for number, chunk in enumerate(chunks)
            if chunk.samples and not chunk.late and chunk.sequence.grammar is not None
        },
        late_masks=tuple(number for number, chunk in enumerate(chunks) if chunk.late),
    )
