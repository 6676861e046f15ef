"""From what was read to what the model sees: 8-bit data to a range, mean and deviation, or the user's function."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from lpsn_tvm.calibration_sources import Arrays, Signature
from lpsn_tvm.errors import CalibrationError
from lpsn_tvm.images import CHANNELS

Preprocessing = Mapping[str, Any] | Callable[[Any], Any]


def as_float(arrays: Arrays) -> Arrays:
    """Float32 copies; what leaves float32 becomes infinite and is refused by name later."""
    with np.errstate(over="ignore"):
        return {name: np.array(array, np.float32, order="C") for name, array in arrays.items()}


def preparation(
    arrays: Arrays, wanted: Signature, input_range: tuple[float, float] | None, preprocessing: Preprocessing | None
) -> tuple[Callable[[Arrays], Arrays], tuple[str, ...]]:
    """The function that prepares a batch, and what was decided on the way."""
    bytes_in = [name for name, array in arrays.items() if array.dtype == np.uint8]
    notes: tuple[str, ...] = ()
    if callable(preprocessing):
        function = preprocessing
        is_single = len(wanted.shapes) == 1

        def custom(batch: Arrays) -> Arrays:
            ready = batch if input_range is None else _mapped(batch, bytes_in, input_range)
            try:
                result = function(next(iter(ready.values())) if is_single else ready)
            except Exception as error:
                raise CalibrationError(f"preprocessing failed: {type(error).__name__}: {error}") from error
            return as_float(_named_result(result, wanted))

        return custom, notes
    low_high = input_range or (0.0, 1.0)
    if bytes_in and input_range is None:
        notes = (f"8-bit data of {', '.join(bytes_in)} was mapped from 0..255 to [0, 1]; input_range changes that",)
    affine = _affine(wanted, preprocessing)

    def standard(batch: Arrays) -> Arrays:
        ready = _mapped(batch, bytes_in, low_high)
        for name, (mean, inverse) in affine.items():
            ready[name] -= mean
            ready[name] *= inverse
        return ready

    return standard, notes


def _mapped(batch: Arrays, names: list[str], low_high: tuple[float, float]) -> Arrays:
    ready = as_float(batch)
    low, high = low_high
    for name in names:
        ready[name] *= np.float32((high - low) / 255.0)
        if low:
            ready[name] += np.float32(low)
    return ready


def _named_result(result: Any, wanted: Signature) -> Arrays:
    if isinstance(result, Mapping):
        if set(result) != set(wanted.shapes):
            raise CalibrationError(
                f"preprocessing returned {', '.join(map(str, result))}; "
                f"the model's inputs are {', '.join(wanted.shapes)}"
            )
        return {name: np.asarray(result[name]) for name in wanted.shapes}
    return {wanted.only("one array, returned by preprocessing,"): np.asarray(result)}


def _affine(wanted: Signature, preprocessing: Any) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Mean and 1 / std of each input, shaped for broadcasting."""
    if preprocessing is None:
        return {}
    if not isinstance(preprocessing, Mapping):
        raise CalibrationError(
            f"preprocessing is {type(preprocessing).__name__}; "
            "a callable, or a dict with mean and std, or one such dict per input"
        )
    if set(preprocessing) <= {"mean", "std"}:
        preprocessing = {
            name: preprocessing for name, shape in wanted.shapes.items() if len(shape) > 2 or len(wanted.shapes) == 1
        }
    unknown = [str(name) for name in preprocessing if name not in wanted.shapes]
    if unknown:
        raise CalibrationError(
            f"preprocessing names {', '.join(unknown)}; allowed are mean, std, {', '.join(wanted.shapes)}"
        )
    return {name: _channel_affine(name, wanted.shapes[name], options) for name, options in preprocessing.items()}


def _channel_affine(name: str, shape: tuple[int, ...], options: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    result = []
    axis = len(shape) - 1 if len(shape) == 4 and shape[1] not in CHANNELS and shape[3] in CHANNELS else 1
    for key, default in (("mean", 0.0), ("std", 1.0)):
        try:
            value = np.asarray(options.get(key, default), np.float32).reshape(-1)
        except (TypeError, ValueError) as error:
            raise CalibrationError(f"{key} of preprocessing is not made of numbers: {error}", where=name) from error
        if not np.isfinite(value).all() or (key == "std" and (value <= 0).any()):
            raise CalibrationError(
                f"{key} of preprocessing is {value.tolist()}; finite{', positive' * (key == 'std')}", where=name
            )
        if value.size not in (1, shape[axis] if len(shape) > 1 else 1):
            raise CalibrationError(f"{key} has {value.size} values, the input has {shape[axis]} channels", where=name)
        wide = [1] * len(shape)
        wide[axis if len(shape) > 1 else 0] = value.size
        result.append(value.reshape(wide))
    return result[0], np.float32(1.0) / result[1]
