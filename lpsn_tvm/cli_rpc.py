"""Command line of tuning on other machines: `lpsn-tvm rpc-tracker` and `lpsn-tvm rpc-server`."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from lpsn_tvm.errors import LpsnError

WARNING = (
    "WHOEVER REACHES THE PORT CAN RUN CODE ON THIS MACHINE: it has neither passwords nor encryption. Listen on "
    "networks only where everybody is trusted, or leave the default (this machine only) and connect through ssh -L."
)


def tracker(
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 is every network.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="First port to try.")] = 9190,
) -> None:
    """Run the tracker that tells tuners which devices are free."""
    from lpsn_tvm.cli import _fail

    try:
        from lpsn_tvm.tuning.rpc_server import serve_tracker

        serve_tracker(host, port, typer.echo)
    except LpsnError as error:
        _fail(error, False)


def server(
    tracker: Annotated[str, typer.Option(help="HOST:PORT of the tracker.")],
    key: Annotated[str, typer.Option(help="What tuners ask for: cuda, llvm, or a name of yours for equal machines.")],
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 is every network.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="First port to try.")] = 9091,
    address: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Address that tuners reach this machine at, where the tracker sees another one."),
    ] = None,
    threads: Annotated[int, typer.Option(help="Threads of kernels for CPUs.")] = 1,
) -> None:
    """Offer this machine's CPU or GPU to tuners."""
    from lpsn_tvm.cli import _fail

    try:
        from lpsn_tvm.tuning.rpc_server import parse_address, serve_device

        serve_device(host, port, parse_address(tracker), key, typer.echo, address=address, threads=threads)
    except LpsnError as error:
        _fail(error, False)


def add_commands(app: typer.Typer) -> None:
    """Give an application both commands."""
    app.command("rpc-tracker", epilog=WARNING)(tracker)
    app.command("rpc-server", epilog=WARNING)(server)
