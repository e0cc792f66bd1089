"""--p2p and --no-p2p reach the engine's settings from every command that starts ranks, and from Python."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from multitensor import LLM
from multitensor.cli.main import app
from multitensor.engine import open_engine
from multitensor.engine.prepare import prepare
from multitensor.engine.process_executor import ProcessExecutor
from multitensor.errors import InputError
from synthetic import write_gguf


class _Enough(Exception):
    pass


def stop_with_settings(found: list[Any]) -> Any:
    def start(*arguments: Any, **settings: Any) -> Any:
        found.append(settings["p2p"])
        raise _Enough

    return start


@pytest.mark.parametrize(("flags", "wanted"), [([], None), (["--no-p2p"], False), (["--p2p"], True)])
@pytest.mark.parametrize("name", ["run", "serve", "bench", "verify"])
def test_commands_pass_it_on(name: str, flags: list[str], wanted: bool | None, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[bool | None] = []
    monkeypatch.setattr(LLM, "_open", stop_with_settings(found))
    monkeypatch.setattr(open_engine, "engine_opener", stop_with_settings(found))
    more = {"run": ["--ids", "1"], "serve": ["--port", "0"]}.get(name, [])
    result = CliRunner().invoke(app, [name, "model.gguf", *more, *flags])
    assert isinstance(result.exception, _Enough), result.output
    assert found == [wanted]


@pytest.mark.parametrize("wish", [None, False, True])
def test_the_engine_is_told(wish: bool | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", types="Q8_0")
    assert prepare(path, devices="cpu:2", p2p=wish).config.p2p is wish
    found: list[bool | None] = []

    def start(executor: ProcessExecutor, plan: Any, config: Any, progress: Any = None) -> None:
        found.append(config.p2p)
        raise InputError("enough")

    monkeypatch.setattr(ProcessExecutor, "start", start)
    with pytest.raises(InputError, match="enough"):
        LLM(path, devices="cpu:1", p2p=wish)
    assert found == [wish]
