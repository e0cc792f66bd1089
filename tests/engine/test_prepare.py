"""From a path and wishes to a checkpoint, a plan and settings, without torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from multitensor.config import parse_devices
from multitensor.engine.prepare import Prepared, prepare
from multitensor.errors import DoesNotFit, InputError
from multitensor.sharding.plan import Plan
from synthetic import write_gguf


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("prepare") / "tiny.gguf", types="Q4_0", ffn=256, context=2048)


def test_defaults_on_cpu_ranks(model: Path) -> None:
    prepared = prepare(model, devices="cpu:2=4GiB", seed=7)
    plan, config = prepared.plan, prepared.config
    assert plan.size == 2 and plan.ratios.ffn == (1.0, 1.0)
    assert (plan.context, plan.dtype, plan.kv_type) == (2048, "float32", "f16")
    assert config.exact is False and config.seed == 7 and config.model == str(model)
    assert (config.max_num_seqs, config.max_batch_tokens, config.block_size) == (32, 512, plan.block_size)
    assert prepared.spec is plan.spec and prepared.checkpoint.architecture == "llama"


def test_float32_asked_for_is_the_exact_mode(model: Path) -> None:
    prepared = prepare(model, devices="cpu:1", dtype="float32")
    assert prepared.config.exact and prepared.plan.kv_type == "f32"
    assert not prepare(model, devices="cpu:1", dtype="auto").config.exact


def test_devices_and_ratios_in_every_form(model: Path) -> None:
    forms = ("cpu:2", ["cpu:2"], parse_devices("cpu:2"))
    assert [prepare(model, devices=form).plan.size for form in forms] == [2, 2, 2]
    ratios = ("3,1", (3, 1), [3.0, 1.0], {"ffn": (3, 1), "attention": (3, 1), "vocabulary": (3, 1)})
    for ratio in ratios:
        plan = prepare(model, devices="cpu:2", ratio=ratio).plan
        assert [rank.ffn.size for rank in plan.ranks] == [192, 64]


def test_limits_of_a_step_are_checked(model: Path) -> None:
    prepared = prepare(model, devices="cpu:1", max_num_seqs=4, max_batch_tokens=16, max_model_len=100)
    assert prepared.plan.max_num_seqs == prepared.config.max_num_seqs == 4
    assert prepared.plan.max_batch_tokens == prepared.config.max_batch_tokens == 16
    assert prepared.plan.context == 100 and prepared.plan.kv_tokens >= 100
    for wrong in ({"max_num_seqs": 0}, {"max_num_seqs": 8, "max_batch_tokens": 4}, {"max_batch_tokens": 0}):
        with pytest.raises(InputError, match="max_num_seqs"):
            prepare(model, devices="cpu:1", **wrong)


def test_longer_steps_where_there_is_room(tmp_path: Path) -> None:
    """On GPUs from the smallest that does on, steps of 4,096 tokens are the default once they cost next to nothing."""
    shape = {"hidden": 512, "ffn": 2048, "n_heads": 8, "head_dim": 64}
    path = write_gguf(tmp_path / "long.gguf", types="Q8_0", context=1 << 16, **shape)

    def made(size: int, tokens: int | None, context: int | None = None) -> Prepared:
        options = {"max_batch_tokens": tokens, "max_model_len": context, "allow_planned_devices": True}
        return prepare(path, devices=f"{size}MiB", **options)

    def fits(size: int, tokens: int) -> Plan | None:
        try:
            return made(size, tokens).plan
        except DoesNotFit:
            return None

    smallest = next(size for size in range(1000, 8000, 10) if fits(size, 2048))
    found: dict[str, list[int]] = {"does not fit": [], "costs context": [], "costs pool": [], "is there": []}
    for size in (*range(smallest, smallest + 900, 20), 8000):
        prepared, short, long = made(size, None), fits(size, 2048), fits(size, 4096)
        assert short is not None and prepared.config.mixed_batch_tokens == 2048
        if long is None:
            kind = "does not fit"
        elif long.context < short.context:
            kind = "costs context"
        else:
            kind = "costs pool" if long.kv_tokens < 0.95 * short.kv_tokens else "is there"
        found[kind].append(size)
        assert prepared.plan == (long if kind == "is there" else short)
        assert prepared.config.max_batch_tokens == prepared.plan.max_batch_tokens
    assert all(found.values()) and min(found["is there"]) > max(found["costs pool"]) > max(found["costs context"])
    assert made(8000, None, 2048).plan.max_batch_tokens == 2048  # no prompt is longer


def test_what_can_only_be_planned_is_not_run(model: Path, tmp_path: Path) -> None:
    assert prepare(model, devices="4GiB,4GiB", allow_planned_devices=True).plan.size == 2
    with pytest.raises(InputError, match="for `plan`"):
        prepare(model, devices="4GiB,4GiB")
    odd = write_gguf(tmp_path / "odd.gguf", hidden=256, ffn=256, types={"*ffn_up*": "IQ2_XXS", "*": "F16"})
    assert prepare(odd, devices="4GiB", allow_planned_devices=True).plan.size == 1
    with pytest.raises(InputError, match=r"blk\.0\.ffn_up\.weight has type IQ2_XXS"):
        prepare(odd, devices="cpu:1")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"tensor_parallel_size": 0}, "0 tensor parallel ranks"),
        ({"devices": "cpu:2", "ratio": (1, 2, 3)}, "3 parts, but there are 2 ranks"),
        ({"devices": "cpu:2", "ratio": "a"}, "cannot read 'a'"),
        ({"devices": "gpu"}, "cannot read 'gpu'"),
        ({"devices": "cpu:1", "dtype": "int4"}, "'int4'"),
        ({"devices": "cpu:1", "kv_type": "q5"}, "'q5'"),
    ],
)
def test_bad_input_is_one_line(model: Path, wrong: dict, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        prepare(model, **wrong)
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2


def test_what_does_not_fit_has_its_own_exit_code(model: Path) -> None:
    with pytest.raises(DoesNotFit, match="cpu:0 needs") as caught:
        prepare(model, devices="cpu:1=100MiB")
    assert caught.value.exit_code == 3


def test_torch_is_not_imported(model: Path) -> None:
    code = (
        "import sys; from multitensor.engine.prepare import Prepared, prepare; "
        f"prepare({str(model)!r}, devices='cpu:2').plan.to_json(); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
