"""Runs of output blocks that gather their lanes alike."""

import pytest

from lpsn_tvm.schedules.llvm.channel_map import LONGEST, runs


def every_channel(plan, count):
    """The channel map that the runs stand for."""
    found = []
    for run in plan:
        for k in range(run.count):
            for lane in run.lanes:
                tensor, block = run.blocks[lane // 16]
                found.append((tensor, (block + k) * 16 + lane % 16))
    return found[:count]


@pytest.mark.parametrize("start", [0, 1, 15, 16, 40])
@pytest.mark.parametrize("count", [1, 15, 16, 50, 160])
def test_runs_say_the_map(start, count):
    sources = [(0, start + i) for i in range(count)] + [(1, i) for i in range(37)]
    assert every_channel(runs(sources), len(sources)) == sources


def test_shifted_blocks_share_one_run():
    assert len(runs([(0, 5 + i) for i in range(160)])) == 1
    assert len(runs([(0, i) for i in range(64)] + [(1, i) for i in range(64)])) == 2


def test_a_scattered_map_is_refused():
    assert runs([(0, i * 37 % 4096) for i in range((LONGEST + 1) * 16)]) is None
