"""The command line as a shell sees it: exit codes, one-line errors, what goes to stdout and what to stderr."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from synthetic import write_gguf

DIMS = {"hidden": 64, "ffn": 128, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab": 320, "context": 128}


def command(*arguments: str, stdin: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "multitensor", *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **environment},
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_gguf(tmp_path_factory.mktemp("model") / "tiny.gguf", types="Q8_0", **DIMS))


@pytest.fixture(scope="module")
def speaking(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("speaking")
    return str(write_gguf(folder / "tiny.gguf", types="Q8_0", no_vocab=False, tokenizer="gpt2", **DIMS))


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["run", "MODEL", "--tp", "0"], 2, "0 tensor parallel ranks"),
        (["run", "MODEL", "--tp", "x"], 2, "'--tp'"),
        (["run", "MODEL", "--ids", "1,x"], 2, "--ids"),
        (["run", "MODEL", "--ids", "1,320"], 2, "320 is not a token id"),
        (["run", "MODEL", "-p", "hello"], 2, "no vocabulary"),
        (["run", "MODEL"], 2, "no vocabulary"),
        (["run", "MODEL", "-p", "hello", "--ids", "1"], 2, "not both"),
        (["run", "MODEL", "--ids", "1", "--system", "be kind"], 2, "--system"),
        (["run", "MODEL", "--ids", ",".join(["1"] * 200)], 2, "200 tokens"),
        (["plan", "MODEL", "--devices", "cpu:²"], 2, "cpu:²"),
        (["plan", "MODEL", "--ratio", "1,2,3", "--tp", "2"], 2, "ratio"),
        (["plan", "MODEL", "--ratio", "0,0"], 2, "ratio"),
        (["plan", ""], 2, "model"),
        (["plan", "MODEL", "--devices", "1MiB"], 3, "fit"),
        (["run", "MODEL", "--ids", "1", "--ctx", "99999999999"], 3, "context"),
        (["nonsense"], 2, "nonsense"),
        (["plan", "MODEL", "--nonsense"], 2, "--nonsense"),
        (["plan"], 2, "MODEL"),
        (["pull", "nonsense"], 2, "nonsense"),
        (["pull", "hf:only/two"], 2, "hf:OWNER/REPO/FILE"),
        (["pull", "smollm2-135m", "--to", "/dev/null/x"], 2, "--to"),
        (["pull", "smollm2-135m", "--sha256", "00"], 2, "SHA-256"),
    ],
)
def test_errors_are_one_line(model: str, arguments: list[str], code: int, words: str) -> None:
    done = command(*[model if argument == "MODEL" else argument for argument in arguments])
    lines = done.stderr.strip().splitlines()
    assert (done.returncode, done.stdout) == (code, ""), done.stderr
    assert len([line for line in lines if "warning" not in line]) == 1, done.stderr
    assert words.lower() in lines[-1].lower()


def test_token_ids_in_and_out(model: str) -> None:
    done = command("run", model, "--ids", "1,2,3", "-n", "5", "--temp", "0", "--tp", "2")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == 5
    assert "too few to time" in done.stderr
    report = json.loads(command("run", model, "--ids", "1,2,3", "-n", "5", "--temp", "0", "--json").stdout)
    assert [str(token) for token in report["token_ids"]] == done.stdout.split()
    assert report["finish_reason"] == "length"
    assert [held["weights_over_plan"] for held in report["memory"]] == [1.0]
    assert 0 < report["load_seconds"] < report["first_token_seconds"], "counted from the command, imports and all"


def test_text_goes_to_stdout_alone(speaking: str) -> None:
    done = command("run", speaking, "-p", "a b", "-n", "12", "--temp", "0")
    report = json.loads(command("run", speaking, "-p", "a b", "-n", "12", "--temp", "0", "--json").stdout)
    assert done.returncode == 0, done.stderr
    assert done.stdout == report["text"] + "\n"
    assert "tokens/s" in done.stderr


def test_a_narrow_terminal_ends_nothing(speaking: str) -> None:
    assert command("run", speaking, "-p", "a", "-n", "12", PYTHONIOENCODING="ascii").returncode == 0


def test_a_reader_that_leaves_is_no_failed_check(speaking: str) -> None:
    line = f"{sys.executable} -m multitensor run {speaking} -p a -n 100 --temp 0 | head -c 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=120)
    assert done.returncode == 141, done.stderr
    assert "Traceback" not in done.stderr


def test_inspect_lets_no_file_drive_the_terminal(model: str, tmp_path: Path) -> None:
    """A key of the header with an escape sequence and a line break in it."""
    content = Path(model).read_bytes()
    key = b"llama.rope.freq_base"
    assert content.count(key) == 1
    hostile = tmp_path / "hostile.gguf"
    hostile.write_bytes(content.replace(key, b"llama.\x1b[31mE\nfreq_ba"))
    shown = command("inspect", str(hostile)).stdout
    assert "\x1b" not in shown and r"'llama.\x1b[31mE\nfreq_ba'" in shown


def test_plan_and_inspect_as_json(model: str) -> None:
    plan = json.loads(command("plan", model, "--devices", "24GiB,12GiB", "--json").stdout)
    assert [device["name"] for device in plan["devices"]] == ["device:0", "device:1"]
    assert {"capacity_bytes", "weights_bytes", "kv_bytes", "buffers_bytes"} <= set(plan["devices"][0])
    assert set(plan["ratios"]) == {"attention", "ffn", "experts", "vocabulary"}
    assert {"name", "type", "rule", "slices"} <= set(plan["tensors"][0])
    assert json.loads(command("inspect", model, "--json").stdout)["architecture"] == "llama"


def test_verify_and_bench(model: str) -> None:
    done = command("verify", model, "--tp", "2", "--dtype", "float32")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(command("bench", model, "-p", "16", "-n", "8", "-b", "1,2", "-r", "1", "--json").stdout)
    assert [(row["test"], row["batch"]) for row in report["results"]] == [("prefill", 1), ("decode", 1), ("decode", 2)]


def test_pull_keeps_what_is_right_and_says_where(tmp_path: Path, smollm2_path: Path) -> None:
    target = tmp_path / smollm2_path.name
    target.symlink_to(smollm2_path)
    done = command("pull", "smollm2-135m", "--to", str(tmp_path))
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, str(target)), done.stderr
