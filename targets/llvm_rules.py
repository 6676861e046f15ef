"""The dispatch table of the llvm backend: operator -> kernel builders, asked in order; the first that does not return
None is taken.
"""

from __future__ import annotations

from lpsn_tvm.schedules.kernel import Builder
from lpsn_tvm.schedules.llvm import concat, data_movement, elementwise, lookup, normalization, pooling, resize
from lpsn_tvm.schedules.llvm.conv2d_float import conv2d_float
from lpsn_tvm.schedules.llvm.conv2d_int8 import conv2d
from lpsn_tvm.schedules.llvm.conv2d_transpose_float import conv2d_transpose_float
from lpsn_tvm.schedules.llvm.conv2d_transpose_int8 import conv2d_transpose
from lpsn_tvm.schedules.llvm.convert import dequantize, quantize, requantize
from lpsn_tvm.schedules.llvm.dense_float import dense_float
from lpsn_tvm.schedules.llvm.dense_int8 import dense
from lpsn_tvm.schedules.llvm.depthwise_float import depthwise_float
from lpsn_tvm.schedules.llvm.depthwise_int8 import depthwise

RULES: dict[str, tuple[Builder, ...]] = {
    # integers
    "lpsn.quantize": (quantize,),
    "lpsn.dequantize": (dequantize,),
    "lpsn.requantize": (requantize,),
    "lpsn.conv2d": (depthwise, conv2d),
    "lpsn.conv2d_transpose": (conv2d_transpose,),
    "lpsn.dense": (dense,),
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
    "lpsn.float_conv2d": (depthwise_float, conv2d_float),
    "lpsn.float_conv2d_transpose": (conv2d_transpose_float,),
    "lpsn.float_dense": (dense_float,),
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
    "lpsn.float_instance_norm": (normalization.float_instance_norm,),
    "lpsn.float_softmax": (normalization.float_softmax,),
}
