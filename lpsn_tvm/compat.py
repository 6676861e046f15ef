"""Every trap of the pinned TVM release in one place: version check, cheap imports, a quiet and quick MetaSchedule.

`apache-tvm==0.27.0.post1` is developed against; its FFI after 0.1.14 crashes any MetaSchedule `TuneContext` with a
space generator (`smoke_test`). Worker processes (`lpsn_tvm/tuning/workers.py`) start with `import_tvm`; of TVM's own
pool of workers nothing is used. The int8 rules of MetaSchedule and TVM's storage rewrite, which shares a buffer between
int8 and int32, are not used either: `targets/cuda_compile.py` has its own list of passes.
"""

from __future__ import annotations

import contextlib
import inspect
import linecache
import logging
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from types import ModuleType
from typing import Any

import numpy as np

from lpsn_tvm.errors import CompileError
from lpsn_tvm.runtime import without_torch

METASCHEDULE = "tvm.s_tir.meta_schedule"
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


@contextlib.contextmanager
def without_tensor_intrinsics() -> Iterator[None]:
    """`TuneContext` imports `tvm.s_tir.tensor_intrin`, which only MetaSchedule's stock rules need: a minute (seconds in
    `light_stack`) that is saved in here.
    """
    name = "tvm.s_tir.tensor_intrin"
    if name in sys.modules:
        yield
        return
    sys.modules[name] = ModuleType(name)
    try:
        yield
    finally:
        del sys.modules[name]


def import_tvm() -> Any:
    """The `tvm` module, imported without torch (0.8 s instead of 3 s, 300 MB less): for worker processes.

    Raises
    ------
    CompileError
        It is another release than this package was made for.
    """
    check_versions()
    with without_torch(), light_stack():
        import tvm
    return tvm


@contextlib.contextmanager
def quiet_metaschedule() -> Iterator[None]:
    """MetaSchedule tells nothing but errors; its level is put back afterwards.

    Its loggers write every candidate's trace to the console and, at level NOTSET, switch themselves to DEBUG.
    """
    logger = logging.getLogger(METASCHEDULE)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


@contextlib.contextmanager
def numpy_seed(seed: int) -> Iterator[None]:
    """Begin numpy's global generator at a seed; the caller's state is put back afterwards.

    MetaSchedule's cost model draws its scores from it until it is trained: without this the same search measures
    something else whenever the process has drawn before.
    """
    before = np.random.get_state()
    np.random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(before)


def pass_interrupts() -> None:
    """From now on Ctrl-C in a Python function that TVM's compiled code called is a KeyboardInterrupt for whoever called
    that code, and not a RuntimeError without a message.
    """
    import tvm_ffi

    tvm_ffi.register_error("KeyboardInterrupt", KeyboardInterrupt)


_SMOKE_TEST = """
from lpsn_tvm.compat import import_tvm, light_stack
tvm = import_tvm()
from tvm import te
from tvm.s_tir import meta_schedule as ms
a = te.placeholder((4,), name="a")
mod = tvm.IRModule({"main": te.create_prim_func([a, te.compute((4,), lambda i: a[i] + 1, name="b")])})
space = ms.space_generator.ScheduleFn(lambda sch: None, sch_rules=[], postprocs=[], mutator_probs={})
target = tvm.target.Target({"kind": "llvm", "num-cores": 1})
with light_stack():  # it imports TVMScript modules
    print(len(ms.TuneContext(mod, target=target, space_generator=space).generate_design_space()))
"""


def smoke_test(command: tuple[str, ...] = (sys.executable, "-c", _SMOKE_TEST)) -> None:
    """Build a `TuneContext` with a space generator, in a process of its own: a wrong FFI crashes it.

    Raises
    ------
    CompileError
        The process did not survive.
    """
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode or done.stdout.split()[-1:] != ["1"]:
        wanted = " ".join(f"{name}=={version}" for name, version in PINS.items())
        raise CompileError(
            f"MetaSchedule does not work with the installed releases (exit status {done.returncode}); wanted: {wanted}"
        )
