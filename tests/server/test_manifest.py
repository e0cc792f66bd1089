"""Manifests: every changed byte shows; a signature is by the key that the checker trusts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from multitensor.errors import CheckFailed, InputError
from multitensor.server import manifest as m


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = tmp_path / "model"
    (model / "sub").mkdir(parents=True)
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(bytes(range(256)) * 40_000)
    (model / "sub" / "vocabulary.txt").write_text("words")
    (model / ".cache").mkdir()
    (model / ".cache" / "junk").write_text("not part of it")
    return model


def test_a_folder_is_listed_with_the_hashes_that_hashlib_gives(folder: Path) -> None:
    made = m.make_manifest(folder)
    assert [entry["path"] for entry in made["files"]] == ["config.json", "model.safetensors", "sub/vocabulary.txt"]
    for entry in made["files"]:
        data = (folder / entry["path"]).read_bytes()
        assert (entry["bytes"], entry["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
    m.write_manifest(m.manifest_path(folder), made)
    assert m.make_manifest(folder) == made, "the manifest is not part of the model"
    assert m.check_manifest(folder, m.read_manifest(m.manifest_path(folder))) == []


def test_changed_missing_and_new_files_are_told(folder: Path) -> None:
    made = m.make_manifest(folder)
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[5_000_000] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    (folder / "config.json").write_text("{ }")
    (folder / "sub" / "vocabulary.txt").unlink()
    (folder / "evil.py").write_text("new")
    differences = "\n".join(sorted(m.check_manifest(folder, made)))
    assert differences.count("\n") == 3
    for part in ("evil.py: in the model", "vocabulary.txt: missing", "config.json: 3 bytes, not 2", "have changed"):
        assert part in differences


def test_a_split_gguf_is_all_its_parts(tmp_path: Path) -> None:
    for part in (1, 2):
        (tmp_path / f"big-{part:05d}-of-00002.gguf").write_bytes(b"GGUF" + bytes([part]))
    (tmp_path / "other.gguf").write_bytes(b"GGUF")
    first = tmp_path / "big-00001-of-00002.gguf"
    made = m.make_manifest(first)
    assert [entry["path"] for entry in made["files"]] == ["big-00001-of-00002.gguf", "big-00002-of-00002.gguf"]
    (tmp_path / "big-00002-of-00002.gguf").unlink()
    assert m.check_manifest(first, made) == ["big-00002-of-00002.gguf: missing"]
    with pytest.raises(InputError, match="00002"):
        m.make_manifest(first)
    assert m.check_manifest(tmp_path / "other.gguf", m.make_manifest(tmp_path / "other.gguf")) == []


def test_signatures(folder: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        m.make_key_files(tmp_path / f"{name}.pem", tmp_path / f"{name}.pub")
    assert (tmp_path / "a.pem").stat().st_mode & 0o777 == 0o600
    with pytest.raises(InputError, match="File exists"):
        m.make_key_files(tmp_path / "a.pem", tmp_path / "c.pub")
    ours, theirs = m.read_public_key(tmp_path / "a.pub"), m.read_public_key(tmp_path / "b.pub")
    plain = m.make_manifest(folder)
    with pytest.raises(CheckFailed, match="not signed"):
        m.verify(plain, ours)
    signed = json.loads(json.dumps(m.sign(plain, m.read_private_key(tmp_path / "a.pem"))))
    m.verify(signed, ours)
    with pytest.raises(CheckFailed, match="not by this key"):
        m.verify(signed, theirs)
    changed = json.loads(json.dumps(signed))
    changed["files"][0]["sha256"] = "0" * 64
    changed["digest"] = m.files_digest(changed["files"])
    with pytest.raises(CheckFailed, match="was changed"):
        m.verify(changed, ours)
    forged = m.sign(plain, m.read_private_key(tmp_path / "b.pem"))  # names its own key, which nobody trusts
    with pytest.raises(CheckFailed):
        m.verify(forged, ours)
    with pytest.raises(CheckFailed):
        m.verify({**signed, "signature": {"value": "no base64!"}}, ours)
    with pytest.raises(InputError, match="PEM key"):
        m.read_private_key(folder / "config.json")


@pytest.mark.parametrize("path", ["../secret", "/etc/passwd", "a/../../b", "a//b", "./a"])
def test_paths_out_of_the_model_are_refused(folder: Path, path: str) -> None:
    made = m.make_manifest(folder)
    made["files"][0]["path"] = path
    made["digest"] = m.files_digest(made["files"])
    with pytest.raises(InputError, match="no plain path"):
        m.check_manifest(folder, made)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": "multitensor-manifest-1", "files": []}', "[" * 100_000])
def test_what_is_no_manifest_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(InputError):
        m.read_manifest(path)


def test_an_edited_list_does_not_match_its_digest(folder: Path) -> None:
    made = m.make_manifest(folder)
    made["files"].pop()
    with pytest.raises(InputError, match="changed by hand"):
        m.check_manifest(folder, made)


def test_digest_for_the_audit_log(folder: Path) -> None:
    before, warning = m.model_digest(folder)
    assert before.startswith("fingerprint:") and warning is None
    (folder / "config.json").write_text("{ }")
    assert m.model_digest(folder)[0] != before
    made = m.make_manifest(folder)
    m.write_manifest(m.manifest_path(folder), made)
    assert m.model_digest(folder) == (f"sha256:{made['digest']}", None)


def _grow(folder: Path) -> None:
    (folder / "config.json").write_text("{  }")


def _lose(folder: Path) -> None:
    (folder / "sub" / "vocabulary.txt").unlink()


def _gain(folder: Path) -> None:
    (folder / "new.json").write_text("{}")


def _spoil(folder: Path) -> None:
    m.manifest_path(folder).write_text("{")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_grow, "config.json has 4 bytes, not 2"),
        (_lose, "vocabulary.txt is missing"),
        (_gain, "new.json is not in it"),
        (_spoil, "not JSON"),
    ],
)
def test_a_manifest_that_cannot_be_the_models_gives_no_digest(
    folder: Path, change: Callable[[Path], None], said: str
) -> None:
    m.write_manifest(m.manifest_path(folder), m.make_manifest(folder))
    change(folder)
    digest, warning = m.model_digest(folder)
    assert digest.startswith("fingerprint:") and warning is not None and said in warning
    assert warning.count("\n") == 0


def test_files_behind_linked_folders_are_listed_and_circles_end(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "blobs" / "deep").mkdir(parents=True)
    (tmp_path / "blobs" / "deep" / "weights.bin").write_bytes(b"1")
    (folder / "linked").symlink_to(tmp_path / "blobs")
    (folder / "again").symlink_to(tmp_path / "blobs" / "deep")
    (folder / "sub" / "circle").symlink_to(folder)
    (tmp_path / "blobs" / "circle").symlink_to(tmp_path / "blobs")
    made = m.make_manifest(folder)
    paths = [entry["path"] for entry in made["files"]]
    assert [path for path in paths if "weights" in path] == ["again/weights.bin", "linked/deep/weights.bin"]
    assert len(paths) == 5
    (tmp_path / "blobs" / "deep" / "weights.bin").write_bytes(b"2")
    assert len(m.check_manifest(folder, made)) == 2


@pytest.mark.parametrize("there", ["private.pem", "public.pem"])
def test_a_pair_of_keys_is_made_whole_or_not_at_all(tmp_path: Path, there: str) -> None:
    (tmp_path / there).write_text("mine")
    with pytest.raises(InputError, match=there):
        m.make_key_files(tmp_path / "private.pem", tmp_path / "public.pem")
    assert [path.name for path in tmp_path.iterdir()] == [there] and (tmp_path / there).read_text() == "mine"
