"""Command line of tuning: `lpsn-tvm tune`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from lpsn_tvm.errors import LpsnError

DEFAULT_BUDGET = "10m"
TrackerOption = Annotated[Optional[str], typer.Option(help="HOST:PORT of a tracker: measure on its machines.")]  # noqa: UP045
KeyOption = Annotated[Optional[str], typer.Option(help="Which of the tracker's machines.")]  # noqa: UP045


def tracker_of(tracker: str | None, key: str | None) -> str | None:
    """What `lpsn_tvm.build` calls the tracker, from both options.

    Raises
    ------
    LpsnError
        A key without a tracker.
    """
    if key and not tracker:
        raise LpsnError("names machines of a tracker; give --tracker HOST:PORT", where="--key")
    return f"{tracker}/{key}" if key else tracker


def tune(
    model: Annotated[Path, typer.Argument(help="ONNX model.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="File of records to write.")],
    budget: Annotated[
        str, typer.Option("--tune", help="Trials, such as 200, or time, such as 90s, 10m, 1h.")
    ] = DEFAULT_BUDGET,
    directory: Annotated[
        Path | None, typer.Option(help="Keeps trials; a killed run goes on from there. By default the user's cache.")
    ] = None,
    target: Annotated[str, typer.Option(help="As for build; the device must be here or at the tracker.")] = "llvm",
    bits: Annotated[str, typer.Option(help="As for build.")] = "8",
    calibration: Annotated[Path | None, typer.Option(help="As for build: what is removed depends on it.")] = None,
    sparsity: Annotated[list[str] | None, typer.Option(help="As for build.")] = None,
    align: Annotated[int | None, typer.Option(help="As for build.")] = None,
    batch: Annotated[int, typer.Option(help="As for build.")] = 1,
    input_shape: Annotated[list[str] | None, typer.Option(help="As for build.")] = None,
    input_range: Annotated[Optional[str], typer.Option(help="As for build.")] = None,  # noqa: UP045
    samples: Annotated[int, typer.Option(help="As for build.")] = 512,
    threads: Annotated[Optional[int], typer.Option(help="Threads that the module will run with.")] = None,  # noqa: UP045
    seed: Annotated[int, typer.Option(help="Seed of every random choice.")] = 0,
    records: Annotated[Path | None, typer.Option(help="Records to start from; they are written to OUTPUT too.")] = None,
    tracker: TrackerOption = None,
    key: KeyOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print machine-readable JSON instead of tables.")] = False,
) -> None:
    """Find faster configurations of MODEL's kernels by measuring; `lpsn-tvm build --records` uses them."""
    from lpsn_tvm.cli import _check_writable, _fail, _interrupted, _interval, _pair, _shapes, _sparsity

    try:
        import lpsn_tvm
        from lpsn_tvm.budget import Budget
        from lpsn_tvm.records import Records

        Budget.parse(budget, "--tune")
        _check_writable(output)
        device = tracker_of(tracker, key)
        options: dict[str, Any] = {"sparsity": _sparsity(sparsity)} if sparsity else {}
        known = Records.from_any(records)
        module = lpsn_tvm.build(
            model,
            target=target,
            bits=_pair(bits),
            calibration=calibration,
            align=align,
            batch=batch,
            input_shapes=_shapes(input_shape or []),
            input_range=_interval(input_range),
            samples=samples,
            num_threads=threads,
            seed=seed,
            measure=False,
            tune=budget,
            tracker=device,
            cache=True if directory is None else directory,
            records=known,
            progress=False if as_json else None,
            **options,
        )
        found = module.records or Records()
        known.merge(found).save(output)
    except LpsnError as error:
        _fail(error, as_json)
    except KeyboardInterrupt as error:
        _interrupted(error)
    _show(module, found, output, as_json)


def _show(module: Any, found: Any, output: Path, as_json: bool) -> None:
    layers = module.report.tuning.get("layers", {})
    if as_json:
        rows = [
            {
                "template": r.template,
                "config": dict(r.config),
                "ms": r.seconds * 1e3,
                "default_ms": r.default_seconds * 1e3,
            }
            for r in found
        ]
        typer.echo(json.dumps({"output": str(output), "records": rows, "notes": module.report.notes}))
        return
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(title="Kernels that beat their default", title_justify="left")
    table.add_column("template")
    table.add_column("configuration", overflow="fold")
    for heading in ("default, ms", "tuned, ms", "ratio"):
        table.add_column(heading, justify="right")
    for r in found:
        config = " ".join(f"{knob}={value}" for knob, value in r.config.items())
        ratio = r.seconds / r.default_seconds
        table.add_row(r.template, config, f"{r.default_seconds * 1e3:.4f}", f"{r.seconds * 1e3:.4f}", f"{ratio:.3f}")
    if found:
        console.print(table)
    for note in module.report.notes:
        console.print(f"Note: {note}", markup=False)
    console.print(f"output: {output} ({len(layers)} layers of this network use a record)", markup=False)
