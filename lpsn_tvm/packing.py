"""Sub-byte packing at the edge of the world: arrays of small integers as dense bits in files, little-endian,
lowest bits first.
"""

from __future__ import annotations

import numpy as np


def bits_needed(array: np.ndarray) -> int:
    """Smallest width 1..8 that holds every value of an int8 (two's complement) or uint8 array; the itemsize in
    bits for other types.
    """
    if array.dtype not in (np.int8, np.uint8):
        return int(array.dtype.itemsize * 8)
    if array.size == 0:
        return 8
    low, high = int(array.min()), int(array.max())
    if array.dtype == np.uint8:
        return max(1, high.bit_length())
    return max(1, max(max(high, 0).bit_length(), (~low).bit_length() if low < 0 else 0) + 1)


def common_shift(array: np.ndarray) -> int:
    """Largest k such that every value of an int8 or uint8 array is a multiple of 2**k (0 for other types and zeros).

    Lowering may have multiplied few-bit weights by a power of two; shifted back they pack into the bits they had.
    """
    if array.dtype not in (np.int8, np.uint8) or array.size == 0:
        return 0
    union = int(np.bitwise_or.reduce(array.reshape(-1)))
    return (union & -union).bit_length() - 1 if union else 0


def pack(array: np.ndarray, bits: int) -> bytes:
    """The low `bits` bits of each value, one after another; whole bytes are copied."""
    if bits >= 8:
        return np.ascontiguousarray(array).tobytes()
    planes = np.unpackbits(array.reshape(-1).view(np.uint8)[:, None], axis=1, count=bits, bitorder="little")
    return np.packbits(planes.reshape(-1), bitorder="little").tobytes()


def unpack(data: bytes, shape: tuple[int, ...], dtype: str, bits: int) -> np.ndarray:
    """Inverse of `pack`; raises ValueError when `data` is too short."""
    if bits >= 8:
        return np.frombuffer(data, dtype).reshape(shape).copy()
    size = int(np.prod(shape))
    planes = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")[: size * bits].reshape(size, bits)
    values = np.packbits(planes, axis=1, bitorder="little")[:, 0]
    if np.dtype(dtype) == np.int8:
        spare = 8 - bits
        return ((values << spare).astype(np.uint8).view(np.int8) >> spare).reshape(shape)
    return values.astype(dtype).reshape(shape)
