"""The Python API over a real decoder of random weights, cut over two ranks that are threads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from multitensor import LLM, SamplingParams
from multitensor.engine.local_executor import LocalExecutor
from multitensor.engine.prepare import prepare
from multitensor.kernels.cpu.binding import load_library
from synthetic import tiny_hf, write_gguf

PROMPTS = [[1, 5, 9, 200, 31], [7] * 23, [11, 250, 3], list(range(40, 80))]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny.gguf"
    write_gguf(
        path,
        "llama",
        hidden=64,
        ffn=96,
        n_layers=2,
        n_heads=4,
        n_kv_heads=2,
        head_dim=16,
        vocab=256,
        types="F32",
        seed=3,
        context=256,
    )
    return path


def open_local(path: Path, **settings: Any) -> LLM:
    exact = {"dtype": "float32", "kv_type": "f32"}
    prepared = prepare(path, devices="cpu:2", max_model_len=128, **{**exact, **settings})
    executor = LocalExecutor()
    executor.start(prepared.plan, prepared.config)
    return LLM._from_executor(executor, prepared.plan, prepared.config, None, prepared.checkpoint)


@pytest.fixture(scope="module")
def llm(model: Path) -> Iterator[LLM]:
    with open_local(model) as llm:
        yield llm


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0.0, max_tokens=16),
        SamplingParams(temperature=1.0, top_p=0.9, top_k=50, seed=1, max_tokens=16),
        SamplingParams(temperature=0.8, repetition_penalty=1.3, frequency_penalty=0.4, seed=2, max_tokens=16),
    ],
)
def test_batches_chunks_and_slots_change_no_token(llm: LLM, model: Path, params: SamplingParams) -> None:
    together = [output.outputs[0].token_ids for output in llm.generate(PROMPTS, params)]
    alone = [llm.generate(prompt, params)[0].outputs[0].token_ids for prompt in PROMPTS]
    assert together == alone
    with open_local(model, max_num_seqs=2, max_batch_tokens=7, block_size=4) as small:
        assert [output.outputs[0].token_ids for output in small.generate(PROMPTS, params)] == together


@pytest.mark.skipif(load_library() is None, reason="native CPU kernels are not built")
@pytest.mark.parametrize("types", ["Q4_1", {"*ffn_down*": "Q8_0", "*attn_v*": "Q6_K", "*": "Q4_K"}])
def test_company_changes_nothing_with_8_bit_activations(tmp_path: Path, types: str | dict[str, str]) -> None:
    """Not a digit of a log-probability: one would be enough for texts to part (see test_native_cpu_company.py)."""
    dims = {"hidden": 256, "n_layers": 4, "n_heads": 8, "n_kv_heads": 2, "head_dim": 32, "vocab": 256, "context": 256}
    path = write_gguf(tmp_path / "tiny.gguf", "llama", ffn=512, types=types, seed=4, **dims)
    prompts = [[(7 + 31 * n * i + n) % 256 for i in range(1 + 5 * n % 60)] for n in range(24)]
    params = SamplingParams(temperature=0.0, max_tokens=12, logprobs=2)

    def said(llm: LLM, prompts: list[list[int]]) -> list[tuple[list[int], list[float]]]:
        answers = [output.outputs[0] for output in llm.generate(prompts, params)]
        return [(a.token_ids, [e.logprob for entry in a.logprobs or [] for e in entry.values()]) for a in answers]

    with open_local(path, dtype="auto", kv_type="auto") as llm:
        alone = [said(llm, [prompt])[0] for prompt in prompts]
    with open_local(path, dtype="auto", kv_type="auto", max_batch_tokens=100) as llm:  # prompts in chunks too
        assert said(llm, prompts) == alone
        assert said(llm, prompts) == alone  # now their beginnings are cached


def test_log_probabilities_of_sampling_and_scoring_agree(llm: LLM) -> None:
    params = SamplingParams(temperature=1.0, seed=5, max_tokens=12, logprobs=3)
    output = llm.generate(PROMPTS[0], params)[0]
    done = output.outputs[0]
    scores = llm.score([*output.prompt_token_ids, *done.token_ids], top=3)
    assert done.logprobs is not None
    for i, (token, entry) in enumerate(zip(done.token_ids, done.logprobs, strict=True)):
        score = scores[len(output.prompt_token_ids) - 1 + i]
        assert score.next_logprob == pytest.approx(entry[token].logprob, abs=1e-4)
        assert score.top_logprobs[0] == pytest.approx(max(e.logprob for e in entry.values()), abs=1e-4)


def test_penalties_reach_the_tokens(llm: LLM) -> None:
    plain = llm.generate(PROMPTS[1], SamplingParams(temperature=0.0, max_tokens=40))[0].outputs[0].token_ids
    strict = SamplingParams(temperature=0.0, max_tokens=40, frequency_penalty=2.0, presence_penalty=2.0)
    penalised = llm.generate(PROMPTS[1], strict)[0].outputs[0].token_ids
    assert len(set(penalised)) > len(set(plain))
    forced = llm.generate(PROMPTS[1], SamplingParams(temperature=0.0, max_tokens=3, logit_bias={77: 100.0}))
    assert forced[0].outputs[0].token_ids == [77, 77, 77]


def test_cancelling_midway_leaves_others_alone(llm: LLM) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=30)
    wanted = llm.generate(PROMPTS[2], params)[0].outputs[0].token_ids
    doomed, kept = llm.stream(PROMPTS[3], params), llm.stream(PROMPTS[2], params)
    next(kept)
    for _ in range(5):
        next(doomed)
    doomed.close()
    *_, last = kept
    assert last.outputs[0].token_ids == wanted


def test_embeddings_are_those_of_transformers(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    path = tiny_hf(tmp_path / "tiny", vocab=256)
    whole = transformers.LlamaForCausalLM.from_pretrained(path, dtype=torch.float32)
    with open_local(path, max_batch_tokens=16, max_num_seqs=2) as llm:
        engine = llm._engine
        requests = [engine.add_embed(prompt) for prompt in PROMPTS]
        engine.run(requests)
    for prompt, request in zip(PROMPTS, requests, strict=True):
        with torch.no_grad():
            mean = whole.model(torch.tensor([prompt])).last_hidden_state[0].mean(0)
        assert request.vector() == pytest.approx((mean / mean.norm()).tolist(), abs=1e-5)
