"""`lpsn.quantize`, `lpsn.dequantize`, `lpsn.requantize` and pure layout conversion: one element-wise function, any two
layouts.

Between a plain and a blocked tensor, registers of neighbouring pixels are transposed by a tree of two-vector shuffles.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from tvm import tirx
from tvm.script.ir_builder import tirx as T

from lpsn_tvm.schedules.kernel import Array, Kernel, TensorSpec
from lpsn_tvm.schedules.llvm.dot import BLOCK
from lpsn_tvm.schedules.llvm.isa import Isa
from lpsn_tvm.schedules.llvm.tir import (
    MAGIC_BITS,
    loop,
    map_elements,
    prim_func,
    requantized,
    unravel,
    vcast,
    vector,
    vload,
    vstore,
)
from lpsn_tvm.schedules.llvm.weights import input_block

Transform = Callable[[Any, Any, Any, int], Any]
"""(value, float parameters, integer parameters, lanes) -> value."""


def quantize(
    inputs: tuple[TensorSpec, ...], constants: Mapping[str, Array], attrs: Mapping[str, Any], isa: Isa
) -> Kernel | None:
    """Kernel of `quant.quantize`; a plain image becomes blocked by 4, 8 or 16."""
    data = inputs[0]
    zero_point = int(attrs["zero_point"])
    floats = [attrs["inv_scale"], attrs["qmin"] - zero_point, attrs["qmax"] - zero_point, 0.0]
    dtype = str(attrs["out_dtype"])
    return _kernel(
        "quantize",
        data,
        TensorSpec(data.shape, dtype, _wanted_block(data)),
        floats,
        [0, zero_point - MAGIC_BITS, 0, 0],
        _quantize(dtype),
    )


def dequantize(
    inputs: tuple[TensorSpec, ...], constants: Mapping[str, Array], attrs: Mapping[str, Any], isa: Isa
) -> Kernel | None:
    """Kernel of `quant.dequantize`, layout kept."""
    data = inputs[0]
    out = TensorSpec(data.shape, "float32", data.block)
    return _kernel("dequantize", data, out, [attrs["scale"], 0, 0, 0], [attrs["zero_point"], 0, 0, 0], _dequantize)


def requantize(
    inputs: tuple[TensorSpec, ...], constants: Mapping[str, Array], attrs: Mapping[str, Any], isa: Isa
) -> Kernel | None:
    """Kernel of `quant.requantize`, layout kept."""
    data, zero_point, dtype = inputs[0], int(attrs["out_zero_point"]), str(attrs["out_dtype"])
    floats = [attrs["multiplier"], attrs["qmin"] - zero_point, attrs["qmax"] - zero_point, 0.0]
    integers = [attrs["in_zero_point"], zero_point - MAGIC_BITS, 0, 0]
    return _kernel("requantize", data, TensorSpec(data.shape, dtype, data.block), floats, integers, _requantize(dtype))


def relayout(data: TensorSpec, out: TensorSpec) -> Kernel:
    """Copy into another layout, values unchanged."""
    return _kernel("relayout", data, out, None, None, lambda value, floats, integers, lanes: value)


def _quantize(dtype: str) -> Transform:
    def transform(value: Any, floats: Any, integers: Any, lanes: int) -> Any:
        return requantized(value * vector(floats[0], lanes), floats[1], floats[2], integers[1], dtype, lanes)

    return transform


def _dequantize(value: Any, floats: Any, integers: Any, lanes: int) -> Any:
    centred = vcast(value, "int32", lanes) - vector(integers[0], lanes)
    return vcast(centred, "float32", lanes) * vector(floats[0], lanes)


def _requantize(dtype: str) -> Transform:
    def transform(value: Any, floats: Any, integers: Any, lanes: int) -> Any:
        return requantized(_dequantize(value, floats, integers, lanes), floats[1], floats[2], integers[1], dtype, lanes)

    return transform


def _wanted_block(data: TensorSpec) -> int:
    """Integer images are blocked; other ranks stay as they are."""
    return data.block or (input_block(data.shape[1]) if len(data.shape) == 4 else 0)


def _kernel(name: str, data: TensorSpec, out: TensorSpec, floats: Any, integers: Any, transform: Transform) -> Kernel:
    constants: tuple[Array, ...] = ()
    if floats is not None:
        constants = (np.array(floats, np.float32), np.array(integers, np.int32))

    def build() -> Any:
        arguments = [("data", data.memory_shape, data.dtype)]
        if constants:
            arguments += [("floats", (4,), "float32"), ("integers", (4,), "int32")]
        arguments.append(("out", out.memory_shape, out.dtype))

        def body(source: Any, *rest: Any) -> None:
            floats, integers = rest[:2] if constants else (None, None)
            _emit(data, out, source, rest[-1], lambda value, lanes: transform(value, floats, integers, lanes))

        return prim_func(arguments, body)

    return Kernel(build, constants, out, (name, data, out), (data,))


def _emit(data: TensorSpec, out: TensorSpec, source: Any, target: Any, function: Callable[[Any, int], Any]) -> None:
    """Choose the loops by the two layouts."""
    if data.memory_shape == out.memory_shape or is_same_memory(data, out):
        _emit_flat(int(np.prod(data.memory_shape)), source, target, function)
    elif data.block == 0 and out.block:
        _emit_blocking(out, source, target, function)
    elif data.block and out.block == 0:
        _emit_unblocking(data, source, target, function)
    else:
        _emit_reblocking(data, out, source, target, function)


def is_same_memory(data: TensorSpec, out: TensorSpec) -> bool:
    """Whether two layouts of one tensor are the same bytes (one pixel, channels that fill their blocks)."""
    one_pixel = int(np.prod(data.shape[2:])) == 1
    return one_pixel and all(spec.block == 0 or spec.shape[1] % spec.block == 0 for spec in (data, out))


def _emit_flat(size: int, source: Any, target: Any, function: Callable[[Any, int], Any]) -> None:
    lanes, piece = 16, 4096
    if size >= 2 * piece:
        with loop(size // piece, size * 8) as i:
            map_elements(
                piece,
                lanes,
                lambda at, n: vstore(target, i * piece + at, function(vload(source, i * piece + at, n), n), n),
            )
    rest = size // piece * piece if size >= 2 * piece else 0
    if size > rest:
        map_elements(
            size - rest, lanes, lambda at, n: vstore(target, rest + at, function(vload(source, rest + at, n), n), n)
        )


def _geometry(spec: TensorSpec) -> tuple[int, int, int, int]:
    """Batch, channels, pixels, blocks."""
    return spec.shape[0], spec.shape[1], int(np.prod(spec.shape[2:])), spec.blocks


def _pixel_loop(count: int, pixels: int, emit: Callable[[Any, Any, int], None]) -> None:
    """`emit(plane, first pixel, lanes)` over `count` planes; the last group of 16 pixels overlaps its neighbour."""
    lanes = min(16, pixels)
    groups = -(-pixels // lanes)
    with loop(count * groups, count * pixels * 64) as index:
        plane, group = unravel(index, count, groups)
        emit(plane, T.min(group * lanes, pixels - lanes) if pixels % lanes else group * lanes, lanes)


def _block_loop(
    batch: int, channels: int, pixels: int, block: int, emit: Callable[[Any, Any, int, Any, int], None]
) -> None:
    """`emit(plane, block of channels, channels that exist, first pixel, lanes)` over all blocks of all samples."""
    whole, rest = divmod(channels, block)
    blocks = -(-channels // block)

    def every(plane: Any, first: Any, lanes: int) -> None:
        c = T.floormod(plane, blocks) if blocks > 1 else 0
        if not rest or not whole:
            emit(plane, c, rest or block, first, lanes)
            return
        with T.If(c < whole):
            with T.Then():
                emit(plane, c, block, first, lanes)
            with T.Else():
                emit(plane, c, rest, first, lanes)

    _pixel_loop(batch * blocks, pixels, every)


def _emit_blocking(out: TensorSpec, source: Any, target: Any, function: Callable[[Any, int], Any]) -> None:
    """Plain -> blocked: load 16 pixels of each channel, apply the function, transpose, store whole pixels."""
    batch, channels, pixels, blocks = _geometry(out)
    block = out.block

    def emit(plane: Any, c: Any, valid: int, first: Any, lanes: int) -> None:
        # plane counts (n, c): n * blocks + c.
        n = T.floordiv(plane, blocks) if blocks > 1 else plane
        base = (n * channels + c * block) * pixels + first
        zero = vector(tirx.const(0, out.dtype), lanes)
        rows = [function(vload(source, base + i * pixels, lanes), lanes) if i < valid else zero for i in range(block)]
        vstore(target, (plane * pixels + first) * block, _transposed(rows, lanes), lanes * block)

    _block_loop(batch, channels, pixels, block, emit)


def _emit_unblocking(data: TensorSpec, source: Any, target: Any, function: Callable[[Any, int], Any]) -> None:
    """Blocked -> plain: load whole pixels, take channels apart, apply the function, store those that exist."""
    batch, channels, pixels, blocks = _geometry(data)
    block = data.block

    def emit(plane: Any, c: Any, valid: int, first: Any, lanes: int) -> None:
        n = T.floordiv(plane, blocks) if blocks > 1 else plane
        base = (n * channels + c * block) * pixels + first
        loaded = vload(source, (plane * pixels + first) * block, lanes * block)
        for i in range(valid):
            row = (
                tirx.Shuffle([loaded], [p * block + i for p in range(lanes)])
                if lanes > 1
                else tirx.Shuffle([loaded], [i])
            )
            vstore(target, base + i * pixels, function(row, lanes), lanes)

    _block_loop(batch, channels, pixels, block, emit)


def _emit_reblocking(
    data: TensorSpec, out: TensorSpec, source: Any, target: Any, function: Callable[[Any, int], Any]
) -> None:
    """Blocked -> blocked otherwise (rare: a network input that integer operators read directly): channel by channel."""
    batch, channels, pixels, blocks = _geometry(out)
    total = batch * blocks * pixels
    with loop(total, total * BLOCK * 8) as index:
        n, c, p = unravel(index, batch, blocks, pixels)
        with T.serial(0, out.block) as i:
            channel = T.min(c * out.block + i, channels - 1)
            at = ((n * data.blocks + T.floordiv(channel, data.block)) * pixels + p) * data.block + T.floormod(
                channel, data.block
            )
            vstore(target, index * out.block + i, function(source[at], 1), 1)


def _transposed(rows: list[Any], lanes: int) -> Any:
    """Vectors by channel -> one vector [pixel, channel], by repeatedly interleaving; the number of rows is a power of
    two.
    """
    width = lanes
    while len(rows) > 1:
        half = len(rows) // 2
        order = [index for i in range(width) for index in (i, width + i)]
        rows = [tirx.Shuffle([rows[i], rows[half + i]], order) for i in range(half)]
        width *= 2
    return rows[0]
