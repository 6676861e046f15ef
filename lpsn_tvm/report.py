"""What a build did and measured, layer by layer: printed as tables, saved as JSON."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from lpsn_tvm.accelerator_report import AcceleratorReport


@dataclass(frozen=True)
class LayerRecord:
    """One weighted layer before and after.

    `kept_float` says why a layer stayed in float ("" when it did not), `left_whole` why no channel was removed
    although that was asked.
    """

    name: str
    kind: str
    in_channels: tuple[int, int]
    out_channels: tuple[int, int]
    macs: tuple[int, int]
    parameters: tuple[int, int]
    weight_bits: int | None = None
    activation_bits: int | None = None
    error: float | None = None
    kept_float: str = ""
    left_whole: str = ""

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> LayerRecord:
        """Inverse of `dataclasses.asdict`."""
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in record.items()}
        return cls(**values)


@dataclass
class Report:
    """Totals, layers, notes and times of one build.

    Parameters
    ----------
    model, target : str
    bits : (int, int) or None
    layers : list of LayerRecord
    totals : mapping of quantity -> (before, after)
        "macs", "parameters", "weight_bytes", "peak_activation_bytes", "activation_elements".
    float_nodes, whole_groups : mapping of name -> reason
        What stayed float; which channel groups could not be followed.
    notes : list of str
        Everything a user should know: synthetic calibration, options that had no effect.
    milliseconds : mapping
        "module" and, where the target runs it, "float": medians measured on this machine; empty when `measure=False`.
    seconds : mapping of stage -> seconds
    calibration : mapping
        samples, digest, synthetic.
    accelerator : AcceleratorReport or None
        Simulated cycles, where the target is an accelerator.
    tuning : mapping
        Where kernels offer a choice: "devices", "digest" of the tuning records, number of "choices", "layers" that use
        a record (with its configuration), "notes".
    """

    model: str = ""
    target: str = ""
    bits: tuple[int, int] | None = None
    layers: list[LayerRecord] = field(default_factory=list)
    totals: dict[str, tuple[float, float]] = field(default_factory=dict)
    float_nodes: dict[str, str] = field(default_factory=dict)
    whole_groups: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    milliseconds: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    calibration: dict[str, Any] = field(default_factory=dict)
    accelerator: AcceleratorReport | None = None
    tuning: dict[str, Any] = field(default_factory=dict)

    @property
    def memory_metric_mbit(self) -> tuple[float, float]:
        """Weights and activations in Mbit, before (32 bits) and after: the paper's footprint with the real counts,
        P * b_w + A * b_a.
        """
        weight_bits, activation_bits = self.bits or (32, 32)
        before = 32 * (self.totals["parameters"][0] + self.totals["activation_elements"][0])
        after = weight_bits * self.totals["parameters"][1] + activation_bits * self.totals["activation_elements"][1]
        return before / 1e6, after / 1e6

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Report:
        """Inverse of `to_json`."""
        known = {key: value for key, value in record.items() if key in cls.__dataclass_fields__}
        known["layers"] = [LayerRecord.from_json(layer) for layer in known.get("layers", [])]
        known["totals"] = {key: tuple(value) for key, value in known.get("totals", {}).items()}
        known["bits"] = tuple(known["bits"]) if known.get("bits") else None
        if known.get("accelerator"):
            known["accelerator"] = AcceleratorReport.from_json(known["accelerator"])
        return cls(**known)

    def __str__(self) -> str:
        from rich.console import Console

        buffer = io.StringIO()
        console = Console(file=buffer, width=120, force_terminal=False)
        self.print(console)
        return buffer.getvalue().rstrip()

    def print(self, console: Any) -> None:
        """Print to a rich console."""
        console.print(self._layer_table())
        console.print(self._total_table())
        if self.accelerator is not None:
            self.accelerator.print(console)
        for title, reasons in (("Stays float", self.float_nodes), ("Channels left whole", self.whole_groups)):
            if reasons:
                console.print(f"{title}:", markup=False)
                for name, reason in reasons.items():
                    console.print(f"  {name}: {reason}", markup=False)
        if self.tuning.get("digest"):
            digest, used = self.tuning["digest"][:12], len(self.tuning["layers"])
            console.print(f"Tuned: {used} of {self.tuning['choices']} kernels with a choice, records {digest}")
        for note in [*self.notes, *self.tuning.get("notes", ())]:
            console.print(f"Note: {note}", markup=False)

    def _layer_table(self) -> Any:
        from rich.table import Table

        table = Table(title=f"{self.model} for {self.target}: channels before -> after", title_justify="left")
        table.add_column("layer", overflow="fold", min_width=12)
        table.add_column("kind", overflow="fold", min_width=6)
        for heading in ("in", "out", "MMAC", "params", "w/a", "error"):
            table.add_column(heading, justify="right", no_wrap=True)
        for layer in self.layers:
            bits = f"{layer.weight_bits}/{layer.activation_bits}" if layer.weight_bits else "float"
            table.add_row(
                layer.name,
                layer.kind,
                _change(layer.in_channels),
                _change(layer.out_channels),
                f"{layer.macs[1] * 1e-6:.2f}",
                str(layer.parameters[1]),
                bits,
                "" if layer.error is None else f"{layer.error:.1e}",
            )
        return table

    def _total_table(self) -> Any:
        from rich.table import Table

        table = Table(title="Totals", title_justify="left")
        for heading in ("", "float model", "this module", "ratio"):
            table.add_column(heading, justify="left" if not heading else "right")
        labels = {
            "macs": ("MMAC", 1e-6),
            "parameters": ("parameters, thousands", 1e-3),
            "weight_bytes": ("weights, KiB", 1 / 1024),
            "peak_activation_bytes": ("peak activations, KiB", 1 / 1024),
        }
        for key, (label, factor) in labels.items():
            if key in self.totals:
                before, after = self.totals[key]
                table.add_row(
                    label,
                    f"{before * factor:,.2f}",
                    f"{after * factor:,.2f}",
                    f"{after / before:.3f}" if before else "",
                )
        if "activation_elements" in self.totals:
            before, after = self.memory_metric_mbit
            ratio = f"{after / before:.3f}" if before else ""
            table.add_row("weights + activations, Mbit", f"{before:,.2f}", f"{after:,.2f}", ratio)
        if self.milliseconds:
            # A GPU runs quantized networks only: there is no time of the float model.
            after = self.milliseconds["module"]
            old = self.milliseconds.get("float")
            cells = ("", f"{after:.3f}", "") if old is None else (f"{old:.3f}", f"{after:.3f}", f"{after / old:.3f}")
            table.add_row("latency, ms (measured)", *cells)
        return table


def _change(pair: tuple[int, int]) -> str:
    before, after = pair
    return str(after) if before == after else f"{before} -> {after}"
