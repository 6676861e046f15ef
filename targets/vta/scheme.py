"""The quantization scheme that an accelerator configuration wants."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lpsn_tvm.errors import RecipeError
from lpsn_tvm.quant import QuantScheme

if TYPE_CHECKING:
    from lpsn_tvm.targets.vta.config import VtaConfig

SPLIT_INPUT_BITS = 7
"""Bits of network inputs that 4-bit hardware reads as two planes: x = 16 * high + low, low in -8..7, high in -4..4."""
OFFSET_BITS = 5
"""Activations of at most so many bits are stored with an offset where they are never negative: half of their numbers
would be lost else, and padding that is not zero costs 1 to 2 % of a network's cycles (`offset_padding`)."""


def vta_scheme(config: VtaConfig, bits: tuple[int, int] | None = None) -> QuantScheme:
    """Signed symmetric integers, requantized by shifts and rounded half up, as wide as the configuration's tiles hold.

    Parameters
    ----------
    config : VtaConfig
        Widths of inputs and weights.
    bits : (weight bits, activation bits), optional
        What the network is asked to have; checked against the configuration.

    Returns
    -------
    QuantScheme
        Network inputs have 8 bits on 8-bit hardware; on 4-bit hardware 7, split into two planes. A residual is added
        through an identity of weights, so its left shift is bounded by the largest power of two that a weight holds.

    Raises
    ------
    RecipeError
        `bits` that the configuration cannot hold.
    """
    weight, activation = min(8, config.wgt_bits), min(8, config.inp_bits)
    if bits is not None:
        for what, asked, most in (("weights", bits[0], weight), ("activations", bits[1], activation)):
            if not 2 <= asked <= most:
                raise RecipeError(f"{asked} bits for {what}; {config.name} holds 2 to {most}", where="bits")
    return QuantScheme(
        activation_signed=True,
        activation_symmetric=True,
        weight_per_channel=True,
        weight_bits=tuple(range(2, weight + 1)),
        activation_bits=tuple(range(2, activation + 1)),
        input_bits=8 if activation >= 8 else SPLIT_INPUT_BITS,
        rounding="half_up",
        weight_container_bits=weight,
        residual_shift=weight - 2,
        has_activation_offset=(activation if bits is None else bits[1]) <= OFFSET_BITS,
    )
