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
    normalize_depth_to_space,
    remove_identities,
    remove_dead,
)


def canonicalize(mod: tvm.IRModule, *, renamed: Renames | None = None, debug: bool = False) -> tvm.IRModule:
    """Bring the raw module of `import_model` into canonical form.

    Operators that can remain, with their conventions; anything else is an `UnsupportedOpError` of `verify_canonical`. All tensors are float32 and static.
    Numbers in attributes are plain; `Const` is a tensor constant; x is a variable.

    Layers (contract 1; `out = relax.add(acc, Const[1, C, 1, 1] or [M])` follows each):
      * `nn.conv2d(x, Const OIHW)`: strides (2), padding (4: top, left, bottom, right, all >= 0), dilation (2), groups, data_layout "NCHW", kernel_layout "OIHW",
        out_dtype float32. Convolutions over [N, C, W] are reshaped to [N, C, 1, W] around it.
      * `nn.conv2d_transpose(x, Const IOHW)`: strides, padding (4), output_padding (2, each below its stride), dilation (1, 1) (dilated kernels are spread
        out), groups.
      * `matmul(x[N, K], Const[K, M])`.
    Functions of one tensor, elementwise: `nn.relu`, `clip(x, lo, hi)` (both finite, args 1 and 2 are scalar immediates), `nn.leakyrelu` (alpha), `nn.prelu(x, Const[C])`
      (axis 1), `sigmoid`, `tanh`, `nn.silu`, `nn.gelu`, `nn.gelu_tanh`, `nn.softplus`, `nn.selu`, `exp`, `log`, `sqrt`, `rsqrt`, `square`, `abs`, `negative`, `erf`,
      `floor`, `ceil`, `round`, `sin`, `cos`, `sign`, `tan`, `atan`; and with a scalar constant (rank 0 Const, always second unless noted)
      `add`, `multiply`, `maximum`, `minimum`, `power`, and `divide(Const, x)`, `power(Const, x)`. `subtract` and `divide` by constants, and `subtract(Const, x)`, have
      become `add` and `multiply`. Hard sigmoid is multiply, add, clip; hard swish is `multiply(x, multiply(clip(add(x, 3), 0, 6), 1/6))`;
      `multiply(x, sigmoid(x))` has become `nn.silu`.
    Two tensors: `add`, `subtract`, `multiply`, `divide`, `maximum`, `minimum`, `power` with numpy broadcasting ([N, C, 1, 1] operands come from squeeze-excitation).
      One operand, the second where the operator commutes, may be a Const of another shape than scalar or per-channel (a positional embedding; rare).
    Shape and data movement:
      * `concat(Tuple(x...), axis)`; `strided_slice(x, axes, begin, end, strides)`: arguments 1-4 are Tuples of integers, resolved: within the extent, axes >= 0; with a
        negative stride `end` may be -(extent + 1), which means "through element 0";
      * `nn.pad(x)`: pad_width (2 * rank, before and after per axis), pad_mode "constant" | "reflect" | "replicate", pad_value. Zero pads before layers are gone;
      * `reshape(x, ShapeExpr)` (flatten, squeeze, unsqueeze too), `permute_dims` (axes always given), `broadcast_to`, `take(x, Const int64[K], axis, mode="clip")` (channel gather);
      * `nn.pixel_shuffle(x, upscale_factor)`: depth-to-space, CRD order. DCR order has become CRD by permuting the channels of the layer before it, or a `take`
        in front. Space-to-depth is reshape, permute_dims, reshape;
      * `image.resize2d(x, ShapeExpr(H, W))`: layout "NCHW", method "nearest_neighbor" | "linear" | "cubic", coordinate_transformation_mode "half_pixel" | "align_corners" |
        "asymmetric" (| "tf_half_pixel_for_nn"), rounding_method "round_prefer_floor" | "round_prefer_ceil" | "floor" | "ceil" for nearest. A nearest resize by whole
        factors is always "asymmetric", "floor" when that is the same function.
    Pooling: `nn.max_pool2d`, `nn.avg_pool2d`: pool_size, strides, padding (4), dilation, ceil_mode always False (the overhang is part of padding), layout "NCHW"; max pads with
      -inf; avg counts real elements only, unless count_include_pad (then all of padding). Global: `mean(x, axis=[2, 3], keepdims=True)`, `max(x, axis=[2, 3], keepdims=True)`.
    Other reductions: `mean`, `sum`, `max`, `min`, `variance` over any axes (non-negative, ascending).
    Float only: `nn.softmax`, `nn.log_softmax` (axis >= 0), `nn.instance_norm(x, Const[C], Const[C])` (channel_axis 1, axes [2, 3], epsilon), `nn.group_norm`, `nn.layer_norm`,
      `matmul` of two tensors.

    Parameters
    ----------
    mod : IRModule
        Of `import_model`.
    renamed : dict, optional
        Filled with raw name -> canonical name for values that now live under another variable (a batch norm folded into the layer before it).
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
