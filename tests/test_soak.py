"""The soak of the server, small; and what its script calls a fault."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "soak_server.py"


@pytest.fixture(scope="module")
def script() -> Any:
    sys.path.insert(0, str(SCRIPT.parent))  # as when it is run: served_model.py lies beside it
    spec = importlib.util.spec_from_file_location("soak_server", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["soak_server"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.processes
@pytest.mark.models
def test_streams_are_neither_lost_nor_crossed_and_nothing_stays_behind(smollm2_path: Path, tmp_path: Path) -> None:
    sizes = ("--streams", "16", "--tokens", "8", "--requests", "80", "--at-once", "16", "--soak-tokens", "5")
    result = subprocess.run(
        [sys.executable, str(SCRIPT), "--model", str(smollm2_path), *sizes, "--json", str(tmp_path / "found.json")],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    found = json.loads((tmp_path / "found.json").read_text())
    streams, soaked, resting = found["streams"], found["soak"], found["at_rest"]
    assert (streams["lost"], streams["different"], soaked["lost"]) == (0, 0, 0), result.stdout
    assert streams["equal"] + streams["equal_until_a_near_tie"] == 16 and streams["distinct_answers"] > 12
    assert 20 < soaked["hung_up"] < 60 and len(soaked["memory"]) == 40
    assert (resting["running"], resting["waiting"], resting["kv_used"]) == (0, 0, 0)
    # So few requests say nothing of memory, which still fills its pools: that is for the full size.
    assert [fault for fault in found["faults"] if "memory" not in fault] == []


def test_where_answers_part(script: Any) -> None:
    def answer(tokens: str, finish: str = "length") -> Any:
        return script.Answer(list(tokens), [0.5, 0.05, 0.2][: len(tokens)], finish, True)

    assert script.parting(answer("abc"), answer("abc")) is None
    assert script.parting(answer("abc"), answer("axy")) == 0.05
    assert script.parting(answer("abc"), answer("ab", "stop")) == math.inf


def test_what_is_a_fault(script: Any) -> None:
    found: dict[str, Any] = {
        "streams": {"lost": 0, "different": 0},
        "soak": {"lost": 0, "growth": {"server": 0.0, "ranks": 0.019}},
        "at_rest": {"running": 0, "waiting": 0, "kv_used": 0},
    }
    assert script.faults(found) == []
    found["streams"] = {"lost": 1, "different": 2}
    found["soak"] = {"lost": 3, "growth": {"server": 0.5, "ranks": 0.0}}
    found["at_rest"] = {"running": 4, "waiting": 0, "kv_used": 16}
    assert len(script.faults(found)) == 6
    assert script.growth([1, 1, 10, 10, 20, 20, 15, 15]) == 0.5
