"""Ranks that torchrun starts join the engine in rank 0's process, and nobody outlives anybody."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from rank_fakes import wait_gone

pytestmark = pytest.mark.processes

SCRIPT = """
import os, signal, sys, threading
from multitensor.engine.process_executor import ProcessExecutor
from multitensor.engine.worker import join_torchrun
from multitensor.errors import RankFailed
from rank_fakes import FACTORY, make_config, make_plan, make_step
if os.environ["RANK"] != "0":
    join_torchrun()
if sys.argv[1] == "no engine":
    sys.exit(0)
executor = ProcessExecutor(FACTORY)
executor.start(make_plan(2), make_config())
executor.submit(make_step(0))
pids = executor.call("pid")
print("result", executor.collect().token_ids.tolist(), os.getpid(), *pids, flush=True)
if sys.argv[1] == "kill":
    threading.Timer(0.2, os.kill, (pids[1], signal.SIGKILL)).start()
    try:
        executor.call("reduce_for_ever")
    except RankFailed as error:
        print(error, flush=True)
        sys.exit(1)
executor.close()
"""


def torchrun(tmp_path: Path, mode: str) -> subprocess.CompletedProcess[str]:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--master-addr", "127.0.0.1", "--master-port", str(port), str(script), mode]
    paths = [*sys.path, str(Path(__file__).parent)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=90)


def result_of(done: subprocess.CompletedProcess[str]) -> tuple[str, list[int]]:
    """What the step gave, and the processes: engine, rank 0, rank 1."""
    line = next((line for line in done.stdout.splitlines() if line.startswith("result")), None)
    assert line is not None, done.stderr
    words = line.split()
    return words[1], [int(word) for word in words[2:]]


def test_ranks_join_and_leave(tmp_path: Path) -> None:
    done = torchrun(tmp_path, "run")
    result, pids = result_of(done)
    assert result == "[12]" and done.returncode == 0, done.stderr
    assert len(set(pids)) == 3 and wait_gone(pids, 1.0) == []


def test_a_killed_rank_takes_the_launch_down(tmp_path: Path) -> None:
    done = torchrun(tmp_path, "kill")
    _, pids = result_of(done)
    assert done.returncode != 0
    assert wait_gone(pids, 1.0) == []


def test_ranks_leave_when_there_will_be_no_engine(tmp_path: Path) -> None:
    """As after `--help` or a wrong option, which rank 0 deals with alone."""
    assert torchrun(tmp_path, "no engine").returncode == 0
