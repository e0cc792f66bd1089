"""Properties of the plan, for random shapes, types and ratios over up to 16 ranks."""

from __future__ import annotations

import itertools
import json
import math
import pickle
from dataclasses import dataclass
from fractions import Fraction

import pytest
from fake_checkpoints import fake_spec, planned
from hypothesis import given, settings
from hypothesis import strategies as st

from multitensor.architectures.cut_rules import CutColumns, CutExperts, CutHeads, CutRows
from multitensor.architectures.spec import ModelSpec, TensorDecl
from multitensor.errors import InputError
from multitensor.formats.checkpoint import TensorInfo
from multitensor.formats.quant_types import quant_type
from multitensor.sharding.plan import Plan, Ratios, Slice, apportion, make_plan

TYPES = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS")


def plan_for(spec: ModelSpec, ratios: Ratios, **changes: int) -> Plan:
    sizes = {"context": 512, "kv_tokens": 1024, "block_size": 32, "max_num_seqs": 4, "max_batch_tokens": 64} | changes
    devices = planned(*[1 << 34] * len(ratios.ffn))
    return make_plan(spec, devices, ratios, kv_type="f16", dtype="float32", **sizes)


@st.composite
def ratio_parts(draw: st.DrawFn, size: int) -> tuple[float, ...]:
    part = st.one_of(st.just(0.0), st.integers(1, 9).map(float), st.floats(0.01, 100.0))
    parts = draw(st.lists(part, min_size=size, max_size=size))
    if not any(parts):
        parts[draw(st.integers(0, size - 1))] = 1.0
    return tuple(parts)


@dataclass
class Case:
    spec: ModelSpec
    ratios: Ratios
    plan: Plan


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Dimensions such that every drawn type is possible: 256-weight blocks need columns in multiples of 256."""
    kinds = {part: draw(st.sampled_from(TYPES)) for part in ("attn_output", "ffn_down", "other")}
    head_dim = draw(st.sampled_from((32, 64, 80, 96, 128, 256)))
    block = quant_type(kinds["attn_output"]).block_weights
    group = draw(st.integers(1, 9))
    n_kv_heads = draw(st.integers(1, 9)) * (block // math.gcd(block, group * head_dim))
    ffn_block = quant_type(kinds["ffn_down"]).block_weights
    ffn = ffn_block * draw(st.integers(1, 6)) if ffn_block > 1 else draw(st.integers(1, 700))
    spec = fake_spec(
        hidden=256 * draw(st.integers(1, 2)),
        ffn=ffn,
        n_layers=draw(st.integers(1, 2)),
        n_heads=n_kv_heads * group,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        vocab=draw(st.integers(1, 1000)),
        tied=draw(st.booleans()),
        type_of=lambda name: next((kinds[part] for part in kinds if part in name), kinds["other"]),
    )
    size = draw(st.integers(1, 16))
    same = draw(ratio_parts(size))
    if draw(st.booleans()):
        ratios = Ratios.uniform(same)
    else:
        ratios = Ratios(same, draw(ratio_parts(size)), same, draw(ratio_parts(size)))
    return Case(spec, ratios, plan_for(spec, ratios))


def exact_shares(total: int, ratio: tuple[float, ...]) -> list[Fraction]:
    whole = sum(Fraction(part) for part in ratio)
    return [total * Fraction(part) / whole for part in ratio]


def check_axis(slices: list[Slice], total: int, unit: int, ratio: tuple[float, ...]) -> None:
    """Contiguous in rank order, whole, at legal points, and within one unit of the exact share."""
    assert slices[0].start == 0 and slices[-1].stop == total
    assert all(left.stop == right.start for left, right in itertools.pairwise(slices))
    assert all(part.start % unit == 0 or part.start == total for part in slices)
    for part, share, weight in zip(slices, exact_shares(total, ratio), ratio, strict=True):
        assert abs(part.size - share) < unit
        assert weight > 0 or part.size == 0


@given(st.integers(0, 5000), st.sampled_from((1, 2, 16, 32, 96)), st.data())
def test_apportion_is_exact_to_a_unit(total: int, unit: int, data: st.DataObject) -> None:
    ratio = data.draw(ratio_parts(data.draw(st.integers(1, 16))))
    check_axis(list(apportion(total, unit, ratio)), total, unit, ratio)


def test_apportion_gives_left_over_units_to_the_largest_remainders() -> None:
    assert apportion(9, 1, (1, 1)) == (Slice(0, 5), Slice(5, 9))
    assert apportion(768, 32, (1, 1)) == (Slice(0, 384), Slice(384, 768))
    assert [part.size for part in apportion(10, 1, (5, 2, 1))] == [6, 3, 1]  # 6.25, 2.5, 1.25
    assert [part.size for part in apportion(100, 32, (1, 1))] == [64, 36]
    assert [part.size for part in apportion(10, 32, (1, 1, 0))] == [0, 10, 0]


@given(cases())
@settings(max_examples=150, deadline=None)
def test_axes_are_cut_by_their_own_ratio_at_legal_points(case: Case) -> None:
    spec, ranks = case.spec, case.plan.ranks
    output = next(d for d in spec.tensors if d.name == "blk.0.attn_output.weight").info.type
    down = next(d for d in spec.tensors if d.name == "blk.0.ffn_down.weight").info.type
    head_unit = 1 if output.is_float else math.lcm(spec.head_dim, output.cut_unit) // spec.head_dim
    check_axis([rank.query_heads for rank in ranks], spec.n_heads, head_unit, case.ratios.attention)
    check_axis([rank.ffn for rank in ranks], spec.ffn_size, down.cut_unit, case.ratios.ffn)
    check_axis([rank.vocabulary for rank in ranks], spec.vocab_size, 32, case.ratios.vocabulary)


@given(cases())
@settings(max_examples=150, deadline=None)
def test_every_rank_holds_the_kv_heads_its_query_heads_need_and_no_others(case: Case) -> None:
    spec = case.spec
    group = spec.n_heads // spec.n_kv_heads
    for rank in case.plan.ranks:
        needed = {head // group for head in range(*rank.query_heads)}
        assert set(range(*rank.kv_heads)) == needed
        assert len(rank.kv_map) == rank.query_heads.size
        for local, head in enumerate(range(*rank.query_heads)):
            assert rank.kv_heads.start + rank.kv_map[local] == head // group


def owners(plan: Plan, name: str) -> list[int]:
    """How many ranks hold each row or column of a tensor's cut axis."""
    tensor = plan.tensors[name]
    counts = [0] * tensor.decl.info.shape[tensor.axis or 0]
    for parts in tensor.slices:
        for part in parts:
            assert part.size > 0
            for place in range(*part):
                counts[place] += 1
    return counts


@given(cases())
@settings(max_examples=100, deadline=None)
def test_every_weight_is_owned_as_often_as_its_rule_says(case: Case) -> None:
    spec, plan = case.spec, case.plan
    assert list(plan.tensors) == [decl.name for decl in spec.tensors]
    kv_owners = [sum(head in range(*rank.kv_heads) for rank in plan.ranks) for head in range(spec.n_kv_heads)]
    for name, tensor in plan.tensors.items():
        counts, rule = owners(plan, name), tensor.decl.rule
        if rule == CutHeads("kv"):
            assert counts == [kv_owners[row // spec.head_dim] for row in range(len(counts))]
            assert bool(tensor.reason) == any(count > 1 for count in kv_owners)
        elif isinstance(rule, CutHeads | CutRows | CutColumns):
            assert counts == [1] * len(counts) and not tensor.reason
        else:
            assert counts == [plan.size] * len(counts) and tensor.reason and tensor.axis is None
        assert all(count >= 1 for count in counts)


@given(cases())
@settings(max_examples=100, deadline=None)
def test_bytes_are_exact(case: Case) -> None:
    for tensor in case.plan.tensors.values():
        info, ranks = tensor.decl.info, range(case.plan.size)
        copies = case.plan.size if tensor.axis is None else 1
        if tensor.decl.rule != CutHeads("kv"):
            assert sum(tensor.owned_bytes(rank) for rank in ranks) == pytest.approx(info.nbytes * copies, rel=1e-12)
        for rank in ranks:
            shape = tensor.local_shape(rank)
            # What is read covers what is owned and is less than two blocks a row more.
            rows = math.prod(info.shape[:-1])
            spare = 2 * info.type.block_bytes * rows if tensor.axis == 1 else 0
            assert tensor.owned_bytes(rank) <= tensor.read_bytes(rank) <= tensor.owned_bytes(rank) + spare
            if len(shape) == 1:
                assert tensor.resident_bytes(rank) == 4 * shape[0]
                continue
            start = tensor.slices[rank][0].start if tensor.axis == 1 and tensor.slices[rank] else 0
            expected = 0
            for plane in info.type.planes:
                groups = -(-(start + shape[1]) // plane.weights) - start // plane.weights if shape[1] else 0
                expected += shape[0] * groups * plane.items * plane.itemsize
            assert tensor.resident_bytes(rank) == expected


@given(cases())
@settings(max_examples=30, deadline=None)
def test_a_plan_is_plain_data(case: Case) -> None:
    assert pickle.loads(pickle.dumps(case.plan)) == case.plan
    data = json.loads(json.dumps(case.plan.to_json()))
    assert [device["name"] for device in data["devices"]] == [rank.device.name for rank in case.plan.ranks]
    for entry, tensor in zip(data["tensors"], case.plan.tensors.values(), strict=True):
        assert entry["name"] == tensor.name and entry["type"] == tensor.decl.info.type.name
        held = [sum(part.size for part in parts) for parts in tensor.slices]
        assert [stop - start for start, stop in entry["slices"]] == held


def test_ffn_of_768_is_cut_in_the_middle_of_a_super_block() -> None:
    for kind in ("Q4_K", "Q5_K", "Q6_K"):
        plan = plan_for(fake_spec(ffn=768, hidden=256, type_of=lambda name, kind=kind: kind), Ratios.uniform((1, 1)))
        assert [rank.ffn for rank in plan.ranks] == [Slice(0, 384), Slice(384, 768)]


def test_straddled_and_scarce_kv_heads_are_replicated_and_the_plan_says_so() -> None:
    smollm2 = fake_spec(hidden=576, n_heads=9, n_kv_heads=3, head_dim=64)
    plan = plan_for(smollm2, Ratios.uniform((1, 1)))
    assert [rank.kv_heads for rank in plan.ranks] == [Slice(0, 2), Slice(1, 3)]
    assert plan.ranks[1].kv_map == (0, 1, 1, 1)
    assert "1 on ranks 0, 1" in plan.tensors["blk.0.attn_k.weight"].reason
    assert plan.tensors["blk.0.attn_k.bias"].slices == ((Slice(0, 128),), (Slice(64, 192),))
    assert plan.tensors["blk.0.attn_q.weight"].reason == ""
    clean = plan_for(smollm2, Ratios.uniform((1, 1, 1)))
    assert clean.tensors["blk.0.attn_k.weight"].reason == ""


def test_ranks_that_get_nothing_are_warned_about_unless_their_part_is_zero() -> None:
    spec = fake_spec(n_heads=2, n_kv_heads=1, ffn=64, vocab=64)
    plan = plan_for(spec, Ratios.uniform((1.0,) * 4))
    assert len(plan.warnings) == 3
    assert all("ranks 2, 3 get no part" in warning for warning in plan.warnings)
    assert plan.ranks[3].kv_map == () and plan.ranks[3].kv_heads.size == 0
    assert plan.tensors["blk.0.attn_q.weight"].local_shape(3) == (0, 64)
    assert plan.tensors["blk.0.attn_output.weight"].local_shape(3) == (64, 0)
    assert plan_for(spec, Ratios.uniform((1.0, 1.0, 0.0))).warnings == ()


def test_packed_segments_are_each_cut_where_their_axis_is() -> None:
    spec = fake_spec(ffn=256, hidden=64)
    packed = TensorInfo("gate_up", (512, 64), quant_type("F16"), 0, 0, 512 * 64 * 2)
    spec = type(spec)(**{**vars(spec), "tensors": (TensorDecl("gate_up", packed, CutRows((256, 256)), "ffn", 0),)})
    tensor = plan_for(spec, Ratios.uniform((3, 1))).tensors["gate_up"]
    assert tensor.slices == ((Slice(0, 192), Slice(256, 448)), (Slice(192, 256), Slice(448, 512)))
    assert tensor.local_shape(0) == (384, 64)
    assert tensor.resident_bytes(1) == 128 * 64 * 2


def test_a_ratio_of_the_wrong_length_and_experts_are_refused() -> None:
    spec = fake_spec()
    with pytest.raises(InputError, match="3 parts for attention"):
        make_plan(
            spec,
            planned(1, 1),
            Ratios.uniform((1, 2, 3)),
            context=1,
            kv_tokens=32,
            kv_type="f16",
            dtype="float32",
            block_size=32,
            max_num_seqs=1,
            max_batch_tokens=1,
        )
    info = TensorInfo("w", (4, 8, 64), quant_type("F16"), 0, 0, 4096)
    experts = type(spec)(**{**vars(spec), "tensors": (TensorDecl("w", info, CutExperts("experts"), "experts", 0),)})
    with pytest.raises(InputError, match="mixture of experts"):
        plan_for(experts, Ratios.uniform((1,)))
