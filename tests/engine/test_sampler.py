"""The sampler against an oracle in numpy float64, row by row, and against the distribution it should draw from."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from multitensor.engine.batch import SamplingSetup, TokenLogprobs
from multitensor.engine.logprobs import Logprobs
from multitensor.engine.sampler import Sampler
from multitensor.engine.uniforms import derive_seed, uniform

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]),
]


def setup(slot: int = 0, **changes: object) -> SamplingSetup:
    values: dict = {
        "slot": slot,
        "temperature": 0.0,
        "top_k": 0,
        "top_p": 1.0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "logit_bias": {},
        "logprobs": -1,
        "prompt_ids": np.zeros(0, np.int32),
    }
    return SamplingSetup(**{**values, **changes})


def read(logprobs: Logprobs | None) -> dict[int, TokenLogprobs]:
    """As a runner reads them when the step ends."""
    assert logprobs is not None
    if logprobs.packed.device.type == "cpu":
        return logprobs.read()
    found = logprobs.to_host()
    torch.cuda.synchronize()
    return found.read()


def oracle_weights(logits: np.ndarray, params: SamplingSetup, outputs: list[int]) -> np.ndarray:
    """Unnormalised probabilities after everything but the draw; greedy: one for the winner."""
    x = logits.astype(np.float64)
    for token, bias in params.logit_bias.items():
        x[token] += bias
    if len(outputs) < params.min_tokens:
        x[list(params.suppress_ids)] = -math.inf
    for token in set(params.prompt_ids.tolist()) | set(outputs):
        x[token] = x[token] / params.repetition_penalty if x[token] > 0 else x[token] * params.repetition_penalty
    for token in set(outputs):
        x[token] -= params.frequency_penalty * outputs.count(token) + params.presence_penalty
    if params.temperature == 0:
        return np.eye(len(x))[int(np.argmax(x))]
    x = (x - x.max()) / params.temperature
    weights = np.exp(x)
    weights[weights < params.min_p * weights.max()] = 0
    order = np.argsort(-weights, kind="stable")
    if params.top_k:
        weights[weights < weights[order[min(params.top_k, len(x)) - 1]]] = 0
    if params.top_p < 1:
        mass = np.cumsum(weights[order])
        if params.top_k:
            mass = mass[: params.top_k]
        last = int(np.searchsorted(mass, params.top_p * mass[-1]))
        weights[weights < weights[order[min(last, len(mass) - 1)]]] = 0
    return weights


def oracle_token(weights: np.ndarray, share: float) -> tuple[int, float]:
    """The token, and how far the draw was from the next one (as a share of the whole)."""
    cumulative = np.cumsum(weights) / weights.sum()
    token = min(int(np.searchsorted(cumulative, share, side="right")), len(weights) - 1)
    return token, float(np.abs(cumulative - share).min())


PARAMETERS = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.1, 0.7, 1.0, 3.0]),
        "top_k": st.sampled_from([0, 1, 5, 40, 10_000]),
        "top_p": st.sampled_from([1.0, 0.05, 0.5, 0.95, 0.9999]),
        "min_p": st.sampled_from([0.0, 0.03, 0.5]),
        "repetition_penalty": st.sampled_from([1.0, 1.3, 0.8]),
        "presence_penalty": st.sampled_from([0.0, 1.5, -1.0]),
        "frequency_penalty": st.sampled_from([0.0, 0.7]),
        "logit_bias": st.sampled_from([{}, {3: 4.0, 7: -100.0}]),
        "min_tokens": st.sampled_from([0, 2]),
    }
)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("vocab", [50, 3000])
@settings(max_examples=40, deadline=None)
@given(rows=st.lists(PARAMETERS, min_size=1, max_size=4), seed=st.integers(0, 2**32 - 1))
def test_every_combination_equals_the_oracle(device: str, vocab: int, rows: list[dict], seed: int) -> None:
    random = np.random.default_rng(seed)
    sampler = Sampler(8, vocab, 64, torch.device(device))
    slots = random.permutation(8)[: len(rows)]
    setups = []
    for slot, row in zip(slots, rows, strict=True):
        prompt = random.integers(0, vocab, 12).astype(np.int32)
        setups.append(setup(int(slot), prompt_ids=prompt, suppress_ids=(1, 2, 5), **row))
        sampler.admit(setups[-1])
    outputs: list[list[int]] = [[] for _ in rows]
    for _ in range(4):
        logits = (random.standard_normal((len(rows), vocab)) * 3).astype(np.float32)
        shares = random.random(len(rows))
        given_logits = torch.from_numpy(logits.copy()).to(device)
        ids, logprobs = sampler.sample(given_logits, slots, shares)
        assert logprobs is None
        assert np.array_equal(given_logits.cpu().numpy(), logits)
        assert sampler.last_tokens[slots].tolist() == ids.tolist()
        for row, (params, token) in enumerate(zip(setups, ids.tolist(), strict=True)):
            weights = oracle_weights(logits[row], params, outputs[row])
            wanted, distance = oracle_token(weights, shares[row])
            if distance > 1e-5:  # closer, float32 scaling may decide otherwise than float64
                assert token == wanted
            outputs[row].append(token)


@pytest.mark.parametrize("device", DEVICES)
def test_a_row_does_not_depend_on_its_neighbours(device: str) -> None:
    random = np.random.default_rng(5)
    vocab = 5000
    kinds: list[dict] = [
        {"temperature": 1.0},
        {"temperature": 0.8, "top_p": 0.97},
        {"temperature": 5.0, "top_p": 0.999},
        {"temperature": 1.0, "top_k": 20, "top_p": 0.9},
        {"temperature": 1.0, "min_p": 0.01},
        {"repetition_penalty": 1.2, "prompt_ids": np.arange(9, dtype=np.int32)},
        {},
    ]
    logits = torch.from_numpy(random.standard_normal((len(kinds), vocab)).astype(np.float32) * 2)
    logits = logits.bfloat16().float().to(device)  # full of ties
    shares = random.random(len(kinds))
    together = Sampler(len(kinds), vocab, 64, torch.device(device))
    for slot, kind in enumerate(kinds):
        together.admit(setup(slot, **kind))
    ids, _ = together.sample(logits, np.arange(len(kinds)), shares)
    for row, kind in enumerate(kinds):
        alone = Sampler(1, vocab, 64, torch.device(device))
        alone.admit(setup(0, **kind))
        lone, _ = alone.sample(logits[row : row + 1], np.zeros(1, np.int64), shares[row : row + 1])
        assert lone.item() == ids[row].item()


@pytest.mark.parametrize("device", DEVICES)
def test_greedy_takes_the_lowest_id_of_equals(device: str) -> None:
    logits = torch.zeros(2, 70_000, device=device)
    logits[0, [69_000, 123, 40_000]] = 4.0
    for changes in ({}, {"presence_penalty": 0.5}):  # the fast path and the other
        sampler = Sampler(2, 70_000, 64, torch.device(device))
        sampler.admit(setup(0, **changes))
        sampler.admit(setup(1, **changes))
        ids, _ = sampler.sample(logits, np.array([0, 1]), np.zeros(2))
        assert ids.tolist() == [123, 0]


@pytest.mark.parametrize("device", DEVICES)
def test_draws_follow_the_distribution(device: str) -> None:
    """Chi-square over 20,000 draws with numbers keyed by (seed, position), as the engine makes them."""
    probabilities = np.array([0.4, 0.25, 0.15, 0.1, 0.06, 0.04])
    draws, rows = 20_000, 200
    sampler = Sampler(rows, 6, 64, torch.device(device))
    for slot in range(rows):
        sampler.admit(setup(slot, temperature=1.0))
    logits = torch.from_numpy(np.log(probabilities).astype(np.float32)).to(device).expand(rows, 6).contiguous()
    counts = np.zeros(6)
    for position in range(draws // rows):
        shares = np.array([uniform(derive_seed(7, row), position) for row in range(rows)])
        ids, _ = sampler.sample(logits, np.arange(rows), shares)
        counts += np.bincount(ids.cpu().numpy(), minlength=6)
    expected = probabilities * draws
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert chi_square < 20.5  # 99.9% quantile for 5 degrees of freedom


def test_the_last_share_below_one_stays_inside_what_is_kept() -> None:
    sampler = Sampler(1, 10, 64, torch.device("cpu"))
    sampler.admit(setup(temperature=1.0, top_k=3))
    logits = torch.tensor([[0.0, 9.0, 8.0, 7.0] + [0.0] * 6])
    assert sampler.sample(logits, np.array([0]), np.array([1 - 2**-53]))[0].item() == 3
    assert sampler.sample(logits, np.array([0]), np.array([0.0]))[0].item() == 1


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("changes", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 3, "top_p": 0.9}])
def test_broken_logits_do_not_lead_out_of_the_vocabulary(device: str, changes: dict) -> None:
    sampler = Sampler(1, 10, 64, torch.device(device))
    sampler.admit(setup(**changes))
    logits = torch.full((1, 10), torch.nan, device=device)
    assert 0 <= sampler.sample(logits, np.array([0]), np.array([0.99]))[0].item() < 10


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logprobs_are_the_models_own(device: str, temperature: float) -> None:
    random = np.random.default_rng(3)
    logits = random.standard_normal((3, 90)).astype(np.float32)
    sampler = Sampler(3, 90, 64, torch.device(device))
    for slot, k in enumerate((4, -1, 0)):
        sampler.admit(setup(slot, temperature=temperature, top_k=5, logit_bias={8: 3.0}, logprobs=k))
    ids, found = sampler.sample(torch.from_numpy(logits).to(device), np.arange(3), random.random(3))
    logprobs = read(found)
    exact = logits.astype(np.float64)
    exact -= np.log(np.exp(exact).sum(1, keepdims=True))
    assert set(logprobs) == {0, 2}
    for row, entry in logprobs.items():
        order = np.argsort(-exact[row])
        assert entry.token_logprob == pytest.approx(exact[row, ids[row].item()], abs=1e-6)
        assert entry.token_rank == order.tolist().index(ids[row].item()) + 1
        assert entry.top_ids == order[: 4 if row == 0 else 0].tolist()
        assert entry.top_logprobs == pytest.approx(exact[row, entry.top_ids].tolist(), abs=1e-6)


def test_rows_beyond_one_group_keep_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(11)
    logits = torch.from_numpy(random.standard_normal((9, 300)).astype(np.float32))
    shares = random.random(9)
    results = []
    for elements in (1 << 22, 700):
        monkeypatch.setattr("multitensor.engine.sampler._GROUP_ELEMENTS", elements)
        sampler = Sampler(9, 300, 64, torch.device("cpu"))
        for slot in range(9):
            sampler.admit(setup(slot, temperature=float(slot % 2), top_p=0.9, logprobs=2, presence_penalty=0.1))
        ids, logprobs = sampler.sample(logits, np.arange(9), shares)
        results.append((ids.tolist(), read(logprobs)))
    assert results[0] == results[1]


def test_a_slot_taken_anew_forgets_its_history() -> None:
    sampler = Sampler(1, 20, 64, torch.device("cpu"))
    logits = torch.zeros(1, 20)
    logits[0, 4] = 1.0
    for _ in range(2):
        sampler.admit(setup(presence_penalty=2.0))
        assert sampler.sample(logits, np.array([0]), np.zeros(1))[0].item() == 4
        assert sampler.sample(logits, np.array([0]), np.zeros(1))[0].item() == 0


@pytest.mark.parametrize("changes", [{"repetition_penalty": 1.8, "prompt_ids": np.array([1, 2], np.int32)}, {}])
def test_a_sequence_that_comes_back_samples_as_if_it_had_stayed(changes: dict) -> None:
    """In another slot, told what it had sampled: penalties and min_tokens count on."""
    penalties = {"presence_penalty": 0.4, "frequency_penalty": 0.9, "min_tokens": 12, "suppress_ids": (3,), **changes}
    logits = torch.randn(1, 12, generator=torch.Generator().manual_seed(1))
    sampler = Sampler(2, 12, 64, torch.device("cpu"))
    sampler.admit(setup(0, **penalties))
    stayed = [int(sampler.sample(logits, np.array([0]), np.zeros(1))[0]) for _ in range(20)]
    for gone in (1, 7, 15):
        sampler.admit(setup(1, **penalties, output_ids=tuple(stayed[:gone])))
        back = [int(sampler.sample(logits, np.array([1]), np.zeros(1))[0]) for _ in range(20 - gone)]
        assert back == stayed[gone:]
    assert len(set(stayed)) > 3


def test_history_grows_to_the_context() -> None:
    sampler = Sampler(2, 500, 300, torch.device("cpu"))
    sampler.admit(setup(1, frequency_penalty=1.0))
    logits = torch.full((1, 500), -10.0)
    logits[0, :300] = torch.linspace(0.9, 0.0, 300)  # each token loses 1 when taken, so all come once, in order
    taken = [sampler.sample(logits, np.array([1]), np.zeros(1))[0].item() for _ in range(300)]
    assert taken == list(range(300))


def test_uniforms_depend_on_seed_and_position_only_and_are_uniform() -> None:
    values = [uniform(derive_seed(1, seed), position) for seed in range(40) for position in range(250)]
    assert len(set(values)) == len(values)
    assert values[0] == uniform(derive_seed(1, 0), 0)
    assert all(0 <= value < 1 for value in values)
    counts = np.bincount((np.array(values) * 20).astype(int), minlength=20)
    assert ((counts - 500) ** 2 / 500).sum() < 43.8  # 99.9% quantile for 19 degrees of freedom
    assert derive_seed(1, 2) != derive_seed(2, 1) and derive_seed(-1) == derive_seed(2**64 - 1)


@pytest.mark.parametrize("device", DEVICES)
@given(st.data())
@settings(max_examples=25, deadline=None)
def test_only_what_a_mask_allows_is_sampled(device: str, data: st.DataObject) -> None:
    """Greedy takes the best of the allowed; random draws stay among them; rows without a mask are as they were."""
    vocab, rows = 77, 4
    rng = np.random.default_rng(data.draw(st.integers(0, 1 << 30)))
    logits = rng.normal(0, 3, (rows, vocab)).astype(np.float32)
    sampler = Sampler(rows, vocab, 16, torch.device(device))
    top_ks = [data.draw(st.sampled_from([0, 3])) for _ in range(rows)]
    setups = [setup(slot, temperature=float(slot % 2), top_k=top_k) for slot, top_k in enumerate(top_ks)]
    for request in setups:
        sampler.admit(request)
    sets = {row: rng.choice(vocab, rng.integers(1, 12), replace=False) for row in data.draw(st.sets(st.integers(0, 3)))}
    masks = {}
    for row, tokens in sets.items():
        bits = np.zeros(96, np.uint8)
        bits[tokens] = 1
        masks[row] = np.packbits(bits, bitorder="little").view(np.uint32)
    slots, uniforms = np.arange(rows), rng.random(rows)
    given_logits = torch.from_numpy(logits).to(device)
    ids = sampler.sample(given_logits, slots, uniforms, masks)[0].tolist()
    assert torch.equal(given_logits.cpu(), torch.from_numpy(logits))
    for row, tokens in sets.items():
        assert ids[row] in tokens
        if row % 2 == 0:
            assert ids[row] == max(tokens, key=lambda token: logits[row, token])
    fresh = Sampler(rows, vocab, 16, torch.device(device))
    for slot in range(rows):
        fresh.admit(setups[slot])
    free = fresh.sample(given_logits, slots, uniforms)[0].tolist()
    assert all(ids[row] == free[row] for row in range(rows) if row not in sets)


@pytest.mark.parametrize("device", DEVICES)
def test_logprobs_of_broken_logits(device: str) -> None:
    """What cannot be sampled has log-probability -inf; where one number is no number, none is."""
    logits = torch.tensor([[1.0, -math.inf, 3.0], [0.0, math.nan, 1.0]], device=device)
    sampler = Sampler(2, 3, 64, torch.device(device))
    for slot in range(2):
        sampler.admit(setup(slot, logprobs=3))
    found = read(sampler.sample(logits, np.arange(2), np.zeros(2))[1])
    rest = math.log1p(math.exp(-2.0))
    assert found[0].top_ids == [2, 0, 1] and found[0].token_rank == 1
    assert found[0].top_logprobs == pytest.approx([-rest, -2.0 - rest, -math.inf], abs=1e-12)
    assert math.isnan(found[1].token_logprob) and all(math.isnan(value) for value in found[1].top_logprobs)


@pytest.mark.parametrize("device", DEVICES)
def test_a_temperature_too_small_for_float32_is_greedy(device: str) -> None:
    sampler = Sampler(1, 9, 64, torch.device(device))
    sampler.admit(setup(temperature=1e-60, top_p=0.9))
    logits = torch.tensor([[0.0, 1.0, 5.0, 4.9, 0.0, 0.0, 0.0, 0.0, 0.0]], device=device)
    assert sampler.sample(logits, np.zeros(1, np.int64), np.array([0.99]))[0].item() == 2
