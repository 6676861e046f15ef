"""Looking at a simulated run: a plot of what each unit did when, and a table of counters.

For example:

    result = simulate(linked, model="pynq", timeline=True)
    plot(result, "layer.png")
    print_summary(result)
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lpsn_tvm.errors import TargetError
from lpsn_tvm.targets.vta.simulator import UNITS, SimulationResult, Timeline

if TYPE_CHECKING:
    from rich.table import Table

# Colours of a colour-blind-safe palette, one hue per kind of work: memory blue, array orange and red, ALU green.
COLOURS = {
    "load.inp": "#4477aa",
    "load.wgt": "#66ccee",
    "load.uop": "#bbbbbb",
    "load.acc": "#aa3377",
    "gemm": "#ee6677",
    "reset": "#f4b6bd",
    "alu": "#228833",
    "store": "#ccbb44",
    "nop": "#dddddd",
    "finish": "#000000",
}
_LEGEND = {"reset": "gemm (reset)", "nop": "nop (tokens only)"}
_PIXELS = 4000
_STALLS = {
    "load": {"compute_to_load_wait": "waits for compute", "load_fetch_wait": "waits for instructions"},
    "compute": {
        "load_to_compute_wait": "waits for load",
        "store_to_compute_wait": "waits for store",
        "compute_fetch_wait": "waits for instructions",
    },
    "store": {"compute_to_store_wait": "waits for compute", "store_fetch_wait": "waits for instructions"},
}
_SHARED = {"load": "load_memory_wait", "compute": "compute_memory_wait"}
_MAX_LABELS = 40


def plot(
    result: SimulationResult,
    path: str | Path,
    *,
    title: str | None = None,
    cycles: tuple[int, int] | None = None,
    show_marks: bool = True,
) -> None:
    """Draw units x cycles, one colour per kind of instruction.

    Parameters
    ----------
    result : SimulationResult
        Of a run with `timeline=True`.
    path : str or Path
        Image file; the suffix chooses the format.
    title : str, optional
        Above the plot; by default cycles and utilization.
    cycles : (int, int), optional
        Part to show; all by default.
    show_marks : bool
        Mark where each operator begins.

    Raises
    ------
    TargetError
        The run kept no timeline, or matplotlib is not installed.
    """
    timeline = _timeline(result)
    figures, patches = _matplotlib()
    first, last = cycles or (0, max(result.cycles, 1))
    figure = figures.Figure(figsize=(14, 3.4), layout="constrained")
    axes = figure.add_subplot()
    for row, unit in enumerate(UNITS):
        for kind in COLOURS:
            chosen = (timeline.unit == row) & (np.array(timeline.kind) == kind)
            chosen &= (timeline.end >= first) & (timeline.start <= last)
            spans = merged(timeline.start[chosen], timeline.end[chosen] + 1, max(1, (last - first) // _PIXELS))
            axes.broken_barh(spans.tolist(), (row - 0.38, 0.76), facecolor=COLOURS[kind], edgecolor="none")
        busy = result.counters[f"{unit}_busy"] / max(result.cycles, 1)
        axes.text(1.005, row, f"{busy:.0%} busy", transform=axes.get_yaxis_transform(), va="center", fontsize=9)
    _decorate(axes, result, title, first, last)
    used = [kind for kind in COLOURS if kind in timeline.kind]
    handles = [patches.Patch(color=COLOURS[kind], label=_LEGEND.get(kind, kind)) for kind in used]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9)
    if show_marks:
        _draw_marks(axes, timeline, first, last)
    figure.savefig(path, dpi=150)


def merged(start: NDArray[np.int64], end: NDArray[np.int64], gap: int) -> NDArray[np.int64]:
    """int64[k, 2] (start, length) of the intervals [start, end), those closer than `gap` joined; both are sorted."""
    if len(start) == 0:
        return np.zeros((0, 2), np.int64)
    begins = np.flatnonzero(np.r_[True, start[1:] - end[:-1] >= gap])
    ends = end[np.r_[begins[1:] - 1, len(start) - 1]]
    return np.stack([start[begins], ends - start[begins]], 1)


def summary(result: SimulationResult) -> Table:
    """Counters of a run as a rich table: work, memory traffic, and per unit busy cycles and stalls by cause."""
    from rich.table import Table

    table = Table(title="accelerator", show_header=True, title_justify="left")
    for column, justify in (("what", "left"), ("count", "right"), ("share", "right")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    counters, cycles = result.counters, result.cycles
    table.add_row("cycles", f"{cycles:,}", "")
    table.add_row("GEMM micro-operations", f"{counters['gemm_uops']:,}", _share(counters["gemm_uops"], cycles))
    table.add_row("  resets", f"{counters['reset_uops']:,}", _share(counters["reset_uops"], cycles))
    table.add_row("ALU micro-operations", f"{counters['alu_uops']:,}", _share(counters["alu_uops"], cycles))
    instructions = sum(value for name, value in counters.items() if name.endswith("_instructions"))
    table.add_row("instructions", f"{instructions:,}", "", end_section=True)
    for name in ("insn", "uop", "wgt", "inp", "acc"):
        value = counters[f"{name}_bytes_read"]
        table.add_row(f"bytes read, {name}", f"{value:,}", _share(value, result.dram_bytes))
    written = counters["out_bytes_written"]
    table.add_row("bytes written, out", f"{written:,}", _share(written, result.dram_bytes), end_section=True)
    for unit in UNITS if cycles else ():
        table.add_row(f"{unit} unit busy", f"{counters[f'{unit}_busy']:,}", _share(counters[f"{unit}_busy"], cycles))
        if unit in _SHARED:
            table.add_row("  for others at the read port", *_cell(counters[_SHARED[unit]], cycles))
        for name, cause in _STALLS[unit].items():
            table.add_row(f"  {cause}", *_cell(counters[name], cycles))
    return table


def print_summary(result: SimulationResult) -> None:
    """Print `summary` to the terminal."""
    from rich.console import Console

    Console().print(summary(result))


def _timeline(result: SimulationResult) -> Timeline:
    if result.timeline is None:
        raise TargetError("the run kept no timeline; call simulate(..., timeline=True)", where="timeline")
    return result.timeline


def _matplotlib() -> tuple[Any, Any]:
    try:
        from matplotlib import figure, patches
    except ImportError as error:
        raise TargetError("plotting needs matplotlib: pip install matplotlib", where="timeline") from error
    return figure, patches


def _decorate(axes: Any, result: SimulationResult, title: str | None, first: int, last: int) -> None:
    axes.set_yticks(range(len(UNITS)), UNITS)
    axes.set_ylim(len(UNITS) - 0.5, -0.5)
    axes.set_xlim(first, last)
    axes.set_xlabel("cycles")
    axes.xaxis.set_major_formatter(lambda value, _: f"{int(value):,}")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    shown = title or f"{result.cycles:,} cycles, {result.utilization:.1%} of them GEMM micro-operations"
    axes.set_title(shown, loc="left", fontsize=11, pad=24 if result.timeline and result.timeline.marks else 8)


def _draw_marks(axes: Any, timeline: Timeline, first: int, last: int) -> None:
    """A line where an operator's first instruction starts; names as long as they have room."""
    free = float("-inf")
    for count, (index, name) in enumerate(timeline.marks):
        if index >= len(timeline.start) or not first <= timeline.start[index] <= last:
            continue
        at = int(timeline.start[index])
        axes.axvline(at, color="#555555", linewidth=0.7, linestyle=(0, (3, 2)))
        if count < _MAX_LABELS and at >= free:
            axes.text(at, -0.56, name, fontsize=8, va="bottom", ha="left", clip_on=False)
            free = at + (last - first) * 0.007 * (len(name) + 2)


def _share(value: int, whole: int) -> str:
    return f"{value / whole:.1%}" if whole else ""


def _cell(value: int, cycles: int) -> tuple[str, str]:
    return f"{value:,}", _share(value, cycles)
