"""Any cut over any number of ranks gives one rank's logits: threads as ranks, float32, prefill and decode, batch 3."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from tiny_models import MODELS

from model_harness import cpu_plan, logits_in_steps, random_prompts, relative_error
from multitensor.formats.checkpoint import open_checkpoint
from multitensor.sharding.plan import Slice
from synthetic import write_gguf

RATIOS = [(1.0, 1.0), (1.0, 1.0, 1.0), (1.0,) * 4, (3.0, 1.0), (5.0, 2.0, 1.0)]
# A prefill in two chunks, then decode one token at a time; the shorter prompts end earlier.
CHUNKS = [9, 20, 1, 1, 1]
LENGTHS = (34, 12, 31)


def check_against_one_rank(
    path: Path,
    ratios: Sequence[Sequence[float]],
    vocab: int,
    lengths: Sequence[int] = LENGTHS,
    chunks: Sequence[int] = CHUNKS,
) -> None:
    prompts = random_prompts(vocab, lengths)
    wanted = logits_in_steps(path, (1.0,), prompts, chunks)[0]
    for ratio in ratios:
        by_rank = logits_in_steps(path, ratio, prompts, chunks)
        for found, expected in zip(by_rank[0], wanted, strict=True):
            assert relative_error(found, expected) < 1e-4, ratio
        for other in by_rank[1:]:  # every rank ends with the same bits
            assert all(torch.equal(a, b) for a, b in zip(other, by_rank[0], strict=True))


@pytest.mark.parametrize("name", MODELS)
def test_ranks_agree_with_one(name: str, tmp_path: Path) -> None:
    check_against_one_rank(MODELS[name](tmp_path / "model.gguf"), RATIOS, vocab=320)


@pytest.mark.models
def test_ranks_agree_with_one_smollm2(smollm2_path: Path) -> None:
    check_against_one_rank(smollm2_path, RATIOS, vocab=49152, lengths=(14, 5, 18), chunks=[12, 1])


@pytest.mark.models
def test_ranks_agree_with_one_gemma3(gemma3_path: Path) -> None:
    check_against_one_rank(gemma3_path, RATIOS, vocab=262144, lengths=(7, 3, 5), chunks=[4])


@pytest.mark.parametrize("kind", ["Q4_K", "Q5_K", "Q6_K"])
def test_ffn_of_three_super_blocks_is_halved(kind: str, tmp_path: Path) -> None:
    """768 columns are three super-blocks of 256: the cut at 384 goes through the middle of the second."""
    path = write_gguf(tmp_path / "model.gguf", hidden=256, ffn=768, n_heads=4, n_kv_heads=2, types=kind)
    plan = cpu_plan(open_checkpoint(path), (1.0, 1.0))
    assert [rank.ffn for rank in plan.ranks] == [Slice(0, 384), Slice(384, 768)]
    assert plan.tensors["blk.0.ffn_down.weight"].slices == ((Slice(0, 384),), (Slice(384, 768),))
    check_against_one_rank(path, [(1.0, 1.0)], vocab=320)


def test_ranks_without_heads_ffn_or_vocabulary(tmp_path: Path) -> None:
    """Seven ranks share two query heads, two FFN units and two vocabulary units: most of them hold nothing."""
    path = write_gguf(
        tmp_path / "m.gguf", hidden=64, ffn=64, n_heads=2, n_kv_heads=1, head_dim=32, vocab=64, n_layers=2, types="Q8_0"
    )
    plan = cpu_plan(open_checkpoint(path), (1.0,) * 7)
    assert sum(rank.query_heads.size == 0 for rank in plan.ranks) == 5
    assert sum(rank.ffn.size == 0 for rank in plan.ranks) == 5
    assert sum(rank.vocabulary.size == 0 for rank in plan.ranks) == 5
    check_against_one_rank(path, [(1.0,) * 7], vocab=64)


def test_biases_are_added_once_when_the_first_rank_has_no_part(tmp_path: Path) -> None:
    from synthetic import tiny_hf

    path = tiny_hf(tmp_path / "model", "llama", attention_bias=True, mlp_bias=True)
    check_against_one_rank(path, [(0.0, 1.0), (0.0, 1.0, 1.0), (1.0, 0.0)], vocab=320)


@pytest.mark.parametrize("kv_type", ["q8", "q4"])
@pytest.mark.parametrize("name", ["llama-odd-heads", "gemma3"])
def test_ranks_agree_with_one_over_a_quantised_cache(name: str, kv_type: str, tmp_path: Path) -> None:
    """Codes may fall on the other side of a rounding where a sum was taken in another order; nothing else may differ.
    Against a float cache the logits differ far more."""
    path, prompts = MODELS[name](tmp_path / "model.gguf"), random_prompts(320, LENGTHS)
    exact = torch.cat(logits_in_steps(path, (1.0,), prompts, CHUNKS)[0])
    wanted = torch.cat(logits_in_steps(path, (1.0,), prompts, CHUNKS, kv_type=kv_type)[0])
    rounding = (wanted - exact).square().mean().sqrt()
    for ratio in [(1.0, 1.0, 1.0), (3.0, 1.0)]:
        by_rank = [torch.cat(found) for found in logits_in_steps(path, ratio, prompts, CHUNKS, kv_type=kv_type)]
        assert (by_rank[0] - wanted).square().mean().sqrt() < 0.1 * rounding
        assert all(torch.equal(other, by_rank[0]) for other in by_rank[1:])
