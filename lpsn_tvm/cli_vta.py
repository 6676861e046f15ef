"""Command line of the VTA back end: `lpsn-tvm vta ...`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from lpsn_tvm.errors import LpsnError

if TYPE_CHECKING:
    from lpsn_tvm.targets.vta.config import VtaConfig

app = typer.Typer(help="Programs of the Versatile Tensor Accelerator.", no_args_is_help=True)
JsonFlag = Annotated[bool, typer.Option("--json", help="Print machine-readable JSON instead of text.")]


@app.callback()
def _group() -> None:
    """Keeps `vta disasm` a subcommand while it is the only one."""


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


def _config(text: str) -> VtaConfig:
    """A preset by name, or the configuration in a file."""
    from lpsn_tvm.targets.vta.config import PRESETS, VtaConfig, preset

    if text not in PRESETS and (text.endswith(".json") or Path(text).is_file()):
        return VtaConfig.read(text)
    return preset(text)
