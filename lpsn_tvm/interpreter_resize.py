"""`relax.image.resize2d` as torch functions, by the formulas of TVM's `topi.image.resize`."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch.nn import functional

from lpsn_tvm.interpreter_node import Node

Tensor = torch.Tensor


def source_positions(size: int, target: int, mode: str, start: float = 0.0, end: float = 1.0) -> np.ndarray:
    """float32[target]: where in the input each output pixel lies, by coordinate transformation mode."""
    x = np.arange(target, dtype=np.float32)
    scale = np.float32(size) / np.float32(target)
    if mode == "half_pixel" or (mode == "pytorch_half_pixel" and target > 1):
        return (x + np.float32(0.5)) * scale - np.float32(0.5)
    if mode == "pytorch_half_pixel":
        return np.zeros(target, np.float32)
    if mode == "align_corners":
        return np.float32(size - 1) / np.float32(max(target - 1, 1)) * x
    if mode == "asymmetric":
        # Whole factors are divided exactly: 1 / 3 * 3 must not fall below 1.
        return x / np.float32(target // size) if target % size == 0 else scale * x
    if mode == "tf_half_pixel_for_nn":
        return (x + np.float32(0.5)) * scale
    if mode == "tf_crop_and_resize":
        if target == 1:
            return np.array([0.5 * (start + end) * (size - 1)], np.float32)
        return np.asarray(start * (size - 1) + x * (end - start) * (size - 1) / (target - 1), np.float32)
    raise ValueError(mode)


def nearest_indices(position: np.ndarray, size: int, rounding: str, mode: str) -> np.ndarray:
    """int64[target]: the input pixel of each output pixel."""
    rounding = rounding or ("round" if mode == "align_corners" else "floor")
    rules: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "round": np.rint,
        "round_prefer_floor": lambda p: np.ceil(p - 0.5),
        "round_prefer_ceil": lambda p: np.floor(p + 0.5),
        "floor": lambda p: np.floor(p + 1e-5),
        "ceil": lambda p: np.ceil(p - 1e-5),
    }
    return np.asarray(np.clip(rules[rounding](position), 0, size - 1), np.int64)


def interpolation_matrix(
    position: np.ndarray, size: int, method: str, alpha: float, exclude_outside: bool
) -> np.ndarray:
    """float32[target, size]: each output pixel as a weighted sum of input pixels; positions outside read the edge."""
    base = np.floor(position).astype(np.int64)
    t = (position - base).astype(np.float64)
    if method == "linear":
        offsets: tuple[int, ...] = (0, 1)
        weights = [1 - t, t]
    else:
        offsets = (-1, 0, 1, 2)
        weights = [
            alpha * (t**3 - 2 * t**2 + t),
            (alpha + 2) * t**3 - (3 + alpha) * t**2 + 1,
            -(alpha + 2) * t**3 + (3 + 2 * alpha) * t**2 - alpha * t,
            -alpha * t**3 + alpha * t**2,
        ]
    index = [base + offset for offset in offsets]
    if exclude_outside and method == "cubic":
        weights = [np.where((i < 0) | (i >= size), 0.0, w) for i, w in zip(index, weights, strict=True)]
        total = sum(weights)
        weights = [w / total for w in weights]
    matrix = np.zeros((len(position), size))
    for i, w in zip(index, weights, strict=True):
        np.add.at(matrix, (np.arange(len(position)), np.clip(i, 0, size - 1)), w)
    return matrix.astype(np.float32)


def resize2d(node: Node) -> Callable[..., Tensor]:
    """Nearest, linear or cubic resize of NCHW data."""
    attrs = node.attrs
    if attrs.get("layout", "NCHW") != "NCHW":
        raise node.refuse(f"data layout {attrs['layout']}; only NCHW is evaluated")
    size, target = node.in_shapes[0][2:], node.shape[2:]
    mode, method = str(attrs["coordinate_transformation_mode"]), str(attrs["method"])
    roi = tuple(attrs.get("roi") or (0.0, 0.0, 1.0, 1.0))
    try:
        positions = [source_positions(size[i], target[i], mode, float(roi[i]), float(roi[i + 2])) for i in range(2)]
    except ValueError:
        raise node.refuse(f"coordinate transformation mode {mode}") from None
    if method == "nearest_neighbor":
        run = _nearest(positions, size, str(attrs.get("rounding_method", "")), mode)
    elif method == "linear" and mode in ("half_pixel", "align_corners") and min(target) > 1:
        run = _native_linear(target, mode == "align_corners")
    elif method in ("linear", "cubic"):
        alpha, exclude = float(attrs.get("cubic_alpha", -0.75)), bool(attrs.get("cubic_exclude", 0))
        run = _weighted(
            [interpolation_matrix(p, s, method, alpha, exclude) for p, s in zip(positions, size, strict=True)]
        )
    else:
        raise node.refuse(f"method {method}; allowed are nearest_neighbor, linear, cubic")
    if mode == "tf_crop_and_resize":
        return _extrapolated(run, positions, size, float(attrs.get("extrapolation_value", 0.0)))
    return run


def _nearest(
    positions: list[np.ndarray], size: tuple[int, ...], rounding: str, mode: str
) -> Callable[[Tensor], Tensor]:
    rows, columns = (
        torch.from_numpy(nearest_indices(p, s, rounding, mode)) for p, s in zip(positions, size, strict=True)
    )
    return lambda x: x.index_select(2, rows.to(x.device)).index_select(3, columns.to(x.device))


def _native_linear(target: tuple[int, ...], aligns: bool) -> Callable[[Tensor], Tensor]:
    return lambda x: functional.interpolate(x, target, mode="bilinear", align_corners=aligns)


def _weighted(matrices: list[np.ndarray]) -> Callable[[Tensor], Tensor]:
    rows, columns = torch.from_numpy(matrices[0]), torch.from_numpy(matrices[1].T.copy())
    return lambda x: torch.matmul(torch.matmul(rows.to(x.device), x), columns.to(x.device))


def _extrapolated(
    run: Callable[[Tensor], Tensor], positions: list[np.ndarray], size: tuple[int, ...], value: float
) -> Callable[[Tensor], Tensor]:
    outside = [torch.from_numpy((p < 0) | (p > s - 1)) for p, s in zip(positions, size, strict=True)]
    mask = outside[0][:, None] | outside[1][None, :]
    return lambda x: run(x).masked_fill(mask.to(x.device), value)
