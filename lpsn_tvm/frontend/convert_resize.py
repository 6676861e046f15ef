"""Converter of Resize and Upsample.

Relax computes coordinates from the ratio of the extents, ONNX from the given scales; the two differ where `extent *
scale` is not whole. Source positions of both are compared here, so that what is imported means what the model says.
Source: the ONNX operator specification of Resize.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from tvm import relax

from lpsn_tvm.frontend.node import Array, Expr, Node

op = relax.op
_ROUNDING: dict[str, Callable[[Array], Array]] = {
    "round_prefer_floor": lambda x: np.ceil(x - 0.5),
    "round_prefer_ceil": lambda x: np.floor(x + 0.5),
    "floor": lambda x: np.floor(x + 1e-5),
    "ceil": lambda x: np.ceil(x - 1e-5),
}


def positions(extent: int, size: int, scale: float, mode: str) -> Array:
    """Source coordinate of every output element along one axis, float64[size]."""
    x = np.arange(size, dtype=np.float64)
    if mode == "asymmetric":
        return x / scale
    if mode == "align_corners":
        return x * (extent - 1) / (size - 1) if size > 1 else np.zeros(size)
    if mode == "tf_half_pixel_for_nn":
        return (x + 0.5) / scale
    if mode == "pytorch_half_pixel" and size == 1:
        return np.zeros(size)
    if mode == "half_pixel_symmetric":
        adjustment = size / (scale * extent)
        return extent / 2 * (1 - adjustment) + (x + 0.5) / scale - 0.5
    return (x + 0.5) / scale - 0.5


def resize(node: Node) -> Expr:
    """Resize and Upsample -> image.resize2d."""
    shape = node.shape()
    if len(shape) != 4:
        raise node.unsupported(f"resize of {len(shape)} dimensions; supported are 4")
    size, scales = _target(node)
    mode = {"nearest": "nearest_neighbor", "bilinear": "linear"}.get(
        node.attrs.get("mode", "nearest"), node.attrs.get("mode", "nearest")
    )
    upsample = node.op_type == "Upsample" or node.opset < 11
    coordinates = "asymmetric" if upsample else node.attrs.get("coordinate_transformation_mode", "half_pixel")
    rounding = "floor" if upsample else node.attrs.get("nearest_mode", "round_prefer_floor")
    if coordinates == "tf_crop_and_resize" or node.attrs.get("antialias", 0) or node.attrs.get("exclude_outside", 0):
        raise node.unsupported("tf_crop_and_resize, antialias and exclude_outside")
    ours = _coordinates(node, size, scales, mode, coordinates, rounding)
    if ours is None:
        raise node.unsupported(f"scales {scales} of {shape[2:]} do not give whole sizes; export the model with `sizes`")
    cubic = float(node.attrs.get("cubic_coeff_a", -0.75))
    call = op.image.resize2d(
        node.inputs[0],
        relax.ShapeExpr(list(size)),
        layout="NCHW",
        method=mode,
        coordinate_transformation_mode=ours[0],
        rounding_method=ours[1],
        cubic_alpha=cubic,
    )
    return node.emit(call)


def _coordinates(
    node: Node, size: tuple[int, int], scales: tuple[float, float], mode: str, coordinates: str, rounding: str
) -> tuple[str, str] | None:
    """Modes under which Relax reads the positions that the model means; the simplest first."""
    extents = node.shape()[2:]
    wanted = [positions(n, m, s, coordinates) for n, m, s in zip(extents, size, scales, strict=True)]
    whole = all(m % n == 0 for n, m in zip(extents, size, strict=True))
    nearest = mode == "nearest_neighbor"
    candidates = [("asymmetric", "floor")] if nearest and whole else []
    plain = "half_pixel" if coordinates in ("pytorch_half_pixel", "half_pixel_symmetric") else coordinates
    candidates += [(plain, rounding), ("asymmetric", rounding)]
    for candidate, way in candidates:
        ratio = [positions(n, m, m / n, candidate) for n, m in zip(extents, size, strict=True)]
        pairs: Any = zip(wanted, ratio, extents, strict=True)
        if nearest:
            same = all(np.array_equal(_index(a, n, rounding), _index(b, n, way)) for a, b, n in pairs)
        else:
            same = all(np.allclose(a.clip(0, n - 1), b.clip(0, n - 1), atol=1e-5) for a, b, n in pairs)
        if same:
            return candidate, way if nearest else "round_prefer_floor"
    return None


def _index(position: Array, extent: int, rounding: str) -> Array:
    return _ROUNDING[rounding](position).clip(0, extent - 1).astype(np.int64)


def _target(node: Node) -> tuple[tuple[int, int], tuple[float, float]]:
    """Output height and width, and the scales the model means."""
    shape = node.shape()
    axes = [axis % 4 for axis in node.attrs.get("axes", range(4))]
    first = 1 if node.op_type == "Upsample" or node.opset < 11 else 2
    scales = node.attrs.get("scales")
    if scales is None:
        array = node.constant(first, "scales")
        scales = None if array is None or not array.size else array.reshape(-1).tolist()
    full, factors = list(shape), [1.0] * 4
    if scales is not None:
        for axis, scale in zip(axes, scales, strict=True):
            full[axis], factors[axis] = int(np.floor(shape[axis] * np.float32(scale))), float(scale)
    else:
        sizes = node.constant(3, "sizes")
        if sizes is None:
            raise node.unsupported("neither scales nor sizes")
        if node.attrs.get("keep_aspect_ratio_policy", "stretch") != "stretch":
            raise node.unsupported("keep_aspect_ratio_policy; export with plain sizes")
        for axis, extent in zip(axes, sizes.reshape(-1).tolist(), strict=True):
            full[axis], factors[axis] = int(extent), int(extent) / shape[axis]
    if tuple(full[:2]) != shape[:2]:
        raise node.unsupported("resizing the batch or the channels")
    return (full[2], full[3]), (factors[2], factors[3])


CONVERTERS = {"Resize": resize, "Upsample": resize}
