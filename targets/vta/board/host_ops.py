"""Host operations of a bundle: compiled C where it is there and fits the operands, numpy elsewhere.

Needs Python >= 3.8 and numpy, nothing else. `run` means the numpy operator of the same name, bit for bit (softmax: up
to float rounding). The C library is looked for beside this file (`host_ops-<machine>.so`), else compiled with `cc`
where there is one; it is used only after it has answered a few questions as numpy does.
"""

# ruff: noqa: UP006, UP035, UP045  (runs on Python 3.8)
from __future__ import annotations

from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence

import numpy as np

_BYTES = (np.dtype(np.int8), np.dtype(np.uint8))
_MODES = {"float32": 0, "half_even": 1, "half_up": 2}
_PARTS = {"whole": 0, "high": 1, "low": 2}


class HostOps:
    """Runs host steps.

    Parameters
    ----------
    operators : mapping
        Name -> numpy function.
    library : CDLL, optional
        From `open_library`; None: numpy for everything.
    integer_multiplier : callable
        `float -> (m, t)` of the reference arithmetic.
    """

    def __init__(
        self,
        operators: Mapping[str, Callable[..., Any]],
        library: Any,
        integer_multiplier: Callable[[float], Any],
    ) -> None:
        self.operators = operators
        self.integer_multiplier = integer_multiplier
        self.library = library
        if library is not None and not self._agrees():
            self.library = None

    def run(self, op: str, arrays: Sequence[Any], attrs: Mapping[str, Any]) -> Any:
        """The operator's result on `arrays`."""
        compiled = _COMPILED.get(op)
        if self.library is not None and compiled is not None:
            result = compiled(self, [np.ascontiguousarray(a) for a in arrays], attrs)
            if result is not None:
                return result
        return np.asarray(self.operators[op](*arrays, **attrs))

    def pack(self, layout: Any, array: Any) -> Any:
        """Value -> uint8[layout.size], as the accelerator reads it."""
        gathered, limit = hasattr(layout, "lanes"), 1 << (layout.bits - 1)
        fits = layout.bits == 8 or not (gathered or array.min(initial=0) < -limit or array.max(initial=0) >= limit)
        if self.library is None or layout.planes != 1 or array.dtype != np.int8 or not fits:
            return np.frombuffer(layout.pack(array), np.uint8)
        if tuple(array.shape) != tuple(layout.shape):
            raise ValueError(f"shape {array.shape} is not {tuple(layout.shape)}")
        source, out = np.ascontiguousarray(array), np.zeros(layout.size, np.uint8)
        n, c, height, width = _image(layout.shape)
        if gathered:
            lanes = [(-1, 0, 0, 0) if x is None else (x.channel, x.dy, x.dx, _PARTS[x.part]) for x in layout.lanes]
            shape = _ints(n, c, height, width, layout.batch, layout.block, layout.height, layout.width,
                          *layout.strides, layout.low_bits, len(lanes))  # fmt: skip
            self.call("pack_gather", source, out, shape, np.array(lanes, np.int32), layout.bits)
        else:
            shape = _ints(n, c, height * width, layout.batch, layout.block)
            self.call("pack_tiles", source, out, shape, layout.bits)
        return out

    def unpack(self, layout: Any, data: Any) -> Any:
        """uint8[layout.size] -> value."""
        if self.library is None:
            return layout.unpack(np.ascontiguousarray(data).data)
        n, c, height, width = _image(layout.shape)
        shape = _ints(n, c, height * width, layout.batch, layout.block)
        source, out = np.ascontiguousarray(data), np.empty(layout.shape, np.int8 if layout.planes == 1 else np.int32)
        if layout.planes == 1:
            self.call("unpack_tiles", source, out, shape, layout.bits)
        else:
            values = layout.tiles // layout.planes * layout.batch * layout.block
            self.call("unpack_planes", source, out, shape, layout.bits, layout.planes, values)
        return out

    def call(self, function: str, *arguments: Any) -> Any:
        """A C function; arrays are passed as pointers (and stay alive during the call)."""
        return getattr(self.library, function)(*[a.ctypes.data if isinstance(a, np.ndarray) else a for a in arguments])

    def _agrees(self) -> bool:
        """Compiled and numpy answers are equal on ties, limits and signs: a guard against a wrong compiler flag."""
        x = np.concatenate([np.arange(-70, 70) / 4, [1e9, -1e9, 0.1]]).astype(np.float32)
        attrs = {"inv_scale": 1.7, "zero_point": 3, "qmin": -128, "qmax": 127, "out_dtype": "int8"}
        q = np.asarray(self.operators["lpsn.quantize"](x, **attrs))
        result = _quantize(self, [x], attrs)
        shift = {"multiplier": 0.25, "in_zero_point": 0, "out_zero_point": 0, "qmin": -8, "qmax": 7,
                 "out_dtype": "int8", "rounding": "half_up"}  # fmt: skip
        same = np.array_equal(q, result)
        return same and np.array_equal(_requantize(self, [q], shift), self.operators["lpsn.requantize"](q, **shift))


# --- one function per compiled operator: None means "not for me"


def _quantize(ops: HostOps, a: List[Any], k: Mapping[str, Any]) -> Any:
    if a[0].dtype != np.float32:
        return None
    out = np.empty(a[0].shape, k["out_dtype"])
    ops.call("quantize", a[0], out, out.size, k["inv_scale"], k["zero_point"], k["qmin"], k["qmax"])
    return out


def _dequantize(ops: HostOps, a: List[Any], k: Mapping[str, Any]) -> Any:
    out = np.empty(a[0].shape, np.float32)
    if a[0].dtype == np.int32:
        ops.call("dequantize_int32", a[0], out, out.size, k["scale"], k["zero_point"])
    elif a[0].dtype in _BYTES:
        ops.call("dequantize", a[0], out, out.size, _signed(a[0]), k["scale"], k["zero_point"])
    else:
        return None
    return out


def _scale(ops: HostOps, a: List[Any], k: Mapping[str, Any]) -> Any:
    acc, scale = a[0], np.ascontiguousarray(a[1], np.float32)
    if acc.dtype != np.int32 or acc.ndim < 2 or not acc.size or scale.shape != acc.shape[1:2]:
        return None
    out = np.empty(acc.shape, np.float32)
    ops.call("scale_int32", acc, scale, out, acc.size, acc.shape[1], acc.size // (acc.shape[0] * acc.shape[1]))
    return out


def _requantize(ops: HostOps, a: List[Any], k: Mapping[str, Any]) -> Any:
    if a[0].dtype not in _BYTES:
        return None
    out = np.empty(a[0].shape, k["out_dtype"])
    if k.get("rounding") == "half_up":
        exponent = _exponent(k["multiplier"])
        if exponent is None or k["in_zero_point"] or k["out_zero_point"]:
            return None
        ops.call("requantize_half_up", a[0], out, out.size, _signed(a[0]), exponent, k["qmin"], k["qmax"])
    else:
        ops.call("requantize", a[0], out, out.size, _signed(a[0]), k["multiplier"], k["in_zero_point"],
                 k["out_zero_point"], k["qmin"], k["qmax"])  # fmt: skip
    return out


def _lookup(ops: HostOps, a: List[Any], k: Mapping[str, Any]) -> Any:
    return _table(ops, a[0], a[1], k["qmin"], 1, max(a[0].size, 1))


def _channel_lookup(ops: HostOps, a: List[Any], k: Mapping[str, Any]) -> Any:
    inner = int(np.prod(a[0].shape[2:], dtype=np.int64))
    return _table(ops, a[0], a[1], k["qmin"], a[0].shape[1], inner) if inner else None


def _table(ops: HostOps, q: Any, table: Any, qmin: int, channels: int, inner: int) -> Any:
    entries = table.shape[-1]
    # C reads where numpy would raise: only values that the table has.
    if q.dtype not in _BYTES or not q.size or int(q.min()) < qmin or int(q.max()) - qmin >= entries:
        return None
    out = np.empty(q.shape, table.dtype)
    ops.call("lookup", q, table, out, q.size, _signed(q), qmin, channels, inner, entries, table.itemsize)
    return out


def _add(ops: HostOps, a: List[Any], k: Mapping[str, Any]) -> Any:
    x, y = a
    if x.shape != y.shape or x.dtype not in _BYTES or y.dtype not in _BYTES:
        return None
    out = np.empty(x.shape, k["out_dtype"])
    points = (k["a_zero_point"], k["b_zero_point"], k["out_zero_point"])
    if k.get("rounding") == "half_up":
        left, right = _exponent(k["a_multiplier"]), _exponent(k["b_multiplier"])
        if left is None or right is None or any(points) or abs(left - right) > 16:
            return None
        shift = max(0, -min(left, right))
        ops.call("add_half_up", x, y, out, out.size, _signed(x), _signed(y), left + shift, right + shift, shift,
                 k["qmin"], k["qmax"])  # fmt: skip
    else:
        ops.call("add", x, y, out, out.size, _signed(x), _signed(y), k["a_multiplier"], k["b_multiplier"], *points,
                 k["qmin"], k["qmax"])  # fmt: skip
    return out


def _multiply(ops: HostOps, a: List[Any], k: Mapping[str, Any]) -> Any:
    x, y = a
    if x.dtype not in _BYTES or y.dtype not in _BYTES or not x.size:
        return None
    per_channel = x.ndim == 4 and y.shape == (*x.shape[:2], 1, 1)
    if x.shape != y.shape and not per_channel:
        return None
    out = np.empty(x.shape, k["out_dtype"])
    ops.call("multiply", x, y, out, x.size, x.size // y.size, _signed(x), _signed(y), k["multiplier"],
             k["a_zero_point"], k["b_zero_point"], k["out_zero_point"], k["qmin"], k["qmax"])  # fmt: skip
    return out


def _max_pool2d(ops: HostOps, a: List[Any], k: Mapping[str, Any]) -> Any:
    x = a[0]
    if x.dtype not in _BYTES or x.ndim != 4:
        return None
    top, left, bottom, right = k["padding"]
    dilation = k.get("dilation", (1, 1))
    slack = [s - 1 if k.get("ceil_mode") else 0 for s in k["strides"]]
    extents = (x.shape[2] + top + bottom, x.shape[3] + left + right)
    oh, ow = [(extents[i] - dilation[i] * (k["kernel"][i] - 1) - 1 + slack[i]) // k["strides"][i] + 1 for i in range(2)]
    out = np.empty((x.shape[0], x.shape[1], oh, ow), x.dtype)
    window = _ints(*k["kernel"], *k["strides"], top, left, *dilation)
    ops.call("max_pool2d", x, out, x.shape[0] * x.shape[1], x.shape[2], x.shape[3], oh, ow, window, _signed(x))
    return out


def _global_avg_pool2d(ops: HostOps, a: List[Any], k: Mapping[str, Any]) -> Any:
    x = a[0]
    if x.dtype not in _BYTES or x.ndim != 4:
        return None
    out = np.empty((*x.shape[:2], 1, 1), k["out_dtype"])
    planes, pixels = x.shape[0] * x.shape[1], x.shape[2] * x.shape[3]
    if k.get("rounding") == "half_up":
        if k["in_zero_point"] or k["out_zero_point"] or pixels > 1 << 16:
            return None
        factor, shift = ops.integer_multiplier(float(np.float32(k["multiplier"])))
        ops.call("global_avg_pool2d_half_up", x, out, planes, pixels, _signed(x), factor, shift, k["qmin"], k["qmax"])
    else:
        ops.call("global_avg_pool2d", x, out, planes, pixels, _signed(x), k["multiplier"], k["in_zero_point"],
                 k["out_zero_point"], k["qmin"], k["qmax"])  # fmt: skip
    return out


def _resize_linear(ops: HostOps, a: List[Any], k: Mapping[str, Any]) -> Any:
    x = a[0]
    if x.dtype not in _BYTES or x.ndim != 4:
        return None
    rows, columns = _ints(*k["rows"]), _ints(*k["columns"])
    out = np.empty((*x.shape[:2], len(rows) // 2, len(columns) // 2), x.dtype)
    ops.call("resize_linear", x, out, x.shape[0] * x.shape[1], x.shape[2], x.shape[3], out.shape[2], out.shape[3],
             _signed(x), rows, _ints(*k["row_weights"]), columns, _ints(*k["column_weights"]), k["qmin"],
             k["qmax"])  # fmt: skip
    return out


def _float_softmax(ops: HostOps, a: List[Any], k: Mapping[str, Any]) -> Any:
    x, axis = a[0], k["axis"] % a[0].ndim
    if x.dtype != np.float32 or not x.size:
        return None
    out = np.empty_like(x)
    outer, inner = int(np.prod(x.shape[:axis])), int(np.prod(x.shape[axis + 1 :]))
    ops.call("float_softmax", x, out, outer, x.shape[axis], inner)
    return out


def _conv2d(ops: HostOps, a: List[Any], k: Mapping[str, Any]) -> Any:
    if len(a) != 4 or a[0].dtype not in _BYTES or a[1].dtype != np.int8 or k.get("x_zero_point"):
        return None
    (n, c, height, width), (outputs, _, kh, kw) = a[0].shape, a[1].shape
    top, left, bottom, right = k["padding"]
    (sh, sw), (dh, dw) = k["strides"], k.get("dilation", (1, 1))
    oh, ow = (height + top + bottom - dh * (kh - 1) - 1) // sh + 1, (width + left + right - dw * (kw - 1) - 1) // sw + 1
    shape = _ints(n, c, height, width, outputs, oh, ow, kh, kw, sh, sw, top, left, dh, dw, k.get("groups", 1))
    return _layer(ops, "conv2d", a, (n, outputs, oh, ow), (shape,), k)


def _dense(ops: HostOps, a: List[Any], k: Mapping[str, Any]) -> Any:
    if len(a) != 4 or a[0].ndim != 2 or a[0].dtype not in _BYTES or a[1].dtype != np.int8 or k.get("x_zero_point"):
        return None
    shape = (a[0].shape[0], a[1].shape[1])
    return _layer(ops, "dense", a, shape, (a[0].shape[0], a[0].shape[1], a[1].shape[1]), k)


def _layer(ops: HostOps, name: str, a: List[Any], shape: Any, extents: Any, k: Mapping[str, Any]) -> Any:
    """A weighted layer without residual; the scale becomes shifts where rounding is half up."""
    out_dtype = k.get("out_dtype", "uint8")
    mode = "float32" if out_dtype == "float32" else k.get("rounding", "half_even")
    scale = np.ascontiguousarray(np.broadcast_to(np.asarray(a[3], np.float32).reshape(-1), (a[2].size,)))
    if mode == "half_up":
        mantissa, exponent = np.frexp(scale)
        if np.any(mantissa != 0.5) or np.any(exponent > 1) or np.any(exponent < -29) or k.get("out_zero_point"):
            return None
        scale = (1 - exponent).astype(np.float32)
    out = np.empty(shape, out_dtype)
    failed = ops.call(name, a[0], a[1], a[2].astype(np.int32), scale, out, *extents, _signed(a[0]), _MODES[mode],
                      k.get("out_zero_point", 0), k.get("qmin", 0), k.get("qmax", 255))  # fmt: skip
    return None if failed else out


_COMPILED: Dict[str, Callable[[HostOps, List[Any], Mapping[str, Any]], Any]] = {
    f"lpsn.{function.__name__[1:]}": function
    for function in (
        _quantize, _dequantize, _requantize, _lookup, _channel_lookup, _add, _multiply, _max_pool2d,
        _global_avg_pool2d, _resize_linear, _float_softmax, _conv2d, _dense,
    )
}  # fmt: skip


_COMPILED["vta.scale"] = _scale


def _signed(array: Any) -> int:
    return int(array.dtype == np.int8)


def _ints(*values: Any) -> Any:
    return np.array(values, np.int32)


def _exponent(multiplier: float) -> Optional[int]:
    """log2 of a power of two within 2**-30..2**16, else None (numpy then says what is wrong)."""
    mantissa, exponent = np.frexp(np.float64(multiplier))
    return int(exponent) - 1 if mantissa == 0.5 and -30 <= exponent - 1 <= 16 else None


def _image(shape: Sequence[int]) -> Any:
    """NCHW of [N], [N, K], [N, C, W], [N, C, H, W]."""
    n, c = (shape[0], shape[1]) if len(shape) > 1 else (shape[0], 1)
    rest = tuple(shape[2:])
    return (n, c, 1, 1) if not rest else (n, c, 1, rest[0]) if len(rest) == 1 else (n, c, rest[0], rest[1])
