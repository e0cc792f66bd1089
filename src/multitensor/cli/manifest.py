"""`multitensor manifest`: are these the bytes that somebody vouched for? Works offline."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from multitensor.cli import options
from multitensor.errors import CheckFailed

app = typer.Typer(no_args_is_help=True, help="Make and check SHA-256 manifests of models, signed if you like.")

ManifestFile = Annotated[
    Path | None,
    typer.Option(
        "--manifest",
        "-m",
        help="Default: beside the file, or multitensor-manifest.json in the folder.",
        show_default=False,
    ),
]


@app.command("create")
def create(
    model: options.Model,
    manifest: ManifestFile = None,
    sign_with: Annotated[
        Path | None, typer.Option("--sign", help="An Ed25519 private key (PEM); see `keygen`.", show_default=False)
    ] = None,
) -> None:
    """Hash every file of MODEL (all parts of a split GGUF, all files of a folder) and write the manifest."""
    from multitensor.server.manifest import make_manifest, manifest_path, read_private_key, sign, write_manifest

    key = None if sign_with is None else read_private_key(sign_with)
    with _hashing_bar(Path(model)) as progress:
        made = make_manifest(model, progress)
    if key is not None:
        made = sign(made, key)
    target = manifest or manifest_path(Path(model))
    write_manifest(target, made)
    typer.echo(f"{target}: {len(made['files'])} file(s), digest {made['digest']}{', signed' if key else ''}")


@app.command("check")
def check(
    model: options.Model,
    manifest: ManifestFile = None,
    public_key: Annotated[
        Path | None, typer.Option(help="Also check the signature, by this Ed25519 key (PEM).", show_default=False)
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Compare MODEL with its manifest. Exit code 1 when a file is changed, missing or new, or the signature wrong."""
    from multitensor.server.manifest import check_manifest, manifest_path, read_manifest, read_public_key, verify

    source = manifest or manifest_path(Path(model))
    known = read_manifest(source)
    if public_key is not None:
        verify(known, read_public_key(public_key))
    with _hashing_bar(Path(model)) as progress:
        differences = check_manifest(model, known, progress)
    if as_json:
        result = {"digest": known["digest"], "differences": differences, "signature_checked": public_key is not None}
        typer.echo(json.dumps(result))
    elif not differences:
        signed = ", signature valid" if public_key else ""
        typer.echo(f"{model}: {len(known['files'])} file(s) as in {source}{signed}")
    else:
        for difference in differences:
            typer.echo(difference)
    if differences:
        raise CheckFailed(f"{model}: {len(differences)} difference(s) from {source}")


@app.command("keygen")
def keygen(
    private: Annotated[Path, typer.Argument(help="Keep this file to yourself.", show_default=False)],
    public: Annotated[Path, typer.Argument(help="Give this file to whoever checks.", show_default=False)],
) -> None:
    """Make an Ed25519 key pair for signing manifests."""
    from multitensor.server.manifest import make_key_files

    make_key_files(private, public)
    typer.echo(f"private key {private}, public key {public}")


@contextmanager
def _hashing_bar(model: Path) -> Iterator[Callable[[int], None] | None]:
    """A bar over bytes on stderr when somebody watches; else None."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    from multitensor.cli.output import stderr_console
    from multitensor.server.manifest import model_files

    console = stderr_console()
    if not console.is_terminal or not model.exists():
        yield None
        return
    folder, names = model_files(model)
    total = sum((folder / name).stat().st_size for name in names if (folder / name).exists())
    columns = (TextColumn("hashing"), BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("hash", total=total)
        yield lambda count: bar.advance(task, count)
