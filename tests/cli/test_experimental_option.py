"""Ways that have not run on several GPUs yet are tried only by name."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from multitensor import LLM
from multitensor.cli import options
from multitensor.cli.main import app
from multitensor.config import EXPERIMENTS, EngineConfig, parse_experiments
from multitensor.errors import InputError
from synthetic import write_gguf


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("experimental") / "tiny.gguf", types="Q8_0")


def test_names() -> None:
    assert options.names("") == ()
    assert options.names(" a, b ,,c") == ("a", "b", "c")
    assert parse_experiments(EXPERIMENTS) == frozenset(EXPERIMENTS)
    assert EngineConfig.experimental == frozenset()


@pytest.mark.parametrize("command", ["run", "bench", "serve", "verify"])
def test_help_lists_them(command: str) -> None:
    shown = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"}).output
    assert "--experimental" in shown
    assert all(name in shown for name in EXPERIMENTS)


def test_an_unknown_one_is_refused(tiny_gguf: Path) -> None:
    with pytest.raises(InputError, match="'warp-speed'") as error:
        LLM(tiny_gguf, devices="cpu:1", experimental=["warp-speed"])
    assert all(name in str(error.value) for name in EXPERIMENTS)
    result = CliRunner().invoke(app, ["verify", str(tiny_gguf), "--devices", "cpu:1", "--experimental", "warp-speed"])
    assert isinstance(result.exception, InputError)


@pytest.mark.processes
def test_it_changes_nothing_on_cpus(tiny_gguf: Path) -> None:
    texts = []
    for names in ((), tuple(EXPERIMENTS)):
        with LLM(tiny_gguf, devices="cpu:2", max_model_len=64, experimental=names) as llm:
            texts.append(llm.generate([[1, 2, 3]])[0].outputs[0].token_ids)
    assert texts[0] == texts[1]
