"""Filters over inputs of few channels, whose k-steps hold several taps: rearranged so that a k-step is whole filter
rows or equal parts of one, and its pieces are as long as memory allows.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from lpsn_tvm.schedules.cuda.geometry import ConvGeometry, fit_columns

Array = npt.NDArray[Any]


def rearrange(weight: Array, geometry: ConvGeometry) -> tuple[Array, ConvGeometry]:
    """Neighbouring columns of the input become channels where the stride allows, then zeros widen the filter.

    With a stride of 2, windows begin at columns of equal parity: a pair of pixels of 4 channels is one of 8, in the
    same memory. A 7 x 7 filter with 3 columns of padding becomes 7 x 4 of 8 channels with 2 columns of padding, its
    first column of weights zero.

    Parameters
    ----------
    weight : int8[O, C, kh, kw]
        One group; C at most `geometry.in_block`.
    geometry : ConvGeometry
        With the layer's own kernel and an `in_block` below 32.

    Returns
    -------
    int8[O, C', kh, kw'] and its geometry.
    """
    g = geometry
    fold = _fold(g)
    block = g.in_block * fold
    left = -(-g.pads[1] // fold)
    before = left * fold - g.pads[1]
    columns = fit_columns(-(-(weight.shape[3] + before) // fold), block)
    out, channels, rows, width = weight.shape
    wide = np.zeros((out, g.in_block, rows, columns * fold), np.int8)
    wide[:, :channels, :, before : before + width] = weight
    folded = wide.reshape(out, g.in_block, rows, columns, fold).transpose(0, 4, 1, 2, 3)
    geometry = replace(
        g,
        in_block=block,
        in_fold=fold,
        in_size=(g.in_size[0], g.in_size[1] // fold),
        kernel=(rows, columns),
        strides=(g.strides[0], g.strides[1] // fold),
        pads=(g.pads[0], left, g.pads[2], g.pads[3]),
    )
    return np.ascontiguousarray(folded).reshape(out, block, rows, columns), geometry


def _fold(g: ConvGeometry) -> int:
    """Columns that become one: windows begin at multiples of it, so does what follows the image."""
    for fold in (4, 2):
        if g.in_block * fold <= 16 and g.strides[1] % fold == 0 == g.in_size[1] % fold and g.dilation[1] == 1:
            return fold
    return 1
