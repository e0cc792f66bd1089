"""Who computes what, and when: prefixes that are reused, steps that are shared, keys that take turns."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import pytest
from fake_ranks import VOCAB, make_engine, oracle
from hypothesis import given, settings
from hypothesis import strategies as st
from test_scheduler import check_blocks, check_nothing_leaked

from multitensor.engine.engine import Engine
from multitensor.engine.fair_queue import FairQueue
from multitensor.engine.kv_cache import BlockManager, block_hash
from multitensor.engine.request import SamplingParams
from multitensor.engine.request_state import Request
from multitensor.engine.scheduler import KEPT_TOKENS, _shares
from multitensor.engine.sequence import Sequence


def greedy(tokens: int | None, n: int = 1) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, n=n)


def text(length: int, seed: int = 0) -> list[int]:
    return [block_hash(b"", [seed, i])[0] % (VOCAB - 1) + 1 for i in range(length)]


def answer(engine: Engine, prompt: list[int], params: SamplingParams, key: str = "") -> list[int]:
    request = engine.add_request(prompt, params, key=key)
    engine.run([request])
    ids = request.output().outputs[0].token_ids
    assert ids == oracle(prompt, params, context=engine.context)[0]
    return ids


# --- prefixes ---


def test_the_second_turn_computes_only_what_is_new() -> None:
    engine, executor = make_engine(context=2048, n_blocks=100, block_size=32, max_batch_tokens=512)
    history = text(1500)
    history += answer(engine, history, greedy(60))
    before = len(executor.steps)
    answer(engine, history + text(20, seed=1), greedy(5))
    prefill = executor.steps[before]
    # The last of the first answer's tokens was never computed, and the last block was not full.
    assert prefill.context_lens.tolist() == [1536] and prefill.query_lens.tolist() == [1580 - 1536]
    assert prefill.sample.tolist() == [True]
    assert (engine.stats.prefix_hits, engine.stats.prefix_queries) == (1536, 1500 + 1580)
    check_nothing_leaked(engine)


@pytest.mark.parametrize("length", [32, 33, 63, 64])
def test_a_prompt_that_is_all_there_computes_its_last_token_again(length: int) -> None:
    engine, executor = make_engine(context=128, n_blocks=30, block_size=32, max_batch_tokens=64)
    first = answer(engine, text(length), greedy(1))
    assert answer(engine, text(length), greedy(1)) == first
    assert executor.steps[-1].context_lens.tolist() == [(length - 1) // 32 * 32]
    assert executor.steps[-1].query_lens.sum() == length - (length - 1) // 32 * 32 >= 1


@pytest.mark.parametrize(("scope", "own", "other"), [("shared", 32, 32), ("key", 32, 0), ("off", 0, 0)])
def test_who_shares_with_whom(scope: str, own: int, other: int) -> None:
    for key, hits in (("a", own), ("b", other)):
        engine, _ = make_engine(context=128, n_blocks=30, block_size=8, max_batch_tokens=64, prefix_cache=scope)
        answer(engine, text(40), greedy(1), key="a")
        answer(engine, text(40), greedy(1), key=key)
        assert engine.stats.prefix_hits == hits
        check_nothing_leaked(engine)


def test_continuations_and_requests_at_once_compute_their_common_beginning_once() -> None:
    engine, executor = make_engine(context=256, n_blocks=200, block_size=8, max_num_seqs=8, max_batch_tokens=32)
    common = text(100)
    requests = [engine.add_request(common, greedy(3, n=3))]
    requests += [engine.add_request([*common, i], greedy(3)) for i in range(1, 4)]
    engine.run(requests)
    prompts = sum(int(step.query_lens[step.context_lens < 100].sum()) for step in executor.steps)
    assert prompts <= 100 + 5 * 8
    for i, request in enumerate(requests):
        prompt = [*common, i] if i else common
        for output in request.output().outputs:
            assert output.token_ids == oracle(prompt, greedy(3), context=256)[0]
    check_nothing_leaked(engine)


def test_the_one_who_computes_the_common_beginning_may_leave() -> None:
    engine, _ = make_engine(context=256, n_blocks=200, block_size=8, max_batch_tokens=16)
    first, second = (engine.add_request([*text(100), i], greedy(4)) for i in (1, 2))
    for _ in range(4):
        engine.step()
    engine.cancel(first)
    engine.run([second])
    assert second.output().outputs[0].token_ids == oracle([*text(100), 2], greedy(4), context=256)[0]
    assert 32 <= engine.stats.prefix_hits <= 80
    check_nothing_leaked(engine)


def test_scores_want_every_position_and_leave_their_blocks_to_others() -> None:
    engine, _ = make_engine(context=128, n_blocks=60, block_size=8)
    answer(engine, text(40), greedy(1))
    scored = engine.add_score(text(40), 2)
    engine.run([scored])
    assert len(scored.scores()) == 40 and engine.stats.prefix_hits == 0
    answer(engine, text(40), greedy(1))
    assert engine.stats.prefix_hits == 32


@dataclass(frozen=True)
class Turn:
    conversation: int
    new: int
    answers: int
    cancelled: int | None


TURNS = st.lists(
    st.builds(
        Turn, st.integers(0, 2), st.integers(1, 12), st.integers(1, 12), st.sampled_from([None, None, None, 1, 3, 6])
    ),
    min_size=2,
    max_size=10,
)


@settings(max_examples=120, deadline=None)
@given(
    turns=TURNS,
    block_size=st.sampled_from([1, 4, 7]),
    spare=st.integers(0, 40),
    batch=st.sampled_from([1, 5, 40]),
    scope=st.sampled_from(["shared", "key"]),
    at_once=st.integers(1, 4),
)
def test_conversations_read_the_same_whatever_is_cached(
    turns: list[Turn], block_size: int, spare: int, batch: int, scope: str, at_once: int
) -> None:
    """The pool is often too small for all that was said, so blocks are evicted, shared and found again."""
    context = 120
    engine, _ = make_engine(
        context=context,
        n_blocks=-(-context // block_size) + spare,
        block_size=block_size,
        max_batch_tokens=batch,
        prefix_cache=scope,
    )
    histories: dict[int, list[int]] = {}
    for first in range(0, len(turns), at_once):
        asked: list[tuple[Turn, list[int], Request]] = []
        for turn in turns[first : first + at_once]:
            # Conversations 0 and 1 begin alike.
            prompt = histories.get(turn.conversation, text(9)) + [turn.conversation // 2 + 1] * turn.new
            if len(prompt) + turn.answers <= context:
                params = greedy(turn.answers)
                asked.append((turn, prompt, engine.add_request(prompt, params, key=str(turn.conversation))))
        steps = 0
        while engine.has_unfinished:
            engine.step()
            check_blocks(engine._scheduler.blocks)
            steps += 1
            for turn, _, request in asked:
                if turn.cancelled == steps:
                    engine.cancel(request)
        for turn, prompt, request in asked:
            wanted = oracle(prompt, greedy(turn.answers), context=context)[0]
            got = request.output().outputs[0].token_ids
            assert got == wanted[: len(got)] and (len(got) == len(wanted) or turn.cancelled is not None)
            histories[turn.conversation] = prompt + got
    check_nothing_leaked(engine)


# --- blocks ---


def hashes(count: int) -> list[bytes]:
    found = [b""]
    for i in range(count):
        found.append(block_hash(found[-1], [i]))
    return found[1:]


def filled(blocks: BlockManager, contents: list[bytes], step: int) -> list[int]:
    table: list[int] = []
    assert blocks.grow(table, len(contents) * blocks.block_size)
    for block, content in zip(table, contents, strict=True):
        blocks.remember(block, content)
    held = list(table)
    blocks.release(table, step)
    return held


def test_the_longest_unused_goes_first_and_the_end_of_a_text_before_its_beginning() -> None:
    blocks = BlockManager(6, 4)
    old, new = hashes(3), [block_hash(b"other", [i]) for i in range(2)]
    first = filled(blocks, old, 0)
    blocks.step_ended(0)
    filled(blocks, new, 1)
    blocks.step_ended(1)
    assert blocks.n_free == 6 and blocks.find(old) == first
    table: list[int] = []
    assert blocks.grow(table, 4 * 3)  # one that is empty, then two of the older text
    assert blocks.find(old) == first[:1] and len(blocks.find(new)) == 2
    check_blocks(blocks)


def test_a_shared_block_is_free_when_the_last_step_of_all_its_holders_has_ended() -> None:
    blocks = BlockManager(2, 4)
    contents = hashes(2)
    filled(blocks, contents, -1)
    tables: list[list[int]] = [[], []]
    for table in tables:
        blocks.share(table, blocks.find(contents))
    assert blocks.n_free == 0 and tables[0] == tables[1]
    blocks.release(tables[0], 5)
    assert blocks.n_waiting == 0
    blocks.release(tables[1], 4)
    assert blocks.n_waiting == 2
    blocks.step_ended(4)
    assert (blocks.n_free, blocks.n_waiting) == (0, 2)
    blocks.step_ended(5)
    assert (blocks.n_free, blocks.n_waiting) == (2, 0)
    check_blocks(blocks)


def test_hashes_tell_texts_apart_by_all_that_came_before() -> None:
    assert block_hash(b"", [1, 2]) != block_hash(b"", [1, 3]) != block_hash(b"a", [1, 3])
    assert block_hash(block_hash(b"", [1]), [2]) != block_hash(block_hash(b"", [3]), [2])


# --- the share of a step ---


@settings(max_examples=300, deadline=None)
@given(
    budget=st.one_of(st.integers(1, 6), st.integers(1, 60)),
    running=st.lists(st.sampled_from([0, 1, 1, 2, 7, 40]), max_size=8),
    newcomers=st.lists(st.integers(1, 40), max_size=4),
)
def test_a_step_is_used_up_by_few_prompts_at_a_time(budget: int, running: list[int], newcomers: list[int]) -> None:
    pairs = [(Sequence([1], 1), want) for want in running]
    new = [(Sequence([1], 1), want) for want in newcomers]
    wants = dict(pairs + new)
    sizes = _shares(budget, pairs, new)
    ones = [s for s, want in pairs if want == 1]
    assert all(sizes[s] == 1 for s in ones[:budget]), "who decodes goes first"
    assert all(1 <= size <= wants[sequence] for sequence, size in sizes.items())
    assert sum(sizes.values()) == min(budget, sum(wants.values()))
    left = max(0, budget - len(ones))
    prompts = [s for s, want in pairs if want > 1] + [s for s, _ in new]
    share = -(-left // min(4, len(prompts))) if prompts else 0
    long = [s for s, want in pairs if want > 1]
    assert not long or sizes.get(long[0], 0) >= min(wants[long[0]], share), "the oldest gets on"
    assert len([s for s in prompts if 0 < sizes.get(s, 0) < wants[s]]) <= 4, "few at a time"
    started = [s in sizes for s, _ in new]
    assert started == sorted(started, reverse=True), "newcomers in their own order"
    waiting = [s for s in prompts if s not in sizes]
    assert not waiting or all(sizes[s] <= share for s in prompts if s in sizes), "nobody takes more while others wait"


def test_prompts_are_done_one_after_the_other() -> None:
    """And what many short ones want comes before the rest of a long one, which still gets on."""
    long, *short = ((Sequence([1], 1), want) for want in (1000, 30, 20, 90, 40, 50))
    sizes = _shares(160, [long, *short[:2]], short[2:])
    assert [sizes.get(s, 0) for s, _ in (long, *short)] == [40, 30, 20, 40, 30, 0]
    assert _shares(160, [long], []) == {long[0]: 160}


def test_one_key_s_prompts_do_not_keep_another_key_s_from_their_turn() -> None:
    """Which wants more than they do: keys take turns, of a key those come first that want least."""
    mine = [(Sequence([1], 1, key="x"), want) for want in (9000, 500, 500, 500, 500, 500)]
    other = (Sequence([1], 1, key="y"), 6000)
    sizes = _shares(400, [*mine, other], [])
    assert sizes[mine[0][0]] == sizes[other[0]] == 100
    assert [sizes.get(sequence, 0) for sequence, _ in mine[1:]] == [100, 100, 0, 0, 0]


def test_nobody_is_let_into_blocks_that_others_will_fill() -> None:
    """Prompts that together outgrow the pool: the second waits for the first, instead of being computed twice."""
    engine, executor = make_engine(context=400, n_blocks=100, block_size=4, max_num_seqs=4, max_batch_tokens=40)
    params = SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True)
    engine.run([engine.add_request([1 + i] * 300, params) for i in range(3)])
    assert engine.stats.preemptions == 0
    assert sum(int(step.query_lens.sum()) for step in executor.steps) == 3 * (300 + 1)


def test_long_prompts_keep_no_short_one_from_its_turn() -> None:
    """Which waits behind others as long: one newcomer is let in at every step."""
    *longs, short = ((Sequence([1], 1), want) for want in (900, 900, 900, 900, 900, 900, 1000, 1000, 5))
    running, newcomers = longs[:6], [*longs[6:], short]
    for turn in range(3):
        sizes = _shares(160, running, newcomers)
        assert sizes[running[0][0]] == 40
        assert newcomers[0][0] in sizes
        running.append(newcomers.pop(0))
        assert turn < 2 or sizes[short[0]] == 5


@settings(max_examples=60, deadline=None)
@given(
    longs=st.lists(st.integers(30, 150), min_size=1, max_size=3),
    batch=st.integers(5, 30),
    older=st.booleans(),
)
def test_no_prompt_stalls_the_tokens_of_others(longs: list[int], batch: int, older: bool) -> None:
    engine, executor = make_engine(context=200, n_blocks=1000, block_size=4, max_num_seqs=5, max_batch_tokens=batch)
    requests = []
    if older:
        requests.append(engine.add_request(text(150, seed=9), greedy(3)))
        engine.step()
    talker = engine.add_request([1], greedy(30))
    engine.step()
    engine.step()
    slot = engine._scheduler.running[-1].slot
    first = len(executor.steps)
    requests += [engine.add_request(text(length, seed=i), greedy(3)) for i, length in enumerate(longs)]
    while not talker.finished:
        engine.step()
    spoken = [slot in step.slots.tolist() for step in executor.steps[first : first + 25]]
    assert all(spoken) and len(spoken) == 25
    engine.run(requests)


def test_a_short_prompt_does_not_wait_for_a_long_one() -> None:
    engine, executor = make_engine(context=4000, n_blocks=2000, block_size=4, max_num_seqs=4, max_batch_tokens=16)
    long = engine.add_request(text(2000), greedy(2))
    for _ in range(5):
        engine.step()
    before = len(executor.steps)
    short = engine.add_request(text(10, seed=1), greedy(1))
    engine.run([short])
    assert len(executor.steps) - before <= 4
    assert not long.finished
    # The long one goes on meanwhile, and the steps are full.
    assert all(step.query_lens.sum() == 16 for step in executor.steps[before:-1])


# --- keys ---


def test_keys_take_turns() -> None:
    engine, _ = make_engine(context=64, n_blocks=200, max_num_seqs=1)
    many = [engine.add_request([1 + i], greedy(5), key="many") for i in range(20)]
    few = [engine.add_request([30 + i], greedy(5), key="few") for i in range(3)]
    order: list[Request] = []
    while engine.has_unfinished:
        order += [request for request in engine.step() if request.finished]  # type: ignore[misc]
    assert [request for request in order if request in many] == many
    assert [request for request in order if request in few] == few
    assert order.index(few[-1]) <= 5  # where it would have been the last of 23
    check_nothing_leaked(engine)


def test_one_key_s_many_answers_keep_no_other_key_waiting_for_their_end() -> None:
    engine, executor = make_engine(context=200, n_blocks=600, max_num_seqs=8, max_batch_tokens=64)
    params = SamplingParams(temperature=1.0, max_tokens=100, ignore_eos=True, n=8, repetition_penalty=1.3)
    many = engine.add_request([1, 2, 3], params, key="many")
    for _ in range(20):
        engine.step()
    before = len(executor.steps)
    first, second = (engine.add_request([number], greedy(1), key=key) for number, key in ((5, "few"), (6, "new")))
    engine.run([first, second])
    assert len(executor.steps) - before <= 4 and engine.stats.preemptions == 2
    oldest = many.continuations[0].sequence
    engine.run([many])
    assert engine.stats.preemptions == 2 and oldest.lives == 0
    assert [output.token_ids for output in many.output().outputs] == oracle([1, 2, 3], params, context=200)
    check_nothing_leaked(engine)


def test_slots_are_shared_by_the_keys_that_want_them_and_then_stay() -> None:
    engine, _ = make_engine(context=120, n_blocks=600, max_num_seqs=6, max_batch_tokens=64)
    requests = [engine.add_request([1], greedy(100, n=6), key="a")]
    for key, shares in (("b", [3, 3]), ("c", [2, 2, 2])):
        engine.step()
        requests.append(engine.add_request([1], greedy(100, n=6), key=key))
        for _ in range(8):
            engine.step()
        assert sorted(Counter(each.key for each in engine._scheduler.running).values()) == shares
    preemptions = engine.stats.preemptions
    for _ in range(60):
        engine.step()
    assert engine.stats.preemptions == preemptions, "a slot goes back and forth"
    engine.run(requests)
    check_nothing_leaked(engine)


def test_who_gave_a_slot_up_for_others_then_gets_on() -> None:
    """However many short requests the others send."""
    engine, _ = make_engine(context=400, n_blocks=900, max_num_seqs=4, max_batch_tokens=64)
    params = greedy(300, n=4)
    long = engine.add_request([1], params, key="long")
    engine.step()
    sequences = [continuation.sequence for continuation in long.continuations]
    lives = [0] * 4
    made = [-KEPT_TOKENS] * 4
    while not long.finished:
        if len(engine._scheduler.waiting) < 2:
            engine.add_request([7], greedy(1), key="short")
        engine.step()
        for number, sequence in enumerate(sequences):
            if sequence.lives > lives[number]:
                assert len(sequence.output_ids) - made[number] >= KEPT_TOKENS - 1  # one was under way
                lives[number], made[number] = sequence.lives, len(sequence.output_ids)
    assert sum(lives) > 4
    assert [output.token_ids for output in long.output().outputs] == oracle([1], params, context=400)


def test_turns() -> None:
    queue: FairQueue[Sequence] = FairQueue()
    for key in "aaabbc":
        queue.push(Sequence([1], 1, key=key))
    order = []
    while queue:
        order.append(next(iter(queue)))
        queue.take(order[-1])
        if len(order) == 4:
            queue.push(Sequence([1], 1, key="c"))  # it had its turn, so it waits for a and b
    assert "".join(sequence.key for sequence in order) == "abcabac"


ACTIONS = st.lists(st.tuples(st.sampled_from(["push", "push", "take", "first", "remove"]), st.integers(0, 3)))


@given(actions=ACTIONS)
def test_the_queue_loses_nobody_and_no_key_is_passed_over(actions: list[tuple[str, int]]) -> None:
    queue: FairQueue[Sequence] = FairQueue()
    members: list[Sequence] = []
    passed: Counter[str] = Counter()  # turns that others had while this key waited
    for action, number in actions:
        if action == "push":
            members.append(Sequence([1], 1, key=str(number)))
            queue.push(members[-1])
        elif members and action == "remove":
            gone = members.pop(number % len(members))
            queue.remove(gone)
            if all(member.key != gone.key for member in members):
                del passed[gone.key]  # it waits no more; if it comes again it is new
        elif members:
            order = list(queue)
            assert sorted(map(id, order)) == sorted(map(id, members))
            taken = order[0]
            queue.take(taken)
            members.remove(taken)
            if action == "first":  # it started, was preempted, and is before all others again
                queue.push_first(taken)
                assert next(iter(queue)) is taken
                queue.take(taken)
                del passed[taken.key]  # it had a turn
                continue
            passed = Counter({key: passed[key] + 1 for key in {m.key for m in members} if key != taken.key})
            assert all(count <= 3 for count in passed.values())
        assert len(queue) == len(members)
    for key in {member.key for member in members}:
        assert [m for m in queue if m.key == key] == [m for m in members if m.key == key]


def test_news_that_come_while_a_call_waits_are_told() -> None:
    engine, _ = make_engine()
    request = engine.add_request([1], greedy(1))
    engine.step()
    engine.call("memory")
    assert request.finished and engine.has_unfinished
    assert engine.step() == [request] and not engine.has_unfinished
