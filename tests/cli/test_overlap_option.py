"""--overlap reaches the ranks from every command that reads long prompts, and from Python."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from multitensor import LLM
from multitensor.cli.main import app
from multitensor.engine import open_engine
from multitensor.engine.prepare import prepare
from synthetic import write_gguf


class _Enough(Exception):
    pass


@pytest.mark.parametrize("wanted", [False, True])
@pytest.mark.parametrize("name", ["run", "serve", "bench"])
def test_commands_pass_it_on(name: str, wanted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[bool] = []

    def start(*arguments: Any, **settings: Any) -> Any:
        found.append(settings["overlap"])
        raise _Enough

    monkeypatch.setattr(LLM, "_open", start)
    monkeypatch.setattr(open_engine, "engine_opener", start)
    more = {"run": ["--ids", "1"], "serve": ["--port", "0"]}.get(name, [])
    result = CliRunner().invoke(app, [name, "model.gguf", *more, *["--overlap"] * wanted])
    assert isinstance(result.exception, _Enough), result.output
    assert found == [wanted]


@pytest.mark.parametrize("wish", [False, True])
def test_the_engine_is_told(wish: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", types="Q8_0")
    assert prepare(path, devices="cpu:2", overlap=wish).config.overlap is wish
    assert prepare(path, devices="cpu:2").config.overlap is False
    found: list[bool] = []

    def start(*arguments: Any, **settings: Any) -> Any:
        found.append(settings["overlap"])
        raise _Enough

    monkeypatch.setattr(LLM, "_start", start)
    with pytest.raises(_Enough):
        LLM(path, devices="cpu:2", overlap=wish)
    assert found == [wish]


@pytest.mark.processes
def test_cpu_ranks_are_not_cut_and_say_so(tmp_path: Path) -> None:
    """Their sums are over at once: nothing can travel meanwhile."""
    path = write_gguf(tmp_path / "tiny.gguf", types="Q8_0")
    with LLM(path, devices="cpu:2", overlap=True, max_model_len=64) as llm:
        assert llm.reductions()["overlapped_from"] is None
