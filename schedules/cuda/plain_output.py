"""Float32 results of a layer in plain memory, where blocks of 32 channels would mostly be padding, and where pixels are
rearranged besides (super-resolution networks end so): the alternative is a launch of its own that reads the blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tvm.script.ir_builder import tirx as T

from lpsn_tvm.schedules.cuda import intrinsics
from lpsn_tvm.schedules.cuda.isa import BLOCK
from lpsn_tvm.schedules.cuda.tir import call, pointer, registers, store, unravel, when
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

    def channel_offset(self, channel: Any) -> Any:
        """Elements from the first result of a pixel to that of `channel`: the same for all pixels."""
        channels, (height, width), size = self.shape[1], self.size, self.block_size
        images = channels // size**2
        if self.mode == "DCR":
            i, j, image = unravel(channel, size, size, images)
        else:
            image, i, j = unravel(channel, images, size, size)
        return image * (height * width * size**2) + i * (width * size) + j

    def pixel_offset(self, at: Any) -> Any:
        """Elements before the first result of the pixel of which some channel is element `at` in blocks of 32."""
        (n, channels), (height, width), size = self.shape[:2], self.size, self.block_size
        sample, _, y, x, _ = unravel(at, n, self.blocks, height, width, BLOCK)
        return sample * (channels * height * width) + y * (width * size**2) + x * size


@dataclass(frozen=True)
class PlainStores:
    """How a thread writes its channels of one pixel after another.

    Parameters
    ----------
    plain : PlainOutput
    first, offsets : Buffer
        Registers: the first channel, and `PlainOutput.channel_offset` of each.
    """

    plain: PlainOutput
    first: Any
    offsets: Any

    @staticmethod
    def begin(plain: PlainOutput, channel: Any, count: int) -> PlainStores:
        """For `count` channels from `channel` on; transposed convolutions count those of every phase."""
        first, offsets = registers(1), registers(count)
        store(first, 0, T.truncmod(channel, plain.blocks * BLOCK))
        for i in range(count):
            store(offsets, i, plain.channel_offset(first[0] + i))
        return PlainStores(plain, first, offsets)

    def store(self, out: Any, results: Any, at: Any) -> None:
        """Write the results of one pixel; `at` is where they would begin in blocks of 32 channels."""
        channels, count = self.plain.shape[1], int(results.shape[0])
        base = registers(1)
        store(base, 0, self.plain.pixel_offset(at))
        # Neighbours in memory, and aligned: dense layers.
        step = 4 if self.plain.size == (1, 1) and self.plain.block_size == 1 and channels % 4 == 0 else 1
        for i in range(0, count, step):
            with when(True if channels % BLOCK == 0 else self.first[0] < channels - i):
                if step == 4:
                    call(intrinsics.copy(16), pointer(out, base[0] + self.offsets[i]), pointer(results, i))
                else:
                    store(out, base[0] + self.offsets[i], results[i])


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
