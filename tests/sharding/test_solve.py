"""Ratios, types, context and KV pool chosen for devices; what does not fit is refused in one line."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest
from fake_checkpoints import GB, fake_spec, llama3_70b, planned
from hypothesis import given, settings
from hypothesis import strategies as st

from multitensor.architectures.spec import ModelSpec
from multitensor.errors import DoesNotFit, InputError
from multitensor.sharding.memory import ATTENTION_BYTES, device_memory
from multitensor.sharding.plan import Plan
from multitensor.sharding.solve import solve
from multitensor.sharding.topology import Device


def plan_of(spec: ModelSpec, *sizes: int, kind: str = "any", **options: Any) -> Plan:
    sizes_of_a_run = {"max_num_seqs": 32, "max_batch_tokens": 512, "block_size": 32}
    devices = [replace(device, kind=kind) for device in planned(*sizes)]
    return solve(spec, devices, **{**sizes_of_a_run, **options})


def check_fits(plan: Plan) -> None:
    for rank, memory in zip(plan.ranks, device_memory(plan), strict=True):
        assert memory.total <= rank.device.capacity_bytes
    assert plan.kv_tokens % plan.block_size == 0
    assert plan.kv_tokens >= plan.context


@pytest.mark.parametrize("sizes", [(80 * GB,) * 2, (40 * GB,) * 4])
def test_llama3_70b_in_f16_fits_two_cards_of_80_gb_and_four_of_40(sizes: tuple[int, ...]) -> None:
    plan = plan_of(llama3_70b(), *sizes, max_batch_tokens=2048)
    check_fits(plan)
    assert plan.dtype == "float16" and plan.kv_type == "f16"
    weights = [sum(memory.weights.values()) for memory in device_memory(plan)]
    # 70.55e9 weights of two bytes; norms are on every rank.
    assert sum(weights) == pytest.approx(141.1e9, rel=1e-3)
    assert max(weights) - min(weights) < 0.01 * max(weights)
    assert plan.context >= 4096


def test_llama3_70b_in_f16_does_not_fit_one_card() -> None:
    with pytest.raises(DoesNotFit) as caught:
        plan_of(llama3_70b(), 80 * GB)
    message = str(caught.value)
    assert caught.value.exit_code == 3
    assert "device:0 needs 14" in message and "80.00 GB" in message and "\n" not in message


def test_planning_a_70b_header_takes_well_under_a_second() -> None:
    spec = llama3_70b(lambda name: "Q6_K" if "ffn_down" in name else "Q4_K")
    started = time.process_time()
    plan = plan_of(spec, *[24 * GB, 24 * GB, 12 * GB])
    plan.to_json()
    assert time.process_time() - started < 1.0
    check_fits(plan)


def test_memory_is_the_sum_of_its_parts() -> None:
    spec = fake_spec(hidden=64, ffn=96, n_layers=3, n_heads=4, n_kv_heads=2, head_dim=64, vocab=100, tied=True)
    plan = plan_of(spec, 8 * GB, 8 * GB, context=512, kv_type="f32")
    first, second = device_memory(plan)
    # Two query heads and one KV head a rank; 64 + 32 columns of the FFN; 64 + 36 rows of the vocabulary, in F16. Biases
    # and norms in float32: biases of q and k are cut, that of attn_output and the norms are on both ranks.
    attention = 3 * (2 * (128 * 64 + 2 * 64 * 64 + 64 * 128) + 4 * (128 + 64))
    assert first.weights["attention"] == second.weights["attention"] == attention
    assert first.weights["ffn"] == 3 * (3 * 64 * 64 * 2 + 64 * 4)
    assert second.weights["ffn"] == 3 * (3 * 64 * 32 * 2 + 32 * 4)
    assert (first.weights["vocabulary"], second.weights["vocabulary"]) == (64 * 64 * 2, 36 * 64 * 2)
    assert first.weights["shared"] == second.weights["shared"] == (3 * 3 + 1) * 64 * 4
    assert first.kv == 2 * 3 * 1 * 64 * 4 * plan.kv_tokens
    assert first.total == sum(first.weights.values()) + first.kv + sum(first.buffer_parts.values())
    assert all(isinstance(size, int) for size in (*first.weights.values(), first.kv, *first.buffer_parts.values()))


def test_equal_capacities_are_cut_equally_and_others_by_capacity() -> None:
    spec = llama3_70b(lambda name: "Q4_0")
    assert plan_of(spec, 48 * GB, 47 * GB).ratios.ffn == (1.0, 1.0)
    plan = plan_of(spec, 48 * GB, 24 * GB)
    assert plan.ratios.ffn == (1.0, 0.5)
    assert plan.ratios.attention == plan.ratios.vocabulary == plan.ratios.ffn


def test_load_moves_off_a_card_that_the_first_ratio_overfills() -> None:
    # Buffers do not shrink with a smaller part, so parts by capacity would overfill the small cards.
    plan = plan_of(llama3_70b(), 80 * GB, 80 * GB, 5 * GB, 5 * GB)
    check_fits(plan)
    assert plan.ratios.ffn[2] < 5 / 80


def test_a_given_ratio_is_kept_whole_or_by_kind() -> None:
    spec = fake_spec()
    assert plan_of(spec, 8 * GB, 8 * GB, ratio=(3, 1)).ratios.vocabulary == (3, 1)
    plan = plan_of(spec, 8 * GB, 8 * GB, ratio={"ffn": (3, 1)})
    assert plan.ratios.ffn == (3, 1) and plan.ratios.attention == (1.0, 1.0)
    for wrong in ((1, 2, 3), {"ffn": (1,)}, {"heads": (1, 1)}, (0, 0), (-1, 2)):
        with pytest.raises(InputError, match="ratio"):
            plan_of(spec, 8 * GB, 8 * GB, ratio=wrong)


def test_the_default_context_is_the_models_own_or_what_fits() -> None:
    spec = fake_spec(n_layers=8, n_heads=16, n_kv_heads=16, context=1 << 17)
    roomy = plan_of(spec, 80 * GB)
    assert roomy.context == 1 << 17
    assert roomy.kv_tokens == 8 << 17
    tight = plan_of(spec, 4 * GB)
    assert 512 <= tight.context < 1 << 17 and tight.context % 32 == 0
    check_fits(tight)
    (memory,) = device_memory(tight)
    assert 0.97 * 4 * GB < memory.total <= 0.98 * 4 * GB  # a margin is left, and no more than that
    assert plan_of(spec, 4 * GB, context=tight.context + 512).context == tight.context + 512
    with pytest.raises(DoesNotFit):
        plan_of(spec, 4 * GB, context=tight.context + 8192)


def test_a_context_beyond_memory_names_one_that_fits() -> None:
    spec = fake_spec(n_layers=8, n_heads=16, n_kv_heads=16)
    with pytest.raises(DoesNotFit, match=r"KV of 10000000 tokens .* a context of ([0-9]+)") as caught:
        plan_of(spec, 8 * GB, 8 * GB, context=10_000_000)
    advised = int(str(caught.value).split("a context of ")[1].split(",")[0])
    check_fits(plan_of(spec, 8 * GB, 8 * GB, context=advised))


def test_a_context_beyond_training_is_a_warning_and_one_below_1_an_error() -> None:
    plan = plan_of(fake_spec(context=256), 8 * GB, context=1000)
    assert plan.context == 1000 and plan.kv_tokens % 32 == 0
    assert any("beyond the 256 tokens" in warning for warning in plan.warnings)
    assert plan_of(fake_spec(context=256), 8 * GB).warnings == ()
    with pytest.raises(InputError, match="at least 1"):
        plan_of(fake_spec(), 8 * GB, context=0)


def test_cpu_pools_stay_within_a_quarter_of_the_memory() -> None:
    spec = fake_spec(n_layers=8, n_heads=16, n_kv_heads=16, context=1 << 17)
    plan = plan_of(spec, 4 * GB, kind="cpu")
    (memory,) = device_memory(plan)
    assert memory.kv <= GB and 16384 < plan.context < 1 << 17
    assert plan.kv_tokens == plan.context
    # A short context shares a pool of several.
    assert plan_of(spec, 40 * GB, kind="cpu", context=3200).kv_tokens == 16384
    assert plan_of(spec, 40 * GB, kind="cpu", context=3200, max_num_seqs=2).kv_tokens == 6400
    # Asked for, a context may take what there is.
    assert device_memory(plan_of(spec, 4 * GB, kind="cpu", context=64_000))[0].kv > GB


@pytest.mark.parametrize(
    ("kind", "weights", "asked", "dtype", "kv"),
    [
        ("cpu", "F16", {}, "float32", "f16"),
        ("cpu", "Q4_0", {"dtype": "float32"}, "float32", "f32"),
        ("cuda", "Q4_0", {}, "bfloat16", "bf16"),
        ("cuda", "F16", {}, "float16", "f16"),
        ("any", "BF16", {}, "bfloat16", "bf16"),
        ("cuda", "F16", {"dtype": "float32"}, "float32", "f32"),
        ("cuda", "F16", {"dtype": "bfloat16", "kv_type": "f16"}, "bfloat16", "f16"),
        ("cuda", "Q4_0", {"kv_type": "q8_0"}, "bfloat16", "q8"),
        ("cpu", "Q4_0", {"kv_type": "q4_0"}, "float32", "q4"),
        ("cpu", "Q4_0", {"dtype": "float32", "kv_type": "q8"}, "float32", "q8"),
    ],
)
def test_types_follow_the_device_the_weights_and_what_was_asked(
    kind: str, weights: str, asked: dict[str, str], dtype: str, kv: str
) -> None:
    plan = plan_of(fake_spec(type_of=lambda name: weights), 8 * GB, kind=kind, **asked)
    assert (plan.dtype, plan.kv_type) == (dtype, kv)


def test_unknown_types_are_refused_with_the_list() -> None:
    with pytest.raises(InputError, match=r"'int3'.*float32, float16, bfloat16"):
        plan_of(fake_spec(), 8 * GB, dtype="int3")
    with pytest.raises(InputError, match=r"'q3'.*f32, f16, bf16, q8, q4"):
        plan_of(fake_spec(), 8 * GB, kv_type="q3")


def test_a_quantised_cache_holds_more_tokens() -> None:
    """Where the cache is what fills the device, the context grows as the bytes of a token shrink: 64 : 34 : 18."""
    spec = fake_spec(hidden=2048, ffn=8192, n_layers=12, n_heads=32, n_kv_heads=32, vocab=50000, context=1 << 22)
    contexts = {kv: plan_of(spec, 24 * GB, kv_type=kv).context for kv in ("f16", "q8", "q4")}
    assert 1.8 < contexts["q8"] / contexts["f16"] < 1.9
    assert 3.3 < contexts["q4"] / contexts["f16"] < 3.6


def test_heads_that_do_not_pack_are_refused() -> None:
    with pytest.raises(InputError, match="packs eight numbers together, the model's heads have 20; take q8"):
        plan_of(fake_spec(head_dim=20), 8 * GB, kv_type="q4")


@given(st.lists(st.integers(2 * GB, 30 * GB), min_size=1, max_size=8), st.booleans())
@settings(max_examples=60, deadline=None)
def test_whatever_the_devices_a_plan_fits_or_is_refused(sizes: list[int], on_cpu: bool) -> None:
    spec = fake_spec(hidden=2048, ffn=8192, n_layers=12, n_heads=32, n_kv_heads=8, vocab=50000)
    try:
        plan = plan_of(spec, *sizes, kind="cpu" if on_cpu else "any")
    except DoesNotFit as error:
        assert "\n" not in str(error)
        # 1.6 GB of weights and less than 2.4 GB beside them: where it is refused, the largest card could not hold it
        # alone, or the smallest cannot even hold what every rank needs beside its weights.
        assert max(sizes) < 4 * GB or min(sizes) < 2.5 * GB
        return
    check_fits(plan)


def test_no_devices_is_an_error() -> None:
    with pytest.raises(InputError):
        solve(fake_spec(), (), max_num_seqs=1, max_batch_tokens=1, block_size=1)


def test_a_device_description_reaches_the_json() -> None:
    device = Device("cuda:1", "cuda", 1, 20 * GB, 24 * GB, "Some GPU")
    data = solve(fake_spec(), [device], max_num_seqs=4, max_batch_tokens=64, block_size=32).to_json()
    (entry,) = data["devices"]
    assert entry["name"] == "cuda:1" and entry["capacity_bytes"] == 20 * GB
    assert entry["weights_bytes"] == sum(entry["weights_bytes_by_group"].values())
    assert entry["weights_bytes"] + entry["kv_bytes"] + entry["buffers_bytes"] <= 20 * GB
    assert set(data["ratios"]) == {"attention", "ffn", "experts", "vocabulary"}


def test_a_long_context_counts_what_attention_copies_out_of_the_cache() -> None:
    """Float32 keys and values of a head: here they are more than any other scratch."""
    spec = fake_spec(n_layers=1, n_heads=1, n_kv_heads=1, head_dim=256, context=1 << 20)
    plan = plan_of(spec, 3 * GB, dtype="float32", kv_type="q8")
    check_fits(plan)
    assert 1 << 18 < plan.context < 1 << 20
    (memory,) = device_memory(plan)
    assert memory.buffer_parts["scratch"] == ATTENTION_BYTES + 2 * 4 * 256 * plan.context
    assert memory.total > 0.95 * 3 * GB
    with pytest.raises(DoesNotFit) as caught:
        plan_of(spec, 3 * GB, dtype="float32", kv_type="q8", context=1 << 20)
    advised = int(str(caught.value).split("a context of ")[1].split(",")[0])
    check_fits(plan_of(spec, 3 * GB, dtype="float32", kv_type="q8", context=advised))
