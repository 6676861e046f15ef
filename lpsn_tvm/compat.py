"""Every trap of the pinned TVM release in one place: version check, cheap imports of TVMScript modules, targets of
LLVM.

`apache-tvm==0.27.0.post1` is developed against; its FFI after 0.1.14 crashes any MetaSchedule `TuneContext` with a
space generator.
"""

from __future__ import annotations

import contextlib
import inspect
import linecache
import sys
from collections.abc import Iterator
from importlib import metadata
from typing import Any

from lpsn_tvm.errors import CompileError

PINS = {"apache-tvm": "0.27.0.post1", "apache-tvm-ffi": "0.1.14.post1"}


def check_versions() -> None:
    """Refuse TVM releases that this package was not made for.

    Raises
    ------
    CompileError
        Names the installed and the wanted version, and the command that installs it.
    """
    for package, wanted in PINS.items():
        try:
            installed = metadata.version(package)
        except metadata.PackageNotFoundError:
            installed = "not installed"
        if installed != wanted:
            raise CompileError(
                f"{package} is {installed}, this release needs {wanted}: python -m pip install "
                + " ".join(f"{name}=={version}" for name, version in PINS.items())
            )


@contextlib.contextmanager
def light_stack() -> Iterator[None]:
    """Make `inspect.stack` cheap while TVMScript modules are imported.

    TVMScript calls it for every function it parses, and each call reads and tokenizes whole source files: `import
    tvm.s_tir.tensor_intrin` takes 66 CPU seconds, 3.5 s in here. Worker processes of a tuner need the same.
    """

    def stack(context: int = 1) -> list[inspect.FrameInfo]:
        frames: list[inspect.FrameInfo] = []
        frame: Any = sys._getframe(1)
        while frame is not None:
            line = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
            code = [line] if line else None
            frames.append(
                inspect.FrameInfo(
                    frame, frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name, code, 0 if line else None
                )
            )
            frame = frame.f_back
        return frames

    original, inspect.stack = inspect.stack, stack
    try:
        yield
    finally:
        inspect.stack = original


def import_tensor_intrinsics() -> None:
    """`import tvm.s_tir.tensor_intrin` in seconds instead of a minute; needed by MetaSchedule's stock rules only."""
    with light_stack():
        import tvm.s_tir.tensor_intrin  # noqa: F401
