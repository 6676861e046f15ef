"""One small torch function per Relax operator.

A factory is called once per graph node, when the interpreter is built: it reads the node's attributes (`Node`) and
returns the function that is called with tensors. Nothing of TVM is touched while the network runs. Values of the graph
have the batch in axis 0; the batch at run time may differ from the traced one, and layers may have lost channels, so
functions read extents from their operands. Only reshape has targets that were traced: see
`lpsn_tvm.interpreter_shapes`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from lpsn_tvm.interpreter_elementwise import ELEMENTWISE
from lpsn_tvm.interpreter_layers import conv2d, conv2d_transpose, matmul
from lpsn_tvm.interpreter_node import Function, Node
from lpsn_tvm.interpreter_pooling import adaptive_avg_pool2d, avg_pool2d, max_pool2d
from lpsn_tvm.interpreter_resize import resize2d
from lpsn_tvm.interpreter_shapes import broadcast_to, concat, flatten, reshape, strided_slice

Tensor = torch.Tensor
__all__ = ["FACTORIES", "Function", "Node"]


def _plain(function: Function) -> Callable[[Node], Function]:
    return lambda _: function


def _clip(node: Node) -> Function:
    low, high = float(node.attrs["min"]), float(node.attrs["max"])
    return lambda x: torch.clamp(x, low, high)


def _leaky_relu(node: Node) -> Function:
    alpha = float(node.attrs["alpha"])
    return lambda x: functional.leaky_relu(x, alpha)


def _prelu(node: Node) -> Function:
    axis = int(node.attrs["axis"]) % len(node.shape)

    def run(x: Tensor, alpha: Tensor) -> Tensor:
        shape = [1] * x.ndim
        shape[axis] = -1
        return torch.where(x > 0, x, x * (alpha.reshape(shape) if alpha.numel() > 1 else alpha.reshape(())))

    return run


def _softmax(function: Function) -> Callable[[Node], Function]:
    def factory(node: Node) -> Function:
        axis = int(node.attrs["axis"])
        return lambda x: function(x, dim=axis)

    return factory


def _softplus(node: Node) -> Function:
    beta, threshold = float(node.attrs["beta"]), float(node.attrs["threshold"])
    return lambda x: functional.softplus(x, beta, threshold)


def _axes(node: Node) -> tuple[int, ...]:
    axis = node.attrs.get("axis")
    if axis is None:
        return tuple(range(len(node.in_shapes[0])))
    return (int(axis),) if isinstance(axis, int) else tuple(int(a) for a in axis)


def _reduce(function: Callable[..., Any]) -> Callable[[Node], Function]:
    def factory(node: Node) -> Function:
        axes, keepdims = _axes(node), bool(node.attrs.get("keepdims", False))
        result: Function = lambda x: function(x, dim=axes, keepdim=keepdims)  # noqa: E731
        return result

    return factory


def _variance(x: Tensor, dim: tuple[int, ...], keepdim: bool) -> Tensor:
    return torch.var(x, dim=dim, keepdim=keepdim, correction=0)


def _std(x: Tensor, dim: tuple[int, ...], keepdim: bool) -> Tensor:
    return torch.std(x, dim=dim, keepdim=keepdim, correction=0)


def _prod(x: Tensor, dim: tuple[int, ...], keepdim: bool) -> Tensor:
    for axis in sorted((a % x.ndim for a in dim), reverse=True):
        x = torch.prod(x, dim=axis, keepdim=keepdim)
    return x


def _expand_dims(node: Node) -> Function:
    rank = len(node.shape)
    axes = sorted(a % rank for a in _axes(node))

    def run(x: Tensor) -> Tensor:
        for axis in axes:
            x = x.unsqueeze(axis)
        return x

    return run


def _squeeze(node: Node) -> Function:
    shape = node.in_shapes[0]
    axis = node.attrs.get("axis")
    axes = tuple(i for i, e in enumerate(shape) if e == 1 and i > 0) if axis is None else _axes(node)
    if axis is None and shape[0] == 1:
        raise node.refuse("squeeze without axes would drop the batch axis")
    return lambda x: torch.squeeze(x, axes)


def _permute(node: Node) -> Function:
    axes = node.attrs.get("axes") or tuple(reversed(range(len(node.shape))))
    return lambda x: x.permute(axes)


_PAD_MODES = {
    "constant": "constant",
    "reflect": "reflect",
    "replicate": "replicate",
    "edge": "replicate",
    "circular": "circular",
}


def _pad(node: Node) -> Function:
    width = tuple(int(w) for w in node.attrs["pad_width"])
    mode = _PAD_MODES.get(str(node.attrs.get("pad_mode", "constant")))
    if mode is None:
        raise node.refuse(f"pad mode {node.attrs['pad_mode']}; allowed are {', '.join(_PAD_MODES)}")
    value = float(node.attrs.get("pad_value", 0.0))
    pairs = [width[2 * i : 2 * i + 2] for i in range(len(width) // 2)]
    # torch wants the last axis first, and modes other than constant only for the spatial axes.
    if mode == "constant":
        flat = [w for pair in reversed(pairs) for w in pair]
        return lambda x: functional.pad(x, flat, value=value)
    if any(w for pair in pairs[:2] for w in pair):
        raise node.refuse(f"{mode} padding of batch or channels")
    flat = [w for pair in reversed(pairs[2:]) for w in pair]
    return lambda x: functional.pad(x, flat, mode=mode)


def _group_norm(node: Node) -> Function:
    groups, epsilon = int(node.attrs["num_groups"]), float(node.attrs["epsilon"])
    if int(node.attrs["channel_axis"]) % len(node.shape) != 1:
        raise node.refuse("channels must be axis 1")
    return lambda x, gamma, beta: functional.group_norm(x, groups, gamma, beta, epsilon)


def _norm_over_axes(node: Node) -> Function:
    """layer_norm (gamma, beta over the normalised axes) and instance_norm (over the channel axis)."""
    rank = len(node.shape)
    axes = tuple(int(a) % rank for a in node.attrs["axes"])
    epsilon = float(node.attrs["epsilon"])
    axis = node.attrs.get("channel_axis")
    affine = axes if axis is None else (int(axis) % rank,)
    center, scale = bool(node.attrs.get("center", True)), bool(node.attrs.get("scale", True))

    def run(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        shape = [x.shape[i] if i in affine else 1 for i in range(x.ndim)]
        out = (x - x.mean(axes, True)) * torch.rsqrt(torch.var(x, axes, correction=0, keepdim=True) + epsilon)
        out = out * gamma.reshape(shape) if scale else out
        return out + beta.reshape(shape) if center else out

    return run


def _take(node: Node) -> Function:
    axis = node.attrs.get("axis")
    if axis is None:
        raise node.refuse("take without an axis")
    rank = len(node.in_shapes[0])
    axis = int(axis) % rank

    def run(x: Tensor, index: Tensor) -> Tensor:
        index = index.to(torch.int64)
        index = torch.where(index < 0, index + x.shape[axis], index)
        out = torch.index_select(x, axis, index.reshape(-1))
        return out.reshape(*x.shape[:axis], *index.shape, *x.shape[axis + 1 :])

    return run


def _astype(node: Node) -> Function:
    dtype = getattr(torch, str(node.attrs["dtype"]).replace("bool_", "bool"), None)
    if dtype is None:
        raise node.refuse(f"cast to {node.attrs['dtype']}")
    return lambda x: x.to(dtype)


def _pixel_shuffle(node: Node) -> Function:
    factor = int(node.attrs["upscale_factor"])
    return lambda x: functional.pixel_shuffle(x, factor)


def _flip(node: Node) -> Function:
    axis = int(node.attrs["axis"])
    return lambda x: torch.flip(x, (axis,))


def _tile(node: Node) -> Function:
    repeats = tuple(int(r) for r in node.attrs["repeats"])
    return lambda x: torch.tile(x, repeats)


def _repeat(node: Node) -> Function:
    repeats, axis = int(node.attrs["repeats"]), node.attrs.get("axis")
    return lambda x: torch.repeat_interleave(x, repeats, dim=axis)


def _stack(node: Node) -> Function:
    axis = int(node.attrs.get("axis") or 0)
    return lambda *tensors: torch.stack(tensors, dim=axis)


FACTORIES: dict[str, Callable[[Node], Function]] = {
    **{f"relax.{name}": _plain(function) for name, function in ELEMENTWISE.items()},
    "relax.nn.conv2d": conv2d,
    "relax.nn.conv2d_transpose": conv2d_transpose,
    "relax.matmul": matmul,
    "relax.clip": _clip,
    "relax.nn.leakyrelu": _leaky_relu,
    "relax.nn.prelu": _prelu,
    "relax.nn.softmax": _softmax(torch.softmax),
    "relax.nn.log_softmax": _softmax(torch.log_softmax),
    "relax.nn.softplus": _softplus,
    "relax.nn.max_pool2d": max_pool2d,
    "relax.nn.avg_pool2d": avg_pool2d,
    "relax.nn.adaptive_avg_pool2d": adaptive_avg_pool2d,
    "relax.mean": _reduce(torch.mean),
    "relax.sum": _reduce(torch.sum),
    "relax.max": _reduce(torch.amax),
    "relax.min": _reduce(torch.amin),
    "relax.prod": _reduce(_prod),
    "relax.variance": _reduce(_variance),
    "relax.std": _reduce(_std),
    "relax.concat": concat,
    "relax.stack": _stack,
    "relax.strided_slice": strided_slice,
    "relax.nn.pad": _pad,
    "relax.image.resize2d": resize2d,
    "relax.reshape": reshape,
    "relax.flatten": flatten,
    "relax.broadcast_to": broadcast_to,
    "relax.expand_dims": _expand_dims,
    "relax.squeeze": _squeeze,
    "relax.permute_dims": _permute,
    "relax.nn.group_norm": _group_norm,
    "relax.nn.layer_norm": _norm_over_axes,
    "relax.nn.instance_norm": _norm_over_axes,
    "relax.nn.pixel_shuffle": _pixel_shuffle,
    "relax.take": _take,
    "relax.astype": _astype,
    "relax.flip": _flip,
    "relax.tile": _tile,
    "relax.repeat": _repeat,
}
"""Relax operator -> factory of its torch function."""
