"""Operators that only the accelerator's networks have on the host; the meaning of a `HostStep` beside `quant` and
`float_ops`. numpy only: a board runs them, too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from lpsn_tvm.targets.vta import host_float

Array = npt.NDArray[Any]


def scale_accumulators(acc: Array, scale: Array) -> Array:
    """int32[N, C, ...] accumulators times float32[C] -> float32: the end of a layer with float32 output."""
    shape = (1, -1) + (1,) * (acc.ndim - 2)
    result: Array = acc.astype(np.float32) * np.asarray(scale, np.float32).reshape(shape)
    return result


OPERATORS: Mapping[str, Callable[..., Array]] = {"vta.scale": scale_accumulators, **host_float.OPERATORS}
"""Name -> meaning."""
