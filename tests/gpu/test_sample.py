"""Sampling on the device: greedy against argmax, all else in one launch against torch; many launches in a row."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from multitensor.engine.batch import SamplingSetup, StepInput
from multitensor.engine.logprobs import pack_logprobs
from multitensor.engine.prepare import prepare
from multitensor.engine.runner import ModelRunner
from multitensor.engine.sampler import Sampler
from multitensor.kernels.cuda.choose import CudaTokenChooser
from multitensor.kernels.cuda.logprobs import CudaLogprobs
from multitensor.parallel.group import SingleGroup
from sampling_oracle import processed, right_tokens, sampling_setup
from synthetic import write_gguf

pytestmark = pytest.mark.gpu
DIMS = {"hidden": 256, "ffn": 768, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "head_dim": 64, "vocab": 512}


@pytest.mark.parametrize("columns", [17, 5000, 128256, 262144])
@pytest.mark.parametrize("rows", [1, 5, 64])
def test_the_likeliest_is_remembered(columns: int, rows: int) -> None:
    from multitensor.kernels.cuda.sample import GreedySampler

    sampler = GreedySampler(rows, torch.device("cuda:0"))
    slots = torch.randperm(rows + 3, device="cuda")[:rows].int()
    positions = torch.arange(rows, device="cuda", dtype=torch.int32) - 1  # the first row is padding
    for launch in range(5):
        last = torch.full((rows + 3,), -7, dtype=torch.int64, device="cuda")
        logits = torch.randn(rows, columns, device="cuda")
        if launch == 3:  # equals: the lowest index counts
            logits = logits.round()
        if launch == 4:
            logits = -logits.abs() - 1e30
        sampler.run(logits, positions, slots, last)
        wanted = torch.tensor([int((row == row.max()).nonzero()[0]) for row in logits], device="cuda")
        assert torch.equal(sampler.ids, wanted)
        expected = torch.full_like(last, -7)
        expected[slots[1:].long()] = wanted[1:]
        assert torch.equal(last, expected)


KINDS: list[dict] = [
    {"temperature": 0.8},
    {"temperature": 0.8, "top_p": 0.95},
    {"temperature": 0.7, "top_k": 40, "top_p": 0.9},
    {"temperature": 1.0, "top_k": 200},
    {"temperature": 1.2, "min_p": 0.02},
    {"temperature": 1.0, "top_p": 0.9, "repetition_penalty": 1.2, "presence_penalty": 0.4, "frequency_penalty": 0.3},
    {"repetition_penalty": 1.3},
    {"temperature": 1e-5, "top_p": 0.5},
    {"temperature": 100.0, "top_p": 0.999},
    {},
]


def requests(rows: int, columns: int, random: np.random.Generator) -> list[SamplingSetup]:
    """One of every kind, in turn, in slots in no order."""
    prompts = [random.integers(0, columns, 700).astype(np.int32) for _ in range(rows)]
    slots = random.permutation(rows)
    return [
        sampling_setup(int(slot), prompt_ids=prompt, **KINDS[row % len(KINDS)])
        for row, (slot, prompt) in enumerate(zip(slots, prompts, strict=True))
    ]


def sampler_of(setups: list[SamplingSetup], columns: int, chooser: CudaTokenChooser | None) -> Sampler:
    sampler = Sampler(len(setups), columns, 1024, torch.device("cuda:0"), chooser)
    for request in setups:
        sampler.admit(request)
    return sampler


def masks_of(rows: int, columns: int, random: np.random.Generator) -> tuple[np.ndarray, dict[int, np.ndarray]]:
    """What grammars allow of every third row: bool [rows, columns], and the same as a step has it."""
    allowed = np.ones((rows, -(-columns // 32) * 32), bool)
    allowed[::3] = random.random(allowed[::3].shape) < 0.4
    bits = np.packbits(allowed, axis=1, bitorder="little").view(np.uint32)
    return allowed[:, :columns], {row: bits[row] for row in range(0, rows, 3)}


@pytest.mark.parametrize("spread", [0.3, 4.0])
@pytest.mark.parametrize(("rows", "columns"), [(1, 128256), (10, 128256), (70, 128256), (10, 32001), (10, 262144)])
def test_one_launch_samples_what_torch_does(rows: int, columns: int, spread: float) -> None:
    random = np.random.default_rng(rows + columns)
    torch.manual_seed(rows + columns)
    setups = requests(rows, columns, random)
    ours = sampler_of(setups, columns, CudaTokenChooser(columns, torch.device("cuda:0")))
    torchs = sampler_of(setups, columns, None)
    slots = np.array([request.slot for request in setups])
    outputs: list[list[int]] = [[] for _ in setups]
    same = 0
    for step in range(4):
        logits = spread * torch.randn(rows, columns, device="cuda")
        logits = logits.bfloat16().float() if step == 2 else logits  # full of ties
        allowed, masks = masks_of(rows, columns, random) if step % 2 else (None, {})
        shares = random.random(rows)
        given = logits.clone()
        ids = ours.sample(given, slots, shares, masks)[0]
        wanted = torchs.sample(logits, slots, shares, masks)[0].tolist()
        assert torch.equal(given, logits)
        assert torch.equal(ours.last_tokens[slots], ids)
        torchs._history.copy_(ours._history)  # where they differ, both go on with the same
        for row, (token, other) in enumerate(zip(ids.tolist(), wanted, strict=True)):
            same += token == other
            if token != other:
                x = processed(
                    logits[row].cpu().numpy(), setups[row], outputs[row], None if allowed is None else allowed[row]
                )
                assert token in right_tokens(x, setups[row], shares[row]), (row, KINDS[row % len(KINDS)])
            outputs[row].append(token)
    assert same >= 0.97 * 4 * rows


@pytest.mark.parametrize("columns", [32001, 128256])
def test_one_launch_does_not_depend_on_its_grid(columns: int) -> None:
    """Rows by themselves, together, and by different numbers of blocks, often in a row: the same tokens."""
    random, device = np.random.default_rng(9), torch.device("cuda:0")
    torch.manual_seed(9)
    setups = requests(20, columns, random)
    logits = 2 * torch.randn(20, columns, device="cuda")
    shares = random.random(20)
    slots = np.array([request.slot for request in setups])
    found = [
        sampler_of(setups, columns, CudaTokenChooser(columns, device, parts)).sample(logits, slots, shares)[0].tolist()
        for parts in (None, 16, 31, 64)
    ]
    alone = sampler_of(setups, columns, CudaTokenChooser(columns, device))
    found.append([alone.sample(logits[r : r + 1], slots[r : r + 1], shares[r : r + 1])[0].item() for r in range(20)])
    assert all(tokens == found[0] for tokens in found)
    chooser = CudaTokenChooser(columns, device)
    random_rows = [row for row in range(20) if "repetition_penalty" not in KINDS[row % len(KINDS)]]
    often = sampler_of(setups, columns, chooser)
    for _ in range(200):
        ids = often.sample(logits[random_rows], slots[random_rows], shares[random_rows])[0]
    assert ids.tolist() == [found[0][row] for row in random_rows]


def texts_of(runner: ModelRunner, setups: tuple[SamplingSetup, ...], tokens: int) -> list[list[int]]:
    """What each of these requests writes after a prompt of its own: one step of all prompts, then recorded ones."""
    count, blocks = len(setups), 256 // runner.plan.block_size
    tables = np.arange(count * blocks, dtype=np.int32).reshape(count, blocks)
    texts: list[list[int]] = [[] for _ in setups]
    random = np.random.default_rng(7)
    for number in range(tokens):
        size = 5 if number == 0 else 1
        ids = np.arange(5 * count, dtype=np.int32) % 300 if number == 0 else np.full(count, -1, np.int32)
        output = runner.step(
            StepInput(
                step=number,
                slots=np.array([request.slot for request in setups], np.int32),
                query_lens=np.full(count, size, np.int32),
                context_lens=np.full(count, 0 if number == 0 else 4 + number, np.int32),
                token_ids=ids,
                block_tables=tables,
                sample=np.ones(count, bool),
                uniforms=random.random(count),
                score_top=np.zeros(count, np.int32),
                score_next=np.full(size * count, -1, np.int32),
                setups=setups if number == 0 else (),
            )
        )
        for text, token in zip(texts, output.token_ids.tolist(), strict=True):
            text.append(token)
        assert set(output.logprobs) == {row for row, request in enumerate(setups) if request.logprobs >= 0}
        for row, entry in output.logprobs.items():
            assert entry.token_logprob <= 0 and len(entry.top_ids) == setups[row].logprobs
    return texts


def test_a_model_writes_the_same_texts(tmp_path: Path) -> None:
    """By one launch a step, as it is unless there is no room for it, and by torch's operations."""
    path = write_gguf(tmp_path / "model.gguf", types="Q8_0", **DIMS)
    found = prepare(str(path), devices="cuda:0", dtype="float16", max_model_len=256, max_num_seqs=8)
    device = torch.device("cuda:0")
    runner = ModelRunner(found.checkpoint, found.plan, 0, found.config, SingleGroup(), device)
    runner.load()
    assert runner.sampler.chooser is not None
    prompt = np.arange(9, dtype=np.int32)
    setups = (
        sampling_setup(4, temperature=0.9, top_p=0.9),
        sampling_setup(0, temperature=1.1, top_k=30, top_p=0.95, logprobs=2),
        sampling_setup(7, temperature=0.8, min_p=0.05, repetition_penalty=1.2, prompt_ids=prompt, logprobs=0),
        sampling_setup(1, presence_penalty=1.0, logit_bias={7: 2.0}),
        sampling_setup(2),
    )
    texts = texts_of(runner, setups, 40)
    runner.sampler.chooser = None
    assert texts == texts_of(runner, setups, 40)
    assert len({tuple(text) for text in texts}) == len(setups)


@pytest.mark.parametrize("most", [0, 5, 20])
@pytest.mark.parametrize(("rows", "columns"), [(1, 128256), (10, 32001), (70, 128256), (10, 262208)])
def test_one_launch_tells_the_logprobs_that_torch_does(rows: int, columns: int, most: int) -> None:
    random, device = np.random.default_rng(rows + most), torch.device("cuda:0")
    torch.manual_seed(rows + most)
    tells = CudaLogprobs(columns, device)
    for _ in range(4):
        logits = 3 * torch.randn(rows, columns, device=device)
        logits[:, 5:9] = -torch.inf
        ids = torch.from_numpy(random.integers(9, columns, rows)).to(device)
        places = random.permutation(rows)[: max(1, rows - 2)]
        found = tells.run(logits, ids, places, most)
        where = torch.from_numpy(places).to(device)
        wanted = pack_logprobs(logits[where], ids[where], most)
        assert torch.equal(found[:, 1], wanted[:, 1])
        values, _ = logits[where].topk(most)  # equals may come in any order
        assert torch.equal(logits[where].gather(1, found[:, 2 : 2 + most]), values)
        for part in (slice(0, 1), slice(2 + most, None)):
            numbers = [packed[:, part].contiguous().view(torch.float64) for packed in (found, wanted)]
            assert torch.allclose(*numbers, rtol=0, atol=1e-6)
