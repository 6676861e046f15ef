"""Entry points of the CUDA driver and the types of their arguments, as in cuda.h 12.0 and later (a test compares them
with the header where one is installed).
"""

from __future__ import annotations

import ctypes
from typing import Any

INT, UINT, SIZE, POINTER, U64, TEXT = (
    ctypes.c_int,
    ctypes.c_uint,
    ctypes.c_size_t,
    ctypes.c_void_p,
    ctypes.c_uint64,
    ctypes.c_char_p,
)


class KernelNode(ctypes.Structure):
    """`CUDA_KERNEL_NODE_PARAMS_v2`."""

    _fields_ = (
        ("function", POINTER),
        ("grid", UINT * 3),
        ("block", UINT * 3),
        ("shared_bytes", UINT),
        ("parameters", ctypes.POINTER(POINTER)),
        ("extra", POINTER),
        ("kernel", POINTER),
        ("context", POINTER),
    )


OUT = ctypes.POINTER(POINTER)
NODE = ctypes.POINTER(KernelNode)
SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cuInit": (UINT,),
    "cuDriverGetVersion": (ctypes.POINTER(INT),),
    "cuGetErrorString": (INT, ctypes.POINTER(TEXT)),
    "cuDeviceGetCount": (ctypes.POINTER(INT),),
    "cuDeviceGet": (ctypes.POINTER(INT), INT),
    "cuDeviceGetName": (TEXT, INT, INT),
    "cuDeviceGetAttribute": (ctypes.POINTER(INT), INT, INT),
    "cuDevicePrimaryCtxRetain": (OUT, INT),
    "cuDevicePrimaryCtxRelease_v2": (INT,),
    "cuCtxGetCurrent": (OUT,),
    "cuCtxSetCurrent": (POINTER,),
    "cuThreadExchangeStreamCaptureMode": (ctypes.POINTER(INT),),
    "cuModuleLoadDataEx": (OUT, POINTER, UINT, ctypes.POINTER(INT), OUT),
    "cuModuleUnload": (POINTER,),
    "cuModuleGetFunction": (OUT, POINTER, TEXT),
    "cuFuncSetAttribute": (POINTER, INT, INT),
    "cuMemGetInfo_v2": (ctypes.POINTER(SIZE), ctypes.POINTER(SIZE)),
    "cuMemAlloc_v2": (ctypes.POINTER(U64), SIZE),
    "cuMemFree_v2": (U64,),
    "cuMemHostAlloc": (OUT, SIZE, UINT),
    "cuMemFreeHost": (POINTER,),
    "cuMemcpyHtoDAsync_v2": (U64, POINTER, SIZE, POINTER),
    "cuMemcpyDtoHAsync_v2": (POINTER, U64, SIZE, POINTER),
    "cuMemcpyDtoDAsync_v2": (U64, U64, SIZE, POINTER),
    "cuMemsetD8Async": (U64, ctypes.c_ubyte, SIZE, POINTER),
    "cuStreamCreate": (OUT, UINT),
    "cuStreamDestroy_v2": (POINTER,),
    "cuStreamSynchronize": (POINTER,),
    "cuStreamWaitEvent": (POINTER, POINTER, UINT),
    "cuStreamIsCapturing": (POINTER, ctypes.POINTER(INT)),
    "cuLaunchKernel": (POINTER, *(UINT,) * 7, POINTER, OUT, OUT),
    "cuGraphCreate": (OUT, UINT),
    "cuGraphAddKernelNode_v2": (OUT, POINTER, OUT, SIZE, NODE),
    "cuGraphInstantiateWithFlags": (OUT, POINTER, U64),
    "cuGraphExecKernelNodeSetParams_v2": (POINTER, POINTER, NODE),
    "cuGraphUpload": (POINTER, POINTER),
    "cuGraphLaunch": (POINTER, POINTER),
    "cuGraphDestroy": (POINTER,),
    "cuGraphExecDestroy": (POINTER,),
    "cuEventCreate": (OUT, UINT),
    "cuEventRecord": (POINTER, POINTER),
    "cuEventQuery": (POINTER,),
    "cuEventSynchronize": (POINTER,),
    "cuEventElapsedTime": (ctypes.POINTER(ctypes.c_float), POINTER, POINTER),
    "cuEventDestroy_v2": (POINTER,),
}
"""Entry point -> C types of its arguments; every one returns a CUresult."""
OPTIONAL = {"cuFuncLoad": (POINTER,)}
"""Entry points that came after 12.0."""
