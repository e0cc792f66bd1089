"""Planning for sizes that are not here reads a header and computes: it has to start like it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from synthetic import write_gguf

PLAN = """
import contextlib, io, json, sys
from multitensor.cli.main import main
sys.argv = ["multitensor", "plan", sys.argv[1], "--devices", "8GiB,8GiB"]
with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.suppress(SystemExit):
    main()
assert "Who computes what" in printed.getvalue()
print(json.dumps(sorted(sys.modules)))
"""
SLOW = {"torch", "transformers", "tokenizers", "huggingface_hub", "fastapi", "uvicorn", "asyncio", "pynvml", "psutil"}


def test_plan_imports_nothing_that_is_slow_and_not_needed(tmp_path: Path) -> None:
    model = write_gguf(tmp_path / "m.gguf", no_vocab=False, tokenizer="gpt2")
    done = subprocess.run([sys.executable, "-c", PLAN, str(model)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    loaded = set(json.loads(done.stdout.splitlines()[-1]))
    assert "multitensor.sharding.solve" in loaded
    assert loaded & SLOW == set()
    assert "multitensor.formats.tokenizer" not in loaded
