"""The engine over ranks without a model: texts, stops, seeds, cancellation, failure, counters."""

from __future__ import annotations

import pytest
from fake_ranks import EOS, VOCAB, FakeTokenizer, make_engine, oracle

from multitensor.engine.engine import Engine
from multitensor.engine.request import RequestOutput, SamplingParams
from multitensor.errors import InputError, RankFailed

GREEDY = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)


def generate(engine: Engine, prompt: list[int], params: SamplingParams) -> RequestOutput:
    request = engine.add_request(prompt, params)
    engine.run([request])
    return request.output()


def letters(ids: list[int]) -> str:
    return FakeTokenizer().decode(ids)


def with_(**changes: object) -> SamplingParams:
    return SamplingParams(**{"temperature": 0.0, "max_tokens": 20, "ignore_eos": True, **changes})  # type: ignore[arg-type]


def test_text_is_that_of_the_tokens() -> None:
    engine, _ = make_engine()
    output = generate(engine, [1, 2], GREEDY)
    (ids,) = oracle([1, 2], GREEDY, context=64)
    done = output.outputs[0]
    assert done.token_ids == ids and done.text == letters(ids) == done.delta
    assert (done.finish_reason, done.stop_reason, done.finished()) == ("length", None, True)
    assert output.prompt_token_ids == [1, 2] and output.prompt is None and output.finished


@pytest.mark.parametrize("include", [False, True])
def test_stop_strings_across_tokens(include: bool) -> None:
    engine, _ = make_engine()
    full = generate(engine, [3, 4], GREEDY).outputs[0]
    stop = full.text[6:9]
    cut = full.text.index(stop)
    done = generate(engine, [3, 4], with_(stop=["never", stop], include_stop_str_in_output=include)).outputs[0]
    assert done.text == full.text[: cut + (3 if include else 0)]
    assert (done.finish_reason, done.stop_reason) == ("stop", stop)
    assert letters(done.token_ids) == full.text[: cut + 3]  # the tokens that made the stop string are there


def test_what_a_stop_string_holds_back_comes_at_the_end() -> None:
    engine, _ = make_engine()
    full = generate(engine, [3, 4], GREEDY).outputs[0].text
    request = engine.add_request([3, 4], with_(stop=full[-2:] + "x"))
    deltas = []
    while not request.finished:
        engine.step()
        deltas.append(request.output().outputs[0].delta)
    assert "".join(deltas) == full
    assert deltas[-2] == "" and deltas[-1] == full[-2:]


@pytest.mark.parametrize("include", [False, True])
def test_end_tokens(include: bool) -> None:
    engine, _ = make_engine(context=400, n_blocks=200)
    prompt = next(
        [first] for first in range(1, VOCAB) if EOS in oracle([first], with_(max_tokens=200), context=400)[0][3:]
    )
    unstopped = oracle(prompt, with_(max_tokens=200), context=400)[0]
    end = unstopped.index(EOS) if unstopped.index(EOS) >= 3 else unstopped.index(EOS, 3)
    params = with_(max_tokens=200, ignore_eos=False, min_tokens=3, skip_special_tokens=False)
    params = SamplingParams(**{**vars(params), "include_stop_str_in_output": include})
    done = generate(engine, prompt, params).outputs[0]
    assert done.token_ids == unstopped[: end + 1]
    assert (done.finish_reason, done.stop_reason) == ("stop", None)
    assert done.text.endswith("</s>") is include
    stop_id = unstopped[5]
    first = unstopped.index(stop_id)
    done = generate(engine, prompt, with_(stop_token_ids=[stop_id])).outputs[0]
    assert (done.token_ids, done.finish_reason, done.stop_reason) == (unstopped[: first + 1], "stop", stop_id)
    assert done.text == letters(unstopped[:first])


def test_an_end_token_that_the_model_has_no_row_for_is_never_asked_for() -> None:
    tokenizer = FakeTokenizer()
    tokenizer.eos_ids = frozenset({EOS, VOCAB, VOCAB + 7})  # type: ignore[misc]
    engine, executor = make_engine(tokenizer=tokenizer)
    generate(engine, [3], with_(ignore_eos=False, min_tokens=5, max_tokens=6))
    assert executor.setups[0].suppress_ids == (EOS,)


def test_min_tokens_puts_off_every_stop_and_tells_the_sampler() -> None:
    engine, executor = make_engine()
    full = generate(engine, [3, 4], GREEDY).outputs[0]
    params = with_(stop=full.text[2:4], stop_token_ids=[full.token_ids[1]], min_tokens=15, max_tokens=16)
    done = generate(engine, [3, 4], params).outputs[0]
    assert len(done.token_ids) >= 15 and full.text.startswith(done.text[:10])
    setup = executor.steps[-1].setups or executor.setups[0]
    assert executor.setups[0].min_tokens == 15 and setup
    assert executor.setups[0].suppress_ids == (full.token_ids[1],)


def test_seeds() -> None:
    random = SamplingParams(temperature=1.0, max_tokens=12, ignore_eos=True)
    seeded = SamplingParams(temperature=1.0, max_tokens=12, ignore_eos=True, seed=11)
    engine, _ = make_engine()
    first = [generate(engine, [1], params).outputs[0].token_ids for params in (random, random, seeded, seeded)]
    assert first[0] != first[1] and first[2] == first[3]
    again, _ = make_engine()
    second = [generate(again, [1], params).outputs[0].token_ids for params in (random, random, seeded, seeded)]
    assert first == second
    other, _ = make_engine(seed=1)
    assert generate(other, [1], random).outputs[0].token_ids != first[0]
    assert generate(other, [1], seeded).outputs[0].token_ids == first[2]


def test_several_continuations() -> None:
    engine, _ = make_engine()
    params = SamplingParams(temperature=1.0, max_tokens=12, ignore_eos=True, n=3, seed=4)
    output = generate(engine, [1, 2, 3], params)
    assert [o.index for o in output.outputs] == [0, 1, 2]
    assert [o.token_ids for o in output.outputs] == oracle([1, 2, 3], params, context=64)
    assert len({tuple(o.token_ids) for o in output.outputs}) == 3
    one = SamplingParams(temperature=1.0, max_tokens=12, ignore_eos=True, seed=4)
    assert generate(engine, [1, 2, 3], one).outputs[0].token_ids == output.outputs[0].token_ids


def test_logprobs_have_vllms_shape() -> None:
    engine, _ = make_engine()
    done = generate(engine, [1], with_(logprobs=3, max_tokens=4)).outputs[0]
    assert done.logprobs is not None and len(done.logprobs) == 4
    assert done.cumulative_logprob == pytest.approx(-2.0)
    for token, entry in zip(done.token_ids, done.logprobs, strict=True):
        assert entry[token].logprob == -0.5 and entry[token].rank == 1
        assert entry[token].decoded_token == FakeTokenizer().token_bytes(token).decode()
        assert len(entry) == 3
    none = generate(engine, [1], GREEDY).outputs[0]
    assert none.logprobs is None and none.cumulative_logprob is None


def test_the_context_ends_a_text() -> None:
    engine, _ = make_engine(context=16)
    done = generate(engine, [1] * 10, with_(max_tokens=None)).outputs[0]
    assert (len(done.token_ids), done.finish_reason) == (6, "length")


@pytest.mark.parametrize(
    ("prompt", "params", "words"),
    [
        ([1] * 70, {}, ("70", "64", "larger context")),
        ([1] * 64, {}, ("64", "no room")),
        ([], {}, ("empty",)),
        ([VOCAB], {}, (str(VOCAB),)),
        ([-1], {}, ("-1",)),
        ([1], {"stop_token_ids": [VOCAB]}, ("stop_token_ids",)),
        ([1], {"logit_bias": {99: 1.0}}, ("logit_bias", "99")),
    ],
)
def test_bad_requests(prompt: list[int], params: dict, words: tuple[str, ...]) -> None:
    engine, executor = make_engine()
    with pytest.raises(InputError) as caught:
        engine.add_request(prompt, SamplingParams(**params))
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)
    assert not engine.has_unfinished and not executor.steps


def test_cancelling_drops_what_is_under_way() -> None:
    engine, _ = make_engine()
    doomed = engine.add_request([1, 2], GREEDY)
    other = engine.add_request([3, 4], GREEDY)
    for _ in range(6):
        engine.step()
    engine.cancel(doomed)
    engine.cancel(doomed)
    had = len(doomed.output().outputs[0].token_ids)
    engine.run([other])
    output = doomed.output()
    assert output.finished and output.outputs[0].finish_reason == "abort"
    assert len(output.outputs[0].token_ids) == had > 0
    assert other.output().outputs[0].token_ids == oracle([3, 4], GREEDY, context=64)[0]
    engine.call("memory")
    assert engine._scheduler.blocks.n_free == 64


def test_an_interrupt_cancels_what_run_waited_for() -> None:
    engine, executor = make_engine()

    def interrupt(step: object) -> None:
        if len(executor.steps) == 4:
            raise KeyboardInterrupt

    executor.on_submit = interrupt
    request = engine.add_request([1, 2], GREEDY)
    with pytest.raises(KeyboardInterrupt):
        engine.run([request])
    assert request.finished and not engine.has_unfinished


def test_a_lost_rank_ends_everything_with_its_reason() -> None:
    engine, executor = make_engine()
    executor.fail_at = 3
    request = engine.add_request([1, 2], GREEDY)
    with pytest.raises(RankFailed, match="killed"):
        engine.run([request])
    for again in (lambda: engine.add_request([1], GREEDY), lambda: engine.call("memory"), engine.step):
        with pytest.raises(RankFailed, match="killed"):
            again()


def test_calls_wait_for_the_step_under_way() -> None:
    engine, _ = make_engine()
    request = engine.add_request([1, 2], GREEDY)
    engine.step()
    engine.step()
    assert engine.call("memory", rank=0) == [("memory", {"rank": 0})]
    engine.run([request])
    assert request.output().outputs[0].token_ids == oracle([1, 2], GREEDY, context=64)[0]


def test_counters_and_times() -> None:
    engine, _ = make_engine(max_batch_tokens=8)
    request = engine.add_request([1] * 20, with_(max_tokens=5))
    engine.run([request])
    stats, metrics = engine.stats, request.metrics
    assert (stats.prefill_tokens, stats.decode_tokens, stats.steps) == (20, 4, 7)
    assert stats.prefill_seconds > 0 and stats.decode_tokens_per_second is not None
    assert (metrics.prompt_tokens, metrics.output_tokens, metrics.first_tokens) == (20, 5, 1)
    times = [metrics.arrival_time, metrics.first_scheduled_time, metrics.first_token_time, metrics.finished_time]
    assert None not in times and times == sorted(times)  # type: ignore[type-var]
    assert metrics.prefill_tokens_per_second and metrics.decode_tokens_per_second


def test_request_ids() -> None:
    engine, _ = make_engine()
    engine.add_request([1], GREEDY, request_id="mine")
    with pytest.raises(InputError, match="mine"):
        engine.add_request([1], GREEDY, request_id="mine")


def test_a_step_begun_ahead_gives_its_blocks_back_though_nothing_follows() -> None:
    engine, _ = make_engine(block_size=4)
    request = engine.add_request([1, 2, 3, 4, 5], GREEDY)
    for _ in range(3):
        engine.step()
    engine.cancel(request)
    assert not engine.has_unfinished and engine.is_busy and engine.load().kv_used > 0
    while engine.is_busy:
        engine.step()
    load = engine.load()
    assert (load.running, load.kv_used) == (0, 0) and load.kv_cached >= 4  # the prompt's first block can be found
