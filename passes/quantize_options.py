"""What quantization was asked for: options, bits of single layers, kept scales; and the checks of all three."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Literal

import numpy as np

from lpsn_tvm.errors import QuantizeError
from lpsn_tvm.graph import Layer
from lpsn_tvm.quant import QuantParams, QuantScheme

ObserverKind = Literal["mse", "minmax", "percentile", "entropy"]
Rounding = Literal["auto", "gptq", "nearest"]
LayerBits = Mapping[str, "int | tuple[int, int]"]

DEFAULT_BUDGET = 3 << 27


@dataclass(frozen=True)
class QuantizeOptions:
    """What `plan_quantization` was asked for; see there."""

    weight_bits: int
    activation_bits: int
    scheme: QuantScheme
    observer: ObserverKind = "mse"
    rounding: Rounding = "auto"
    resolve: bool = True
    keep: Mapping[str, QuantParams] = field(default_factory=dict)
    keep_weights: Mapping[str, QuantParams] = field(default_factory=dict)
    layer_bits: LayerBits = field(default_factory=dict)
    input_bits: int = 8
    seed: int = 0
    memory_budget: int = DEFAULT_BUDGET


def override(name: str, layer_bits: LayerBits) -> tuple[int, int] | None:
    """(weight bits, input bits) that `layer_bits` gives this layer, or None."""
    for pattern, bits in layer_bits.items():
        if name == pattern or fnmatchcase(name, pattern):
            return (bits, bits) if isinstance(bits, int) else bits
    return None


def bits_of(name: str, options: QuantizeOptions) -> tuple[int, int]:
    """(weight bits, input bits) of a layer."""
    return override(name, options.layer_bits) or (options.weight_bits, options.activation_bits)


def check_bits(bits: Mapping[str, tuple[int, int]], options: QuantizeOptions) -> None:
    """Refuse bits that the scheme does not have, and patterns that no layer matches."""
    default = {"bits": (options.weight_bits, options.activation_bits)}
    for where, (weight_bits, activation_bits) in {**default, **bits}.items():
        for what, given, allowed in (
            ("weights", weight_bits, options.scheme.weight_bits),
            ("activations", activation_bits, options.scheme.activation_bits),
        ):  # fmt: skip
            if given not in allowed:
                raise QuantizeError(
                    f"{given} bits for {what} are not available; allowed: {', '.join(map(str, allowed))}", where=where
                )
    for pattern in options.layer_bits:
        if not any(name == pattern or fnmatchcase(name, pattern) for name in bits):
            raise QuantizeError(
                f"no quantized layer has this name; layers are {', '.join(list(bits)[:20])}", where=pattern
            )


def check_finite(layers: Mapping[str, Layer]) -> None:
    """Refuse weights with NaN or infinite values."""
    for name, layer in layers.items():
        if not (np.isfinite(layer.weight).all() and np.isfinite(layer.bias).all()):
            raise QuantizeError("weight or bias has NaN or infinite values", where=name)


def to_scheme(params: QuantParams, scheme: QuantScheme) -> QuantParams | None:
    """Kept parameters in the backend's container (same grid, integers shifted); None where its scheme has no room."""
    if (
        params.axis is not None
        or (scheme.activation_symmetric and params.zero_point != 0)
        or params.bits not in scheme.activation_bits
    ):
        return None
    if scheme.power_of_two and float(np.log2(float(params.scale))) % 1.0 != 0.0:
        return None
    if params.signed == scheme.activation_signed:
        return params
    half = 2 ** (params.bits - 1)
    shifted = replace(
        params, zero_point=params.zero_point + (half if params.signed else -half), signed=scheme.activation_signed
    )
    return None if scheme.activation_symmetric and shifted.zero_point != 0 else shifted
