"""Batching, chunking, preemption and lateness must not change any text, lose a token, or leak a block or slot."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from fake_ranks import EOS, VOCAB, FakeGrammars, grammar_ends, hidden_state, make_engine, next_score, oracle
from hypothesis import given, settings
from hypothesis import strategies as st

from multitensor.engine.engine import Engine
from multitensor.engine.grammar import GrammarSpec
from multitensor.engine.kv_cache import BlockManager
from multitensor.engine.request import SamplingParams
from multitensor.engine.request_state import Request


@dataclass(frozen=True)
class Case:
    prompt: tuple[int, ...]
    params: SamplingParams
    key: str
    arrives: int
    cancelled: int | None
    constrained: bool


PARAMS = st.builds(
    SamplingParams,
    n=st.integers(1, 3),
    temperature=st.sampled_from([0.0, 1.0]),
    seed=st.sampled_from([None, 0, 1]),
    max_tokens=st.one_of(st.none(), st.integers(1, 20)),
    ignore_eos=st.booleans(),
    stop_token_ids=st.sampled_from([None, [3, 4]]),
    logprobs=st.sampled_from([None, 2]),
    repetition_penalty=st.sampled_from([1.0, 1.5]),
)
# Many begin alike, so that there is something to share.
PROMPTS = st.one_of(
    st.lists(st.integers(1, VOCAB - 1), min_size=1, max_size=30).map(tuple),
    st.builds(
        lambda common, own: (*range(1, common), *own),
        st.integers(2, 25),
        st.lists(st.integers(1, 3), min_size=1, max_size=6),
    ),
)
CASES = st.lists(
    st.builds(
        Case,
        prompt=PROMPTS,
        key=st.sampled_from(["", "a", "b"]),
        params=PARAMS,
        arrives=st.integers(0, 12),
        cancelled=st.one_of(st.none(), st.none(), st.integers(0, 30)),
        constrained=st.booleans(),
    ),
    min_size=1,
    max_size=7,
)
SIZES = st.fixed_dictionaries(
    {
        "prefix_cache": st.sampled_from(["shared", "key", "off"]),
        "block_size": st.sampled_from([1, 3, 8]),
        "extra_blocks": st.sampled_from([0, 2, 40]),
        "max_num_seqs": st.integers(1, 5),
        "max_batch_tokens": st.sampled_from([1, 4, 17, 200]),
        "mixed_batch_tokens": st.sampled_from([None, 1, 3]),
    }
)
CONTEXT = 40


def test_a_prompt_alone_takes_longer_steps() -> None:
    engine, ranks = make_engine(
        context=400, n_blocks=200, max_batch_tokens=64, mixed_batch_tokens=16, prefix_cache="off"
    )
    alone = engine.add_request([1] * 200, SamplingParams(max_tokens=1))
    while not alone.finished:
        engine.step()
    lengths = [sum(step.query_lens) for step in ranks.steps]
    assert lengths == [64, 64, 64, 8]
    writing = engine.add_request([1, 2, 3], SamplingParams(max_tokens=40, ignore_eos=True))
    while not writing.output().outputs[0].token_ids:
        engine.step()
    beside = engine.add_request([1] * 200, SamplingParams(max_tokens=1))
    seen = len(ranks.steps)
    while not beside.finished:
        engine.step()
    assert not writing.finished
    lengths = [sum(step.query_lens) for step in ranks.steps[seen:]]
    assert max(lengths) == 16 and lengths.count(16) == 13  # 15 of the prompt's tokens and the other text's next


def drain(engine: Engine) -> None:
    engine.call("memory")


def check_blocks(blocks: BlockManager) -> None:
    """Every block is free, idle or held: exactly one of them."""
    held = [block for block in range(blocks.n_blocks) if blocks._holders[block] > 0]
    assert sorted([*blocks._free, *blocks._idle, *held]) == list(range(blocks.n_blocks))
    assert {block: content for content, block in blocks._by_hash.items()} == blocks._hashes
    assert set(blocks._idle) <= set(blocks._hashes) and not set(blocks._free) & set(blocks._hashes)


def check_nothing_leaked(engine: Engine) -> None:
    drain(engine)
    scheduler = engine._scheduler
    assert not engine.has_unfinished and not scheduler.n_under_way
    check_blocks(scheduler.blocks)
    assert scheduler.blocks.n_free == scheduler.blocks.n_blocks and not scheduler.blocks._waiting
    assert sorted(scheduler._free_slots) == list(range(scheduler.max_num_seqs))
    assert not engine._owners and not engine._requests


def check_first_come_first_served(engine: Engine) -> None:
    scheduler = engine._scheduler
    owners = [engine._owners[sequence] for sequence in (*scheduler.running, *scheduler.waiting)]
    order = [(int(owner[0].request_id), owner[1].index) for owner in owners if isinstance(owner, tuple)]
    assert order == sorted(order)


@settings(max_examples=150, deadline=None)
@given(cases=CASES, sizes=SIZES)
def test_any_traffic_gives_the_same_texts_as_one_at_a_time(cases: list[Case], sizes: dict) -> None:
    n_blocks = -(-CONTEXT // sizes["block_size"]) + sizes.pop("extra_blocks")
    engine, _ = make_engine(context=CONTEXT, n_blocks=n_blocks, **sizes)
    engine._grammars = FakeGrammars()  # type: ignore[assignment]
    requests: dict[int, Request] = {}
    for step in range(20_000):
        for number, case in enumerate(cases):
            if case.arrives == step:
                grammar = GrammarSpec("json_object") if case.constrained else None
                requests[number] = engine.add_request(case.prompt, case.params, key=case.key, grammar=grammar)
            if number in requests and case.cancelled == step:
                engine.cancel(requests[number])
        engine.step()
        check_blocks(engine._scheduler.blocks)
        if len(requests) == len(cases) and all(request.finished for request in requests.values()):
            break
    assert len(requests) == len(cases)
    for case, request in ((cases[number], request) for number, request in requests.items()):
        wanted = oracle(
            list(case.prompt),
            case.params,
            context=CONTEXT,
            number=int(request.request_id),
            constrained=case.constrained,
        )
        output = request.output()
        assert output.finished
        for continuation, ids in zip(output.outputs, wanted, strict=True):
            if continuation.finish_reason == "abort":
                assert case.cancelled is not None
                assert continuation.token_ids == ids[: len(continuation.token_ids)]
                continue
            assert continuation.token_ids == ids
            ended = (ids[-1] == EOS and not case.params.ignore_eos) or ids[-1] in case.params.stop_ids
            ended = ended or (case.constrained and grammar_ends(ids))
            assert continuation.finish_reason == ("stop" if ended else "length")
            assert len(continuation.logprobs or []) == (len(ids) if case.params.logprobs is not None else 0)
    check_nothing_leaked(engine)


@settings(max_examples=60, deadline=None)
@given(
    texts=st.lists(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=CONTEXT), min_size=1, max_size=4),
    sizes=SIZES,
    top=st.integers(1, 3),
    generate=st.booleans(),
)
def test_scores_cover_every_position_once_whatever_the_chunks(
    texts: list[list[int]], sizes: dict, top: int, generate: bool
) -> None:
    n_blocks = -(-CONTEXT // sizes["block_size"]) + sizes.pop("extra_blocks")
    engine, _ = make_engine(context=CONTEXT, n_blocks=n_blocks, **sizes)
    others = [engine.add_request([5], SamplingParams(max_tokens=None, ignore_eos=True))] if generate else []
    requests = [engine.add_score(ids, top) for ids in texts]
    engine.run([*others, *requests])
    for ids, request in zip(texts, requests, strict=True):
        scores = request.scores()
        assert len(scores) == len(ids)
        for i, score in enumerate(scores):
            following = ids[i + 1] if i + 1 < len(ids) else -1
            assert (score.top_ids, score.top_logprobs, score.next_logprob) == next_score(ids[: i + 1], following, top)
        assert scores[-1].next_logprob is None
    check_nothing_leaked(engine)


@settings(max_examples=60, deadline=None)
@given(
    texts=st.lists(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=CONTEXT), min_size=1, max_size=4),
    sizes=SIZES,
    twice=st.booleans(),
)
def test_embeddings_are_of_every_position_once_whatever_the_chunks(
    texts: list[list[int]], sizes: dict, twice: bool
) -> None:
    n_blocks = -(-CONTEXT // sizes["block_size"]) + sizes.pop("extra_blocks")
    engine, _ = make_engine(context=CONTEXT, n_blocks=n_blocks, **sizes)
    others = [engine.add_request([5], SamplingParams(max_tokens=None, ignore_eos=True))]
    requests = [engine.add_embed(ids) for ids in texts * (1 + twice)]
    engine.run([*others, *requests])
    for ids, request in zip(texts * (1 + twice), requests, strict=True):
        mean = np.mean([hidden_state(ids[: i + 1]) for i in range(len(ids))], axis=0, dtype=np.float64)
        assert np.allclose(request.vector(), mean / np.linalg.norm(mean), rtol=1e-6)
    check_nothing_leaked(engine)


def test_the_pool_running_dry_preempts_the_youngest_and_changes_no_text() -> None:
    # Each of four wants 8 + 30 tokens; the pool holds 44.
    engine, executor = make_engine(context=40, n_blocks=11, block_size=4, max_num_seqs=4, max_batch_tokens=64)
    params = SamplingParams(temperature=1.0, max_tokens=30, ignore_eos=True)
    prompts = [[i + 1] * 8 for i in range(4)]
    requests = [engine.add_request(prompt, params) for prompt in prompts]
    finished: list[str] = []
    while engine.has_unfinished:
        finished += [request.request_id for request in engine.step() if request.finished]
    assert engine.stats.preemptions > 0
    assert finished == ["0", "1", "2", "3"]
    for number, (prompt, request) in enumerate(zip(prompts, requests, strict=True)):
        assert [o.token_ids for o in request.output().outputs] == oracle(prompt, params, context=40, number=number)
    assert sum(len(step.setups) for step in executor.steps) == 4  # a preempted sequence keeps its slot and history
    check_nothing_leaked(engine)


def test_a_preempted_score_is_taken_up_again_without_doubles() -> None:
    engine, executor = make_engine(context=40, n_blocks=40, block_size=1, max_batch_tokens=4)
    older = engine.add_request([5], SamplingParams(max_tokens=None, ignore_eos=True))
    ids = [i % VOCAB for i in range(38)]
    scored = engine.add_score(ids, 2)
    engine.run([older, scored])
    assert engine.stats.preemptions > 0
    assert sum(int(step.query_lens[step.score_top > 0].sum()) for step in executor.steps) > len(ids)
    wanted = [next_score(ids[: i + 1], ids[i + 1] if i + 1 < len(ids) else -1, 2) for i in range(len(ids))]
    assert [(s.top_ids, s.top_logprobs, s.next_logprob) for s in scored.scores()] == wanted


def test_a_preempted_embedding_is_not_summed_twice() -> None:
    engine, executor = make_engine(context=40, n_blocks=40, block_size=1, max_batch_tokens=4)
    older = engine.add_request([5], SamplingParams(max_tokens=None, ignore_eos=True))
    ids = [i % VOCAB for i in range(38)]
    embedded = engine.add_embed(ids)
    engine.run([older, embedded])
    assert engine.stats.preemptions > 0
    assert sum(int(step.query_lens[list(step.pooled)].sum()) for step in executor.steps) > len(ids)
    total = np.sum([hidden_state(ids[: i + 1]) for i in range(len(ids))], axis=0, dtype=np.float64)
    assert np.allclose(embedded.vector(), total / np.linalg.norm(total))


def test_the_preempted_come_before_those_who_never_ran() -> None:
    engine, _ = make_engine(context=40, n_blocks=11, block_size=4, max_num_seqs=8, max_batch_tokens=64)
    params = SamplingParams(temperature=1.0, max_tokens=25, ignore_eos=True)
    requests = [engine.add_request([i + 1] * 8, params) for i in range(7)]
    finished: list[str] = []
    while engine.has_unfinished:
        finished += [request.request_id for request in engine.step() if request.finished]
        check_first_come_first_served(engine)
    assert engine.stats.preemptions > 0
    assert finished == [request.request_id for request in requests]


def test_one_step_runs_ahead_and_nothing_is_computed_beyond_the_limit() -> None:
    engine, executor = make_engine()
    depth: list[int] = []
    executor.on_submit = lambda step: depth.append(len(executor.queue))
    request = engine.add_request([1, 2, 3], SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True))
    engine.run([request])
    assert depth == [1, 2, 2, 2, 2]
    assert [step.token_ids.tolist() for step in executor.steps] == [[1, 2, 3], [-1], [-1], [-1], [-1]]
    assert [step.context_lens.tolist() for step in executor.steps] == [[0], [3], [4], [5], [6]]
    assert not executor.queue


def test_prefill_is_chunked_and_shares_steps_with_decode() -> None:
    engine, executor = make_engine(max_batch_tokens=6)
    first = engine.add_request([1, 2], SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True))
    engine.step()
    second = engine.add_request(list(range(1, 13)), SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True))
    engine.run([first, second])
    lens = [step.query_lens.tolist() for step in executor.steps]
    assert lens[:4] == [[2], [1, 5], [1, 5], [1, 2]]
    assert [step.sample.tolist() for step in executor.steps[:4]] == [[True], [True, False], [True, False], [True, True]]


def test_a_request_that_can_never_fit_the_pool_is_cut_to_it() -> None:
    engine, _ = make_engine(context=1000, n_blocks=5, block_size=4)
    assert engine.context == 20
    request = engine.add_request([1] * 7, SamplingParams(max_tokens=None, ignore_eos=True))
    engine.run([request])
    assert len(request.output().outputs[0].token_ids) == 13
