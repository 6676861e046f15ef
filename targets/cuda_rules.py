"""The dispatch table of the cuda backend."""

from __future__ import annotations

from lpsn_tvm.schedules.cuda import block_reduction, convert, direct, direct_float
from lpsn_tvm.schedules.cuda.conv2d_mma import conv2d
from lpsn_tvm.schedules.cuda.conv2d_transpose_mma import conv2d_transpose
from lpsn_tvm.schedules.cuda.dense import dense
from lpsn_tvm.schedules.cuda.depthwise import depthwise, depthwise_transpose
from lpsn_tvm.schedules.cuda.maker import MAKER
from lpsn_tvm.schedules.rules import rules

RULES = rules(
    MAKER,
    {
        # integers
        "lpsn.quantize": (convert.quantize,),
        "lpsn.dequantize": (convert.dequantize,),
        "lpsn.conv2d": (depthwise, direct.depthwise, conv2d, direct.conv2d),
        "lpsn.conv2d_transpose": (depthwise_transpose, conv2d_transpose, direct.conv2d_transpose),
        "lpsn.dense": (dense, direct.dense),
        # floats
        "lpsn.float_conv2d": (direct_float.float_conv2d,),
        "lpsn.float_conv2d_transpose": (direct_float.float_conv2d_transpose,),
        "lpsn.float_dense": (direct_float.float_dense,),
        "lpsn.float_instance_norm": (block_reduction.float_instance_norm,),
        "lpsn.float_softmax": (block_reduction.float_softmax,),
    },
)
