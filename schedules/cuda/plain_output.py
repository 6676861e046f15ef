"""Float32 results of a layer in plain memory, where blocks of 32 channels would mostly be padding, and where pixels are
rearranged besides (super-resolution networks end so): the alternative is a launch of its own that reads the blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lpsn_tvm.schedules.cuda import intrinsics
from lpsn_tvm.schedules.cuda.isa import BLOCK
from lpsn_tvm.schedules.cuda.tir import call, pointer, store, unravel, when
from lpsn_tvm.schedules.kernel import TensorSpec

WIDEST = 16
"""Images of more channels stay in blocks: their readers want those, and little of them is padding."""


@dataclass(frozen=True)
class PlainOutput:
    """Where the results of a layer are written.

    Parameters
    ----------
    shape : tuple of int
        [N, C, H, W] or [N, K] of the layer's results.
    block_size : int
        Each pixel becomes so many rows and columns (`quant.depth_to_space`); 1 where pixels stay pixels.
    mode : str
        "DCR" or "CRD", the order of the channels then.
    """

    shape: tuple[int, ...]
    block_size: int = 1
    mode: str = "DCR"

    @property
    def blocks(self) -> int:
        """Blocks of 32 channels."""
        return -(-self.shape[1] // BLOCK)

    @property
    def spec(self) -> TensorSpec:
        """The tensor that is written."""
        if self.block_size == 1:
            return TensorSpec(self.shape, "float32")
        n, channels, height, width = self.shape
        size = self.block_size
        return TensorSpec((n, channels // size**2, height * size, width * size), "float32")

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the results."""
        return (self.shape[2], self.shape[3]) if len(self.shape) == 4 else (1, 1)

    def store(self, out: Any, results: Any, at: Any) -> None:
        """Write the results of neighbouring channels of one pixel; `at` is where they would begin in blocks of 32
        channels.
        """
        count = int(results.shape[0])
        (n, channels), pixels = self.shape[:2], self.size[0] * self.size[1]
        sample, block, pixel, lane = unravel(at, n, self.blocks, pixels, BLOCK)
        first = block * BLOCK + lane
        if pixels == self.block_size == 1 and channels % 4 == 0:
            for i in range(0, count, 4):
                with when(True if channels % BLOCK == 0 else first + i < channels):
                    call(intrinsics.copy(16), pointer(out, sample * channels + first + i), pointer(results, i))
            return
        for i in range(count):
            with when(True if channels % BLOCK == 0 else first + i < channels):
                store(out, self._place(sample, first + i, pixel), results[i])

    def _place(self, sample: Any, channel: Any, pixel: Any) -> Any:
        """Index of a result in memory."""
        channels, (height, width) = self.shape[1], self.size
        if self.block_size == 1:
            return (sample * channels + channel) * (height * width) + pixel
        size, images = self.block_size, channels // self.block_size**2
        y, x = unravel(pixel, height, width)
        if self.mode == "DCR":
            i, j, image = unravel(channel, size, size, images)
        else:
            image, i, j = unravel(channel, images, size, size)
        return ((sample * images + image) * (height * size) + y * size + i) * (width * size) + x * size + j


def plain_output(out: TensorSpec, attrs: Mapping[str, Any]) -> PlainOutput | None:
    """How a layer with results `out` writes plain memory; None where it writes blocks.

    Dense layers always do: nobody but the network's caller or softmax reads their floats.
    """
    size = int(attrs.get("block_size", 1))
    if out.dtype != "float32":
        return None
    if size == 1 and len(out.shape) == 4 and out.shape[1] > WIDEST:
        return None
    return PlainOutput(out.shape, size, str(attrs.get("mode", "DCR")))
