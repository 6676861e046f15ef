"""The timeline of a run: arrays, plot and table."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from vta_programs import matmul

from lpsn_tvm.errors import TargetError
from lpsn_tvm.targets.vta.simulator import SimulationResult, simulate
from lpsn_tvm.targets.vta.timeline import merged, plot, print_summary, summary


@pytest.fixture(scope="module")
def result() -> SimulationResult:
    linked = dataclasses.replace(matmul(tiles=40, fan_in=8).linked, marks=((0, "fc1"), (4, "fc1.relu"), (99, "gone")))
    return simulate(linked, timeline=True)


def test_arrays(result: SimulationResult) -> None:
    timeline = result.timeline
    assert timeline is not None
    assert timeline.kind == (
        *("load.inp", "load.wgt", "load.uop", "load.acc", "reset", "gemm", "alu", "alu", "alu"),
        *("store", "nop", "finish"),
    )
    assert timeline.unit.tolist() == [0, 0, *[1] * 7, 2, 1, 1]
    assert (timeline.end > timeline.start).all() and timeline.end.max() + 1 == result.cycles
    for unit in range(3):
        start, end = timeline.start[timeline.unit == unit], timeline.end[timeline.unit == unit]
        assert (start[1:] > end[:-1]).all()
    assert timeline.start[5] > timeline.end[1], "the product waits for the weights"
    assert timeline.start[9] > timeline.end[8], "the store waits for the last ALU instruction"


@pytest.mark.parametrize("options", [{}, {"cycles": (100, 500)}, {"title": "layer", "show_marks": False}])
def test_plot(result: SimulationResult, tmp_path: Path, options: dict[str, object]) -> None:
    pytest.importorskip("matplotlib")
    plot(result, tmp_path / "run.png", **options)  # type: ignore[arg-type]
    data = (tmp_path / "run.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and len(data) > 10_000


def test_a_run_without_timeline_cannot_be_drawn(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=r"kept no timeline; call simulate\(..., timeline=True\)"):
        plot(simulate(matmul().linked), tmp_path / "run.png")
    with pytest.raises(TargetError, match=r"a timeline needs a cycle model"):
        simulate(matmul().linked, model=None, timeline=True)


def test_close_intervals_are_joined() -> None:
    start, end = np.array([0, 10, 21, 50]), np.array([10, 20, 30, 60])
    assert merged(start, end, 1).tolist() == [[0, 20], [21, 9], [50, 10]]
    assert merged(start, end, 5).tolist() == [[0, 30], [50, 10]]
    assert merged(start[:0], end[:0], 1).shape == (0, 2)


def test_summary(result: SimulationResult, capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(summary(result))
    text = console.export_text()
    assert "GEMM micro-operations" in text and "320" in text and "waits for load" in text
    print_summary(simulate(matmul().linked, model=None))
    assert "busy" not in capsys.readouterr().out
