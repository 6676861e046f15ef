"""Logical access to blocked tensors in TE, for kernels of any target."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

from lpsn_tvm.schedules.kernel import Array, Kernel, TensorSpec


class View:
    """A TE tensor indexed logically ([N, C, H, W]), whatever its memory layout; axes of extent 1 broadcast."""

    def __init__(self, tensor: Any, spec: TensorSpec) -> None:
        self.tensor, self.spec = tensor, spec

    def __call__(self, *index: Any) -> Any:
        """Element at the logical index; an axis of extent 1 is read at 0."""
        index = tuple(0 if extent == 1 else i for i, extent in zip(index, self.spec.shape, strict=True))
        if self.spec.block == 0:
            return self.tensor(*index)
        n, c, *rest = index
        block = self.spec.block
        return self.tensor(n, c // block, *rest, c % block)


def placeholder(spec: TensorSpec, name: str) -> Any:
    """TE placeholder of the spec's memory."""
    from tvm import te

    return te.placeholder(spec.memory_shape, spec.dtype, name=name)


def compute(spec: TensorSpec, value: Callable[..., Any], name: str = "out") -> Any:
    """TE tensor of `spec` with `value(*logical index)` at every element.

    Lanes beyond C are computed like the others: `value` must be defined there (`c` runs to the end of the last block).
    """
    from tvm import te

    if spec.block == 0:
        return te.compute(spec.shape, value, name=name)

    def blocked(n: Any, c: Any, *rest: Any) -> Any:
        return value(n, c * spec.block + rest[-1], *rest[:-1])

    return te.compute(spec.memory_shape, blocked, name=name)


def within(spec: TensorSpec, c: Any, value: Callable[[], Any]) -> Any:
    """`value()` where channel `c` exists, 0 in the lanes beyond: for kernels whose reads would leave their input
    there.
    """
    from tvm import tirx

    inner = value()
    if spec.block == 0 or spec.shape[1] % spec.block == 0:
        return inner
    return tirx.if_then_else(c < spec.shape[1], inner, tirx.const(0, spec.dtype))


def existing(spec: TensorSpec, index: tuple[Any, ...], run: int = 1) -> tuple[Any, ...]:
    """The index with its channel held within C: lanes beyond have no meaning, but what they read must exist.

    With `run` whole runs of so many channels are held at the last one that has channels, their order kept.
    """
    from tvm import tirx

    if spec.block == 0 or spec.shape[1] % spec.block == 0:
        return index
    channel, last = index[1], (spec.shape[1] - 1) // run
    if run > 1:
        held = tirx.min(tirx.floordiv(channel, run), tirx.const(last, "int32")) * run + tirx.floormod(channel, run)
    else:
        held = tirx.min(channel, tirx.const(last, "int32"))
    return (index[0], held, *index[2:])


def prim_func(tensors: Sequence[Any]) -> Any:
    """TE graph -> TIR function with the arguments `tensors`."""
    from tvm import te

    # Pattern 8 is opaque: operator fusion leaves a finished kernel alone.
    return te.create_prim_func(list(tensors)).with_attrs({"global_symbol": "main", "op_pattern": 8})


def te_kernel(
    key: Sequence[Hashable],
    inputs: Sequence[TensorSpec],
    constants: Sequence[Array],
    out: TensorSpec,
    define: Callable[..., Any],
    schedule: Callable[[Any], Any],
) -> Kernel:
    """A kernel written in TE.

    Parameters
    ----------
    key : sequence of hashable
        The kernel's name, and what the code depends on beside layouts and shapes.
    inputs, constants, out :
        What the kernel reads and writes.
    define : callable (views of the inputs..., TE tensors of the constants...) -> TE tensor
        The computation.
    schedule : callable (PrimFunc) -> PrimFunc
        The loops.
    """

    def build() -> Any:
        from tvm import te

        data = [placeholder(spec, f"x{i}") for i, spec in enumerate(inputs)]
        extra = [te.placeholder(array.shape, str(array.dtype), name=f"p{i}") for i, array in enumerate(constants)]
        views = [View(tensor, spec) for tensor, spec in zip(data, inputs, strict=True)]
        return schedule(prim_func([*data, *extra, define(*views, *extra)]))

    shapes = tuple((array.shape, str(array.dtype)) for array in constants)
    name, *details = key
    return Kernel(build, tuple(constants), out, (name, tuple(inputs), out, shapes, *details), tuple(inputs))


def has_block(sch: Any, name: str) -> bool:
    """Whether the function has a block of that name."""
    return any(sch.get(block).name_hint == name for block in sch.get_child_blocks(sch.get_sblock("root")))
