"""`multitensor keys`, `audit` and `manifest` as a user types them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from multitensor.server.audit import AuditLog
from multitensor.server.auth import KeyStore


def _run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "multitensor", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env={**os.environ, "COLUMNS": "140"})


def test_keys(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    added = _run("keys", "add", path, "ada", "--tokens-per-minute", 1000)
    assert added.returncode == 0, added.stderr
    store = KeyStore.load(path)
    assert store.check(f"Bearer {added.stdout.strip()}") is not None
    listed = _run("keys", "list", path)
    assert "ada" in listed.stdout and "1000" in listed.stdout and added.stdout.strip() not in listed.stdout
    assert json.loads(_run("keys", "list", path, "--json").stdout)[0]["tokens_per_minute"] == 1000
    assert _run("keys", "revoke", path, "ada").returncode == 0
    assert store.keys == ()
    again = _run("keys", "revoke", path, "ada")
    assert again.returncode == 2 and "no key is named ada" in again.stderr and again.stderr.count("\n") == 1


def test_audit_verify(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    log = AuditLog(path)
    head = log.append("end", key="ada")
    log.append("end", key="bob")
    log.close()
    done = _run("audit", "verify", path, "--head", head)
    assert done.returncode == 0 and "2 records, whole" in done.stdout
    path.write_text(path.read_text().replace("ada", "eve"))
    done = _run("audit", "verify", path)
    assert done.returncode == 1 and "line 1: the record was changed" in done.stderr
    assert _run("audit", "verify", tmp_path / "none").returncode == 2


def test_manifest(tmp_path: Path) -> None:
    model = tmp_path / "model.gguf"
    model.write_bytes(b"GGUF and weights")
    assert _run("manifest", "keygen", tmp_path / "k.pem", tmp_path / "k.pub").returncode == 0
    made = _run("manifest", "create", model, "--sign", tmp_path / "k.pem")
    assert made.returncode == 0 and "signed" in made.stdout, made.stderr
    assert (tmp_path / "model.gguf.manifest.json").exists()
    checked = _run("manifest", "check", model, "--public-key", tmp_path / "k.pub")
    assert checked.returncode == 0 and "signature valid" in checked.stdout, checked.stderr
    model.write_bytes(b"GGUF and weighty")
    checked = _run("manifest", "check", model, "--json")
    assert checked.returncode == 1 and len(json.loads(checked.stdout)["differences"]) == 1
