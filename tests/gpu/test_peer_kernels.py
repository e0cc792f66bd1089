"""Sums and gathers through peers' memory against float64 and plain concatenation. The ranks run in processes of their
own: a kernel whose peer does not come ends its process."""

from __future__ import annotations

from pathlib import Path

import pytest
from rank_processes import answers, write_two_layers

from multitensor import LLM, InputError, SamplingParams

RANKS = "peer_ranks.py"


@pytest.mark.gpu
@pytest.mark.parametrize("mailbox", [(), ("mailbox",)], ids=["pushed", "mailbox"])
@pytest.mark.parametrize("size", [2, 3, 5])
def test_ranks_on_one_gpu(size: int, mailbox: tuple[str, ...]) -> None:
    """600 launches in a row and 40 replays of 8, rows of 576 and 8192, ranks late by turns."""
    (report,) = answers(RANKS, ("together", size, *mailbox))
    print(report["errors"])
    assert not report["wrong"], report["wrong"][:10]


@pytest.mark.gpu
def test_a_peer_that_never_comes_is_an_error_and_no_hang() -> None:
    (report,) = answers(RANKS, ("alone",))
    assert report["error"] is not None and 0.3 < report["seconds"] < 60, report


@pytest.mark.gpu
def test_a_trial_whose_peer_never_comes_gives_up_and_says_so() -> None:
    (report,) = answers(RANKS, ("lonely",))
    assert report["error"] is None and report["given_up"] > 0 and 0.3 < report["seconds"] < 60, report


@pytest.mark.gpu2
@pytest.mark.parametrize("mailbox", [(), ("mailbox",)], ids=["peer memory", "host memory"])
def test_two_gpus(tmp_path: Path, mailbox: tuple[str, ...]) -> None:
    """1000 launches of 1 to 64 rows of 8192, 50 replays, the gather of 128255 columns; then the group's own choice."""
    reports = answers(RANKS, *(("rank", rank, 2, tmp_path / "store", *mailbox) for rank in range(2)))
    for report in reports:
        print({key: report.get(key) for key in ("why", "errors", "times", "reductions")})
        if report["why"] is not None and not mailbox:
            pytest.skip(report["why"])
        assert report["why"] is None, report["why"]
        assert not report["wrong"], report["wrong"][:10]
    assert reports[0]["digest"] == reports[1]["digest"], "the ranks' bits differ"


@pytest.mark.gpu2
def test_a_model_with_and_without_peer_memory(tmp_path: Path) -> None:
    path = write_two_layers(tmp_path)
    prompts = [[3, 14, 15, 92, 65], [2, 71, 82], [16, 18, 3]]
    params = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
    found = {}
    for p2p in (None, False):
        with LLM(path, devices="cuda:0,cuda:1", dtype="float16", max_model_len=256, p2p=p2p) as llm:
            told, memory = llm.reductions(), llm.memory()
            print(p2p, told, memory[0]["peer_bytes"])
            llm.generate(prompts, params)  # three sequences in one graph
            found[p2p] = told, memory, [output.outputs[0].token_ids for output in llm.generate(prompts[:1], params)]
            assert llm.verify()["ok"]
    told, memory, _ = found[False]
    assert "--no-p2p" in told["why"] and memory[0]["peer_bytes"] == 0
    assert told["small"] == "NCCL" or told["small"].startswith("host memory up to "), told
    assert memory[0]["host_bytes"] > 32 << 20
    assert set(told["microseconds"]) == {1, 8, 64}, told  # mailboxes have passed their trial and were timed
    told, memory, _ = found[None]
    if memory[0]["peer_bytes"]:
        assert set(told["microseconds"]) == {1, 8, 64}
    else:
        assert told["why"] and not told["small"].startswith("peer memory")
        with pytest.raises(InputError, match="demanded"):
            LLM(path, devices="cuda:0,cuda:1", dtype="float16", max_model_len=256, p2p=True)
