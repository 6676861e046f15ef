"""Raw Relax -> canonical form (contract 1): the ordered list of small passes, and what can remain afterwards."""

from __future__ import annotations

from collections.abc import Callable

import tvm

from lpsn_tvm.passes.add_missing_bias import add_missing_bias
from lpsn_tvm.passes.affine_to_depthwise import affine_to_depthwise
from lpsn_tvm.passes.fold_affine import fold_affine
from lpsn_tvm.passes.fold_constants import fold_constants
from lpsn_tvm.passes.fold_zero_pad import fold_zero_pad
from lpsn_tvm.passes.normalize_dense import normalize_dense
from lpsn_tvm.passes.normalize_depth_to_space import normalize_depth_to_space
from lpsn_tvm.passes.normalize_elementwise import normalize_elementwise
from lpsn_tvm.passes.normalize_pooling import normalize_pooling
from lpsn_tvm.passes.remove_dead import remove_dead
from lpsn_tvm.passes.remove_identities import remove_identities
from lpsn_tvm.passes.sink_transposes import sink_transposes
from lpsn_tvm.passes.verify_canonical import verify_canonical

__all__ = ["PASSES", "canonicalize", "verify_canonical"]

Renames = dict[str, str]
Pass = Callable[[tvm.IRModule, Renames], tvm.IRModule]

PASSES: tuple[Pass, ...] = (
    fold_constants,  # what only depends on weights
    sink_transposes,  # channels first everywhere
    normalize_elementwise,  # constants second, scalars rank 0, one spelling per function
    normalize_dense,  # matmul(x, Const), bias [M]
    remove_identities,
    fold_zero_pad,  # into convolutions and pools
    add_missing_bias,  # every layer is acc, out
    fold_affine,  # batch norm and other per-channel affine maps into the layer before them
    affine_to_depthwise,  # what could not be folded
    normalize_pooling,
    remove_dead,  # so that "nobody else reads it" is seen
    normalize_depth_to_space,
    remove_identities,
    remove_dead,
)


def canonicalize(mod: tvm.IRModule, *, renamed: Renames | None = None, debug: bool = False) -> tvm.IRModule:
    """Bring the raw module of `import_model` into canonical form.

    Operators that can remain, with their conventions; anything else is an `UnsupportedOpError` of `verify_canonical`.
    All tensors are float32 and static. `Const` is a tensor constant, x and y are variables.

    Layers (contract 1; `out = add(acc, Const[1, C, 1, 1] or Const[M])` follows each):

    * `nn.conv2d(x, Const OIHW)`: strides (2), padding (4: top, left, bottom, right, all >= 0), dilation (2), groups,
      data_layout "NCHW", kernel_layout "OIHW". A convolution over [N, C, W] is one over [N, C, 1, W] between reshapes.
    * `nn.conv2d_transpose(x, Const IOHW)`: strides, padding (4), output_padding (2, each below its stride), groups;
      dilation is (1, 1): dilated kernels are spread out.
    * `matmul(x[N, K], Const[K, M])`.

    Functions of one tensor, elementwise:

    * `nn.relu`, `clip(x, lo, hi)` (finite floats, arguments 1 and 2), `nn.leakyrelu` (alpha), `nn.prelu(x, Const[C])`
      (axis 1), `sigmoid`, `tanh`, `nn.silu`, `nn.gelu`, `nn.gelu_tanh`, `nn.softplus`, `nn.selu`, `exp`, `log`, `sqrt`,
      `rsqrt`, `square`, `abs`, `negative`, `erf`, `floor`, `ceil`, `round`, `sin`, `cos`, `tan`, `atan`, `sign`.
    * With a scalar constant (rank 0, second): `add`, `multiply`, `maximum`, `minimum`, `power`. With it first:
      `divide(Const, x)`, `power(Const, x)`. `x - c`, `x / c` and `c - x` have become add and multiply.
    * Hard sigmoid is multiply, add, clip; hard swish is `multiply(x, multiply(clip(add(x, 3), 0, 6), 1/6))`;
      `multiply(x, sigmoid(x))` has become `nn.silu`.

    Two tensors, numpy broadcasting ([N, C, 1, 1] operands come from squeeze-excitation): `add`, `subtract`, `multiply`,
    `divide`, `maximum`, `minimum`, `power`. One operand, the second where the operator commutes, may be a Const that is
    neither scalar nor per channel (a positional embedding; rare).

    Shapes and data movement:

    * `concat(Tuple(x, ...), axis)`, axis >= 0.
    * `strided_slice(x, axes, begin, end, strides)`: arguments 1 to 4 are Tuples of integers, within the extents; with a
      negative stride `end` may be -(extent + 1), which means "through element 0".
    * `nn.pad(x)`: pad_width (2 * rank: before and after per axis), pad_mode "constant" | "reflect" | "replicate",
      pad_value. Zero pads in front of convolutions are gone.
    * `reshape(x, ShapeExpr)` (also flatten, squeeze, unsqueeze), `permute_dims` (axes always given), `broadcast_to`,
      `take(x, Const int64[K], axis, mode="clip")` (gather by constant indices).
    * `nn.pixel_shuffle(x, upscale_factor)`: depth-to-space in CRD order. DCR order has become CRD by permuting the
      channels of the layer before it, or a `take` in front. Space-to-depth is reshape, permute_dims, reshape. TVM
      cannot compile `pixel_shuffle`: see `expand_pixel_shuffle`.
    * `image.resize2d(x, ShapeExpr(H, W))`: layout "NCHW", method "nearest_neighbor" | "linear" | "cubic",
      coordinate_transformation_mode "half_pixel" | "align_corners" | "asymmetric" | "tf_half_pixel_for_nn",
      rounding_method (nearest) "round_prefer_floor" | "round_prefer_ceil" | "floor" | "ceil". Coordinates come from the
      ratio of the extents. Nearest by whole factors is "asymmetric", "floor" wherever that is the same function.

    Pooling and reductions:

    * `nn.max_pool2d`, `nn.avg_pool2d`: pool_size, strides, padding (4), dilation, layout "NCHW", ceil_mode False (the
      overhang is part of padding). max pads with -inf; avg counts real elements, or all padding if count_include_pad.
    * Global pooling is `mean(x, axis=[2, 3], keepdims=True)`, `max(x, axis=[2, 3], keepdims=True)`.
    * `mean`, `sum`, `max`, `min` over other axes (>= 0, ascending); `variance`.

    Float only: `nn.softmax`, `nn.log_softmax` (axis >= 0), `nn.instance_norm(x, Const[C], Const[C])` (channel_axis 1,
    all axes from 2 on, epsilon), `nn.group_norm(x, Const[C], Const[C])` (num_groups, channel_axis 1, axes from 2 on),
    `nn.layer_norm(x, Const, Const)` (last axes), `matmul` of two tensors or of `(Const, x)`.

    Parameters
    ----------
    mod : IRModule
        Of `import_model`.
    renamed : dict, optional
        Filled with raw name -> canonical name for values that now live under another variable (a batch norm folded into
        the layer before it).
    debug : bool
        Check after every pass that the module is well formed.

    Raises
    ------
    ModelError, UnsupportedOpError
        A rule of the canonical form cannot be reached; names node and rule.
    """
    names: Renames = {} if renamed is None else renamed
    for step in PASSES:
        mod = step(mod, names)
        if debug:
            _check_well_formed(mod, step)
    for name in list(names):
        while names[name] in names:
            names[name] = names[names[name]]
    verify_canonical(mod)
    return mod


def _check_well_formed(mod: tvm.IRModule, step: Pass) -> None:
    if not tvm.relax.analysis.check_well_formed(mod):
        raise AssertionError(f"the module is not well formed after {step.__name__}")
