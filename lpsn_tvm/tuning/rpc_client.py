"""Measuring on other machines: a worker process per server asks TVM's tracker for a device, uploads candidates and has
them measured there.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lpsn_tvm import compat
from lpsn_tvm.errors import TuningError
from lpsn_tvm.tuning.rpc_server import MEASURE, parse_address
from lpsn_tvm.tuning.workers import Call, Outcome, Settings, WorkerPool

HOLD_SECONDS, IDLE_SECONDS = 60.0, 2.0
"""A session is given back after this time, and after so long without a request: devices are shared with others."""
QUEUE_SECONDS = 300.0
"""For a server to become free."""
SLACK_SECONDS = 30.0
"""For sessions, uploads, and the start of a worker on the server, beside the measuring itself."""
_MODULE = "lpsn_tvm.tuning.rpc_client"


@dataclass
class _Session:
    remote: Any
    since: float
    used: float
    until: float
    """The server ends it then."""


_sessions: dict[tuple[str, int, str], _Session] = {}
_lock = threading.RLock()


def prepare() -> None:
    """Import what a client needs."""
    compat.import_tvm()
    import tvm.rpc  # noqa: F401


def _session(tracker: tuple[str, int], key: str, timeout: float) -> Any:
    """A session with a server that is free, held for a while."""
    from tvm import rpc

    remote = _held((*tracker, key), timeout)
    if remote is not None:
        return remote
    # Nothing may refer to the old session any more: its server is busy until that has ended.
    release()
    seconds = HOLD_SECONDS + timeout + SLACK_SECONDS
    remote = rpc.connect_tracker(*tracker).request(key, session_timeout=seconds)
    now = time.monotonic()
    _sessions[(*tracker, key)] = _Session(remote, now, 0.0, now + seconds)
    return remote


def _held(name: tuple[str, int, str], timeout: float) -> Any:
    """The session that is there, as long as others can wait and there is time enough for a request."""
    held, now = _sessions.get(name), time.monotonic()
    if held is None or now - held.since >= HOLD_SECONDS or now + timeout + SLACK_SECONDS > held.until:
        return None
    return held.remote


def release(idle: float = 0.0) -> None:
    """Give sessions back that were not used for so many seconds."""
    with _lock:
        for name, session in list(_sessions.items()):
            if time.monotonic() - session.used >= idle:
                del _sessions[name]


def _release_later() -> None:
    with _lock:
        for session in _sessions.values():
            session.used = time.monotonic()
    timer = threading.Timer(IDLE_SECONDS + 0.01, release, [IDLE_SECONDS])
    timer.daemon = True
    timer.start()


def execute(tracker: Sequence[Any], key: str, request: Mapping[str, Any]) -> Any:
    """Have a request answered by a server; called in worker processes.

    Raises
    ------
    TuningError
        With the server's words.
    """
    names = [f"{index}.zip" for index in range(len(request["files"]))]
    with _lock:
        remote = _session((str(tracker[0]), int(tracker[1])), key, float(request["timeout"]))
        try:
            for name, path in zip(names, request["files"], strict=True):
                remote.upload(bytearray(Path(path).read_bytes()), name)
            reply = json.loads(remote.get_function(MEASURE)(json.dumps({**request, "files": names})))
        except Exception:  # Whatever it is, the session is not to be trusted again.
            release()
            raise
    _release_later()
    if reply["error"]:
        raise TuningError(str(reply["error"]))
    return reply["value"]


def servers(tracker: tuple[str, int], key: str) -> int:
    """How many servers of a key a tracker knows.

    Raises
    ------
    TuningError
        There is no tracker, or no such server.
    """
    from tvm import rpc

    where = f"{tracker[0]}:{tracker[1]}"
    try:
        socket.create_connection(tracker, timeout=10).close()
        known = [str(item["key"]) for item in rpc.connect_tracker(*tracker).summary()["server_info"]]
    except (OSError, RuntimeError) as error:
        raise TuningError(f"no tracker there: {error}", where=where) from error
    count = known.count(f"server:{key}")
    if not count:
        others = ", ".join(sorted({name.removeprefix("server:") for name in known})) or "none"
        raise TuningError(f"knows no server with key {key!r}; known keys: {others}", where=where)
    return count


class RemotePlace:
    """Machines behind a tracker.

    Parameters
    ----------
    kind : str
        "llvm" or "cuda".
    tracker : str
        "HOST:PORT" or "HOST:PORT/KEY"; the key is the kind by default.

    Raises
    ------
    TuningError
        There is no tracker, or it knows no such server.
    """

    def __init__(self, kind: str, tracker: str) -> None:
        address, _, key = tracker.partition("/")
        self.kind, self._key = kind, key or kind
        self._tracker = parse_address(address)
        size = servers(self._tracker, self._key)
        self._pool = WorkerPool(size, Settings(prepare=Call(f"{_MODULE}:prepare"), is_fresh_after_error=False))

    def submit(self, command: str, paths: Sequence[str], rounds: int, timeout: float) -> Future[Outcome]:
        """Start a command on candidate files of this machine."""
        request = {
            "command": command, "kind": self.kind, "files": list(paths), "rounds": rounds, "timeout": timeout,
        }  # fmt: skip
        arguments = {"tracker": list(self._tracker), "key": self._key, "request": request}
        return self._pool.submit(Call(f"{_MODULE}:execute", arguments), timeout + SLACK_SECONDS + QUEUE_SECONDS)

    def close(self) -> None:
        """End the clients; servers go on."""
        self._pool.close()
