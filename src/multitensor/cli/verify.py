"""`multitensor verify`: the split model against the whole one, a layer at a time."""

from __future__ import annotations

import json
import math
import sys
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from multitensor.cli import options
from multitensor.cli.output import loading_bar, warn_of


def command(
    model: options.Model,
    tp: options.Tp = None,
    devices: options.Devices = None,
    ratio: options.Ratio = None,
    ctx: options.Ctx = None,
    dtype: options.Dtype = None,
    kv_type: options.KvType = None,
    p2p: options.P2p = None,
    experimental: options.Experimental = "",
    as_json: options.Json = False,
) -> None:
    """Check that MODEL, cut over ranks, computes what the whole MODEL computes.

    The whole model is streamed one layer at a time on one device, so this works for a model larger than one card.
    Prints the error of each layer, in exact float32 and as the engine runs, and the KL divergence of the logits. Exit
    code 1: out of tolerance; the first tensor that differs from the file, or is not finite, is named.
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
            p2p=p2p,
            experimental=options.names(experimental),
        )
    with llm:
        warn_of(llm.warnings)
        report = llm.verify()
    if as_json:
        typer.echo(json.dumps(report))
    else:
        _print(report)
    if not report["ok"]:
        sys.exit(1)


def _print(report: dict[str, Any]) -> None:
    """The errors of each layer, then every figure that is judged: its arithmetic, its tolerance, its verdict."""
    console = Console(highlight=False, soft_wrap=True)
    table = Table("layer", "exact float32", "as the engine runs", title="Largest relative error")
    for entry in report["layers"]:
        table.add_row(str(entry["layer"]), _error(entry["error"]), _error(entry["run_error"]))
    console.print(table)
    worst = max(report["layers"], key=lambda entry: entry["error"])
    exact = {f"layer {worst['layer']}": worst["error"], "embedding": report["embedding_error"]}
    exact |= {"output norm": report["output_norm_error"], "output matrix": report["lm_head_error"]}
    _judge(console, "exact float32, resident weights", exact, report["tolerance"])
    worst = max(report["layers"], key=lambda entry: entry["run_error"])
    _judge(console, "as the engine runs", {f"layer {worst['layer']}": worst["run_error"]}, report["run_tolerance"])
    worst = max(report["layers"], key=lambda entry: entry["cache_error"])
    kept = {f"layer {worst['layer']}": worst["cache_error"]}
    _judge(console, "keys and values in the cache", kept, report["cache_tolerance"])
    _judge(console, "logits as the engine runs", {"mean KL in nats": report["kl_mean"]}, report["kl_tolerance"])
    console.print(f"the engine runs with {report['arithmetic']}")
    if report["kl_mean"] is None:
        console.print("largest KL and top-1 agreement: not available, the logits are not finite")
    else:
        console.print(f"largest KL {report['kl_max']:.2e}, top-1 agreement {report['top1_agreement']:.1%}")
    console.print("ok" if report["ok"] else f"FAILED: {_cause(report)}")


def _error(value: float | None) -> str:
    if value is None:
        return "not available"
    return f"{value:.2e}" if value < 1e30 else "not finite"


def _judge(console: Console, what: str, errors: dict[str, float | None], tolerance: float) -> None:
    """One line: the worst of the errors and how it stands to the tolerance."""
    where = max(errors, key=lambda name: math.inf if errors[name] is None else errors[name] or 0.0)
    value = errors[where]
    verdict = "ok" if value is not None and value <= tolerance else "FAILED"
    console.print(f"{what}: {_error(value)} ({where}), tolerance {tolerance:.1e}: {verdict}")


def _cause(report: dict[str, Any]) -> str:
    if report["first_bad_tensor"]:
        return f"{report['first_bad_tensor']} on rank {report['first_bad_rank']} is not what the file holds"
    if report["not_finite_tensor"]:
        return f"not finite: {report['not_finite_tensor']} holds NaN or infinity in the file itself"
    if report["kl_mean"] is None:
        return "values are not finite, though all weights are"
    return "every weight is what the file holds, so the computation differs"
