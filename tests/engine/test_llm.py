"""The Python API over ranks without a model: shapes of prompts and results, streams, aliases, no vocabulary."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from fake_ranks import FakeExecutor, FakeTokenizer, make_config, make_plan, oracle

import multitensor.engine.prompts as prompts_module
from multitensor import LLM, InputError, SamplingParams

GREEDY = SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True)
CONTEXT = 64


def make(tokenizer: object = None) -> tuple[LLM, FakeExecutor]:
    executor = FakeExecutor(64, 4, 16, 4)
    return LLM._from_executor(executor, make_plan(CONTEXT, 64, 4), make_config(4, 16, 4), tokenizer), executor  # type: ignore[arg-type]


@pytest.fixture
def llm() -> Iterator[LLM]:
    with make(FakeTokenizer())[0] as llm:
        yield llm


@pytest.fixture
def bare() -> Iterator[LLM]:
    with make()[0] as llm:
        yield llm


def expected(prompt: list[int]) -> list[int]:
    return oracle(prompt, GREEDY, context=CONTEXT)[0]


def test_prompts_of_every_shape(llm: LLM) -> None:
    bos = FakeTokenizer.bos_id
    shapes = [
        ("abc", [[bos, 1, 2, 3]]),
        (["abc", "d"], [[bos, 1, 2, 3], [bos, 4]]),
        ([1, 2], [[1, 2]]),
        ([[1, 2], [3]], [[1, 2], [3]]),
        ((1, 2), [[1, 2]]),
        (np.array([1, 2]), [[1, 2]]),
        (np.array([[1, 2], [3, 4]]), [[1, 2], [3, 4]]),
        (["abc", [4]], [[bos, 1, 2, 3], [4]]),
        ({"prompt": "abc"}, [[bos, 1, 2, 3]]),
        ([{"prompt_token_ids": [5]}, "a"], [[5], [bos, 1]]),
        ([], []),
    ]
    for prompts, ids in shapes:
        outputs = llm.generate(prompts, GREEDY)  # type: ignore[arg-type]
        assert [output.prompt_token_ids for output in outputs] == ids
        assert [output.outputs[0].token_ids for output in outputs] == [expected(prompt) for prompt in ids]
    assert llm.generate("abc", GREEDY)[0].prompt == "abc"
    assert llm.generate([1], GREEDY)[0].prompt is None


def test_a_text_that_spells_bos_gets_one_only(llm: LLM) -> None:
    assert llm.generate("<s>ab", GREEDY)[0].prompt_token_ids == [FakeTokenizer.bos_id, 1, 2]


def test_parameters_one_each(llm: LLM) -> None:
    params = [SamplingParams(temperature=0.0, max_tokens=k, ignore_eos=True) for k in (1, 5)]
    assert [len(o.outputs[0].token_ids) for o in llm.generate([[1], [2]], params)] == [1, 5]
    with pytest.raises(InputError, match="2 prompts but 1"):
        llm.generate([[1], [2]], params[:1])
    assert len(llm.generate([1])[0].outputs[0].token_ids) <= 16


def test_one_bad_prompt_stops_all_before_anything_runs() -> None:
    llm, executor = make()
    with pytest.raises(InputError, match=r"100 tokens.*64"):
        llm.generate([[1], [1] * 100], GREEDY)
    assert not executor.steps and not llm._engine.has_unfinished
    for wrong in (5, [1.5], ["a", 3], [[1], ["b"]], b"x", None, [True]):
        with pytest.raises(InputError):
            llm.generate(wrong, GREEDY)  # type: ignore[arg-type]


def test_stream_is_cumulative_with_deltas(llm: LLM) -> None:
    outputs = list(llm.stream([1, 2], GREEDY))
    assert [len(o.outputs[0].token_ids) for o in outputs] == list(range(1, 11))
    assert "".join(o.delta for o in outputs) == outputs[-1].outputs[0].text == llm.detokenize(expected([1, 2]))
    assert [o.finished for o in outputs] == [False] * 9 + [True]


def test_closing_a_stream_cancels_it() -> None:
    llm, executor = make(FakeTokenizer())
    stream = llm.stream([1, 2], SamplingParams(max_tokens=None, ignore_eos=True))
    assert not executor.steps
    for _ in range(3):
        next(stream)
    assert llm._engine.has_unfinished
    stream.close()
    assert not llm._engine.has_unfinished
    llm._engine.call("memory")  # between steps
    assert llm._engine._scheduler.blocks.n_free == 64
    never_started = llm.stream([1], GREEDY)
    del never_started
    assert not llm._engine.has_unfinished


def test_streams_and_other_calls_interleave(llm: LLM) -> None:
    one, two = llm.stream([1, 2], GREEDY), llm.stream([3], GREEDY)
    first, second = [next(one)], [next(two)]
    middle = llm.generate([[5], [6]], GREEDY)
    scores = llm.score([1, 2, 3])
    first += one
    second += two
    assert first[-1].outputs[0].token_ids == expected([1, 2])
    assert second[-1].outputs[0].token_ids == expected([3])
    assert "".join(o.delta for o in first) == first[-1].outputs[0].text
    assert [o.outputs[0].token_ids for o in middle] == [expected([5]), expected([6])]
    assert len(scores) == 3


def test_stream_checks_its_prompt_at_once(llm: LLM) -> None:
    with pytest.raises(InputError, match="64"):
        llm.stream([1] * 64)


def test_score_of_a_long_text(llm: LLM) -> None:
    ids = [i % 30 + 1 for i in range(CONTEXT)]
    scores = llm.score(ids, top=3)
    assert len(scores) == CONTEXT and all(len(score.top_ids) == 3 for score in scores)
    assert [score.next_logprob is None for score in scores] == [False] * 63 + [True]
    with pytest.raises(InputError, match="65 tokens"):
        llm.score([1] * 65)
    with pytest.raises(InputError, match="top"):
        llm.score([1], top=0)


def test_tokenize_and_detokenize(llm: LLM) -> None:
    assert llm.tokenize("ab") == [1, 2]
    assert llm.tokenize("ab", bos=True) == [39, 1, 2]
    assert llm.detokenize([39, 1, 2]) == "ab"


def test_without_a_vocabulary_ids_work_and_text_is_refused(bare: LLM) -> None:
    assert not bare.has_vocabulary
    done = bare.generate([1, 2], GREEDY)[0].outputs[0]
    assert done.token_ids == expected([1, 2]) and done.text == ""
    assert len(list(bare.stream([1, 2], GREEDY))) == 10
    assert len(bare.score([1, 2, 3])) == 3
    for refused in (
        lambda: bare.generate("abc"),
        lambda: bare.tokenize("abc"),
        lambda: bare.detokenize([1]),
        lambda: bare.chat([{"role": "user", "content": "Hi"}]),
        lambda: bare.generate([1], SamplingParams(stop="x")),
    ):
        with pytest.raises(InputError, match="vocabulary"):
            refused()


def test_chat_goes_through_the_template(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    from multitensor.formats import chat_template

    asked: list[dict] = []

    def render_chat(tokenizer: FakeTokenizer, messages: list[dict], **options: object) -> list[int]:
        asked.append(options)
        return [39, *(i for message in messages for i in tokenizer.encode(message["content"]))]

    monkeypatch.setattr(chat_template, "render_chat", render_chat)
    one = [{"role": "user", "content": "ab"}]
    assert [o.prompt_token_ids for o in llm.chat(one, GREEDY)] == [[39, 1, 2]]
    two = [one, [{"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]]
    assert [o.prompt_token_ids for o in llm.chat(two, GREEDY)] == [[39, 1, 2], [39, 3, 4]]
    assert asked[0] == {"add_generation_prompt": True, "tools": None}


def test_progress_tells_how_many_are_done(llm: LLM) -> None:
    seen: list[tuple[int, int]] = []
    llm.generate([[1], [2], [3]], GREEDY, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (3, 3) and [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert len(llm.generate([[1], [2]], GREEDY, progress=True)) == 2


def test_verify_has_prompts_of_its_own() -> None:
    for llm in (make()[0], make(FakeTokenizer())[0]):
        if llm.has_vocabulary:  # the fake alphabet has small letters only
            monkey = pytest.MonkeyPatch()
            monkey.setattr(prompts_module, "VERIFY_TEXTS", ("abc", "defg"))
        _, arguments = llm.verify()  # type: ignore[misc]
        prompts = arguments["prompts"]  # type: ignore[index]
        assert len(prompts) == 2 and all(prompts)
        assert all(0 <= token < 40 for prompt in prompts for token in prompt)
        if llm.has_vocabulary:
            monkey.undo()


def test_settings_are_named_as_promised() -> None:
    with pytest.raises(TypeError):
        LLM("model.gguf", gpu_memory_utilization=0.9)  # type: ignore[call-arg]
    with pytest.raises(InputError, match=r"tensor_parallel_size=2.*tensor_parallel=3"):
        LLM("model.gguf", tensor_parallel_size=2, tensor_parallel=3)
    with pytest.raises(InputError, match=r"max_model_len=8.*context=9"):
        LLM("model.gguf", max_model_len=8, context=9)


def test_closing_twice_and_using_a_closed_one() -> None:
    llm, executor = make()
    with llm:
        llm.generate([1], GREEDY)
    llm.close()
    assert executor.closed == 1
    with pytest.raises(InputError, match="closed"):
        llm.generate([1], GREEDY)


def test_a_forgotten_llm_ends_its_ranks() -> None:
    llm, executor = make()
    llm.generate([1], GREEDY)
    del llm
    assert executor.closed == 1
