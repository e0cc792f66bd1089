"""Large sums through the host's memory on real GPUs, in processes of their own: a wait in vain ends its process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rank_processes import answers, write_two_layers

from multitensor import LLM, SamplingParams

RANKS = "host_sum_ranks.py"


@pytest.mark.gpu
@pytest.mark.parametrize("maths", ["kernels", "torch"])
@pytest.mark.parametrize("wire", ["exact", "q8"])
@pytest.mark.parametrize("size", [2, 3, 5])
def test_ranks_on_one_gpu(size: int, wire: str, maths: str) -> None:
    (report,) = answers(RANKS, ("together", size, wire, maths))
    assert not report["wrong"], report["wrong"][:10]


@pytest.mark.gpu2
@pytest.mark.parametrize("wire", ["exact", "q8"])
def test_two_gpus(tmp_path: Path, wire: str) -> None:
    """The group's own trial and times, then sums of all types and sizes beside products."""
    reports = answers(RANKS, *(("rank", rank, 2, tmp_path / "store", wire) for rank in range(2)))
    for report in reports:
        print({key: report[key] for key in ("seconds", "why", "reductions")})
        assert not report["wrong"], report["wrong"][:10]
        assert report["reductions"]["large_why"] in (None, "NCCL is faster here")
    assert reports[0]["digest"] == reports[1]["digest"], "the ranks' bits differ"
    assert set(reports[0]["reductions"]["large_microseconds"]) == {"128", "512", "2048"}


@pytest.mark.gpu2
def test_a_rank_that_is_gone_is_an_error_and_no_hang(tmp_path: Path) -> None:
    first, last = answers(RANKS, *(("dies", rank, 2, tmp_path / "store") for rank in range(2)))
    assert last["error"] == "left"
    assert first["error"] is not None and 0.5 < first["seconds"] < 60, first


@pytest.mark.gpu2
def test_a_long_prompt_is_the_same_without_peer_memory(tmp_path: Path) -> None:
    path = write_two_layers(tmp_path)
    prompt = [(7 * i * i + 3 * i) % 1000 for i in range(3000)]
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    found = {}
    for p2p, tried in ((None, ()), (False, ()), (False, ("q8-wire",))):
        options: dict[str, Any] = {"dtype": "float16", "max_model_len": 4096, "p2p": p2p, "experimental": tried}
        with LLM(path, devices="cuda:0,cuda:1", **options) as llm:
            told = llm.reductions()
            print(p2p, tried, {key: told[key] for key in ("large", "large_why", "large_microseconds")})
            best = llm.score(prompt, top=1)
            found[p2p, tried] = [position.top_logprobs[0] for position in best]
            llm.generate([prompt], params)
            assert llm.verify()["ok"]
    wanted = found[None, ()]
    exact = max(abs(a - b) for a, b in zip(wanted, found[False, ()], strict=True))
    assert exact < 0.05, exact
    loose = sum(abs(a - b) for a, b in zip(wanted, found[False, ("q8-wire",)], strict=True)) / len(wanted)
    assert loose < 0.05, loose
