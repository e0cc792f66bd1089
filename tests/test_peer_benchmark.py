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
scale = {"none": 1.0, "layer": 0.5, "tensor": 2.0}[a["-sm"]]
print("a log line", file=sys.stderr)
work = [(int(n), 0) for n in a["-p"].split(",") if n != "0"] + [(0, int(n)) for n in [a["-n"]] if n != "0"]
print(json.dumps([{"n_prompt": p, "n_gen": n, "n_depth": int(a.get("-d", 0)), "avg_ts": 99.0,
                   "samples_ts": [v * scale * (100 if p else 1) for v in (10, 40, 20)]} for p, n in work]))
"""
BATCHED_BENCH = """
import json, sys
a = dict(zip(sys.argv[1::2], sys.argv[2::2]))
print("a log line")
for i, n in enumerate(a["-npl"].split(",")):
    print(json.dumps({"pl": int(n), "speed_pp": 1.0, "speed_tg": 1.0 if i % 4 == 0 else int(n) * (10.0 + i)}))
"""
OURS = """
import json, sys
given = [part for part in sys.argv[5:] if part not in ("--json", "--no-p2p")]  # after -m multitensor COMMAND MODEL
a = dict(zip(given[::2], given[1::2]))
ranks = int(a["--tp"] if "--tp" in a else a["--devices"].removeprefix("cpu:"))
if sys.argv[3] == "run":
    print(json.dumps({"first_token_seconds": 8.0, "load_seconds": 5.0}))
    sys.exit()
results = [{"test": "prefill", "tokens": int(n), "batch": 1} for n in a["-p"].split(",") if n != "0"]
results += [{"test": "decode", "tokens": int(a["-n"]), "batch": int(n)} for n in a["-b"].split(",") if a["-n"] != "0"]
for r in results:
    r.update(ranks=ranks, depth=int(a.get("-d", 0)), tokens_per_second=60.0 * ranks, slowest=50.0, fastest=70.0)
    r.update(floor_percent=81.0 if r["test"] == "decode" else None)
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
    options = script.arguments([*given, "--tests", "decode:1,decode:4,decode:8,prefill:512", "--tp", "1,2"])
    report = script.measure(options)
    rows = {(row["test"], row["ranks"]): row for row in report["results"]}
    best = {mode: speed["median"] for mode, speed in rows["decode:1", 1]["theirs"].items()}
    assert best == {"none": 20.0}
    assert rows["decode:1", 1]["ratio"] == pytest.approx(3.0)
    # One call for both, and no layers there: the fake fails for prefills.
    assert rows["decode:1", 2]["ratio"] == pytest.approx(120 / 40)
    # The first of each batch warms up; of 4 * 11, 4 * 12, 4 * 13 the median is 48; of 8 * 15, 16, 17 it is 128.
    assert rows["decode:4", 1]["theirs"]["none"]["median"] == pytest.approx(48.0)
    assert rows["decode:8", 1]["theirs"]["none"]["median"] == pytest.approx(128.0)
    assert rows["prefill:512", 1]["ratio"] == pytest.approx(60 / 2000)
    assert set(rows["prefill:512", 2]["theirs"]) == {"tensor"}
    (error,) = report["errors"]
    assert "-sm layer" in error and "prefill:512" in error and "no such split" in error
    text = script.table(report)
    assert "decode:1 | 2 | 120.0 (50.0 to 70.0) | 81% |" in text and "| 3.00; 2.00 over one GPU |" in text
    json.dumps(report)


def test_first_token_and_depth(script: ModuleType, given: list[str]) -> None:
    report = script.measure(script.arguments([*given, "--tests", "first_token:1,decode:1@4096,decode:1"]))
    assert report["errors"] == []
    first, deep, shallow = report["results"]
    assert first["ours"]["median"] == 8.0 and 0 < first["theirs"]["none"]["median"] < 8.0
    assert first["ratio"] == pytest.approx(first["theirs"]["none"]["median"] / 8.0), "shorter is better"
    assert (deep["test"], shallow["test"]) == ("decode:1@4096", "decode:1")
    assert deep["ratio"] == shallow["ratio"] == pytest.approx(3.0)


@pytest.mark.parametrize("rows", ["issue3", "issue4", "one_gpu"])
def test_a_whole_table(script: ModuleType, given: list[str], tmp_path: Path, rows: str) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    common = [*given[2:], "--folder", str(folder), "--split-modes", "tensor"]
    report = script.measure(script.arguments(["--rows", rows, "--rehearse", *common]))
    assert report["errors"] == []
    assert set(report["models"]) == {"tiny-q4_k_m", "tiny-bf16"}, "written where they were missing"
    for row in (row for row in report["results"] if row["required"] or rows != "one_gpu"):
        assert row["required"]["met"] in (True, False), row
        assert row["required"]["met"] or not row["aim"]["met"]
    if rows == "issue3":
        by_goal = {row["required"]["goal"]: row for row in report["results"]}
        assert by_goal["1.55 x of 1 GPU"]["required"]["met"] and by_goal["1.55 x of 1 GPU"]["aim"]["met"]
        assert by_goal["20 s"]["required"]["met"] and by_goal["20 s"]["aim"]["met"]
        assert by_goal["235 tok/s"]["required"]["met"] is False
        assert by_goal["1.85 x"]["ratio"] == pytest.approx(120 / 40) and by_goal["1.85 x"]["required"]["met"]
        assert by_goal["1.85 x"]["aim"] == {"goal": "150 tok/s", "met": False}
        assert any(row["test"] == f"decode:1@{32768 // 64}" and row["kv"] == "q8" for row in report["results"])
    elif rows == "one_gpu":
        assert {row["ranks"] for row in report["results"]} == {1} and report["results"][2]["required"] is None
    else:
        without = [row for row in report["results"] if not row["p2p"]]
        assert {mode for row in without for mode in row["theirs"]} == {"tensor nccl", "tensor internal"}
    text = script.table(report)
    assert text.count("\n") == len(report["results"]) + 1
    assert ": met" in text and ": missed" in text


def test_one_command_for_all_that_share_a_load(script: ModuleType, given: list[str]) -> None:
    options = script.arguments([*given, "--tests", "prefill:512,prefill:4096,decode:1,decode:4"])
    (group,) = options.groups
    (tests,) = script.our_calls(group.tests)
    command = " ".join(script.our_command(options, group, tests))
    assert "-p 512,4096 -n 128 -b 1,4 -r 3" in command
    names = [name for name, _ in script.their_calls(options, group, "none", {})]
    assert names == ["prefill:512, prefill:4096, decode:1", "decode:4"]


def test_our_side_missing(script: ModuleType, given: list[str], tmp_path: Path) -> None:
    program(tmp_path / "python", "\nimport sys\nsys.exit('out of memory')\n")
    report = script.measure(script.arguments([*given, "--tests", "decode:1"]))
    (row,) = report["results"]
    assert row["ours"] is None and row["ratio"] is None and row["theirs"] and row["required"] is None
    assert "out of memory" in report["errors"][0]
    assert "failed" in script.table(report)


@pytest.mark.parametrize(
    "tests", ["decode", "decode:0", "encode:4", "", "decode:x", "decode:1@", "decode:1@x", "prefill:4@9"]
)
def test_tests_that_mean_nothing(script: ModuleType, given: list[str], tests: str) -> None:
    with pytest.raises(SystemExit):
        script.arguments([*given, "--tests", tests])
