"""--overlap, --chunk and --step-timeout reach the engine from the commands and from Python."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from multitensor import LLM
from multitensor.cli.main import app
from multitensor.engine import open_engine
from multitensor.engine.prepare import prepare
from multitensor.errors import InputError
from synthetic import write_gguf


class _Enough(Exception):
    pass


OPTIONS: list[tuple[list[str], str, Any, Any]] = [
    (["--overlap"], "overlap", True, False),
    (["--chunk", "4096"], "max_batch_tokens", 4096, None),
    (["--step-timeout", "30"], "step_timeout", 30.0, None),
]


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize(("flags", "setting", "wanted", "default"), OPTIONS)
@pytest.mark.parametrize("name", ["run", "serve", "bench"])
def test_commands_pass_it_on(
    name: str, flags: list[str], setting: str, wanted: Any, default: Any, given: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[Any] = []

    def start(*arguments: Any, **settings: Any) -> Any:
        found.append(settings[setting])
        raise _Enough

    monkeypatch.setattr(LLM, "_open", start)
    monkeypatch.setattr(open_engine, "engine_opener", start)
    more = {"run": ["--ids", "1"], "serve": ["--port", "0"]}.get(name, [])
    result = CliRunner().invoke(app, [name, "model.gguf", *more, *(flags if given else [])])
    assert isinstance(result.exception, _Enough), result.output
    assert found == [wanted if given else default]


@pytest.mark.parametrize(("_", "setting", "wanted", "default"), OPTIONS)
def test_the_engine_is_told(
    _: Any, setting: str, wanted: Any, default: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", types="Q8_0")
    found: list[Any] = []

    def start(*arguments: Any, **settings: Any) -> Any:
        found.append(settings[setting])
        raise _Enough

    monkeypatch.setattr(LLM, "_start", start)
    for options in ({}, {setting: wanted}):
        with pytest.raises(_Enough):
            LLM(path, devices="cpu:2", **options)
    assert found == [default, wanted]
    config = prepare(path, devices="cpu:2", **{setting: wanted}).config
    assert getattr(config, setting) == wanted


@pytest.mark.parametrize(
    ("chunk", "kind", "mixed"), [(None, "cpu:2", 512), (4096, "cpu:2", 512), (64, "cpu:2", 64), (8192, "24GiB", 2048)]
)
def test_longer_steps_are_for_prompts_alone(chunk: int | None, kind: str, mixed: int, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", types="Q8_0")
    prepared = prepare(path, devices=kind, max_batch_tokens=chunk, allow_planned_devices=True)
    assert prepared.config.max_batch_tokens == prepared.plan.max_batch_tokens == (chunk or 512)
    assert prepared.config.mixed_batch_tokens == mixed


@pytest.mark.parametrize("chunk", ["many", 0, True, 1.5])
def test_nonsense_is_refused(chunk: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="max_batch_tokens"):
        prepare(write_gguf(tmp_path / "tiny.gguf", types="Q8_0"), devices="cpu:2", max_batch_tokens=chunk)


@pytest.mark.parametrize(
    ("devices", "asked", "limit"), [("cpu:1", None, 600.0), ("cpu:1", 0, 0.0), ("24GiB", None, 0.0)]
)
def test_the_time_of_a_step(devices: str, asked: float | None, limit: float, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", types="Q8_0")
    assert prepare(path, devices=devices, step_timeout=asked, allow_planned_devices=True).config.step_timeout == limit


@pytest.mark.parametrize("seconds", ["soon", -1, True, float("nan"), float("inf")])
def test_nonsense_instead_of_seconds_is_refused(seconds: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="step_timeout"):
        prepare(write_gguf(tmp_path / "tiny.gguf", types="Q8_0"), devices="cpu:2", step_timeout=seconds)


@pytest.mark.processes
def test_cpu_ranks_are_not_cut_and_say_so(tmp_path: Path) -> None:
    """Their sums are over at once: nothing can travel meanwhile."""
    path = write_gguf(tmp_path / "tiny.gguf", types="Q8_0")
    with LLM(path, devices="cpu:2", overlap=True, max_model_len=64) as llm:
        assert llm.reductions()["overlapped_from"] is None
