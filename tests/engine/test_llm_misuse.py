"""Wrong values, wrong threads, wrong moments: each gives one clear error and leaves the LLM as it was."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_ranks import FakeExecutor, FakeTokenizer, make_config, make_plan

from multitensor import LLM, InputError, SamplingParams
from multitensor.engine.prepare import prepare
from synthetic import write_gguf


@pytest.fixture
def llm() -> Iterator[LLM]:
    executor = FakeExecutor(64, 4, 16, 4)
    with LLM._from_executor(executor, make_plan(64, 64, 4), make_config(4, 16, 4), FakeTokenizer()) as llm:  # type: ignore[arg-type]
        yield llm


@pytest.mark.parametrize(
    "values",
    [
        {"stop": 5},
        {"stop_token_ids": 5},
        {"logit_bias": [1]},
        {"logit_bias": {"x": 1.0}},
        {"ignore_eos": "yes"},
        {"seed": 1.5},
        {"n": True},
    ],
)
def test_sampling_parameters_of_the_wrong_type(values: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        SamplingParams(**values)


def test_parameters_may_be_changed_and_are_checked_again(llm: LLM) -> None:
    params = SamplingParams(temperature=0.0)
    params.max_tokens = 3
    params.ignore_eos = True
    assert len(llm.generate([1], params)[0].outputs[0].token_ids) == 3
    params.top_p = 2.0
    with pytest.raises(InputError, match="top_p"):
        llm.generate([1], params)
    assert SamplingParams(logit_bias={"12": 1.0}).logit_bias == {12: 1.0}  # type: ignore[dict-item]


def test_a_numpy_seed_is_a_seed(llm: LLM) -> None:
    texts = [
        llm.generate([1], SamplingParams(max_tokens=9, seed=seed))[0].outputs[0].token_ids for seed in (3, np.int64(3))
    ]
    assert texts[0] == texts[1]


def test_what_was_queued_before_a_failure_is_cancelled(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = llm._engine
    add, calls = engine.add_request, []

    def failing(*arguments: Any, **keywords: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 2:
            raise RuntimeError("the second request")
        return add(*arguments, **keywords)

    monkeypatch.setattr(engine, "add_request", failing)
    with pytest.raises(RuntimeError, match="second"):
        llm.generate([[1], [2]], SamplingParams(max_tokens=5))
    monkeypatch.undo()
    assert len(llm.generate([[1]], SamplingParams(max_tokens=5, ignore_eos=True))) == 1
    assert not engine.has_unfinished


def test_a_second_thread_is_refused(llm: LLM) -> None:
    found: list[BaseException] = []

    def other() -> None:
        try:
            llm.generate([1])
        except BaseException as error:
            found.append(error)

    with llm._exclusive():
        thread = threading.Thread(target=other)
        thread.start()
        thread.join(10)
    assert [type(error) for error in found] == [InputError]
    assert "another thread" in str(found[0])
    assert llm.generate([1])


@pytest.mark.parametrize(
    "call",
    [
        lambda llm: llm.chat("hi"),
        lambda llm: llm.chat({"role": "user", "content": "x"}),
        lambda llm: llm.chat(None),
        lambda llm: llm.chat([]),
        lambda llm: llm.chat([["x"]]),
        lambda llm: llm.tokenize(None),
        lambda llm: llm.tokenize(["a"]),
        lambda llm: llm.detokenize([10**7]),
        lambda llm: llm.detokenize([-1]),
        lambda llm: llm.detokenize("ab"),
        lambda llm: llm.score([1, 2], top=1.5),
        lambda llm: llm.score([1, 2], top="3"),
        lambda llm: llm.generate(None),
        lambda llm: llm.generate(3.5),
    ],
)
def test_calls_with_the_wrong_type(llm: LLM, call: Any) -> None:
    with pytest.raises(InputError) as error:
        call(llm)
    assert "\n" not in str(error.value)


def test_a_stream_pulled_after_close(llm: LLM) -> None:
    stream = llm.stream([1], SamplingParams(max_tokens=9, ignore_eos=True))
    next(stream)
    llm.close()
    with pytest.raises(InputError, match="closed"):
        next(stream)


def test_results_have_the_field_for_prompt_logprobs(llm: LLM) -> None:
    assert llm.generate([1])[0].prompt_logprobs is None


@pytest.mark.parametrize(
    "settings",
    [
        {"max_model_len": 12.5},
        {"max_model_len": "x"},
        {"tensor_parallel_size": 1.5},
        {"tensor_parallel_size": True},
        {"ratio": ["3", "x"]},
        {"ratio": 5},
        {"devices": 3},
        {"seed": 1.5},
        {"seed": "x"},
    ],
)
def test_settings_of_the_wrong_type(tmp_path: Any, settings: dict[str, Any]) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", hidden=64, ffn=128, n_layers=1, n_heads=2, n_kv_heads=1, vocab=64)
    with pytest.raises(InputError) as error:
        prepare(path, **settings)
    assert "\n" not in str(error.value)


def test_a_ratio_says_how_many_ranks(tmp_path: Any) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", hidden=64, ffn=128, n_layers=1, n_heads=2, n_kv_heads=1, vocab=64)
    assert prepare(path, ratio=[3, 1]).plan.size == 2
    assert prepare(path, seed=None).config.seed == 0


@pytest.mark.parametrize("model", [None, 3, ""])
def test_a_model_is_a_path(model: Any) -> None:
    with pytest.raises(InputError, match="model"):
        LLM(model)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"max_model_len": 0}, "a context of 0"),
        ({"context": -5}, "a context of -5"),
        ({"tensor_parallel_size": 0}, "0 tensor parallel ranks"),
        ({"tensor_parallel": 2, "devices": "cpu:3"}, "2 tensor parallel ranks and 3 devices"),
        ({"devices": "cpu:0"}, "devices"),
        ({"devices": ["cpu:1", "nonsense"]}, "devices: cannot read 'nonsense'"),
        ({"devices": "24GiB"}, "devices: sizes"),
        ({"ratio": [1, 2, 3], "tensor_parallel_size": 2}, "the ratio has 3 parts"),
        ({"ratio": "a,b"}, "ratio: cannot read"),
        ({"ratio": [0, 0]}, "ratio: 0.0,0.0"),
        ({"dtype": "float8"}, "dtype 'float8'"),
        ({"kv_type": "q3"}, "KV type 'q3'"),
    ],
)
def test_errors_name_no_option_of_the_command_line(settings: dict[str, Any], words: str, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", hidden=64, ffn=128, n_layers=1, n_heads=2, n_kv_heads=1, vocab=64)
    with pytest.raises(InputError) as error:
        LLM(path, **settings)
    assert words in str(error.value)
    assert "--" not in str(error.value)
