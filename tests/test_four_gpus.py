"""benchmarks/four_gpus.py rehearsed: every part, on CPU ranks with tiny models; and what it makes of bad results."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "four_gpus.py"


@pytest.fixture
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("four_gpus", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.processes
def test_rehearsal_on_two_ranks(tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    command = [sys.executable, str(SCRIPT), "--cpu", "--tp", "1,2", "--folder", str(tmp_path), "--json", str(result)]
    done = subprocess.run(
        [*command, "--repetitions", "1", "--generate", "8"], capture_output=True, text=True, timeout=170
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(result.read_text())
    assert report["errors"] == []
    assert set(report["seconds"]) == {"capped", "ratios 2,1", "speed", "killed"}
    met = {check["name"]: check["met"] for check in report["checks"]}
    for name in ("tiny-f16 capped, 2 cards: verify", "tiny-f16 at 2,1: verify", "tiny-f16 at 2,1: weight bytes"):
        assert met[name] is True
    assert met["a rank killed while decoding"] is True
    assert "SIGKILL" in report["killed"]["message"] and "rank 1" in report["killed"]["message"]
    rows = {(row["test"], row["ranks"]) for row in report["speed"]["results"] if row["ours"]}
    assert rows == {(test, ranks) for test in ("decode:1", "prefill:48", "decode:4") for ranks in (1, 2)}
    assert "| a rank killed while decoding |" in done.stdout and "| tiny-q4_k_m decode:1 | 2 |" in done.stdout


def shares_of(**changes: Any) -> dict[str, Any]:
    good = {
        "ratio": "2,1,1",
        "ranks": 3,
        "verify": {"ok": True, "kl_mean": 1e-4},
        "resident_weight_bytes": [51, 25, 24],
        "planned_weight_bytes": [51, 25, 24],
        "used_over_planned": [0.99, 1.02, 1.0],
        "load_seconds": 9.0,
        "tokens_per_second": {"batch 1": 40.0},
        "prefill_1024_tokens_per_second": 1000.0,
    }
    return {**good, **changes}


@pytest.mark.parametrize(
    ("changes", "missed"),
    [
        ({}, set()),
        ({"verify": {"ok": False, "kl_mean": 1.0}}, {"verify"}),
        ({"used_over_planned": [0.9, 1.0, 1.0]}, {"memory a card"}),
        ({"resident_weight_bytes": [40, 30, 30]}, {"balance"}),
    ],
)
def test_what_is_wrong_is_told(script: ModuleType, changes: dict[str, Any], missed: set[str]) -> None:
    checks = script.check_shares("x", shares_of(**changes), cpu=False)
    assert {check.name.removeprefix("x: ") for check in checks if check.met is False} == missed


@pytest.mark.parametrize("changes", [{"seconds": 5.5}, {"processes_left": 1}, {"bytes_left": 1 << 30}, {"message": ""}])
def test_an_end_that_is_not_clean(script: ModuleType, changes: dict[str, Any]) -> None:
    good = {"message": "rank 3 was killed", "seconds": 1.0, "processes_left": 0, "bytes_left": 0}
    assert script.check_killed(good)[0].met is True
    assert script.check_killed({**good, **changes})[0].met is False


def test_a_failing_part_leaves_the_others(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise ValueError("no such card")

    monkeypatch.setattr(script, "shares", fails)
    monkeypatch.setattr(
        script,
        "kill_a_rank",
        lambda options: {"message": "rank 1 was killed", "seconds": 1.0, "processes_left": 0, "bytes_left": 0},
    )
    report = script.everything(script.arguments(["--cpu", "--tp", "1,2", "--parts", "capped,killed"]))
    assert report["errors"] == ["capped: ValueError: no such card"]
    assert [check["met"] for check in report["checks"]] == [False, True]
    assert "no such card" in script.tables(report)


def test_the_whole_list_is_asked_of_four_cards(script: ModuleType) -> None:
    options = script.arguments([])
    assert script.ratios_for(options) == ["2,1,1", "1,1,1", "3,3,2,2"]
    rows = script.speed_rows(options)
    asked = {(row.model, row.test.name, row.ranks, row.p2p) for row in rows if row.required}
    for model in ("llama3-70b-q4_k_m", "llama3-8b-q4_k_m"):
        assert {(model, test, 4, True) for test in ("decode:1", "prefill:4096", "decode:32")} <= asked
    assert ("llama3-70b-q4_k_m", "decode:1", 4, False) in asked
    assert {row.ranks for row in rows} == {1, 2, 4}
    report = {
        "results": [
            {"model": "llama3-70b-q4_k_m", "ranks": ranks, "test": "decode:1", "p2p": True, "ours": {"median": speed}}
            for ranks, speed in ((1, 90.0), (2, 150.0), (4, 200.0))
        ]
    }
    (check,) = script.check_scaling(options, report)
    assert check.met is False and check.found == "1.33"
