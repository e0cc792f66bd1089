"""A rank that dies while nobody asks anything of it: said once, and soon."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from multitensor import LLM
from multitensor.errors import RankFailed
from synthetic import write_gguf

pytestmark = pytest.mark.processes

WITHIN = 5.0  # seconds from the rank's death to the engine's end


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    return write_gguf(path, no_vocab=False, tokenizer="gpt2", chat_template=template)


def kill_second_rank(pid: int) -> None:
    """The rank whose command line ends in "worker 1 ..."."""
    for child in psutil.Process(pid).children():
        arguments = child.cmdline()
        if (
            "multitensor.engine.worker" in arguments
            and arguments[arguments.index("multitensor.engine.worker") + 1] == "1"
        ):
            child.send_signal(signal.SIGKILL)
            return
    raise AssertionError("there is no rank 1")


def read_until(descriptor: int, words: str, seconds: float = 60.0) -> str:
    text, deadline = "", time.monotonic() + seconds
    while words not in text:
        ready, _, _ = select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
        assert ready, f"{words!r} did not come: {text!r}"
        text += os.read(descriptor, 4096).decode()
    return text


@pytest.mark.parametrize(
    ("terminal", "typed"), [(True, "half a quest"), (True, "hello\n"), (False, "")], ids=["typing", "answered", "pipe"]
)
def test_a_waiting_chat_ends_with_the_reason(model: Path, terminal: bool, typed: str) -> None:
    """terminal: input() edits lines with readline; else it reads a pipe whose writer stays."""
    ours, theirs = pty.openpty() if terminal else os.pipe()[::-1]
    out, out_theirs = (ours, theirs) if terminal else os.pipe()
    chat = subprocess.Popen(
        [sys.executable, "-m", "multitensor", "run", str(model), "--devices", "cpu:2", "-n", "4", "--temp", "0"],
        stdin=theirs,
        stdout=out_theirs,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        read_until(out, "> ")
        if typed:
            os.write(ours, typed.encode())
        if typed.endswith("\n"):
            read_until(out, "> ")
        time.sleep(0.3)
        begin = time.monotonic()
        kill_second_rank(chat.pid)
        chat.wait(timeout=WITHIN)
        assert time.monotonic() - begin < WITHIN
        assert chat.stderr is not None
        errors = chat.stderr.read()
        assert chat.returncode == 1, errors
        assert errors.count("SIGKILL") == 1 and "Traceback" not in errors, errors
        assert errors.endswith("\nmultitensor: rank 1 (cpu:1) was killed by SIGKILL\n")
    finally:
        chat.kill()
        chat.communicate()
        for descriptor in {ours, theirs, out, out_theirs}:
            os.close(descriptor)


def test_an_idle_llm_says_so_at_the_next_call(model: Path) -> None:
    with LLM(model, devices="cpu:2") as llm:
        llm.generate([[5, 6]])
        kill_second_rank(os.getpid())
        time.sleep(1.5)  # a diagnosis takes half a second
        for call in (lambda: llm.generate([[5, 6]]), llm.memory, lambda: next(llm.stream([5, 6]))):
            begin = time.monotonic()
            with pytest.raises(RankFailed, match=r"^rank 1 \(cpu:1\) was killed by SIGKILL$"):
                call()
            assert time.monotonic() - begin < 0.5
