"""The two programs that lend devices to tuners elsewhere, on TVM's RPC: a tracker that knows who is free, and a server
beside each device.

Whoever reaches a server's port can write files on its machine and run code there: trusted networks only.

What TVM's server does by itself is to load a module into the process that serves a session, where a candidate that
crashes ends the server. Here that process registers `lpsn.measure`, which hands uploaded candidates to a worker process
of its own (`workers.py`); and both programs run in the process that was started, so that nothing stays when it ends.
"""

from __future__ import annotations

import ctypes
import errno
import json
import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Callable
from typing import Any

from lpsn_tvm import compat
from lpsn_tvm.errors import TuningError
from lpsn_tvm.tuning.place import EXECUTE, LocalPlace

MEASURE = "lpsn.measure"
SEARCHED_PORTS = 100
"""Ports that are tried from the given one on. TVM's own programs end at 9199 unless told otherwise."""
_PR_SET_PDEATHSIG = 1
Report = Callable[[str], None]

_places: dict[tuple[str, int], LocalPlace] = {}


def parse_address(text: str) -> tuple[str, int]:
    """("host", 9190) of "host:9190".

    Raises
    ------
    TuningError
        It is not of that form.
    """
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise TuningError(f"expected HOST:PORT, got {text!r}", where="tracker")
    return host, int(port)


def listening_socket(host: str, port: int) -> socket.socket:
    """A socket that listens at the first free port from `port` on.

    Raises
    ------
    TuningError
        There is none, or the host is not this machine.
    """
    try:
        family = socket.getaddrinfo(host, port, 0, 0, socket.IPPROTO_TCP)[0][0]
    except OSError as error:
        raise TuningError(f"is not an address: {error.strerror or error}", where=host) from error
    for candidate in range(port, min(port + SEARCHED_PORTS, 65536)):
        opened = socket.socket(family, socket.SOCK_STREAM)
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            opened.bind((host, candidate))
            opened.listen(16)
            return opened
        except OSError as error:
            opened.close()
            if error.errno != errno.EADDRINUSE:
                raise TuningError(
                    f"port {candidate} cannot be opened: {error.strerror or error}", where=host
                ) from error
    raise TuningError(f"no port from {port} to {port + SEARCHED_PORTS - 1} is free", where=host)


def serve_tracker(host: str, port: int, report: Report) -> None:
    """Run a tracker until the process is interrupted.

    Raises
    ------
    TuningError
        No port, or TVM's tracker cannot be imported.
    """
    compat.import_tvm()
    try:
        from tvm.rpc import tracker
    except ImportError as error:
        raise TuningError("the tracker needs tornado: python -m pip install 'lpsn-tvm[tune]'") from error
    tracker.logger.setLevel("WARNING")
    opened = listening_socket(host, port)
    report(f"tracker at {host}:{opened.getsockname()[1]}")
    tracker._tracker_server(opened, "")


def serve_device(
    host: str, port: int, tracker: tuple[str, int], key: str, report: Report, *, address: str | None = None,
    threads: int = 1, execute: str = EXECUTE,
) -> None:  # fmt: skip
    """Offer this machine's device until the process is interrupted.

    Parameters
    ----------
    host : str
        Address to listen at.
    port : int
        First port to try.
    tracker : (str, int)
        Where to register.
    key : str
        What clients ask the tracker for.
    report : (str) -> None
        Told what happens, line by line.
    address : str, optional
        What the tracker tells clients, where that is not the address it sees.
    threads : int
        Threads of kernels for CPUs.
    execute : str
        Import path of what answers.

    Raises
    ------
    TuningError
        No port, or no tracker.
    """
    compat.import_tvm()
    from tvm.rpc import server

    try:
        socket.create_connection(tracker, timeout=10).close()
    except OSError as error:
        raise TuningError(
            f"no tracker there ({error.strerror or error}); `lpsn-tvm rpc-tracker` starts one",
            where=f"{tracker[0]}:{tracker[1]}",
        ) from error
    server.logger.setLevel("ERROR")
    _register(threads, execute)
    opened = listening_socket(host, port)
    bound, home = opened.getsockname()[1], os.getcwd()
    report(f"server at {host}:{bound}, key {key}, tracker {tracker[0]}:{tracker[1]}")
    try:
        while True:
            try:
                server._listen_loop(opened, bound, key, tracker, None, address)
            except RuntimeError as error:
                # A session's process that failed, or a tracker that was away for a minute: TVM's loop ends there.
                report(f"goes on after: {error}")
                os.chdir(home)
    finally:
        _end_sessions()


def _end_sessions() -> None:
    for child in multiprocessing.active_children():
        child.kill()
        child.join()


def _register(threads: int, execute: str) -> None:
    """What the processes of sessions, which are forked from this one, can do."""
    import tvm

    def measure(request: str) -> str:
        return json.dumps(_measured(json.loads(request), threads, execute))

    tvm.register_global_func(MEASURE, measure, override=True)
    signal.signal(signal.SIGTERM, _interrupt)
    if sys.platform == "linux":
        os.register_at_fork(after_in_child=_end_with_parent)


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


def _end_with_parent() -> None:
    """The kernel ends a session's process when the server is gone, however that ended."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _measured(request: dict[str, Any], threads: int, execute: str) -> dict[str, Any]:
    """Have a worker process of this session answer a request; files are names in the session's folder."""
    import tvm

    path_of = tvm.get_global_func("tvm.rpc.server.workpath")
    # One worker for a session, started by its first request.
    place = _places.setdefault((request["kind"], threads), LocalPlace(request["kind"], threads, execute))
    files = [str(path_of(name)) for name in request["files"]]
    outcome = place.submit(request["command"], files, int(request["rounds"]), float(request["timeout"])).result()
    return {"value": outcome.value, "error": outcome.error}
