"""The dispatch table of the cuda backend: operator -> kernel builders, asked in order; the first that does not return
None is taken.
"""

from __future__ import annotations

from lpsn_tvm.schedules.cuda import (
    block_reduction,
    concat,
    convert,
    data_movement,
    direct,
    direct_float,
    elementwise,
    lookup,
    pooling,
    resize,
)
from lpsn_tvm.schedules.cuda.conv2d_mma import conv2d
from lpsn_tvm.schedules.cuda.conv2d_transpose_mma import conv2d_transpose
from lpsn_tvm.schedules.cuda.dense import dense
from lpsn_tvm.schedules.kernel import Builder

RULES: dict[str, tuple[Builder, ...]] = {
    # integers
    "lpsn.quantize": (convert.quantize,),
    "lpsn.dequantize": (convert.dequantize,),
    "lpsn.requantize": (elementwise.requantize,),
    "lpsn.conv2d": (direct.depthwise, conv2d, direct.conv2d),
    "lpsn.conv2d_transpose": (conv2d_transpose, direct.conv2d_transpose),
    "lpsn.dense": (dense, direct.dense),
    "lpsn.add": (elementwise.add,),
    "lpsn.multiply": (elementwise.multiply,),
    "lpsn.lookup": (lookup.lookup,),
    "lpsn.channel_lookup": (lookup.channel_lookup,),
    "lpsn.concat": (concat.concat,),
    "lpsn.max_pool2d": (pooling.max_pool2d,),
    "lpsn.avg_pool2d": (pooling.avg_pool2d,),
    "lpsn.global_avg_pool2d": (pooling.global_avg_pool2d,),
    # integers or floats
    "lpsn.resize_nearest": (resize.resize_nearest,),
    "lpsn.resize_linear": (resize.resize_linear,),
    "lpsn.pad": (resize.pad,),
    "lpsn.strided_slice": (data_movement.strided_slice,),
    "lpsn.depth_to_space": (data_movement.depth_to_space,),
    "lpsn.reshape": (data_movement.reshape,),
    "lpsn.transpose": (data_movement.transpose,),
    # floats
    "lpsn.float_conv2d": (direct_float.float_conv2d,),
    "lpsn.float_conv2d_transpose": (direct_float.float_conv2d_transpose,),
    "lpsn.float_dense": (direct_float.float_dense,),
    "lpsn.float_elementwise": (elementwise.float_elementwise,),
    "lpsn.float_max_pool2d": (pooling.max_pool2d,),
    "lpsn.float_avg_pool2d": (pooling.float_avg_pool2d,),
    "lpsn.float_global_avg_pool2d": (pooling.float_global_avg_pool2d,),
    "lpsn.float_concat": (concat.float_concat,),
    "lpsn.float_resize_linear": (resize.resize_linear,),
    "lpsn.float_pad": (resize.pad,),
    "lpsn.float_resize_nearest": (resize.resize_nearest,),
    "lpsn.float_strided_slice": (data_movement.strided_slice,),
    "lpsn.float_depth_to_space": (data_movement.depth_to_space,),
    "lpsn.float_reshape": (data_movement.reshape,),
    "lpsn.float_transpose": (data_movement.transpose,),
    "lpsn.float_instance_norm": (block_reduction.float_instance_norm,),
    "lpsn.float_softmax": (block_reduction.float_softmax,),
}
