"""What is to be shown beside llama.cpp, as rows: model, work, number of GPUs, what is asked of it; and their table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

UNITS = ("x of 1 GPU", "x", "tok/s", "s")


@dataclass(frozen=True)
class Test:
    """kind: `decode` of `number` sequences together, `prefill` of `number` tokens, `first_token` (seconds from the
    command, `number` tokens written). depth: tokens in every sequence's cache before."""

    kind: str
    number: int
    depth: int = 0

    @property
    def name(self) -> str:
        return f"{self.kind}:{self.number}" + (f"@{self.depth}" if self.depth else "")


def parse_test(text: str) -> Test:
    """From decode:4, decode:1@32768, prefill:512, first_token:1. Raises ValueError."""
    work, _, depth = text.strip().partition("@")
    kind, _, number = work.partition(":")
    deep = kind == "decode" and depth.isdigit() and int(depth) > 0
    known = kind in ("decode", "prefill", "first_token")
    if not known or not number.isdigit() or int(number) < 1 or ("@" in text and not deep):
        raise ValueError(f"--tests: {text!r} is not like decode:4, decode:1@32768 or prefill:512")
    return Test(kind, int(number), int(depth) if deep else 0)


@dataclass(frozen=True)
class Goal:
    """unit: "x" times llama.cpp's speed, "x of 1 GPU" times our own on one GPU, "tok/s", or "s" at most."""

    value: float
    unit: str

    @staticmethod
    def parse(text: str) -> Goal:
        number, _, unit = text.partition(" ")
        if unit not in UNITS:
            raise ValueError(f"goal {text!r}: the unit is one of {', '.join(UNITS)}")
        return Goal(float(number.replace(",", "")), unit)

    def __str__(self) -> str:
        return f"{self.value:,g} {self.unit}"

    def is_met(self, ours: float | None, theirs: float | None, single: float | None) -> bool | None:
        """None where a figure that it needs is missing. Figures are tokens a second, or seconds."""
        if self.unit in ("tok/s", "s"):
            against = 1.0
        else:
            against = (theirs if self.unit == "x" else single) or 0.0
        if not ours or not against:
            return None
        return ours <= self.value if self.unit == "s" else ours / against >= self.value


@dataclass(frozen=True)
class Row:
    """model: SHAPE-MIX of synthetic_model.py. kv: of the cache, "" for 16 bits. p2p: whether GPUs may use each other's
    memory. required, aim: what is asked for at least, and hoped for."""

    model: str
    test: Test
    ranks: int
    required: Goal | None = None
    aim: Goal | None = None
    kv: str = ""
    p2p: bool = True


def _row(model: str, test: str, ranks: int, required: str = "", aim: str = "", kv: str = "", p2p: bool = True) -> Row:
    required_goal, aim_goal = (Goal.parse(text) if text else None for text in (required, aim))
    return Row(model, parse_test(test), ranks, required_goal, aim_goal, kv, p2p)


_70B, _8B, _8B_BF16 = "llama3-70b-q4_k_m", "llama3-8b-q4_k_m", "llama3-8b-bf16"

PRESETS: dict[str, tuple[Row, ...]] = {
    "issue3": (
        _row(_70B, "decode:1", 1, "1.6 x", "1.9 x"),
        _row(_70B, "decode:1", 2, "1.85 x", "150 tok/s"),
        _row(_70B, "decode:1", 2, "1.55 x of 1 GPU", "1.7 x of 1 GPU"),
        _row(_70B, "first_token:1", 2, "20 s", "10 s"),
        _row(_70B, "decode:1@32768", 2, "1.8 x", "2.2 x", kv="q8"),
        _row(_8B, "decode:1", 1, "1.8 x", "2.3 x"),
        _row(_8B, "decode:1", 2, "2 x", "2.6 x"),
        _row(_8B_BF16, "decode:1", 1, "235 tok/s", "250 tok/s"),
        _row(_8B_BF16, "decode:1", 2, "340 tok/s", "390 tok/s"),
    ),
    "issue4": (
        _row(_70B, "prefill:4096", 1, "3 x", "5300 tok/s"),
        _row(_70B, "prefill:4096", 2, "3 x", "9800 tok/s"),
        _row(_70B, "decode:4", 2, "320 tok/s", "520 tok/s"),
        _row(_70B, "decode:16", 2, "1100 tok/s", "1800 tok/s"),
        _row(_70B, "decode:32", 2, "1900 tok/s", "2900 tok/s"),
        _row(_70B, "decode:1", 2, "1.7 x", "2 x", p2p=False),
        _row(_70B, "prefill:4096", 2, "2.5 x", "4 x", p2p=False),
        _row(_8B, "prefill:512", 1, "2 x", "20000 tok/s"),
        _row(_8B, "prefill:4096", 1, "2.5 x", "38000 tok/s"),
        _row(_8B_BF16, "prefill:4096", 1, "32000 tok/s", "39451 tok/s"),
        _row(_8B_BF16, "prefill:4096", 2, "52000 tok/s", "64430 tok/s"),
        _row(_8B_BF16, "decode:32", 1, "5000 tok/s", "5541 tok/s"),
        _row(_8B_BF16, "decode:32", 2, "7000 tok/s", "7525 tok/s"),
    ),
    "one_gpu": (  # what of the above one GPU can show, and the rest of it without a goal
        _row(_70B, "decode:1", 1, "1.6 x", "1.9 x"),
        _row(_70B, "prefill:4096", 1, "3 x", "5300 tok/s"),
        _row(_70B, "decode:4", 1),
        _row(_70B, "decode:16", 1),
        _row(_70B, "decode:32", 1),
        _row(_70B, "decode:1@32768", 1, kv="q8"),
        _row(_8B, "decode:1", 1, "1.8 x", "2.3 x"),
        _row(_8B, "prefill:512", 1, "2 x", "20000 tok/s"),
        _row(_8B, "prefill:4096", 1, "2.5 x", "38000 tok/s"),
        _row(_8B, "decode:4", 1),
        _row(_8B, "decode:32", 1),
        _row(_8B_BF16, "decode:1", 1, "235 tok/s", "250 tok/s"),
        _row(_8B_BF16, "prefill:4096", 1, "32000 tok/s", "39451 tok/s"),
        _row(_8B_BF16, "decode:32", 1, "5000 tok/s", "5541 tok/s"),
    ),
}


def table(report: dict[str, Any]) -> str:
    """Markdown, of peer_llama_cpp.py's report. Tokens a second (first_token: seconds) with the slowest and the fastest
    run; llama.cpp's by split mode."""

    def cell(speed: dict[str, Any] | None) -> str:
        return f"{speed['median']:,.1f} ({speed['slowest']:,.1f} to {speed['fastest']:,.1f})" if speed else "failed"

    def verdict(goal: dict[str, Any] | None) -> str:
        if goal is None:
            return ""
        return goal["goal"] + {True: ": met", False: ": missed", None: ": ?"}[goal["met"]]

    missing = "not run" if report["llama_cpp"] == "not run" else "failed"
    titles = ("test", "GPUs", "multitensor", "of floor", "llama.cpp", "ratio", "required", "aim")
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for row in report["results"]:
        theirs = "; ".join(f"-sm {mode} {cell(speed)}" for mode, speed in row["theirs"].items()) or missing
        floor = (row["ours"] or {}).get("details", {}).get("floor_percent")
        ratio = f"{row['ratio']:.2f}" if row["ratio"] else "-"
        ratio += f"; {row['over_one_gpu']:.2f} over one GPU" if row["over_one_gpu"] else ""
        name = f"{row['model']} {row['test']}" + f", {row['kv']}" * bool(row["kv"]) + ", no P2P" * (not row["p2p"])
        cells = (name, str(row["ranks"]), cell(row["ours"]), f"{floor:.0f}%" if floor else "", theirs, ratio)
        lines.append(f"| {' | '.join((*cells, verdict(row['required']), verdict(row['aim'])))} |")
    return "\n".join(lines)
