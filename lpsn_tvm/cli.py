"""Command line: `lpsn-tvm build`, `run` and `inspect`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, NoReturn, Optional

import typer

from lpsn_tvm import cli_rpc, cli_tune, cli_vta
from lpsn_tvm.errors import LpsnError

app = typer.Typer(
    help="Make a trained convolutional network small and fast: remove channels, quantize to 2..8 bits, compile.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(cli_vta.app, name="vta")
JsonFlag = Annotated[bool, typer.Option("--json", help="Print machine-readable JSON instead of tables.")]


def _fail(error: Exception, as_json: bool) -> NoReturn:
    """One line on standard error (or a JSON object) and exit status 2."""
    if as_json:
        typer.echo(json.dumps({"error": type(error).__name__, "message": str(error)}))
    else:
        typer.secho(f"{type(error).__name__}: {error}", fg=typer.colors.RED, err=True)
    raise typer.Exit(2)


def _interrupted(error: KeyboardInterrupt) -> NoReturn:
    """What was interrupted may have kept something, and then says so."""
    typer.secho(f"interrupted; {str(error) or 'nothing was written'}", err=True)
    raise typer.Exit(130)


def _pair(text: str) -> int | tuple[int, int] | None:
    """Bits from text: "8" -> 8, "4,8" -> (4, 8), "float" -> None."""
    if text in ("float", "none", "32"):
        return None
    try:
        parts = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise LpsnError(
            f"expected a number of bits, two of them (weights,activations), or float; got {text!r}", where="--bits"
        ) from error
    return parts[0] if len(parts) == 1 else (parts[0], parts[1]) if len(parts) == 2 else _too_many(text)


def _too_many(text: str) -> NoReturn:
    raise LpsnError(f"expected at most two numbers, got {text!r}", where="--bits")


def _sparsity(values: list[str]) -> Any:
    """["0.5"] -> 0.5, ["auto"] -> "auto", ["none"] -> None, ["conv1=0.5", ...] -> dict."""
    if len(values) == 1 and "=" not in values[0]:
        text = values[0]
        if text in ("auto", "none"):
            return None if text == "none" else "auto"
        try:
            return float(text)
        except ValueError as error:
            raise LpsnError(
                f'expected a fraction, "auto", "none" or LAYER=FRACTION, got {text!r}', where="--sparsity"
            ) from error
    pairs = [value.rpartition("=") for value in values]
    if not all(layer and sign for layer, sign, _ in pairs):
        raise LpsnError(f"expected LAYER=FRACTION for each layer, got {values}", where="--sparsity")
    return {layer: fraction for layer, _, fraction in pairs}


def _shapes(values: list[str]) -> dict[str, tuple[int, ...]]:
    shapes = {}
    for value in values:
        name, sign, dims = value.rpartition("=")
        try:
            shapes[name] = tuple(int(d) for d in dims.lower().replace("x", ",").split(","))
        except ValueError as error:
            raise LpsnError(f"expected NAME=1x3x224x224, got {value!r}", where="--input-shape") from error
        if not sign or not name:
            raise LpsnError(f"expected NAME=1x3x224x224, got {value!r}", where="--input-shape")
    return shapes


@app.command()
def build(
    model: Annotated[Path, typer.Argument(help="ONNX model.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Module file to write.")],
    calibration: Annotated[
        Path | None, typer.Option(help="Folder of images, or .npy / .npz file, of unlabelled samples.")
    ] = None,
    target: Annotated[
        str,
        typer.Option(help='llvm, "llvm -mcpu=...", "cuda -arch=sm_80,sm_90", "vta -preset=..." and others.'),
    ] = "llvm",
    bits: Annotated[str, typer.Option(help="2..8, WEIGHTS,ACTIVATIONS such as 4,8, or float.")] = "8",
    sparsity: Annotated[
        list[str] | None,
        typer.Option(help='Fraction of channels to remove, "auto", "none", or LAYER=FRACTION (repeatable).'),
    ] = None,
    align: Annotated[int | None, typer.Option(help="Kept channels are a multiple of this; 1: exact fractions.")] = None,
    score: Annotated[
        str, typer.Option(help="output_error, mean_activation (the paper's), zero_fraction or random.")
    ] = "output_error",
    observer: Annotated[str, typer.Option(help="mse, minmax, percentile or entropy.")] = "mse",
    ignore: Annotated[list[str] | None, typer.Option(help="Layer (or pattern) to leave as it is; repeatable.")] = None,
    batch: Annotated[int, typer.Option(help="Batch size to compile for.")] = 1,
    input_shape: Annotated[
        list[str] | None, typer.Option(help="NAME=1x3x224x224 for dynamic dimensions; repeatable.")
    ] = None,
    input_range: Annotated[Optional[str], typer.Option(help="LOW,HIGH that images are mapped to.")] = None,  # noqa: UP045
    samples: Annotated[int, typer.Option(help="Calibration samples at most.")] = 512,
    threads: Annotated[Optional[int], typer.Option(help="Threads of the module.")] = None,  # noqa: UP045
    seed: Annotated[int, typer.Option(help="Seed of every random choice.")] = 0,
    measure: Annotated[
        bool, typer.Option(help="Measure the latency of module and float network for the report.")
    ] = True,
    search: Annotated[
        str, typer.Option(help="vta: on, off, or seconds per layer that schedules are searched for.")
    ] = "on",
    cache: Annotated[
        str, typer.Option(help="on, off, or the directory that keeps found schedules (vta) and trials of tuning.")
    ] = "on",
    tune: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="llvm, cuda: tune kernels for so many trials (200) or so long (90s, 10m), by default here."),
    ] = None,
    tracker: cli_tune.TrackerOption = None,
    key: cli_tune.KeyOption = None,
    records: Annotated[
        Path | None, typer.Option(help="Records that lpsn-tvm tune has written for the target's device.")
    ] = None,
    onnx: Annotated[
        Path | None, typer.Option("--onnx", help="Also write the compressed network as (QDQ) ONNX.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Prune, quantize and compile MODEL into one module file."""
    try:
        import lpsn_tvm

        options: dict[str, Any] = {}
        if sparsity:
            options["sparsity"] = _sparsity(sparsity)
        options["input_range"] = _interval(input_range)
        device = cli_tune.tracker_of(tracker, key)
        if device and tune is None:
            raise LpsnError("is where --tune measures; give --tune 10m", where="--tracker")
        _check_writable(output)
        module = lpsn_tvm.build(
            model,
            target=target,
            bits=_pair(bits),
            calibration=calibration,
            align=align,
            score=score,
            observer=observer,
            ignore=tuple(ignore or ()),
            batch=batch,
            input_shapes=_shapes(input_shape or []),
            samples=samples,
            num_threads=threads,
            seed=seed,
            measure=measure,
            search=_search(search),
            cache={"on": True, "off": False}.get(cache, cache),
            tune=tune,
            tracker=device,
            records=records,
            progress=False if as_json else None,
            **options,
        )
        module.save(output)
        if onnx is not None:
            module.to_onnx(onnx)
    except LpsnError as error:
        _fail(error, as_json)
    except KeyboardInterrupt as error:
        _interrupted(error)
    _show(module.report, as_json, {"output": str(output), "bytes": output.stat().st_size})


def _search(text: str) -> bool | float:
    if text in ("on", "off"):
        return text == "on"
    try:
        return float(text)
    except ValueError as error:
        raise LpsnError(f"expected on, off or seconds, got {text!r}", where="--search") from error


def _check_writable(output: Path) -> None:
    """Minutes of work should not end at a missing folder."""
    folder = output.resolve().parent
    if not folder.is_dir():
        raise LpsnError("its folder does not exist", where=str(output))
    if output.is_dir():
        raise LpsnError("is a folder; give a file name", where=str(output))


@app.command()
def run(
    module: Annotated[Path, typer.Argument(help="Module file.")],
    inputs: Annotated[Path, typer.Argument(help=".npy (one input) or .npz (by input name).")],
    output: Annotated[Optional[Path], typer.Option("--output", "-o", help="Write outputs to this .npz file.")] = None,  # noqa: UP045
    threads: Annotated[Optional[int], typer.Option(help="Threads.")] = None,  # noqa: UP045
    as_json: JsonFlag = False,
) -> None:
    """Run a saved module on arrays from a file."""
    import numpy as np

    try:
        from lpsn_tvm.container import write_atomically
        from lpsn_tvm.loading import load

        artifact = load(module)
        try:
            data = np.load(inputs, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise LpsnError(f"cannot be read as .npy or .npz: {error}", where=str(inputs)) from error
        feeds = data if isinstance(data, np.ndarray) else {name: data[name] for name in data.files}
        artifact.prepare(threads)
        result = artifact(feeds)
        outputs = result if isinstance(result, dict) else {artifact.outputs[0].name: result}
        if output is not None:
            import io

            buffer = io.BytesIO()
            np.savez(buffer, allow_pickle=False, **outputs)
            write_atomically(output, buffer.getvalue())
    except LpsnError as error:
        _fail(error, as_json)
    if as_json:
        summary = {
            name: {"shape": list(v.shape), "min": float(v.min()), "max": float(v.max()), "mean": float(v.mean())}
            for name, v in outputs.items()
        }
        typer.echo(json.dumps({"outputs": summary, "ms": artifact.benchmark()}))
        return
    for name, value in outputs.items():
        typer.echo(
            f"{name}: {value.dtype}{list(value.shape)}  "
            f"min {value.min():.6g}  mean {value.mean():.6g}  max {value.max():.6g}"
        )
        if output is None and value.size <= 64:
            typer.echo(np.array2string(value, precision=5, suppress_small=True))
    typer.echo(f"{artifact.benchmark():.3f} ms per run of batch {artifact.batch} ({artifact.timing})")


@app.command()
def inspect(module: Annotated[Path, typer.Argument(help="Module file.")], as_json: JsonFlag = False) -> None:
    """Show what a saved module is: layers, channels, bits, sizes, measured times."""
    try:
        from lpsn_tvm.loading import load

        artifact = load(module)
    except LpsnError as error:
        _fail(error, as_json)
    extra = artifact.details() | {"bytes": module.stat().st_size}
    _show(artifact.report, as_json, extra)


@app.command()
def rank(
    model: Annotated[Path, typer.Argument(help="ONNX model.")],
    calibration: Annotated[Path, typer.Option(help="Folder of images, or .npy / .npz file, of unlabelled samples.")],
    sparsity: Annotated[Optional[list[float]], typer.Option(help="Fractions to compare at; repeatable.")] = None,  # noqa: UP045
    input_shape: Annotated[Optional[list[str]], typer.Option(help="NAME=1x3x224x224; repeatable.")] = None,  # noqa: UP045
    input_range: Annotated[Optional[str], typer.Option(help="LOW,HIGH that images are mapped to.")] = None,  # noqa: UP045
    as_json: JsonFlag = False,
) -> None:
    """Show how much each layer's channel ranking changes when the layers before it are pruned (greedy vs one-shot)."""
    try:
        from lpsn_tvm.analysis import compare_rankings

        changes = compare_rankings(
            model,
            calibration=calibration,
            sparsities=sparsity or (0.25, 0.5, 0.75),
            input_shapes=_shapes(input_shape or []),
            input_range=_interval(input_range),
            progress=False if as_json else None,
        )
    except LpsnError as error:
        _fail(error, as_json)
    if as_json:
        typer.echo(json.dumps([vars(change) for change in changes]))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Channel rankings, dense network against pruned prefix", title_justify="left")
    table.add_column("group", overflow="fold", min_width=12)
    for heading in ("channels", "sparsity", "Kendall's tau", "Levenshtein"):
        table.add_column(heading, justify="right")
    for c in changes:
        table.add_row(c.name, str(c.channels), f"{c.sparsity:g}", f"{c.tau:.3f}", str(c.levenshtein))
    Console().print(table)


# In the order of the help page.
app.command()(cli_tune.tune)
cli_rpc.add_commands(app)


def _interval(text: str | None) -> tuple[float, float] | None:
    if text is None:
        return None
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError as error:
        raise LpsnError(f"expected LOW,HIGH, got {text!r}", where="--input-range") from error
    return low, high


def _show(report: Any, as_json: bool, extra: dict[str, Any]) -> None:
    if as_json:
        typer.echo(json.dumps({**extra, "report": report.to_json()}))
        return
    from rich.console import Console

    console = Console()
    report.print(console)
    for key, value in extra.items():
        if key != "recipe":
            console.print(f"{key}: {value}", markup=False)


def main() -> None:
    """Entry point; Ctrl-C ends quietly, nothing half-written is left."""
    try:
        app()
    except KeyboardInterrupt:
        typer.secho("interrupted; nothing was written", err=True)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
