"""The code of depthwise convolutions: each thread makes a few rows and columns of eight channels with dot products of
four bytes.

A thread reads its input once into registers, 8 bytes of 8 channels at a time; what neighbouring threads share comes
from the cache of their block. No shared memory and no barrier: nothing waits but for memory. See `depthwise_plan`.

Never run on a GPU so far: results are checked in emulation, instructions in machine code.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm.script.ir_builder import tirx as T

from lpsn_tvm.schedules.cuda import intrinsics
from lpsn_tvm.schedules.cuda.depthwise_plan import CHANNELS, HALVES, WORD, DepthwiseGeometry, Use
from lpsn_tvm.schedules.cuda.epilogue import Epilogue
from lpsn_tvm.schedules.cuda.geometry import TABLE
from lpsn_tvm.schedules.cuda.tir import call, launch, pointer, prim_func, registers, rolled, store, unravel, when

Words = Callable[[Use, int, int], Any]
"""(use, index of the input column, channel) -> the register that holds what the channel multiplies."""
WORDS = {2: 2, 3: 4, 4: 4}
"""Registers that the words of four channels take, by the rows in them."""


def convolution(geometry: DepthwiseGeometry) -> Any:
    """The PrimFunc (data, [residual], weight, bias, scale, floats, integers, padding, [table], out)."""
    g = geometry
    arguments: list[tuple[str, tuple[int, ...], str]] = [("data", g.in_shape, g.in_dtype)]
    if g.has_residual:
        arguments.append(("residual", g.out_shape, g.out_dtype))
    arguments += [
        ("weight", g.weight_shape, "int8"),
        ("bias", g.parameter_shape, "int32"),
        ("scale", g.parameter_shape, "float32"),
        ("floats", (4,), "float32"),
        ("integers", (4,), "int32"),
        ("padding", g.padding_shape, g.in_dtype),
        *([("table", (TABLE,), "uint8")] if g.has_table else []),
        ("out", g.out_shape, g.out_dtype),
    ]

    def body(data: Any, *rest: Any) -> None:
        residual = rest[0] if g.has_residual else None
        weight, bias, scale, floats, integers, padding, *table, out = rest[1:] if g.has_residual else rest
        epilogue = Epilogue(
            bias, scale, floats, integers, residual, out, g.out_dtype, False,
            saturation=g.saturation, table=table[0] if table else None,
        )  # fmt: skip
        z, y, x = g.grid
        with launch((z * y * x,), g.threads) as ((block,), thread):
            tile_z, tile_y, tile_x = unravel(block, z, y, x)
            along_z, along_y, along_x, octet = unravel(thread, *g.block_shape, g.octets)
            place = [
                tile * size + along
                for tile, size, along in zip(
                    (tile_z, tile_y, tile_x), g.block_shape, (along_z, along_y, along_x), strict=True
                )
            ]
            with when(_exists(g, place)):
                _thread(g, data, weight, padding, epilogue, place, octet * CHANNELS)

    return prim_func(arguments, body)


def _exists(g: DepthwiseGeometry, place: list[Any]) -> Any:
    """Whether a thread has anything to do."""
    inside: Any = True
    for at, total, part in zip(place, (g.images, *g.strips), g.block_shape, strict=True):
        if total % part:
            inside = at < total if inside is True else T.And(inside, at < total)
    return inside


def _thread(
    g: DepthwiseGeometry, data: Any, weight: Any, padding: Any, epilogue: Epilogue, place: list[Any], channel: Any
) -> None:
    """All that one thread does."""
    image, strip_y, strip_x = place
    top, left = strip_y * (g.tile.rows * g.strides[0]), strip_x * (g.tile.columns * g.strides[1])
    raw = _load(g, data, padding, image, (top - g.pads[0], left - g.pads[1]), channel)
    words = _transpose(g, raw)
    block = T.truncmod(image, g.blocks) if g.batch > 1 else image
    if g.interleave is None:
        _outputs(g, words, weight, epilogue, place, block, channel, (0, 0))
        return
    with rolled(g.phases) as phase:
        shift = unravel(phase, *g.interleave.strides)
        _outputs(g, words, weight, epilogue, place, phase * g.blocks + block, channel, (shift[0], shift[1]))


def _outputs(
    g: DepthwiseGeometry, words: Words, weight: Any, epilogue: Epilogue, place: list[Any], block: Any, channel: Any,
    phase: tuple[Any, Any],
) -> None:  # fmt: skip
    """The pixels of one phase; `block` says which weights."""
    epilogue.load(block * g.block + channel)
    size = g.tile.rows * g.tile.columns
    sums = registers(size * CHANNELS)
    for i in range(size * CHANNELS):
        store(sums, i, epilogue.bias_values[i % CHANNELS])
    _multiply(g, sums, words, weight, block * (g.weight_shape[1] * g.block) + channel)
    for i in range(size):
        at, inside = _pixel(g, place, divmod(i, g.tile.columns), phase)
        with when(inside):
            epilogue.finish([sums[i * CHANNELS + c] for c in range(CHANNELS)], at * g.block + channel, has_bias=True)


def _pixel(g: DepthwiseGeometry, place: list[Any], within: tuple[int, int], phase: tuple[Any, Any]) -> tuple[Any, Any]:
    """Where a pixel of a thread lies in the output, and whether it does."""
    image, *strips = place
    position, inside = [], True
    for i, (strip, size) in enumerate(zip(strips, (g.tile.rows, g.tile.columns), strict=True)):
        at = strip * size + within[i]
        if g.interleave is not None:
            at = at * g.interleave.strides[i] + phase[i] - g.interleave.crop[i]
            within_image = T.And(at >= 0, at < g.interleave.size[i])
            inside = within_image if inside is True else T.And(inside, within_image)
        elif g.out_size[i] % size:
            inside = at < g.out_size[i] if inside is True else T.And(inside, at < g.out_size[i])
        position.append(at)
    height, width = g.out_shape[2:4]
    return (image * height + position[0]) * width + position[1], inside


def _load(g: DepthwiseGeometry, data: Any, padding: Any, image: Any, origin: tuple[Any, Any], channel: Any) -> Any:
    """Registers [input row, input column, half]."""
    raw = registers(len(g.plan.rows) * len(g.columns) * HALVES)
    height, width = g.in_size
    function = load_row(g)
    for i, row in enumerate(g.plan.rows):
        y = origin[0] + row
        at = ((image * height + y) * width + origin[1]) * g.block + channel
        last = (g.strips[0] - 1) * g.tile.rows * g.strides[0] - g.pads[0] + row
        inside = T.bool(True)
        if row < g.pads[0]:
            inside = y >= 0
        if last >= height:
            inside = T.And(inside, y < height)
        to = pointer(raw, i * len(g.columns) * HALVES)
        call(function, to, pointer(data, at), pointer(padding, channel), inside, origin[1])
    return raw


def load_row(g: DepthwiseGeometry) -> intrinsics.Function:
    """Eight bytes of every column of a row; only columns that can lie outside of the image for some thread are asked
    whether they do.
    """
    width = g.in_size[1]
    last = (g.strips[1] - 1) * g.tile.columns * g.strides[1] - g.pads[1]
    lines = []
    for i, column in enumerate(g.columns):
        may_leave = column < g.pads[1] or last + column >= width
        source = f"((unsigned int)(left + {column}) < {width}u ? line : pad)" if may_leave else "line"
        lines.append(f"  *(int2*)(to + {i * HALVES}) = *(const int2*)({source} + {column * g.block});")
    checked = "".join("x" if "?" in line else "-" for line in lines)
    name = f"lpsn_row_{g.block}_{width}_" + "_".join(
        f"{column}{mark}" for column, mark in zip(g.columns, checked.replace("-", "i"), strict=True)
    )
    body = "\n".join(["  const signed char* pad = (const signed char*)padding;",
                      "  const signed char* line = is_inside ? (const signed char*)row : pad;", *lines])  # fmt: skip
    signature = f"void {name}(int* to, const void* row, const void* padding, bool is_inside, int left)"
    return name, f"__device__ __forceinline__ {signature} {{\n{body}\n}}\n"


def _permute(a: str, b: str, selector: str) -> str:
    return f"__byte_perm({a}, {b}, 0x{selector})"


def _transposed(rows: int) -> intrinsics.Function:
    """`rows` words of four channels -> words of one or two channels."""
    name = f"lpsn_transpose_{rows}"
    low, high = _permute("r0", "r1", "5140"), _permute("r0", "r1", "7362")
    lines = [f"  unsigned int low = {low}, high = {high};"]
    if rows == 2:
        lines += ["  to[0] = (int)low;", "  to[1] = (int)high;"]
    elif rows == 3:
        lines += [
            f"  to[{i}] = (int){_permute(half, 'r2', selector)};"
            for i, (half, selector) in enumerate((("low", "4410"), ("low", "5532"), ("high", "6610"), ("high", "7732")))
        ]
    else:
        lines.append(f"  unsigned int low2 = {_permute('r2', 'r3', '5140')}, high2 = {_permute('r2', 'r3', '7362')};")
        lines += [
            f"  to[{i}] = (int){_permute(half, half + '2', selector)};"
            for i, (half, selector) in enumerate((("low", "5410"), ("low", "7632"), ("high", "5410"), ("high", "7632")))
        ]
    given = ", ".join(f"unsigned int r{i}" for i in range(rows))
    return name, f"__device__ __forceinline__ void {name}(int* to, {given}) {{\n" + "\n".join(lines) + "\n}\n"


def _transpose(g: DepthwiseGeometry, raw: Any) -> Words:
    """Every word of every input column; one row alone is its own word."""
    rows, columns = g.plan.rows, len(g.columns)
    buffers = {word: registers(columns * HALVES * WORDS[len(word)]) for word in g.plan.words if len(word) > 1}

    def raw_at(row: int, column: int, half: int) -> Any:
        return raw[(rows.index(row) * columns + column) * HALVES + half]

    for word, buffer in buffers.items():
        for column in range(columns):
            for half in range(HALVES):
                to = pointer(buffer, (column * HALVES + half) * WORDS[len(word)])
                given = [T.reinterpret("uint32", raw_at(row, column, half)) for row in word]
                call(_transposed(len(word)), to, *given)

    def at(use: Use, column: int, channel: int) -> Any:
        half, lane = divmod(channel, 4)
        members = g.plan.words[use.word]
        if len(members) == 1:
            return raw_at(members[0], column, half if use.half is None else use.half)
        within = lane // 2 if len(members) == 2 else lane
        return buffers[members][(column * HALVES + half) * WORDS[len(members)] + within]

    return at


def _multiply(g: DepthwiseGeometry, sums: Any, words: Words, weight: Any, first: Any) -> None:
    """sums[y, x, channel] += products; `first` is the thread's first word of the packed weight."""
    dot = intrinsics.dot(g.in_dtype)
    count = len(g.plan.factors)
    factors = registers(count * CHANNELS)
    for s in range(g.kernel[1]):
        for f in range(count):
            for half in range(HALVES):
                source = pointer(weight, (first + (s * count + f) * g.block + half * 4) * WORD)
                call(intrinsics.copy(16), pointer(factors, f * CHANNELS + half * 4), source)
        for use in g.plan.uses:
            f = g.plan.factors.index(use.factor)
            for x in range(g.tile.columns):
                column = g.columns.index(x * g.strides[1] + s * g.dilation[1])
                for c in range(CHANNELS):
                    at = (use.row * g.tile.columns + x) * CHANNELS + c
                    word = words(use, column, c)
                    store(sums, at, call(dot, word, factors[f * CHANNELS + c], sums[at], returns="int32"))
