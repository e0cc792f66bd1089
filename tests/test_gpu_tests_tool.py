"""tools/gpu_tests.py: which tests it finds, and that it tells what it had no time for."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

TOOL = Path(__file__).parents[1] / "tools" / "gpu_tests.py"
ONE = "test_what_does_not_fit_is_refused and layer_kernel"


@pytest.mark.parametrize(("limit", "left_out"), [("100", False), ("0", True)])
def test_a_test_is_run_or_told_as_not_run(limit: str, left_out: bool, tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    command = [sys.executable, str(TOOL), "-k", ONE, "--limit", limit, "--logs", str(tmp_path), "--json", str(result)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "0"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=150)
    told = json.loads(result.read_text())
    ((name, counts),) = told["files"].items()
    assert name == "tests/gpu/test_layer_kernel.py" and sum(counts.values()) == 1
    assert ("not run" in counts) == left_out
    assert run.returncode == left_out, run.stdout + run.stderr
    assert told["failures"] == []


def run_in_copy(folder: Path, files: dict[str, str], *options: str) -> tuple[dict[str, Any], str, int]:
    """The tool over these test files: (its JSON, what it said on stderr, exit status)."""
    (folder / "tools").mkdir()
    (folder / "tests").mkdir()
    tool = shutil.copy(TOOL, folder / "tools")
    (folder / "pytest.ini").write_text("[pytest]\nmarkers =\n    gpu: one\n    gpu2: two\n")
    for name, text in files.items():
        (folder / "tests" / name).write_text(text)
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "0"}
    command = [sys.executable, str(tool), "--json", "result.json", "--logs", "logs", *options]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=folder, timeout=100)
    return json.loads((folder / "result.json").read_text()), run.stderr, run.returncode


def test_files_that_cannot_be_collected_are_told_and_the_others_run(tmp_path: Path) -> None:
    files = {
        "lender.py": "import pytest\nMARKS = [pytest.mark.gpu]\n",
        "test_lent.py": "from lender import MARKS\npytestmark = MARKS\ndef test_it(): pass\n",
        "test_marked.py": "import pytest\n@pytest.mark.gpu\ndef test_it(): pass\n",
        "test_broken.py": "import pytest, no_such_module\n@pytest.mark.gpu\ndef test_it(): pass\n",
        "test_other.py": "raise SystemExit('not a file for GPUs')\n",
    }
    told, said, status = run_in_copy(tmp_path, files)
    assert told["files"] == {"tests/test_lent.py": {"passed": 1}, "tests/test_marked.py": {"passed": 1}}
    (line,) = [line for line in said.splitlines() if line.startswith("not collected: ")]
    assert "tests/test_broken.py" in line and "no_such_module" in line
    assert [line] == [f"not collected: {line}" for line in told["not collected"]]
    assert status == 1 and told["failures"] == []


def test_when_the_time_is_over_it_is_still_told_why_tests_failed(tmp_path: Path) -> None:
    test = """
        import time, pytest
        @pytest.mark.gpu
        @pytest.mark.parametrize("seconds", [0, 60])
        def test_it(seconds):
            assert seconds, "the reason"
            time.sleep(seconds)
    """
    told, _, status = run_in_copy(tmp_path, {"test_slow.py": dedent(test)}, "--limit", "4")
    assert told["files"] == {"tests/test_slow.py": {"failed": 1, "not run": 1}} and status == 1
    assert "AssertionError: the reason" in (tmp_path / "logs" / "000.log").read_text()


def test_without_gpus_it_says_so(tmp_path: Path) -> None:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run([sys.executable, str(TOOL)], env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 1 and "no CUDA device" in run.stderr
