"""Lane packing of narrow feature maps: where a layer has at most half as many channels as a tile has lanes, a tile of
its result holds `pixels` horizontal neighbours, and the weights of both sides are arranged for that.

The layer then sums over `kernel + pixels - 1` positions for `pixels` results, its reader over pairs instead of pixels.
Behind a pooling of stride p, the neighbours are those of the pooled map: accumulator column p * t + j holds, for lane
group e, pixel p * (pixels * t + e) + j; pooling columns p * t .. p * t + p - 1 leaves pixels pixels * t + e in tile t.

LeNet-5, 6 channels: two pooled pixels per tile; 5x5 over 28 x 28 takes 3 micro-operations per 2 pixels, the second
5x5 takes 15 instead of 25.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from lpsn_tvm.schedules.vta.ops import Gemm, Span
from lpsn_tvm.targets.vta.forms import Form, Image
from lpsn_tvm.targets.vta.gemm import Rectangle, Windows
from lpsn_tvm.targets.vta.integer_graph import Node
from lpsn_tvm.targets.vta.layout import ceil_div, image_shape
from lpsn_tvm.targets.vta.lower_context import Context


@dataclass(frozen=True)
class Narrow:
    """How the result of a layer is packed.

    Parameters
    ----------
    image : (N, C, H, W)
        Of the layer, before the pooling.
    pixels : int
        Neighbours per tile.
    stride : int
        Of the pooling along x (1: none).
    tiles : int
        Tiles along x of the result.
    block : int
        Lanes per tile.
    """

    image: Image
    pixels: int
    stride: int
    tiles: int
    block: int

    @property
    def form(self) -> Form:
        """Of the result."""
        return self._form(1, 0)

    def _form(self, stride: int, first: int) -> Form:
        channels = self.image[1]
        lanes = [(c, stride * e + first) for e in range(self.pixels) for c in range(channels)]
        lanes += [(-1, 0)] * (self.block - len(lanes))
        names, dx = zip(*lanes, strict=True)
        return Form(names, (0,) * len(lanes), dx, (1, stride * self.pixels))

    @property
    def columns(self) -> tuple[Rectangle, ...]:
        """The accumulators, by their column modulo the pooling's stride."""
        tiles = (self.image[2], self.tiles)
        return tuple(Rectangle(self.image, self._form(self.stride, j), tiles) for j in range(self.stride))

    @property
    def rectangle(self) -> Rectangle:
        """All accumulators."""
        return Rectangle(self.image, self.form, (self.image[2], self.stride * self.tiles))

    def placed(self, step: Gemm, column: int) -> Gemm:
        """Sums of `columns[column]` as sums of `rectangle`."""

        def spread(span: Span) -> Span:
            return Span(self.stride * span.start + column, self.stride * span.step, span.count)

        return replace(step, taps=tuple(replace(tap, dst_x=spread(tap.dst_x)) for tap in step.taps))


def narrow_result(context: Context, node: Node, pooling: Node | None, windows: Windows) -> Narrow | None:
    """The packing of a convolution's result, if it has few channels and its one reader gains by it."""
    result = node if pooling is None else pooling
    if node.op != "lpsn.conv2d" or len(node.operands) > 4 or node.attrs["out_dtype"] == "float32":
        return None
    stride = 1 if pooling is None else int(pooling.attrs["strides"][1])
    if pooling is not None and (int(pooling.attrs["kernel"][1]) != stride or any(pooling.attrs["padding"])):
        return None
    image, width = image_shape(node.shape), image_shape(result.shape)[3]
    if int(node.attrs["groups"]) != 1 or windows[1].dilation != 1 or width * stride > image[3]:
        return None
    reader = context.graph.only_consumer(result.name)
    pixels = _pixels(reader, context.block // image[1], width)
    return None if pixels < 2 else Narrow(image, pixels, stride, width // pixels, context.block)


def _pixels(reader: Node | None, most: int, width: int) -> int:
    """Neighbours per tile that save the reader most: a convolution of stride 1 with a kernel wider than one."""
    if reader is None or reader.op != "lpsn.conv2d" or int(reader.attrs["groups"]) != 1:
        return 1
    kernel = int(reader.constant(1).shape[3])
    if reader.attrs["rounding"] != "half_up" or tuple(reader.attrs["dilation"]) != (1, 1) or kernel < 2:
        return 1
    if int(reader.attrs["strides"][1]) != 1:
        return 1
    choices = [pixels for pixels in range(1, most + 1) if width % pixels == 0]
    return min(choices, key=lambda pixels: _taps(kernel, pixels), default=1)


def _taps(kernel: int, pixels: int) -> float:
    """Average number of tiles that a row of the kernel touches, over the phases."""
    phases: Sequence[int] = [ceil_div(phase + kernel, pixels) for phase in range(pixels)]
    return sum(phases) / pixels
