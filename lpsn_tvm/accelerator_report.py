"""What a network costs on an accelerator, step by step, as its simulator counts it: part of a `Report`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class AcceleratorStep:
    """One step of the network.

    Parameters
    ----------
    name : str
        Variable of the graph.
    place : {"accelerator", "host"}
    cycles : mapping of cycle model to int
        From the end of the step before to its own end (steps overlap); empty on the host.
    macs : int
        Useful multiply-accumulates.
    dram_bytes : int
        Bytes that its instructions move.
    reason : str
        Why it is on the host.
    """

    name: str
    place: Literal["accelerator", "host"]
    cycles: dict[str, int] = field(default_factory=dict)
    macs: int = 0
    dram_bytes: int = 0
    reason: str = ""


@dataclass(frozen=True)
class AcceleratorReport:
    """Cycles, traffic and memory of a network.

    Parameters
    ----------
    config : str
        Name of the geometry.
    isa_version : str
    clock_mhz : float
    macs_per_cycle : int
        Of the array.
    programs : int
        Times that the host starts the accelerator.
    peak_arena_bytes : int
        Activations inside the hungriest program.
    cycles : mapping of cycle model to int
        Of all programs.
    steps : tuple of AcceleratorStep
    """

    config: str
    isa_version: str
    clock_mhz: float
    macs_per_cycle: int
    programs: int
    peak_arena_bytes: int
    cycles: dict[str, int]
    steps: tuple[AcceleratorStep, ...]

    @property
    def milliseconds(self) -> dict[str, float]:
        """Of one batch at the configured clock, host steps left out."""
        return {model: cycles / (self.clock_mhz * 1e3) for model, cycles in self.cycles.items()}

    @property
    def dram_bytes(self) -> int:
        """Bytes moved by all programs."""
        return sum(step.dram_bytes for step in self.steps)

    def utilization(self, model: str, step: AcceleratorStep | None = None) -> float:
        """Multiply-accumulates of the layer per possible one, of a step or of the network.

        May exceed 1: those with padding zeros are counted, as usual, but never executed.
        """
        macs = sum(s.macs for s in self.steps) if step is None else step.macs
        cycles = self.cycles.get(model, 0) if step is None else step.cycles.get(model, 0)
        return macs / (cycles * self.macs_per_cycle) if cycles else 0.0

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> AcceleratorReport:
        """Inverse of `dataclasses.asdict`."""
        values = dict(record)
        values["steps"] = tuple(AcceleratorStep(**step) for step in values["steps"])
        return cls(**values)

    def print(self, console: Any) -> None:
        """Print to a rich console."""
        from rich.table import Table

        models = list(self.cycles)
        title = f"Accelerator {self.config}, isa {self.isa_version}, {self.clock_mhz:g} MHz (simulated)"
        table = Table(title=title, title_justify="left")
        table.add_column("step", overflow="fold", min_width=12)
        for model in models:
            table.add_column(f"cycles, {model}", justify="right", no_wrap=True)
            table.add_column("use", justify="right", no_wrap=True)
        table.add_column("DRAM KiB", justify="right", no_wrap=True)
        table.add_column("host, because", overflow="fold")
        for step in self.steps:
            cells = []
            for model in models:
                known = model in step.cycles
                cells.append(f"{step.cycles[model]:,}" if known else "")
                cells.append(f"{self.utilization(model, step):.0%}" if known and step.macs else "")
            size = f"{step.dram_bytes / 1024:,.1f}" if step.place == "accelerator" else ""
            table.add_row(step.name, *cells, size, step.reason)
        totals = [text for m in models for text in (f"{self.cycles[m]:,}", f"{self.utilization(m):.0%}")]
        table.add_section()
        table.add_row("all", *totals, f"{self.dram_bytes / 1024:,.1f}", "")
        console.print(table)
        times = ", ".join(f"{value:.3f} ms ({model})" for model, value in self.milliseconds.items())
        console.print(
            f"Simulated: {times}; {self.programs} program(s), activations in {self.peak_arena_bytes / 1024:,.1f} KiB",
            markup=False,
        )
