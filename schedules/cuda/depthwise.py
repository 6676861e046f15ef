"""`lpsn.conv2d` in groups of one or a few channels: any kernel, stride, dilation and padding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from lpsn_tvm.schedules.cuda.conv2d_mma import is_supported
from lpsn_tvm.schedules.cuda.conv2d_transpose_mma import phased_constants
from lpsn_tvm.schedules.cuda.depthwise_core import convolution
from lpsn_tvm.schedules.cuda.depthwise_plan import (
    COLUMNS,
    MOST_REGISTERS,
    ROWS,
    THREADS,
    WORD,
    DepthwiseGeometry,
    DepthwiseTile,
    candidates,
    estimate,
    features,
    registers_of,
)
from lpsn_tvm.schedules.cuda.epilogue import has_table, saturation_of, tables
from lpsn_tvm.schedules.cuda.geometry import TABLE, Interleave
from lpsn_tvm.schedules.cuda.isa import BLOCK, CudaIsa
from lpsn_tvm.schedules.cuda.weights import parameters
from lpsn_tvm.schedules.cuda.window_sums import convolution_window, transposed_window
from lpsn_tvm.schedules.kernel import Array, Kernel, TensorSpec
from lpsn_tvm.schedules.template import Config, Template


def depthwise(
    inputs: tuple[TensorSpec, ...],
    constants: Mapping[str, Array],
    attrs: Mapping[str, Any],
    isa: CudaIsa,
    tile: DepthwiseTile | None = None,
) -> Kernel | None:
    """Kernel of `quant.conv2d` with a constant weight and as many output as input channels in groups of 1, 2 or 4, or
    8 where there are no matrix instructions (with them, zeros between groups cost less); `tile` overrides the choice.
    """
    data, weight = inputs[0], constants.get("weight")
    if weight is None or data.dtype not in ("uint8", "int8"):
        return None
    group, channels = weight.shape[1], data.shape[1]
    is_narrow = group in (1, 2, 4) or (group == 8 and not isa.has_mma_s8)
    if not is_narrow or int(attrs.get("groups", 1)) * group != channels or weight.shape[0] != channels:
        return None
    if int(attrs.get("block_size", 1)) > 1:
        return None
    window = convolution_window(data.shape, weight.shape[2:], attrs)
    data = data.with_block(data.block if data.block in (8, 16, BLOCK) else block_of(data.shape[1]))
    out = TensorSpec((*data.shape[:2], *window.size), str(attrs.get("out_dtype", "uint8")), data.block)
    if not is_supported(inputs, out):
        return None
    geometry = DepthwiseGeometry(
        batch=data.shape[0],
        blocks=data.blocks,
        block=data.block,
        in_size=(data.shape[2], data.shape[3]),
        out_size=window.size,
        in_dtype=data.dtype,
        out_dtype=out.dtype,
        kernel=window.kernel,
        strides=window.strides,
        dilation=window.dilation,
        pads=window.padding,
        has_residual=len(inputs) == 2,
        tile=DepthwiseTile(1, 1),
        group=group,
        saturation=saturation_of(constants, attrs, out.dtype, isa),
        has_table=has_table(attrs),
    )
    made = make_template(geometry, isa, constants, attrs, (data, out))
    return made.make(asdict(tile)) if tile else made.kernel()


def block_of(channels: int) -> int:
    """Channel block of an input that has none: the smallest that holds all, whole octets."""
    return next((block for block in (8, 16) if channels <= block), BLOCK)


def choose_tile(geometry: DepthwiseGeometry, isa: CudaIsa) -> DepthwiseTile:
    """The tile of least estimated time."""
    fitting = [replace(geometry, tile=tile) for tile in candidates(geometry.out_size)]
    small = [g for g in fitting if registers_of(g) <= MOST_REGISTERS] or fitting[:1]
    return min(small, key=lambda g: estimate(g, isa)).tile


def depthwise_transpose(
    inputs: tuple[TensorSpec, ...],
    constants: Mapping[str, Array],
    attrs: Mapping[str, Any],
    isa: CudaIsa,
    tile: DepthwiseTile | None = None,
) -> Kernel | None:
    """Kernel of `quant.conv2d_transpose` with as many output as input channels in groups of 1, 2 or 4 and without
    dilation: a convolution per position within a stride, all of the same words; `tile` overrides the choice.
    """
    data, weight = inputs[0], constants.get("weight")
    if weight is None or data.dtype not in ("uint8", "int8") or tuple(attrs.get("dilation", (1, 1))) != (1, 1):
        return None
    group, groups, channels = weight.shape[1], int(attrs.get("groups", 1)), data.shape[1]
    if group not in (1, 2, 4) or groups * group != channels or len(inputs) != 1:
        return None
    window = transposed_window(data.shape, weight.shape[2:], attrs)
    data = data.with_block(BLOCK)
    out = TensorSpec((*data.shape[:2], *window.size), str(attrs.get("out_dtype", "uint8")), BLOCK)
    if not is_supported(inputs, out):
        return None
    (kh, kw), (sy, sx), crop = window.kernel, window.strides, window.padding
    # [groups, input, output channel of a group, ...] -> [input channel of a group, output channel, ...]
    split = weight.reshape(groups, group, group, kh, kw).transpose(1, 0, 2, 3, 4).reshape(group, channels, kh, kw)
    phased = phased_constants({**constants, "weight": split}, (sy, sx), out.blocks, int(attrs.get("x_zero_point", 0)))
    taps = (-(-kh // sy), -(-kw // sx))
    geometry = DepthwiseGeometry(
        batch=data.shape[0],
        blocks=data.blocks,
        block=BLOCK,
        in_size=(data.shape[2], data.shape[3]),
        # Windows that begin before the image too: cropping decides what is written.
        out_size=(-(-(window.size[0] + crop[0]) // sy), -(-(window.size[1] + crop[1]) // sx)),
        in_dtype=data.dtype,
        out_dtype=out.dtype,
        kernel=taps,
        strides=(1, 1),
        dilation=(1, 1),
        pads=(taps[0] - 1, taps[1] - 1),
        has_residual=False,
        tile=DepthwiseTile(1, 1),
        group=group,
        interleave=Interleave((sy, sx), crop, window.size),
        saturation=saturation_of(phased, attrs, out.dtype, isa),
        has_table=has_table(attrs),
    )
    made = make_template(geometry, isa, phased, attrs, (data, out))
    return made.make(asdict(tile)) if tile else made.kernel()


def make_template(
    geometry: DepthwiseGeometry,
    isa: CudaIsa,
    constants: Mapping[str, Array],
    attrs: Mapping[str, Any],
    specs: tuple[TensorSpec, TensorSpec],
) -> Template:
    """The ways to make a kernel; the tile of `geometry` does not count, `specs` are input and output."""
    choices = {
        "columns": tuple(c for c in COLUMNS if c <= geometry.out_size[1]),
        "rows": tuple(r for r in ROWS if r <= geometry.out_size[0]),
        "threads": THREADS,
    }

    def with_tile(config: Config) -> DepthwiseGeometry:
        tile = DepthwiseTile(int(config["columns"]), int(config["rows"]), int(config["threads"]))
        return replace(geometry, tile=tile)

    return Template(
        "depthwise",
        {"geometry": {k: v for k, v in asdict(geometry).items() if k != "tile"}, "isa": asdict(isa)},
        choices,
        asdict(choose_tile(geometry, isa)),
        lambda config: make_kernel(with_tile(config), constants, attrs, specs),
        lambda config: registers_of(with_tile(config)) <= MOST_REGISTERS or config == {**config, **_SMALLEST},
        lambda config: features(with_tile(config), isa),
    )


_SMALLEST = {"columns": 1, "rows": 1}
"""Always allowed: however large the window, something has to compute it."""


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    """What JSON made lists of."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def remake(workload: Mapping[str, Any]) -> Template:
    """The template of a workload, with constants of zeros."""
    given = _tuples(workload["geometry"])
    if given["interleave"] is not None:
        given["interleave"] = Interleave(**_tuples(given["interleave"]))
    geometry = DepthwiseGeometry(**given, tile=DepthwiseTile(1, 1))
    g, channels = geometry, geometry.blocks * geometry.block
    constants: dict[str, Array] = {
        "weight": np.zeros((g.phases * channels, g.group, *g.kernel), np.int8),
        "bias": np.zeros(g.phases * channels, np.int32),
        "scale": np.ones(g.phases * channels, np.float32),
    }
    data = TensorSpec((g.batch, channels, *g.in_size), g.in_dtype, g.block)
    out = TensorSpec((g.batch, channels, *g.out_shape[2:4]), g.out_dtype, g.block)
    low = -TABLE // 2 if g.out_dtype == "int8" else 0
    last = {"qmin": low, "out_dtype": g.out_dtype, "table": tuple(range(low, low + TABLE))} if g.has_table else {}
    return make_template(geometry, CudaIsa(**workload["isa"]), constants, last, (data, out))


def make_kernel(
    geometry: DepthwiseGeometry,
    constants: Mapping[str, Array],
    attrs: Mapping[str, Any],
    specs: tuple[TensorSpec, TensorSpec],
) -> Kernel:
    """The kernel of a geometry; `specs` are input and output. With phases, constants are those of
    `conv2d_transpose_mma.phased_constants`.
    """
    data, out = specs
    floats, integers, padding = parameters(attrs, data.dtype, 0)
    packed = (
        pack_weight(constants["weight"], geometry),
        _per_channel(constants, "bias", "int32", geometry),
        _per_channel(constants, "scale", "float32", geometry),
        floats,
        integers,
        np.full(geometry.padding_shape, padding[0], data.dtype),
        *tables(attrs),
    )
    wanted = (data, out) if geometry.has_residual else (data,)
    return Kernel(lambda: convolution(geometry), packed, out, ("depthwise", geometry), wanted)


def _per_channel(constants: Mapping[str, Array], name: str, dtype: str, geometry: DepthwiseGeometry) -> Array:
    """One value, or one per channel, in blocks; zero beyond the channels."""
    count = constants["weight"].shape[0]
    full = np.zeros(geometry.parameter_shape, dtype)
    full.reshape(-1)[:count] = np.broadcast_to(np.asarray(constants[name]).reshape(-1), (count,))
    return full


def pack_weight(weight: Array, geometry: DepthwiseGeometry) -> Array:
    """int8[phases * C, channels of a group, kh, kw] -> int8[phases * blocks, kw * sets of weights, channels, 4].

    A word of three or four rows holds them in order. One of two rows holds them twice, for an even and an odd channel
    (the other's weights are zero), one of one row holds four channels.
    """
    g = geometry
    blocks = g.phases * g.blocks
    full = np.zeros((blocks * g.block, g.group, *g.kernel), np.int8)
    full[: weight.shape[0]] = weight
    split = full.reshape(blocks, g.block, g.group, *g.kernel)
    packed = np.zeros((blocks, g.kernel[1], len(g.plan.factors), g.block, WORD), np.int8)
    for at, (taps, half) in enumerate(g.plan.factors):
        for i, tap in enumerate(taps):
            for member in range(g.group if tap is not None else 0):
                lane, byte = _bytes_of(g, len(taps), i, member, half)
                packed[:, :, at, lane, byte] = split[:, lane, member, tap].transpose(0, 2, 1)
    return packed.reshape(g.weight_shape)


def _bytes_of(g: DepthwiseGeometry, rows: int, i: int, member: int, half: int | None) -> tuple[Array, Array]:
    """Channels, and the byte of each one's word that is row `i` of `rows` of channel `member` of its group."""
    lane = np.arange(g.block)
    if rows > 2:
        return lane, np.full_like(lane, i)
    if rows == 2:
        return lane, lane % 2 * 2 + i
    source = lane // g.group * g.group + member
    if half is not None:
        lane = lane[source // WORD % 2 == half]
        source = lane // g.group * g.group + member
    return lane, source % WORD
