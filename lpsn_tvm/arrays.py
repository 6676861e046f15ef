"""What users hand over as data, as numpy sees it."""

from __future__ import annotations

from typing import Any

import numpy as np

from lpsn_tvm.errors import LpsnError


def as_array(value: Any, where: str | None, error: type[LpsnError] = LpsnError) -> np.ndarray:
    """The array of anything that numpy reads, or of a torch tensor: without its gradient, from wherever it lies, as
    float32 where numpy has no such type.

    Parameters
    ----------
    value : array-like or torch tensor
        Of any type; whether that fits is for the caller to say.
    where : str, optional
        What the data is for.
    error : type
        What is raised.

    Raises
    ------
    LpsnError
        It cannot be read.
    """
    try:
        if hasattr(value, "detach"):
            value = value.detach().cpu()
            if str(value.dtype) == "torch.bfloat16":
                value = value.float()
        return np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as reason:
        raise error(f"cannot be read as an array: {reason}", where=where) from reason
