"""The dispatch table of the llvm backend."""

from __future__ import annotations

from lpsn_tvm.schedules.llvm import channel_moves, normalization
from lpsn_tvm.schedules.llvm.conv2d_float import conv2d_float
from lpsn_tvm.schedules.llvm.conv2d_int8 import conv2d
from lpsn_tvm.schedules.llvm.conv2d_transpose_float import conv2d_transpose_float
from lpsn_tvm.schedules.llvm.conv2d_transpose_int8 import conv2d_transpose
from lpsn_tvm.schedules.llvm.convert import dequantize, quantize, requantize
from lpsn_tvm.schedules.llvm.dense_float import dense_float
from lpsn_tvm.schedules.llvm.dense_int8 import dense
from lpsn_tvm.schedules.llvm.depthwise_float import depthwise_float
from lpsn_tvm.schedules.llvm.depthwise_int8 import depthwise
from lpsn_tvm.schedules.llvm.lookup import lookup
from lpsn_tvm.schedules.llvm.maker import MAKER
from lpsn_tvm.schedules.rules import rules

RULES = rules(
    MAKER,
    {
        # integers
        "lpsn.quantize": (quantize,),
        "lpsn.dequantize": (dequantize,),
        "lpsn.requantize": (requantize,),
        "lpsn.conv2d": (depthwise, conv2d),
        "lpsn.conv2d_transpose": (conv2d_transpose,),
        "lpsn.dense": (dense,),
        "lpsn.lookup": (lookup,),
        "lpsn.concat": (channel_moves.concat,),
        "lpsn.strided_slice": (channel_moves.strided_slice,),
        # floats
        "lpsn.float_conv2d": (depthwise_float, conv2d_float),
        "lpsn.float_conv2d_transpose": (conv2d_transpose_float,),
        "lpsn.float_dense": (dense_float,),
        "lpsn.float_concat": (channel_moves.float_concat,),
        "lpsn.float_strided_slice": (channel_moves.strided_slice,),
        "lpsn.float_instance_norm": (normalization.float_instance_norm,),
        "lpsn.float_softmax": (normalization.float_softmax,),
    },
)
