"""What runs in a worker process of `workers.py`: calls of functions by import path, one JSON line each, in order.

Imports nothing of TVM itself, so that workers which do not need it start in a fraction of a second.
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import os
import signal
import sys
import threading
import traceback
from typing import Any

GRACE_SECONDS = 20.0
"""A worker that nobody ended this long after its time was up ends itself."""


def resolve(path: str) -> Any:
    """The function of an import path "module:function"."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def last_line(error: BaseException) -> str:
    """The last line of an error's message: what TVM's multi-line messages come down to."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _end_with_parent(lifeline: int) -> None:
    """Ends this process and all that it started when the parent is gone, however that ended."""
    os.read(lifeline, 1)  # Returns when the other end is closed: nothing is ever written.
    os.killpg(0, signal.SIGKILL)


def _reply(request: dict[str, Any]) -> dict[str, Any]:
    try:
        return {"value": resolve(request["function"])(**request["arguments"])}
    except Exception as error:  # Whatever it is, it belongs to this call and must not end the worker.
        from lpsn_tvm.errors import LpsnError

        if isinstance(error, LpsnError):
            return {"error": str(error)}
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {last_line(error)}"}


def main() -> None:
    """Answer calls until the parent closes the channel."""
    replies = os.fdopen(os.dup(1), "wb")
    calls = os.fdopen(os.dup(0), "rb")
    # What kernels, compilers and libraries print must not end up among the replies.
    os.dup2(2, 1)
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    threading.Thread(target=_end_with_parent, args=(int(sys.argv[1]),), daemon=True).start()
    for line in calls:
        request = json.loads(line)
        # A thread of C: it works while a call holds the interpreter's lock.
        faulthandler.dump_traceback_later(float(request["timeout"]) + GRACE_SECONDS, exit=True)
        reply = _reply(request)
        faulthandler.cancel_dump_traceback_later()
        replies.write(json.dumps(reply).encode() + b"\n")
        replies.flush()


if __name__ == "__main__":
    main()
