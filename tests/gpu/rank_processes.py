"""Ranks of GPU tests in processes of their own, which may be lost, and the model that they are compared with."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from synthetic import write_gguf

SECONDS = 150


def answers(script: str, *commands: tuple[object, ...]) -> list[dict[str, Any]]:
    """What each of these ranks, started together, prints at its end; AssertionError with its last words if it fails.

    script: a file beside this one. commands: the arguments of each rank.
    """
    path = Path(__file__).parent / script
    processes = [
        subprocess.Popen(
            [sys.executable, str(path), *map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for command in commands
    ]
    try:
        ended = [process.communicate(timeout=SECONDS) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, errors) in zip(processes, ended, strict=True):
        assert process.returncode == 0, errors[-2000:]
    return [json.loads(printed.strip().splitlines()[-1]) for printed, _ in ended]


def write_two_layers(folder: Path) -> Path:
    """A model of two layers of 1,024, 16 query and 4 KV heads of 64, in Q8_0."""
    return write_gguf(
        folder / "model.gguf",
        hidden=1024,
        ffn=1536,
        n_layers=2,
        n_heads=16,
        n_kv_heads=4,
        head_dim=64,
        vocab=1024,
        types="Q8_0",
    )
