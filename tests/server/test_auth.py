"""API keys: hashed, named, compared whole, revoked while the server runs."""

from __future__ import annotations

import hmac
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from multitensor.errors import InputError
from multitensor.server import auth
from multitensor.server.auth import ANONYMOUS, AuthError, KeyStore, add_key, authenticate, new_key, revoke_key


def _add(path: Path, name: str, **limits: int) -> str:
    key, secret = new_key(name, **limits)
    add_key(path, key)
    return secret


def test_a_key_is_known_by_its_secret_and_the_file_holds_only_its_hash(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    secret = _add(path, "ada", requests_per_minute=3, tokens_per_minute=500, streams=2)
    other = _add(path, "bob")
    text = path.read_text()
    assert secret not in text and other not in text and "ada sha256:" in text
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    store = KeyStore.load(path)
    found = store.check(f"Bearer {secret}")
    assert found is not None
    assert (found.name, found.requests_per_minute, found.tokens_per_minute, found.streams) == ("ada", 3, 500, 2)
    assert store.check(f"bearer  {other} ").name == "bob"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "Bearer",
        "Bearer ",
        "Basic YTpi",
        "mt-nonsense",
        "Bearer mt-nonsense",
        "Bearer \udcff",
        "Bearer " + "x" * 9999,
    ],
)
def test_other_headers_are_nobody(tmp_path: Path, header: str | None) -> None:
    path = tmp_path / "keys"
    _add(path, "ada")
    store = KeyStore.load(path)
    assert store.check(header) is None
    with pytest.raises(AuthError) as caught:
        authenticate(store, header)
    assert str(path) not in str(caught.value)


def test_without_a_file_everybody_is_anonymous() -> None:
    assert authenticate(None, None) is ANONYMOUS
    assert authenticate(None, "Bearer anything") is ANONYMOUS


def test_every_key_is_compared_whichever_matches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "keys"
    secrets = [_add(path, name) for name in ("a", "b", "c")]
    store = KeyStore.load(path)
    compared: list[bytes] = []
    whole_compare = hmac.compare_digest

    def compare(left: bytes, right: bytes) -> bool:
        compared.append(left)
        return whole_compare(left, right)

    monkeypatch.setattr(auth.hmac, "compare_digest", compare)
    for secret in (*secrets, "mt-unknown"):
        compared.clear()
        store.check(f"Bearer {secret}")
        assert len(compared) == 3


def test_keys_are_revoked_and_added_without_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    ada, bob = _add(path, "ada"), _add(path, "bob")
    store = KeyStore.load(path)
    revoke_key(path, "ada")
    assert store.check(f"Bearer {ada}") is None
    assert store.check(f"Bearer {bob}") is not None
    eve = _add(path, "eve")
    assert store.check(f"Bearer {eve}") is not None
    path.unlink()
    assert store.check(f"Bearer {bob}") is None, "a file that vanished leaves no key valid"


def test_a_line_that_goes_bad_locks_out_only_its_own_key(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    ada, bob = _add(path, "ada"), _add(path, "bob")
    store = KeyStore.load(path)
    path.write_text(path.read_text().replace("ada sha256:", "ada sha25:"))
    assert store.check(f"Bearer {ada}") is None
    assert store.check(f"Bearer {bob}") is not None
    with pytest.raises(InputError, match="line 2"):
        KeyStore.load(path)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("ada", "sha256"),
        ("ada sha256:abc", "64"),
        (f"anonymous sha256:{'0' * 64}", "anonymous"),
        (f"a/b sha256:{'0' * 64}", "letters"),
        (f"ada sha256:{'0' * 64} streams=0", "from 1 up"),
        (f"ada sha256:{'0' * 64} streams=²", "from 1 up"),
        (f"ada sha256:{'0' * 64} colour=3", "colour"),
        (f"ada sha256:{'0' * 64} streams=1 streams=2", "once"),
        (f"ada sha256:{'0' * 64}\nada sha256:{'1' * 64}", "twice"),
    ],
)
def test_a_bad_file_is_refused_at_the_start(tmp_path: Path, line: str, reason: str) -> None:
    path = tmp_path / "keys"
    path.write_text(line + "\n")
    with pytest.raises(InputError, match=reason):
        KeyStore.load(path)


def test_a_file_that_everybody_may_write_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    _add(path, "ada")
    os.chmod(path, 0o666)
    with pytest.raises(InputError, match="chmod 600"):
        KeyStore.load(path)


_ADD = """
import sys
from pathlib import Path
from multitensor.server.auth import add_key, new_key, revoke_key
path, name = Path(sys.argv[1]), sys.argv[2]
print("ready", flush=True)
sys.stdin.readline()
for turn in range(12):
    add_key(path, new_key(f"{name}-{turn}")[0])
revoke_key(path, f"old-{name}")
"""


def test_keys_that_are_added_and_revoked_at_the_same_time_are_not_lost(tmp_path: Path) -> None:
    """By several processes."""
    path = tmp_path / "keys"
    names = ["ann", "bob", "eve"]
    for name in names:
        _add(path, f"old-{name}")
    command = [sys.executable, "-c", _ADD, str(path)]
    pipe = subprocess.PIPE
    processes = [subprocess.Popen([*command, name], stdin=pipe, stdout=pipe, text=True) for name in names]
    for process in processes:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        process.communicate(timeout=30)
    assert [process.returncode for process in processes] == [0] * len(names)
    assert {key.name for key in auth.read_keys(path)} == {f"{name}-{turn}" for name in names for turn in range(12)}


def test_names_are_unique_and_comments_survive(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("# our keys\n")
    _add(path, "ada")
    with pytest.raises(InputError, match="ada exists"):
        _add(path, "ada")
    with pytest.raises(InputError, match="no key is named bob"):
        revoke_key(path, "bob")
    revoke_key(path, "ada")
    assert path.read_text() == "# our keys\n"
    with pytest.raises(InputError, match="at least 1"):
        new_key("ada", streams=0)
