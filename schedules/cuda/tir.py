"""Small vocabulary for writing GPU kernels directly as TIR: named flat buffers, launches, scratch memory, and device
functions given as CUDA source.

A kernel's PrimFunc holds one launch or several, one after another; each is a grid of blocks with explicit thread
indices, explicit shared memory (one buffer `shared` per launch) and explicit barriers: `targets/cuda_compile.py` runs
no pass that inserts any.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tvm.backend.cuda.op import cuda_func_call
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from lpsn_tvm.schedules.indices import coordinates

EXPLICIT = "lpsn.explicit"
"""Attribute of functions whose memory and barriers are as written."""
Argument = tuple[str, Sequence[int], str]


def prim_func(arguments: Sequence[Argument], body: Callable[..., None], workspace: Sequence[Argument] = ()) -> Any:
    """A PrimFunc with the given (name, shape, dtype) buffers; `body` gets them flattened to one dimension, followed by
    the `workspace` buffers: device memory that lives for one call and holds anything before it.
    """
    with IRBuilder() as builder:
        with T.prim_func():
            T.func_name("main")
            # 8 is opaque: operator fusion leaves a finished kernel alone.
            T.func_attr({"tirx.noalias": True, "op_pattern": 8, EXPLICIT: True})
            buffers = [T.arg(name, T.Buffer(tuple(shape), dtype)) for name, shape, dtype in arguments]
            flat = [
                _named(name, T.decl_buffer((_size(shape),), dtype, data=buffer.data))
                for buffer, (name, shape, dtype) in zip(buffers, arguments, strict=True)
            ]
            scratch = [_named(name, T.alloc_buffer((_size(shape),), dtype)) for name, shape, dtype in workspace]
            body(*flat, *scratch)
    return builder.get()


def _named(name: str, buffer: Any) -> Any:
    """The device function's parameters take their names from the buffers."""
    IRBuilder.name(f"{name}_flat", buffer)
    return buffer


def _size(shape: Sequence[int]) -> int:
    size = 1
    for extent in shape:
        size *= int(extent)
    return size


@contextmanager
def launch(grid: Sequence[int], threads: int) -> Iterator[tuple[list[Any], Any]]:
    """One kernel launch: block indices (as many as `grid` has) and the thread index."""
    frames: list[Any] = []
    try:
        blocks = []
        for axis, extent in zip("xyz", grid, strict=False):
            frames.append(T.launch_thread(f"blockIdx.{axis}", int(extent)))
            blocks.append(frames[-1].__enter__())
        frames.append(T.launch_thread("threadIdx.x", threads))
        yield blocks, frames[-1].__enter__()
    finally:
        for frame in reversed(frames):
            frame.__exit__(None, None, None)


def registers(size: int, dtype: str = "int32") -> Any:
    """An array of one thread; constant indices (unrolled loops) keep it in registers."""
    return T.alloc_buffer((size,), dtype, scope="local")


def shared(size: int) -> Any:
    """The block's shared memory in bytes; once per launch."""
    return T.alloc_buffer((size,), "uint8", scope="shared.dyn")


def barrier() -> None:
    """Wait for all threads of the block."""
    T.evaluate(T.tvm_storage_sync("shared"))


def call(function: tuple[str, str], *arguments: Any, returns: str = "void") -> Any:
    """Call a device function (name, CUDA source); a `void` one is emitted as a statement."""
    name, source = function
    expression = cuda_func_call(name, *arguments, source_code=source, return_type="" if returns == "void" else returns)
    if returns == "void":
        T.evaluate(expression)
    return expression


def pointer(buffer: Any, index: Any = 0) -> Any:
    """Address of an element."""
    return T.address_of(buffer[index])


def store(buffer: Any, index: Any, value: Any) -> None:
    """`buffer[index] = value`."""
    T.buffer_store(buffer, value, [index])


ROLLED = ("lpsn_rolled", "")
"""Mark in front of a loop that the compiler must not unroll; `targets/cuda_compile.py` makes it a pragma."""


def rolled(extent: int) -> Any:
    """A loop that stays one: unrolling a long body again only costs registers."""
    call(ROLLED)
    return T.serial(0, extent)


@contextmanager
def when(condition: Any) -> Iterator[None]:
    """Statements under a condition; True costs nothing."""
    if condition is True:
        yield
        return
    with T.If(condition), T.Then():
        yield


def unravel(index: Any, *extents: int) -> list[Any]:
    """Coordinates of a fused index; extents of one cost nothing."""
    return coordinates(index, extents, T.truncdiv, T.truncmod)
