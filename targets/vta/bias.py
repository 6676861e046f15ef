"""Biases as products: one more reduction step on a constant tile, a micro-operation per accumulator tile.

    bias = 1 * w0 + (-128) * w1 + (-128) * w2 + ...        lanes of the constant tile hold 1, -128, -128, ...; 8 bits

The ALU takes two cycles to add a vector to a tile, the array takes one; and vectors need not be loaded. The weights of
a block are four times as large as its vector, so a layer of few positions, whose time is that of its weights, keeps the
vector, and so does a bias that one tile of products does not reach.
"""

from __future__ import annotations

import numpy as np

from lpsn_tvm.schedules.vta.ops import Gemm, Plane, Span, Step, Tap, Vector
from lpsn_tvm.targets.vta.epilogue import add_steps
from lpsn_tvm.targets.vta.forms import Array
from lpsn_tvm.targets.vta.gemm import Rectangle
from lpsn_tvm.targets.vta.lower_context import Context

FEW_POSITIONS = 128
"""Below this many accumulator tiles per block the weights of a bias cost more than its products save."""


def bias_steps(
    context: Context, name: str, result: Rectangle, tiles: tuple[int, int], per_channel: Array
) -> list[Step]:
    """Add a number per channel to the accumulators: nothing, an immediate, products, or a vector.

    Parameters
    ----------
    context : Context
        Its pool takes the constants.
    name : str
        Of the layer.
    result : Rectangle
        The accumulators.
    tiles : (height, width)
        Accumulator tiles of a block at this point: fewer than the result's after a pooling.
    per_channel : int[C]
        What to add.
    """
    steps = add_steps(context, name, result.form, per_channel)
    if not any(isinstance(step, Vector) for step in steps) or tiles[0] * tiles[1] < FEW_POSITIONS:
        return steps
    config, block = context.config, context.block
    digits = _digits(result.form.per_lane(np.asarray(per_channel, np.int64)), config.inp_bits, config.wgt_bits, block)
    if digits is None:
        return steps
    data, weights = digits
    batches = context.batches(result.image[0])
    region = context.pool.add_data(f"{name}.one", np.broadcast_to(data, (batches, config.batch, block)))
    placed = context.pool.add_weights(f"{name}.bias", weights.reshape(-1, 1, 1, config.block_out, block))
    blocks = result.form.lanes // config.block_out
    y, x = (Span(0, 1, count) for count in tiles)
    everywhere = Tap(y, x, Span(0, 0, y.count), Span(0, 0, x.count), 0)
    plane = Plane.dense(region, 0, batches, 1, 1, 1)
    return [Gemm(plane, (everywhere,), placed.region, 0, placed.output_stride, 0, 1, (0,) * blocks)]


def _digits(constants: Array, data_bits: int, weight_bits: int, lanes: int) -> tuple[Array, Array] | None:
    """int[lanes] of data and int[n, lanes] of weights whose products are the constants int[n]; None if they are too
    large. The data are the same for all constants: 1, powers of what a weight counts to where a datum exceeds it, and
    in every other lane the most negative datum, whose products are the largest.
    """
    largest, half = 1 << (data_bits - 1), 1 << (weight_bits - 1)
    units = [1]
    while units[-1] * 2 * half < largest:
        units.append(units[-1] * 2 * half)
    rest, weights = constants, np.zeros((len(constants), lanes), np.int64)
    for lane, (unit, above) in enumerate(zip(units, [*units[1:], largest], strict=True)):
        base = above // unit
        weights[:, lane] = (rest + base // 2) % base - base // 2
        rest = (rest - weights[:, lane]) // base
    rest = -rest
    for lane in range(len(units), lanes):
        weights[:, lane] = np.clip(rest, 1 - half, half - 1)
        rest = rest - weights[:, lane]
    return None if np.any(rest) else (np.array(units + [-largest] * (lanes - len(units))), weights)
