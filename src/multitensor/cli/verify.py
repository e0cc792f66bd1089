"""`multitensor verify`: the split model against the whole one, a layer at a time."""

from __future__ import annotations

import json
import sys

import typer
from rich.console import Console
from rich.table import Table

from multitensor.cli import options
from multitensor.cli.output import loading_bar, warn


def command(
    model: options.Model,
    tp: options.Tp = None,
    devices: options.Devices = None,
    ratio: options.Ratio = None,
    ctx: options.Ctx = None,
    dtype: options.Dtype = None,
    kv_type: options.KvType = None,
    as_json: options.Json = False,
) -> None:
    """Check that MODEL, cut over ranks, computes what the whole MODEL computes.

    The whole model is streamed one layer at a time on one device, so this works for a model larger than one card.
    Prints the error of each layer and the KL divergence of the logits. Exit code 1: out of tolerance; the first
    tensor that disagrees is named.
    """
    from multitensor import LLM

    with loading_bar(quiet=as_json) as progress:
        llm = LLM._open(
            model,
            progress=progress,
            tensor_parallel_size=tp,
            devices=devices,
            ratio=ratio,
            max_model_len=ctx,
            dtype=dtype,
            kv_type=kv_type,
        )
    with llm:
        for warning in llm.plan.warnings:
            warn(warning)
        report = llm.verify()
    if as_json:
        typer.echo(json.dumps(report))
    else:
        _print(report)
    if not report["ok"]:
        sys.exit(1)


def _print(report: dict) -> None:
    console = Console(highlight=False)
    table = Table("layer", "largest relative error")
    for entry in report["layers"]:
        table.add_row(str(entry["layer"]), f"{entry['error']:.2e}")
    console.print(table)
    console.print(
        f"logits: mean KL {report['kl_mean']:.2e}, largest {report['kl_max']:.2e}, "
        f"top-1 agreement {report['top1_agreement']:.1%}"
    )
    if report["ok"]:
        console.print(f"ok: every layer within {report['tolerance']:.0e}")
        return
    where = report.get("first_bad_tensor")
    rank = report.get("first_bad_rank")
    console.print(f"FAILED (tolerance {report['tolerance']:.0e})" + (f": {where} on rank {rank}" if where else ""))
