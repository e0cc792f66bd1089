"""Options that several commands take, declared once."""

from __future__ import annotations

from typing import Annotated

import typer

from multitensor.config import EXPERIMENTS

Model = Annotated[str, typer.Argument(help="A .gguf file or a Hugging Face folder.", show_default=False)]
Tp = Annotated[
    int | None,
    typer.Option("--tp", help="Tensor parallel ranks. Default: every GPU found, or one CPU rank.", show_default=False),
]
Devices = Annotated[
    str | None,
    typer.Option(
        help="One rank a device: cpu:2 (two CPU ranks), cuda:0,cuda:1=24GiB (a memory cap). `plan` also takes bare "
        "sizes: 24GiB,24GiB,12GiB.",
        show_default=False,
    ),
]
Ratio = Annotated[
    str | None,
    typer.Option(help="Share of each rank, as 3,1. Default: equal, or by memory where it differs.", show_default=False),
]
Ctx = Annotated[
    int | None,
    typer.Option("--ctx", help="Context in tokens. Default: the model's own, or what fits.", show_default=False),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        help="auto, float32, float16, bfloat16. float32 is the exact mode: no activation is rounded to 8 bits.",
        show_default=False,
    ),
]
KvType = Annotated[
    str | None,
    typer.Option("--kv-type", help="KV cache's type: auto, f32, f16, bf16, q8, q4.", show_default=False),
]
P2p = Annotated[
    bool | None,
    typer.Option(
        "--p2p/--no-p2p",
        help="Whether GPUs may use each other's memory. Default: where a probe finds that it works. Elsewhere sums go "
        "through the host's memory or NCCL, whichever is faster.",
        show_default=False,
    ),
]
Chunk = Annotated[
    int | None,
    typer.Option(
        "--chunk",
        help="Tokens of prompts in one step at most. Default: 4096 on GPUs with room for it, else 2048; 512 on CPUs. "
        "With more, long prompts are read faster where nothing is being written, and less memory is left.",
        min=1,
        show_default=False,
    ),
]
Overlap = Annotated[
    bool,
    typer.Option(
        "--overlap",
        help="Several GPUs: sums over them travel while a long prompt's products are computed. Not yet measured.",
    ),
]
Experimental = Annotated[
    str,
    typer.Option(
        metavar="NAMES",
        help="Ways that may be faster and have not run on several GPUs yet, to be tried, by comma: "
        + ", ".join(EXPERIMENTS)
        + ". Any other name tells what each does.",
        show_default=False,
    ),
]
StepTimeout = Annotated[
    float | None,
    typer.Option(
        "--step-timeout",
        metavar="SECONDS",
        help="Ranks that do not answer to a step for so long are ended, and `serve` starts them again; 0: never. "
        "Compiling kernels at their first use counts. Loading may go five times as long, and 300 s at least, without "
        "any progress. Default: 120 on GPUs, 600 and more on CPUs.",
        min=0,
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]


def names(text: str) -> tuple[str, ...]:
    """'a, b' -> ('a', 'b')."""
    return tuple(name for part in text.split(",") if (name := part.strip()))
