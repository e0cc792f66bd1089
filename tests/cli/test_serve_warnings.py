"""`serve` tells what is worth telling of plan and vocabulary before it loads anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from multitensor.cli.main import app
from multitensor.engine.process_executor import ProcessExecutor
from multitensor.errors import InputError
from synthetic import write_gguf


def test_warnings_of_plan_and_vocabulary_come_before_the_loading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(executor: ProcessExecutor, plan: Any, config: Any, progress: Any = None) -> None:
        raise InputError("the ranks would start now")

    monkeypatch.setattr(ProcessExecutor, "start", start)
    metadata = {"tokenizer.ggml.pre": "brand-new", "tokenizer.ggml.eos_token_id": 999_999}
    shape = {"n_heads": 2, "n_kv_heads": 1, "hidden": 32, "ffn": 32}
    path = write_gguf(tmp_path / "tiny.gguf", no_vocab=False, tokenizer="gpt2", metadata=metadata, **shape)
    result = CliRunner().invoke(app, ["serve", str(path), "--port", "0", "--devices", "cpu:3"])
    assert "the ranks would start now" in str(result.exception)
    told = [line for line in result.stderr.splitlines() if line.startswith("multitensor: warning: ")]
    assert any("rank 2 gets no part of the attention heads" in line for line in told), told
    assert sum("pre-tokenizer 'brand-new' is unknown" in line for line in told) == 1
    assert sum("eos_token_id is 999999" in line for line in told) == 1
