"""Sampling in one launch (choose.cu) on an emulated GPU against numpy in float64 and the sampler's torch path."""

from __future__ import annotations

from pathlib import Path

import emulated_cuda
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from multitensor.engine.batch import SamplingSetup
from multitensor.engine.logprobs import pack_logprobs
from multitensor.engine.sampler import Sampler
from multitensor.kernels.cuda import choose, logprobs
from multitensor.kernels.cuda.choose import CudaTokenChooser
from multitensor.kernels.cuda.logprobs import CudaLogprobs
from sampling_oracle import processed, right_tokens, sampling_setup

pytestmark = pytest.mark.skipif(emulated_cuda.compiler() is None, reason="there is no C++ compiler")
CPU = torch.device("cpu")
PER_BLOCK = 64 * 16  # logits, with the threads of a block here


@pytest.fixture(autouse=True)
def emulated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    emulated_cuda.replace_gpu(monkeypatch, emulated_cuda.AtOnce(tmp_path), choose, logprobs, processors=12)
    monkeypatch.setattr(choose, "THREADS", 64)
    monkeypatch.setattr(logprobs, "THREADS", 64)


def samplers(setups: list[SamplingSetup], vocab: int, parts: int | None = None) -> tuple[Sampler, Sampler]:
    """One that has the kernel, and one of torch's operations; both with these requests."""
    slots = 1 + max(request.slot for request in setups)
    both = (
        Sampler(slots, vocab, 64, CPU, CudaTokenChooser(vocab, CPU, parts)),
        Sampler(slots, vocab, 64, CPU),
    )
    for sampler in both:
        for request in setups:
            sampler.admit(request)
    return both


def words(allowed: np.ndarray) -> np.ndarray:
    """bool [V] -> a grammar's mask."""
    padded = np.zeros(-(-len(allowed) // 32) * 32, np.uint8)
    padded[: len(allowed)] = allowed
    return np.packbits(padded, bitorder="little").view(np.uint32)


PARAMETERS = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 1e-5, 0.1, 0.8, 1.0, 3.0, 100.0]),
        "top_k": st.sampled_from([0, 0, 1, 5, 40, 2999, 10_000]),
        "top_p": st.sampled_from([1.0, 1e-9, 0.05, 0.5, 0.95, 0.9999]),
        "min_p": st.sampled_from([0.0, 0.03, 0.5]),
        "repetition_penalty": st.sampled_from([1.0, 1.3, 0.8]),
        "presence_penalty": st.sampled_from([0.0, 1.5, -1.0]),
        "frequency_penalty": st.sampled_from([0.0, 0.7]),
        "logit_bias": st.sampled_from([{}, {}, {3: 4.0, 7: -100.0}]),
        "min_tokens": st.sampled_from([0, 2]),
    }
)
KINDS = ("wide", "ties", "narrow", "equal", "peak")


def logits_of(kind: str, shape: tuple[int, int], random: np.random.Generator) -> np.ndarray:
    x = random.standard_normal(shape)
    spread = {"wide": 3 * x, "ties": np.round(x), "narrow": 1e-3 * x, "equal": 0 * x, "peak": 20 * (x > 2.5) + x}
    return spread[kind].astype(np.float32)


@pytest.mark.parametrize("vocab", [1, 50, 3000])
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    requests=st.lists(PARAMETERS, min_size=1, max_size=3),
    kind=st.sampled_from(KINDS),
    masked=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_combination_equals_the_oracle(
    vocab: int, requests: list[dict], kind: str, masked: bool, seed: int
) -> None:
    random = np.random.default_rng(seed)
    slots = random.permutation(5)[: len(requests)]
    prompts = [random.integers(0, vocab, 12).astype(np.int32) for _ in requests]
    most = vocab - 1
    setups = [
        sampling_setup(
            int(slot),
            prompt_ids=prompt,
            suppress_ids=tuple({min(1, most), min(2, most)}),
            **{**request, "logit_bias": {min(token, most): bias for token, bias in request["logit_bias"].items()}},
        )
        for slot, request, prompt in zip(slots, requests, prompts, strict=True)
    ]
    sampler, _ = samplers(setups, vocab)
    outputs: list[list[int]] = [[] for _ in setups]
    for _ in range(3):
        logits = logits_of(kind, (len(setups), vocab), random)
        shares = random.random(len(setups))
        allowed = random.random((len(setups), vocab)) < 0.3
        masks = {row: words(allowed[row]) for row in range(0, len(setups), 2)} if masked else {}
        ids = sampler.sample(torch.from_numpy(logits.copy()), slots, shares, masks)[0].tolist()
        assert sampler.last_tokens[slots].tolist() == ids
        for row, params in enumerate(setups):
            x = processed(logits[row], params, outputs[row], allowed[row] if row in masks else None)
            assert ids[row] in right_tokens(x, params, shares[row])
            outputs[row].append(ids[row])


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(request=PARAMETERS, kind=st.sampled_from(KINDS), seed=st.integers(0, 2**32 - 1))
def test_a_token_depends_neither_on_other_rows_nor_on_the_grid(request: dict, kind: str, seed: int) -> None:
    random = np.random.default_rng(seed)
    vocab, rows = 2100, 3
    logits = torch.from_numpy(logits_of(kind, (rows, vocab), random))
    shares = random.random(rows)
    prompt = random.integers(0, vocab, 30).astype(np.int32)
    others = [{"temperature": 1.0, "top_k": 9}, {"temperature": 0.7, "top_p": 0.9}]
    found = []
    for parts in (3, 5, 12):
        setups = [sampling_setup(slot, **other) for slot, other in enumerate(others)]
        sampler, _ = samplers([*setups, sampling_setup(2, prompt_ids=prompt, **request)], vocab, parts)
        found.append(sampler.sample(logits, np.arange(rows), shares)[0][2].item())
    alone, _ = samplers([sampling_setup(0, prompt_ids=prompt, **request)], vocab)
    found.append(alone.sample(logits[2:], np.zeros(1, np.int64), shares[2:])[0].item())
    assert len(set(found)) == 1


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"presence_penalty": 0.5},
        {"temperature": 1.0},
        {"temperature": 1.0, "top_k": 3, "top_p": 0.9},
        {"temperature": 1.0, "top_p": 0.9, "min_p": 0.1},
        {"temperature": 1.0, "top_k": 40},
    ],
)
def test_broken_logits_give_what_torch_gives(changes: dict) -> None:
    vocab = 1500
    usual = np.random.default_rng(4).standard_normal(vocab).astype(np.float32)
    rows = []
    for places, value in (([7, 900], np.nan), ([7, 900], np.inf), ([7, 900], -np.inf)):
        rows.append(usual.copy())
        rows[-1][places] = value
    rows += [np.full(vocab, value, np.float32) for value in (np.nan, np.inf, -np.inf)]
    rows.append(np.full(vocab, -np.inf, np.float32))
    rows[-1][[1100, 1400]] = 2.0, 1.0
    rows.append(np.full(vocab, -3e38, np.float32))
    rows[-1][3] = 3e38
    logits = torch.from_numpy(np.stack(rows))
    setups = [sampling_setup(slot, **changes) for slot in range(len(rows))]
    ours, torchs = samplers(setups, vocab)
    for share in (0.0, 0.5, 1 - 2**-53):
        shares = np.full(len(rows), share)
        wanted = torchs.sample(logits, np.arange(len(rows)), shares)[0]
        assert torch.equal(ours.sample(logits, np.arange(len(rows)), shares)[0], wanted)


def test_nothing_allowed_gives_the_first_token() -> None:
    setups = [sampling_setup(0), sampling_setup(1, temperature=1.0, top_k=4)]
    sampler, _ = samplers(setups, 70)
    none = np.zeros(3, np.uint32)
    assert sampler.sample(torch.randn(2, 70), np.arange(2), np.full(2, 0.5), {0: none, 1: none})[0].tolist() == [0, 0]


def test_every_token_as_likely_as_the_least_kept_one_is_kept() -> None:
    """Three tie at the second place, and top-k is 2: four tokens have shares. Of the mass of two the first is 73%."""
    logits = torch.full((1, 2000), -1.0)
    logits[0, [5, 700, 1100, 1999]] = torch.tensor([2.0, 2.0, 3.0, 2.0])
    weights = np.exp([-1.0, -1.0, 0.0, -1.0])
    borders = np.cumsum(weights) / weights.sum()
    for top_p in (1.0, 0.9):
        sampler, _ = samplers([sampling_setup(0, temperature=1.0, top_k=2, top_p=top_p)], 2000)
        for token, border in zip([5, 700, 1100, 1999], borders, strict=True):
            assert sampler.sample(logits, np.zeros(1, np.int64), np.array([border - 1e-5]))[0].item() == token
    sampler, _ = samplers([sampling_setup(0, temperature=1.0, top_k=2, top_p=0.7)], 2000)
    for share in (0.01, 0.99):
        assert sampler.sample(logits, np.zeros(1, np.int64), np.array([share]))[0].item() == 1100


def test_sums_begin_at_zero_every_time() -> None:
    """The same filters over other logits: three splits and more each, of which nothing must be left."""
    random = np.random.default_rng(12)
    kinds = [{"top_k": 700, "top_p": 0.6}, {"top_k": 300}, {"top_p": 0.8}]
    setups = [sampling_setup(slot, temperature=50.0, **kind) for slot, kind in enumerate(kinds)]
    sampler, _ = samplers(setups, 3000)
    for _ in range(12):
        logits, shares = logits_of("wide", (3, 3000), random), random.random(3)
        ids = sampler.sample(torch.from_numpy(logits), np.arange(3), shares)[0].tolist()
        for row, params in enumerate(setups):
            assert ids[row] in right_tokens(processed(logits[row], params, []), params, shares[row])
    chooser = sampler.chooser
    assert isinstance(chooser, CudaTokenChooser)
    assert (
        not chooser._states[:, :16].any() and not chooser._states[:, 16 + 8 * 64 :].any() and not chooser._turns.any()
    )


def test_draws_follow_the_distribution() -> None:
    """Every share of a fine comb: as many tokens as their probability says."""
    probabilities = np.array([0.4, 0.25, 0.15, 0.1, 0.06, 0.04])
    logits = torch.full((1, PER_BLOCK + 300), -torch.inf)
    places = [2, 3, 500, PER_BLOCK - 1, PER_BLOCK, PER_BLOCK + 299]
    logits[0, places] = torch.from_numpy(np.log(probabilities).astype(np.float32))
    rows, draws = 8, 400
    sampler, _ = samplers([sampling_setup(slot, temperature=1.0) for slot in range(rows)], logits.shape[1])
    shares = (np.arange(draws) + 0.5) / draws
    found: list[int] = []
    for first in range(0, draws, rows):
        ids, _ = sampler.sample(logits.expand(rows, -1).contiguous(), np.arange(rows), shares[first : first + rows])
        found += ids.tolist()
    counts = [found.count(place) for place in places]
    assert counts == pytest.approx(draws * probabilities, abs=1) and sum(counts) == draws


def test_a_history_longer_than_a_block_has_threads() -> None:
    """Penalties over prompt and output, step after step, as torch counts them; ids in several stretches."""
    vocab, random = 1100, np.random.default_rng(8)
    prompt = random.integers(0, vocab, 500).astype(np.int32)
    penalties = {"repetition_penalty": 1.4, "presence_penalty": 0.3, "frequency_penalty": 0.2}
    ours, torchs = samplers([sampling_setup(1, prompt_ids=prompt, **penalties)], vocab)
    logits = torch.from_numpy(random.standard_normal((1, vocab)).astype(np.float32))
    ids = [[s.sample(logits, np.array([1]), np.zeros(1))[0].item() for _ in range(12)] for s in (ours, torchs)]
    assert ids[0] == ids[1] and len(set(ids[0])) > 1


def test_rows_that_do_not_follow_one_another_in_memory() -> None:
    """Rows of an odd number of logits that are part of wider ones, none aligned to four."""
    wide = torch.randn(3, 1307, generator=torch.Generator().manual_seed(6))
    ours, torchs = samplers([sampling_setup(slot) for slot in range(3)], 1301)
    logits = wide[:, 5:1306]
    wanted = torchs.sample(logits, np.arange(3), np.zeros(3))[0]
    assert torch.equal(ours.sample(logits, np.arange(3), np.zeros(3))[0], wanted)


@pytest.mark.parametrize("most", [0, 1, 5, 20])
@pytest.mark.parametrize(("rows", "columns"), [(1, 20), (1, 40), (3, 1025), (5, 4000)])
def test_logprobs_are_those_of_torch(most: int, rows: int, columns: int) -> None:
    """Of some rows, in no order, launch after launch; -inf among the logits."""
    random = np.random.default_rng(most + columns)
    tells = CudaLogprobs(columns, CPU)
    for turn in range(3):
        logits = torch.from_numpy(logits_of(("wide", "narrow", "peak")[turn], (rows, columns), random))
        logits[:, : max(0, columns - 25) : 3] = -torch.inf  # so many are left
        logits[:, -1] = 0.5
        ids = torch.from_numpy(random.integers(0, columns, rows))
        wanted = random.permutation(rows)[: max(1, rows - 1)]
        agree(tells.run(logits, ids, wanted, most), pack_logprobs(logits[wanted], ids[wanted], most), most)


def agree(found: torch.Tensor, wanted: torch.Tensor, most: int) -> None:
    """Ranks and ids alike, log-probabilities within 1e-6 (the same bits where they are no finite numbers)."""
    assert torch.equal(found[:, 1], wanted[:, 1]) and torch.equal(found[:, 2 : 2 + most], wanted[:, 2 : 2 + most])
    for part in (slice(0, 1), slice(2 + most, None)):
        values = [packed[:, part].contiguous().view(torch.float64) for packed in (found, wanted)]
        assert torch.allclose(*values, rtol=1e-6, atol=1e-6, equal_nan=True)


def test_logprobs_of_broken_logits_are_those_of_torch() -> None:
    rows = torch.randn(7, 1500, generator=torch.Generator().manual_seed(3))
    for row, value in enumerate((torch.nan, torch.inf, -torch.inf)):
        rows[row, 900] = value
        rows[3 + row] = value
    rows[3] = torch.randn(1500, generator=torch.Generator().manual_seed(4))
    rows[3, 0] = torch.nan
    rows[6, :1200] = -torch.inf
    ids = torch.tensor([900, 900, 900, 5, 5, 5, 1300])
    places = np.arange(7)
    found, wanted = CudaLogprobs(1500, CPU).run(rows, ids, places, 2), pack_logprobs(rows, ids, 2)
    alike = [4, 5]  # all equal: which come first is nobody's promise
    agree(found[[0, 1, 2, 3, 6]], wanted[[0, 1, 2, 3, 6]], 2)
    assert found[alike, 1].tolist() == [1, 1]
    assert found[alike][:, [0, 4, 5]].view(torch.float64).isnan().all()


def test_a_sampler_tells_logprobs_in_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    vocab = 1100
    setups = [
        sampling_setup(0, temperature=1.0, logprobs=3, logit_bias={7: 3.0}),
        sampling_setup(1, logprobs=-1),
        sampling_setup(2, temperature=1.0, top_k=5, logprobs=1),
    ]
    ours, torchs = (
        Sampler(3, vocab, 64, CPU, CudaTokenChooser(vocab, CPU)),
        Sampler(3, vocab, 64, CPU),
    )
    for sampler in (ours, torchs):
        for request in setups:
            sampler.admit(request)
    logits, shares = torch.randn(3, vocab, generator=torch.Generator().manual_seed(5)), np.array([0.3, 0.4, 0.5])
    found = [sampler.sample(logits, np.arange(3), shares)[1] for sampler in (torchs, ours)]
    monkeypatch.setattr("multitensor.engine.sampler.pack_logprobs", None)  # ours has no need of it
    found[1] = ours.sample(logits, np.arange(3), shares)[1]
    wanted, told = (logprobs.read() for logprobs in found if logprobs is not None)
    assert set(told) == set(wanted) == {0, 2}
    for row, entry in told.items():
        assert (entry.token_rank, entry.top_ids) == (wanted[row].token_rank, wanted[row].top_ids)
        assert entry.token_logprob == pytest.approx(wanted[row].token_logprob, abs=1e-6)
        assert entry.top_logprobs == pytest.approx(wanted[row].top_logprobs, abs=1e-6)


def test_a_gpu_too_small_for_a_row_is_refused() -> None:
    with pytest.raises(ValueError, match="at once"):
        CudaTokenChooser(25 * PER_BLOCK, CPU)
