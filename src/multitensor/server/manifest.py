"""Manifests: the SHA-256 of every file of a model, and an Ed25519 signature over them, so that a copy can be checked
on a machine that is connected to nothing."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from multitensor.errors import CheckFailed, InputError

FORMAT = "multitensor-manifest-1"
FOLDER_MANIFEST = "multitensor-manifest.json"
CHUNK = 4 << 20
_SPLIT = re.compile(r"(.*)-\d{5}-of-(\d{5})\.gguf")  # the naming of split GGUF files
_HEX = re.compile(r"[0-9a-f]{64}")

Progress = Callable[[int], None]  # called with the bytes hashed since the last call


def manifest_path(model: Path) -> Path:
    """Where a model's manifest lies unless told otherwise: in its folder, or beside its (first) file."""
    return model / FOLDER_MANIFEST if model.is_dir() else model.with_name(f"{model.name}.manifest.json")


def model_files(model: Path) -> tuple[Path, list[str]]:
    """(folder, paths within it): all files of a folder but hidden ones and its manifest; of a split GGUF every part."""
    if model.is_dir():
        return model, sorted(name for name in _walk(model, "", ()) if name != FOLDER_MANIFEST)
    split = _SPLIT.fullmatch(model.name)
    if split is None:
        return model.parent, [model.name]
    stem, total = split[1], int(split[2])
    return model.parent, [f"{stem}-{part:05d}-of-{total:05d}.gguf" for part in range(1, total + 1)]


def _walk(folder: Path, prefix: str, above: tuple[Path, ...]) -> Iterator[str]:
    """All files but hidden ones, links to folders followed as a loader would; above: the real folders that lead here,
    into which a link leads in a circle."""
    above = (*above, folder.resolve())
    for entry in os.scandir(folder):
        if entry.name.startswith("."):
            continue
        if not entry.is_dir():
            yield prefix + entry.name
        elif (inner := Path(entry.path)).resolve() not in above:
            yield from _walk(inner, f"{prefix}{entry.name}/", above)


def make_manifest(model: str | os.PathLike[str], progress: Progress | None = None) -> dict[str, Any]:
    """{"format", "files": [{"path", "bytes", "sha256"}], "digest"}; digest: SHA-256 over the files' entries.

    Raises InputError for a model that is not there or has no files."""
    path = Path(model)
    if not path.exists():
        raise InputError(f"{path}: there is no such file or folder")
    folder, names = model_files(path)
    if not names:
        raise InputError(f"{path}: the folder has no files")
    files = _hash_all(folder, names, progress)
    return {"format": FORMAT, "files": files, "digest": files_digest(files)}


def check_manifest(
    model: str | os.PathLike[str], manifest: Mapping[str, Any], progress: Progress | None = None
) -> list[str]:
    """What differs, one line each; empty when every file is there, unchanged, and no file is there besides.

    Raises InputError when the manifest is not one."""
    files = _checked(manifest)
    folder, present = model_files(Path(model))
    listed = {entry["path"]: entry for entry in files}
    differences = [f"{name}: in the model, but not in the manifest" for name in present if name not in listed]
    readable = []
    for name, entry in listed.items():
        target = folder / name
        if not target.is_file():
            differences.append(f"{name}: missing")
        elif target.stat().st_size != entry["bytes"]:
            differences.append(f"{name}: {target.stat().st_size} bytes, not {entry['bytes']}")
        else:
            readable.append(name)
    differences += [
        f"{found['path']}: its bytes have changed (SHA-256 {found['sha256'][:16]}..., "
        f"not {listed[found['path']]['sha256'][:16]}...)"
        for found in _hash_all(folder, readable, progress)
        if found["sha256"] != listed[found["path"]]["sha256"]
    ]
    return differences


def files_digest(files: list[dict[str, Any]]) -> str:
    """One hash that stands for all files: names, sizes and contents."""
    return hashlib.sha256(_canonical(files)).hexdigest()


def model_digest(model: str | os.PathLike[str]) -> tuple[str, str | None]:
    """What an audit log may call the model, and a warning if a manifest lies beside it that cannot be its: "sha256:..."
    of the manifest where one lists files of these names and sizes; else "fingerprint:...", over names, sizes, and each
    file's first and last MiB, which takes no time. Neither reads all the weights: `check_manifest` does."""
    path = Path(model)
    source = manifest_path(path)
    fingerprint = _fingerprint(*model_files(path))
    if not source.exists():
        return fingerprint, None
    try:
        manifest = read_manifest(source)
        difference = _size_difference(path, manifest["files"])
    except InputError as error:
        difference = str(error)
    if difference is None:
        return f"sha256:{manifest['digest']}", None
    told = f"{source} is not this model's ({difference}), so the audit log names it by a fingerprint instead"
    return fingerprint, f"{told}; see `multitensor manifest check`"


def _size_difference(model: Path, files: list[dict[str, Any]]) -> str | None:
    """The first file that is missing, new, or of another size than the manifest's."""
    folder, present = model_files(model)
    listed = {entry["path"]: entry["bytes"] for entry in files}
    for name in sorted(listed.keys() | set(present)):
        if name not in listed:
            return f"{name} is not in it"
        if name not in present or not (folder / name).is_file():
            return f"{name} is missing"
        if (size := (folder / name).stat().st_size) != listed[name]:
            return f"{name} has {size} bytes, not {listed[name]}"
    return None


def _fingerprint(folder: Path, names: list[str]) -> str:
    digest = hashlib.sha256()
    for name in names:
        try:
            size = (folder / name).stat().st_size
            with open(folder / name, "rb") as file:
                digest.update(_canonical([name, size]) + file.read(1 << 20))
                file.seek(max(0, size - (1 << 20)))
                digest.update(file.read(1 << 20))
        except OSError as error:
            raise InputError(f"{folder / name}: cannot read: {error.strerror}") from error
    return f"fingerprint:{digest.hexdigest()}"


def sign(manifest: Mapping[str, Any], private_key: Ed25519PrivateKey) -> dict[str, Any]:
    """The manifest with a "signature" over its format and files, in place of any it had."""
    public = private_key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
    signature = {
        "algorithm": "ed25519",
        "public_key": base64.b64encode(public).decode(),
        "value": base64.b64encode(private_key.sign(_signed_bytes(manifest))).decode(),
    }
    return {**manifest, "signature": signature}


def verify(manifest: Mapping[str, Any], public_key: Ed25519PublicKey) -> None:
    """Raises CheckFailed unless the manifest is signed by this key. The key that the manifest itself names is not
    believed: anybody could have put it there."""
    signature = manifest.get("signature")
    if not isinstance(signature, Mapping):
        raise CheckFailed("the manifest is not signed")
    _checked(manifest)
    try:
        value = base64.b64decode(str(signature.get("value")), validate=True)
        public_key.verify(value, _signed_bytes(manifest))
    except (InvalidSignature, ValueError) as error:
        raise CheckFailed("the manifest's signature is not by this key, or the manifest was changed since") from error


def read_manifest(path: Path) -> dict[str, Any]:
    """Raises InputError when it cannot be read or is not a manifest."""
    try:
        manifest = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot read the manifest: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not a manifest: not JSON") from error
    _checked(manifest)
    return manifest


def write_manifest(path: Path, manifest: Mapping[str, Any]) -> None:
    try:
        path.write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", "utf-8")
    except OSError as error:
        raise InputError(f"{path}: cannot write the manifest: {error.strerror}") from error


def make_key_files(private: Path, public: Path) -> None:
    """A new Ed25519 pair as PEM files, both or neither; the private one mode 0600. Raises InputError rather than
    replace a file."""
    key = Ed25519PrivateKey.generate()
    pems = (
        (private, 0o600, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())),
        (public, 0o644, key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)),
    )
    made: list[Path] = []
    for path, mode, pem in pems:
        try:
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
            made.append(path)
            with os.fdopen(handle, "wb") as file:
                file.write(pem)
        except OSError as error:
            for each in made:
                each.unlink(missing_ok=True)
            raise InputError(f"{path}: cannot make this file: {error.strerror}") from error


def read_private_key(path: Path) -> Ed25519PrivateKey:
    key = _load(path, lambda data: load_pem_private_key(data, None))
    if not isinstance(key, Ed25519PrivateKey):
        raise InputError(f"{path}: not an Ed25519 private key")
    return key


def read_public_key(path: Path) -> Ed25519PublicKey:
    key = _load(path, load_pem_public_key)
    if not isinstance(key, Ed25519PublicKey):
        raise InputError(f"{path}: not an Ed25519 public key")
    return key


def _load(path: Path, load: Callable[[bytes], Any]) -> Any:
    try:
        return load(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path}: cannot read the key: {error.strerror}") from error
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:  # TypeError: it is encrypted
        raise InputError(f"{path}: not an unencrypted PEM key of the kind needed") from error


def _signed_bytes(manifest: Mapping[str, Any]) -> bytes:
    return _canonical({"format": manifest["format"], "files": manifest["files"]})


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode("ascii")


def _hash_all(folder: Path, names: list[str], progress: Progress | None) -> list[dict[str, Any]]:
    """Several files at a time: hashing releases the interpreter, and disks like to be asked for more than one thing."""
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        return list(pool.map(lambda name: _hash(folder, name, progress), names))


def _hash(folder: Path, name: str, progress: Progress | None) -> dict[str, Any]:
    digest = hashlib.sha256()
    size = 0
    try:
        with open(folder / name, "rb", buffering=0) as file:
            while chunk := file.read(CHUNK):
                digest.update(chunk)
                size += len(chunk)
                if progress is not None:
                    progress(len(chunk))
    except OSError as error:
        raise InputError(f"{folder / name}: cannot read: {error.strerror}") from error
    return {"path": name, "bytes": size, "sha256": digest.hexdigest()}


def _checked(manifest: Any) -> list[dict[str, Any]]:
    """The files' entries. Paths that would leave the model's folder are refused: a manifest comes from elsewhere."""
    if not isinstance(manifest, Mapping) or manifest.get("format") != FORMAT:
        raise InputError(f"not a manifest of the format {FORMAT}")
    files = manifest.get("files")
    if not isinstance(files, list) or not files:
        raise InputError("the manifest lists no files")
    seen = set()
    for entry in files:
        if (
            not isinstance(entry, Mapping)
            or set(entry) != {"path", "bytes", "sha256"}
            or not isinstance(entry["path"], str)
            or type(entry["bytes"]) is not int
            or not _HEX.fullmatch(str(entry["sha256"]))
        ):
            raise InputError("the manifest has an entry that is not a file's path, bytes and sha256")
        path = PurePosixPath(entry["path"])
        if path.is_absolute() or ".." in path.parts or path.as_posix() != entry["path"] or entry["path"] in seen:
            raise InputError(f"the manifest lists {entry['path']!r}, which is no plain path inside the model, or twice")
        seen.add(entry["path"])
    if manifest.get("digest") != files_digest(files):
        raise InputError("the manifest's digest does not match its files: it was changed by hand")
    return files
