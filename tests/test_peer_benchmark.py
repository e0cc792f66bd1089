"""benchmarks/peer_llama_cpp.py with both sides played by small scripts that print what the real programs print."""

from __future__ import annotations

import importlib.util
import json
import stat
import sys
from pathlib import Path
from types import ModuleType

import pytest

PYTHON = sys.executable
SCRIPT = Path(__file__).parents[1] / "benchmarks" / "peer_llama_cpp.py"
LLAMA_BENCH = """
import json, sys
a = dict(zip(sys.argv[1::2], sys.argv[2::2]))
if a["-sm"] == "layer" and a["-p"] != "0": sys.exit("no such split")
scale = {"none": 1.0, "layer": 0.5, "tensor": 2.0}[a["-sm"]] * (100 if a["-p"] != "0" else 1)
print("a log line", file=sys.stderr)
print(json.dumps([{"avg_ts": 99.0, "samples_ts": [10 * scale, 40 * scale, 20 * scale]}]))
"""
BATCHED_BENCH = """
import json, sys
a = dict(zip(sys.argv[1::2], sys.argv[2::2]))
print("a log line")
for i, n in enumerate(a["-npl"].split(",")):
    print(json.dumps({"pl": int(n), "speed_pp": 1.0, "speed_tg": 1.0 if i == 0 else int(n) * (10.0 + i)}))
"""
OURS = """
import json, sys
given = [part for part in sys.argv[5:] if part != "--json"]  # after -m multitensor bench MODEL
a = dict(zip(given[::2], given[1::2]))
ranks = int(a["--tp"])
results = [{"test": "prefill", "tokens": int(n), "batch": 1} for n in a["-p"].split(",") if n != "0"]
results += [{"test": "decode", "tokens": int(a["-n"]), "batch": int(n)} for n in a["-b"].split(",")]
for r in results:
    r.update(ranks=ranks, tokens_per_second=60.0 * ranks, slowest=50.0, fastest=70.0)
print(json.dumps({"machine": {"torch": "x"}, "results": results}))
"""


@pytest.fixture
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("peer_llama_cpp", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def program(path: Path, text: str) -> Path:
    path.write_text(f"#!{PYTHON}{text}")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.fixture
def given(tmp_path: Path, script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Command line over the fakes; ours is called through a fake interpreter."""
    bench = program(tmp_path / "llama-bench", LLAMA_BENCH)
    program(tmp_path / "llama-batched-bench", BATCHED_BENCH)
    ours = program(tmp_path / "python", OURS)
    monkeypatch.setattr(script.sys, "executable", str(ours))
    model = tmp_path / "model.gguf"
    model.write_bytes(b"GGUF")
    return ["--model", str(model), "--llama-bench", str(bench), "--repetitions", "3"]


def test_medians_and_ratios(script: ModuleType, given: list[str]) -> None:
    options = script.arguments([*given, "--tests", "decode:1,decode:4,prefill:512", "--tp", "1,2"])
    report = script.measure(options)
    rows = {(row["test"], row["ranks"]): row for row in report["results"]}
    assert rows["decode:1", 1]["theirs"] == {"none": {"median": 20.0, "slowest": 10.0, "fastest": 40.0}}
    assert rows["decode:1", 1]["ratio"] == pytest.approx(3.0)
    assert rows["decode:1", 2]["ratio"] == pytest.approx(120 / 40), "against the faster split"
    # The first batch warms up; of 4 * 11, 4 * 12, 4 * 13 the median is 48.
    assert rows["decode:4", 1]["theirs"]["none"]["median"] == pytest.approx(48.0)
    assert rows["prefill:512", 1]["ratio"] == pytest.approx(60 / 2000)
    assert set(rows["prefill:512", 2]["theirs"]) == {"tensor"}
    (error,) = report["errors"]
    assert "-sm layer" in error and "prefill:512" in error and "no such split" in error
    text = script.table(report)
    assert "| decode:1 | 2 | 120.0 (50.0 to 70.0) |" in text and "| 3.00 |" in text
    json.dumps(report)


def test_our_side_missing(script: ModuleType, given: list[str], tmp_path: Path) -> None:
    program(tmp_path / "python", "\nimport sys\nsys.exit('out of memory')\n")
    report = script.measure(script.arguments([*given, "--tests", "decode:1"]))
    (row,) = report["results"]
    assert row["ours"] is None and row["ratio"] is None and row["theirs"]
    assert "out of memory" in report["errors"][0]
    assert "failed" in script.table(report)


@pytest.mark.parametrize("tests", ["decode", "decode:0", "encode:4", "", "decode:x"])
def test_tests_that_mean_nothing(script: ModuleType, given: list[str], tests: str) -> None:
    with pytest.raises(SystemExit):
        script.arguments([*given, "--tests", tests])
