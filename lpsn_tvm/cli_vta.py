"""Command line of the VTA back end: `lpsn-tvm vta ...`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from lpsn_tvm.errors import LpsnError

if TYPE_CHECKING:
    from lpsn_tvm.targets.vta.config import VtaConfig
    from lpsn_tvm.targets.vta.simulated_board import BundleRun

app = typer.Typer(help="Programs of the Versatile Tensor Accelerator.", no_args_is_help=True)
JsonFlag = Annotated[bool, typer.Option("--json", help="Print machine-readable JSON instead of text.")]


@app.command()
def disasm(
    path: Annotated[
        Path,
        typer.Argument(help="Program directory, exported network, bundle.zip, module file, or bare instructions."),
    ],
    config: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="For bare instructions: a preset such as pynq or pynq-0.0.2, or a vta_config.json."),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Show the instructions of PATH, one per line."""
    from lpsn_tvm.cli import _fail

    try:
        from lpsn_tvm.targets.vta.listing import read_listings

        listings = read_listings(path, None if config is None else _config(config))
    except LpsnError as error:
        _fail(error, as_json)
    if as_json:
        typer.echo(json.dumps({"programs": [listing.to_json() for listing in listings]}))
        return
    for listing in listings:
        typer.echo("\n".join(listing.lines()))


@app.command()
def run(
    bundle: Annotated[Path, typer.Argument(help="Bundle that export_pynq wrote, zip or unpacked.")],
    sim: Annotated[bool, typer.Option("--sim", help="In the simulator of this machine.")] = False,
    inputs: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--input", "-i", help=".npy (one input) or .npz (by input name); default: the bundle's sample."),
    ] = None,
    output: Annotated[Optional[Path], typer.Option("--output", "-o", help="Write outputs to this .npz file.")] = None,  # noqa: UP045
    model: Annotated[str, typer.Option(help="Cycle model: pynq or rtl.")] = "pynq",
    as_json: JsonFlag = False,
) -> None:
    """Run BUNDLE without a board: the same runner and self-test, programs in the simulator."""
    from lpsn_tvm.cli import _fail

    try:
        if not sim:
            raise LpsnError(
                "this machine is no board: give --sim, or unpack the bundle on the board and start runner.py there",
                where="vta run",
            )
        from lpsn_tvm.targets.vta.simulated_board import run_bundle

        result = run_bundle(bundle, None if inputs is None else read_arrays(inputs), model=model)
        if output is not None:
            write_arrays(output, result.outputs)
    except LpsnError as error:
        _fail(error, as_json)
    _show_run(result, model, as_json)


def _show_run(result: BundleRun, model: str, as_json: bool) -> None:
    summary = {
        name: {"shape": list(v.shape), "min": float(v.min()), "max": float(v.max()), "mean": float(v.mean())}
        for name, v in result.outputs.items()
    }
    if as_json:
        total = {"cycles": sum(result.cycles), "programs": list(result.cycles), "ms": result.milliseconds}
        typer.echo(json.dumps({"outputs": summary, **total, "model": model, "configuration": result.configuration}))
        return
    for line in result.self_test:
        typer.echo(line)
    for name, v in summary.items():
        typer.echo(f"{name}: {v['shape']}  min {v['min']:.6g}  mean {v['mean']:.6g}  max {v['max']:.6g}")
    typer.echo(
        f"{sum(result.cycles)} cycles in {len(result.cycles)} program runs, {result.milliseconds:.3f} ms ({model})"
    )


def read_arrays(path: Path) -> Any:
    """The array of a .npy file, or the arrays of a .npz file by name.

    Raises
    ------
    LpsnError
        It cannot be read.
    """
    import zipfile

    import numpy as np

    try:
        data = np.load(path, allow_pickle=False)
        return data if isinstance(data, np.ndarray) else {name: data[name] for name in data.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise LpsnError(f"cannot be read as .npy or .npz: {error}", where=str(path)) from error


def write_arrays(path: Path, arrays: dict[str, Any]) -> None:
    """A .npz file, atomically."""
    import io

    import numpy as np

    from lpsn_tvm.container import write_atomically

    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    write_atomically(path, buffer.getvalue())


def _config(text: str) -> VtaConfig:
    """A preset by name, or the configuration in a file."""
    from lpsn_tvm.targets.vta.config import PRESETS, VtaConfig, preset

    if text not in PRESETS and (text.endswith(".json") or Path(text).is_file()):
        return VtaConfig.read(text)
    return preset(text)
