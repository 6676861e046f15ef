"""Relax operators that work element by element and need no attributes: the torch function of each."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional

_SAME_NAME = (
    "abs", "acos", "add", "asin", "atan", "ceil", "cos", "cosh", "divide", "erf", "exp", "floor", "floor_divide",
    "greater", "greater_equal", "less", "less_equal", "log", "logical_and", "logical_not", "logical_or",
    "maximum", "minimum", "multiply", "negative", "not_equal", "round", "rsqrt", "sigmoid", "sign", "sin", "sinh",
    "sqrt", "square", "subtract", "tan", "tanh", "where",
)  # fmt: skip

ELEMENTWISE: dict[str, Callable[..., torch.Tensor]] = {
    **{name: getattr(torch, name) for name in _SAME_NAME},
    "equal": torch.eq,
    "floor_mod": torch.remainder,
    "mod": torch.remainder,
    "power": torch.pow,
    "nn.batch_flatten": lambda x: x.flatten(1),
    "nn.dropout": lambda x: x,
    "nn.gelu": functional.gelu,
    "nn.gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "nn.relu": torch.relu,
    "nn.selu": functional.selu,
    "nn.silu": functional.silu,
}
"""Operator name without `relax.` -> function."""
