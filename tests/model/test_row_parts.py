"""Steps whose rows are cut in parts, sums and products interleaved: the same logits as uncut ones."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[1] / "parallel"))

from rank_fakes import run_forked
from tiny_models import MODELS

from late_sums import LateSums
from model_harness import BLOCK, CPU, RankModel, cpu_plan, on_ranks, random_prompts, relative_error, shuffled_tables
from multitensor.formats.checkpoint import open_checkpoint
from multitensor.kernels.dispatch import make_kernels
from multitensor.model.row_cuts import OVERLAP_TOKENS, RowCut, halves, row_cut, uncut
from multitensor.parallel.group import Group, SingleGroup
from multitensor.parallel.group_region import create_group_region
from multitensor.parallel.local_group import LocalGroup
from multitensor.parallel.shared_memory_group import SharedMemoryGroup
from multitensor.parallel.shared_region import SharedRegion
from synthetic import write_gguf

RATIOS = [(1.0,), (1.0, 1.0), (1.0, 1.0, 1.0), (1.0,) * 4, (3.0, 1.0), (5.0, 2.0, 1.0)]
# (tokens of each sequence, tokens of each that are in the cache): prompts; their next chunks beside decodes; decodes.
STEPS = [((21, 12, 6), (0, 0, 0)), ((15, 1, 1), (21, 12, 6)), ((1, 1, 1), (36, 13, 7))]
ORDER = 1e-5  # of the largest logit, where the order of a sum depends on the number of rows: up to 3e-6 was seen


def in_two(tokens: int) -> tuple[int, ...]:
    return (tokens - tokens // 2, tokens // 2)


def one_row_first(tokens: int) -> tuple[int, ...]:
    return (1, tokens - 1)


def one_row_last(tokens: int) -> tuple[int, ...]:
    return (tokens - 1, 1)


def in_threes(tokens: int) -> tuple[int, ...]:
    return (*[3] * (tokens // 3), *([tokens % 3] if tokens % 3 else []))


CUTS: list[RowCut] = [in_two, one_row_first, one_row_last, in_threes]


def run_steps(model: RankModel, cut_rows: RowCut) -> torch.Tensor:
    """Logits of all positions of STEPS, which fill the model's caches anew."""
    prompts = random_prompts(320, [37, 14, 8])
    tables = shuffled_tables([len(prompt) for prompt in prompts], model.plan.kv_tokens // BLOCK)
    model.decoder.cut_rows = cut_rows
    found = []
    for lengths, contexts in STEPS:
        starts_stops = zip(prompts, contexts, lengths, strict=True)
        found += model.step([ids[start : start + count] for ids, start, count in starts_stops], contexts, tables)
    return torch.cat(found)


def all_cuts(
    path: Path,
    ratio: Sequence[float],
    *,
    kv_type: str = "f32",
    exact: bool = True,
    wrap: Callable[[Group], Group] = lambda group: group,
) -> list[list[torch.Tensor]]:
    """By rank: logits uncut, then with each of CUTS."""
    checkpoint = open_checkpoint(path)
    plan = cpu_plan(checkpoint, ratio, kv_type=kv_type)

    def work(group: Group) -> list[torch.Tensor]:
        model = RankModel(checkpoint, plan, wrap(group), exact=exact)
        return [run_steps(model, cut) for cut in (uncut, *CUTS)]

    return on_ranks(plan.size, work)


def bits_or(tolerance: float) -> float:
    """0.0 where a row's products with quantised weights have the same bits whatever rows are beside it: with the native
    kernels and activations of eight bits."""
    return 0.0 if make_kernels(CPU, exact=False).name == "native" else tolerance


def check_all_cuts(by_rank: list[list[torch.Tensor]], tolerance: float) -> None:
    """tolerance: as relative_error; 0.0: the same bits."""
    for whole, *cut in by_rank:
        assert not whole.isnan().any()
        for found in cut:
            assert torch.equal(found, whole) if tolerance == 0.0 else relative_error(found, whole) < tolerance
    for other in by_rank[1:]:  # and every rank has the same bits
        assert all(torch.equal(a, b) for a, b in zip(other, by_rank[0], strict=True))


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("name", MODELS)
def test_parts_give_what_the_whole_gives(name: str, ratio: Sequence[float], tmp_path: Path) -> None:
    check_all_cuts(all_cuts(MODELS[name](tmp_path / "m.gguf"), ratio), ORDER)


@pytest.mark.parametrize("ratio", [(1.0, 1.0), (5.0, 2.0, 1.0)])
@pytest.mark.parametrize("name", [name for name in MODELS if name != "qwen3-half-precision"])
def test_parts_have_the_bits_of_the_whole(name: str, ratio: Sequence[float], tmp_path: Path) -> None:
    check_all_cuts(all_cuts(MODELS[name](tmp_path / "m.gguf"), ratio, exact=False), bits_or(ORDER))


@pytest.mark.parametrize("kv_type", ["q8", "q4"])
@pytest.mark.parametrize("name", ["llama-odd-heads", "gemma3"])  # gemma3: a window of 8
def test_quantised_caches(name: str, kv_type: str, tmp_path: Path) -> None:
    """Other orders of sums would make codes fall on the other side of a rounding."""
    by_rank = all_cuts(MODELS[name](tmp_path / "m.gguf"), (3.0, 1.0), kv_type=kv_type, exact=False)
    check_all_cuts(by_rank, bits_or(0.1))


def test_ranks_with_nothing_to_multiply(tmp_path: Path) -> None:
    """They wait for the others' sums and begin their own all the same."""
    small = {"hidden": 64, "ffn": 64, "n_heads": 2, "n_kv_heads": 1, "head_dim": 32, "n_layers": 2}
    path = write_gguf(tmp_path / "m.gguf", types="Q8_0", **small)
    check_all_cuts(all_cuts(path, (1.0,) * 5, wrap=LateSums), ORDER)


@pytest.mark.parametrize("name", MODELS)
def test_nothing_is_read_or_written_before_its_sum_is_waited_for(name: str, tmp_path: Path) -> None:
    path = MODELS[name](tmp_path / "m.gguf")
    at_once, late = (all_cuts(path, (2.0, 1.0), wrap=wrap) for wrap in (lambda group: group, LateSums))
    for rank, wanted in zip(late, at_once, strict=True):
        assert all(torch.equal(found, right) for found, right in zip(rank, wanted, strict=True))


def test_sums_travel_under_products(tmp_path: Path) -> None:
    """Both halves' sums are under way before the first is waited for, and the second stays so while the first half's
    next product is queued."""
    path = MODELS["llama-odd-heads"](tmp_path / "m.gguf")
    checkpoint = open_checkpoint(path)
    plan = cpu_plan(checkpoint, (1.0, 1.0))

    def work(group: Group) -> tuple[list[str], int]:
        late = LateSums(group)
        model = RankModel(checkpoint, plan, late)
        products = model.decoder.kernels.linear_in_parts

        def logged(*arguments: Any) -> Any:
            for rows in products(*arguments):
                late.log.append("product")
                yield rows

        model.decoder.kernels.linear_in_parts = logged  # type: ignore[method-assign]
        run_steps(model, in_two)
        assert not late.under_way
        return late.log, late.most

    for log, most in on_ranks(2, work):
        assert most == 2
        sub_layers = 2 * plan.spec.n_layers
        halves_of_a_step = ["product", "start", "product", "start", "wait", "wait"]
        assert log == halves_of_a_step * sub_layers * len(STEPS)


def test_processes(tmp_path: Path) -> None:
    """Ranks as processes that sum over shared memory."""
    checkpoint = open_checkpoint(MODELS["llama-K-quants"](tmp_path / "m.gguf"))
    plan = cpu_plan(checkpoint, (2.0, 1.0, 1.0))
    region = create_group_region(plan.size, 64 << 10)

    def work(rank: int) -> list[Any]:
        group = SharedMemoryGroup(SharedRegion(os.dup(region.fd)), rank)
        model = RankModel(checkpoint, plan, group)
        return [run_steps(model, cut).numpy() for cut in (uncut, *CUTS)]

    try:
        by_rank = run_forked(plan.size, work)
    finally:
        region.close()
    check_all_cuts([[torch.from_numpy(found) for found in rank] for rank in by_rank], ORDER)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[RankModel]:
    path = write_gguf(tmp_path_factory.mktemp("rows") / "m.gguf", n_layers=2, types="Q4_0", vocab=320)
    checkpoint = open_checkpoint(path)
    plan = cpu_plan(checkpoint, (2.0, 1.0))
    return [RankModel(checkpoint, plan, LateSums(group), exact=False) for group in LocalGroup.make(2)]


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_no_cut_changes_a_result(two_ranks: list[RankModel], data: st.DataObject) -> None:
    """Any sequences, after any contexts, in any parts."""
    lengths = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=5), "lengths")
    contexts = data.draw(st.lists(st.integers(0, 30), min_size=len(lengths), max_size=len(lengths)), "contexts")
    tokens = sum(lengths)
    marks = data.draw(st.sets(st.integers(1, max(1, tokens - 1)), max_size=4), "cuts") - {tokens}
    edges = [0, *sorted(marks), tokens]
    sizes = tuple(stop - start for start, stop in pairwise(edges))
    totals = [length + context for length, context in zip(lengths, contexts, strict=True)]
    prompts = random_prompts(320, totals, data.draw(st.integers(0, 99), "seed"))
    tables = shuffled_tables(totals, two_ranks[0].plan.kv_tokens // BLOCK)
    live = [s for s, context in enumerate(contexts) if context]
    chunks = [ids[context:] for ids, context in zip(prompts, contexts, strict=True)]

    def work(group: Group) -> list[list[torch.Tensor]]:
        model, found = two_ranks[group.rank], []
        for cut in (uncut, lambda tokens: sizes):
            if live:
                model.decoder.cut_rows = uncut
                model.step([prompts[s][: contexts[s]] for s in live], [0] * len(live), tables[live])
            model.decoder.cut_rows = cut
            found.append(model.step(chunks, contexts, tables))
        return found

    check_all_cuts([[torch.cat(logits) for logits in rank] for rank in on_ranks(2, work)], bits_or(ORDER))


@given(st.integers(1, 1 << 17))
def test_halves(tokens: int) -> None:
    sizes = halves(tokens)
    assert sum(sizes) == tokens and min(sizes) > 0
    assert (len(sizes) == 2) == (tokens >= OVERLAP_TOKENS)
    if len(sizes) == 2:
        assert sizes[0] % 128 == 0 and abs(sizes[0] - sizes[1]) <= 256


def test_only_where_it_is_wanted_and_sums_can_travel_by_themselves() -> None:
    one, two = SingleGroup(), LocalGroup.make(2)[0]
    assert row_cut(LateSums(two), wanted=True) is halves
    assert row_cut(LateSums(two), wanted=False) is uncut
    assert row_cut(two, wanted=True) is uncut  # its sums are over at once
    assert row_cut(LateSums(one), wanted=True) is uncut
