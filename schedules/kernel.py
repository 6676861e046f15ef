"""The contract between kernels and target lowering: what a kernel reads, writes and how it is shared between equal
layers.

A kernel builder is a function `builder(inputs, constants, attrs, isa) -> Kernel | None`; None means "not mine", the
next rule is asked.

* `inputs`: one `TensorSpec` per argument that is not a constant, in the operator's argument order, in the layout that
  exists at this point;
* `constants`: the operator's constant arguments by the parameter names of its reference function in `quant.py`
  (`weight`, `bias`, `scale`, `table`);
* `attrs`: the operator's attributes;
* `isa`: what the machine can do (`schedules/llvm/isa.py`).

The PrimFunc's arguments are: inputs, `Kernel.constants`, output; every buffer has exactly the `memory_shape` of its
spec (constants: of the array). Scales, zero points and clamps belong into small constant tensors and not into the
code, so that layers of equal shape
share one compiled function.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from lpsn_tvm.schedules.template import Template

Array = npt.NDArray[Any]
Attrs = Mapping[str, Any]
Constants = Mapping[str, Array]


@dataclass(frozen=True)
class TensorSpec:
    """Logical shape, data type and memory layout of one tensor.

    Parameters
    ----------
    shape : tuple of int
        Logical shape: [N, C, H, W], [N, K], or any other (then `block` is 0).
    dtype : str
        "uint8", "int8", "int32", "float32", ...
    block : int
        0: plain row-major memory. b > 0: axis 1 is split into blocks of b: [N, C, H, W] lies in memory as [N,
        ceil(C/b), H, W, b], [N, K] as [N, ceil(K/b), b]. What stands in lanes beyond C is deterministic but has no
        meaning: readers multiply it by
        zero or drop it.
    """

    shape: tuple[int, ...]
    dtype: str
    block: int = 0

    @property
    def blocks(self) -> int:
        """Blocks along axis 1 (only for block > 0)."""
        return -(-self.shape[1] // self.block)

    @property
    def memory_shape(self) -> tuple[int, ...]:
        """Shape of the buffer."""
        if self.block == 0:
            return self.shape
        return (self.shape[0], self.blocks, *self.shape[2:], self.block)

    def with_block(self, block: int) -> TensorSpec:
        """The same tensor in another layout."""
        return replace(self, block=block)

    def pack(self, array: Array) -> Array:
        """Numpy of the logical shape -> numpy of the memory shape; lanes beyond C are zero."""
        if self.block == 0:
            return np.ascontiguousarray(array)
        extra = self.blocks * self.block - self.shape[1]
        padded = np.pad(array, [(0, 0), (0, extra)] + [(0, 0)] * (array.ndim - 2))
        split = padded.reshape(self.shape[0], self.blocks, self.block, *self.shape[2:])
        return np.ascontiguousarray(np.moveaxis(split, 2, -1))

    def unpack(self, array: Array) -> Array:
        """Numpy of the memory shape -> numpy of the logical shape."""
        if self.block == 0:
            return array
        merged = np.moveaxis(array, -1, 2).reshape(self.shape[0], self.blocks * self.block, *self.shape[2:])
        return np.ascontiguousarray(merged[:, : self.shape[1]])


@dataclass(frozen=True)
class Kernel:
    """One operator ready to compile.

    Parameters
    ----------
    build : callable () -> tirx.PrimFunc
        Makes the scheduled function; called once for all kernels with an equal `key`, so it may cost time.
    constants : tuple of ndarray
        Packed constants, arguments of the function between the inputs and the output.
    out : TensorSpec
        What the kernel writes.
    key : hashable
        Equal keys mean equal functions: put in every shape, dtype, layout and attribute that the code depends on,
        never values that are read from constants. Starts with the kernel's name, which also names the compiled
        function.
    inputs : tuple of TensorSpec
        The layouts that the function reads; where one differs from what was offered, lowering inserts a layout
        conversion.
    template : Template, optional
        The ways there are to make this kernel, where there are several; set by `Template.make`.
    """

    build: Callable[[], Any]
    constants: tuple[Array, ...]
    out: TensorSpec
    key: tuple[Hashable, ...]
    inputs: tuple[TensorSpec, ...] = field(default=())
    template: Template | None = field(default=None, compare=False, repr=False)


Inputs = tuple[TensorSpec, ...]
Builder = Callable[[Inputs, Constants, Attrs, Any], "Kernel | None"]
