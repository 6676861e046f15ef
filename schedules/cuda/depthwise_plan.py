"""How one thread of a depthwise convolution computes a few output rows and columns of eight neighbouring channels.

Pixels hold the bytes of neighbouring channels, a dot product of four bytes (dp4a) wants four filter taps of one
channel: the bytes of up to four rows of an input column are transposed into words of one channel, and weights are
arranged to match. A word serves every output row that has a tap in it, with zero weights for the rest: rows 0 .. 3 of
an input serve output rows 0 and 1 of a 3x3 filter.

Groups of 2, 4 or 8 channels need no transposing: their channels are neighbours already.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import ceil, prod

from lpsn_tvm.schedules.cuda.geometry import Interleave
from lpsn_tvm.schedules.cuda.isa import WARP, CudaIsa

CHANNELS = 8
"""Channels of a thread: loads and stores of 8 bytes."""
HALVES = CHANNELS // 4
WORD = 4
"""Bytes that one dot product takes."""
PERMUTES = {1: 0, 2: 2, 3: 6, 4: 8}
"""Byte permutes that make words of four channels from as many rows."""


@dataclass(frozen=True)
class Use:
    """Output row `row` of a thread takes the products of word `word`: filter row `taps[i]`, or none, at position i.

    `half`: None where a channel's word is among its own four channels, else which four channels of a thread all its
    channels read (groups of eight).
    """

    row: int
    word: int
    taps: tuple[int | None, ...]
    half: int | None = None

    @property
    def factor(self) -> tuple[tuple[int | None, ...], int | None]:
        """What the weights depend on."""
        return self.taps, self.half


@dataclass(frozen=True)
class WordPlan:
    """Which input rows are made into words, and who takes them.

    Parameters
    ----------
    words : tuple of tuple of int
        Input rows (0 is the first that the thread's first output row needs) of each word, one to four.
    uses : tuple of Use
    """

    words: tuple[tuple[int, ...], ...]
    uses: tuple[Use, ...]

    @property
    def rows(self) -> tuple[int, ...]:
        """Input rows that are read, ascending."""
        return tuple(sorted({row for word in self.words for row in word}))

    @cached_property
    def factors(self) -> tuple[tuple[tuple[int | None, ...], int | None], ...]:
        """Sets of weights per filter column; several uses may share one."""
        return tuple(dict.fromkeys(use.factor for use in self.uses))

    @property
    def permutes(self) -> int:
        """Byte permutes per input column and four channels."""
        return sum(PERMUTES[len(word)] for word in self.words)


def _plan(count: int, group: int, kernel: int, stride: int, dilation: int) -> WordPlan:
    """Words are shared by `group` neighbouring output rows."""
    words: list[tuple[int, ...]] = []
    uses = []
    for first in range(0, count, group):
        members = range(first, min(first + group, count))
        needed = sorted({y * stride + r * dilation for y in members for r in range(kernel)})
        for start in range(0, len(needed), WORD):
            word = tuple(needed[start : start + WORD])
            if word not in words:
                words.append(word)
            for y in members:
                taps = tuple(_tap(row - y * stride, kernel, dilation) for row in word)
                if any(tap is not None for tap in taps):
                    uses.append(Use(y, words.index(word), taps))
    return WordPlan(tuple(words), tuple(uses))


def _tap(distance: int, kernel: int, dilation: int) -> int | None:
    tap, rest = divmod(distance, dilation)
    return tap if rest == 0 and 0 <= tap < kernel else None


def plan_words(rows: int, columns: tuple[int, int], kernel: int, stride: int, dilation: int) -> WordPlan:
    """The plan of fewest instructions for `rows` output rows; `columns` are the input columns that are transposed and
    the pairs of output column and filter column that take products.
    """
    plans = [_plan(rows, group, kernel, stride, dilation) for group in range(1, rows + 1)]
    return min(plans, key=lambda plan: plan.permutes * columns[0] + len(plan.uses) * 4 * columns[1])


def plan_groups(rows: int, kernel: int, stride: int, dilation: int, group: int) -> WordPlan:
    """The plan of groups of several channels: each row is a word of its own."""
    needed = sorted({y * stride + r * dilation for y in range(rows) for r in range(kernel)})
    halves = (0, 1) if group == CHANNELS else (None,)
    uses = [
        Use(y, needed.index(y * stride + r * dilation), (r,), half)
        for y in range(rows)
        for r in range(kernel)
        for half in halves
    ]
    return WordPlan(tuple((row,) for row in needed), tuple(uses))


@dataclass(frozen=True)
class DepthwiseTile:
    """What one thread and one thread block compute.

    Parameters
    ----------
    columns, rows : int
        Neighbouring outputs of a thread.
    threads : int
        Threads of a block, about.
    """

    columns: int
    rows: int
    threads: int = 128


@dataclass(frozen=True)
class DepthwiseGeometry:
    """Everything that the code of a depthwise convolution depends on.

    Parameters
    ----------
    batch, blocks, block : int
        Samples, channel blocks, channels per block (8, 16 or 32).
    in_size, out_size : (int, int)
        Height and width.
    in_dtype, out_dtype : str
    kernel, strides, dilation : (int, int)
    pads : (int, int)
        Top and left.
    has_residual : bool
    tile : DepthwiseTile
    group : int
        Channels of a group, input and output: 1, 2, 4 or 8.
    interleave : Interleave or None
        Transposed convolutions: `out_size` counts windows, each of which has a pixel per phase, with weights, bias and
        scale of its own.
    saturation : str
        As `Epilogue.saturation`.
    has_table : bool
        A table stands for the integers of the output.
    """

    batch: int
    blocks: int
    block: int
    in_size: tuple[int, int]
    out_size: tuple[int, int]
    in_dtype: str
    out_dtype: str
    kernel: tuple[int, int]
    strides: tuple[int, int]
    dilation: tuple[int, int]
    pads: tuple[int, int]
    has_residual: bool
    tile: DepthwiseTile
    group: int = 1
    interleave: Interleave | None = None
    saturation: str = ""
    has_table: bool = False

    @property
    def in_shape(self) -> tuple[int, ...]:
        """Shape of the input in memory."""
        return (self.batch, self.blocks, *self.in_size, self.block)

    @property
    def out_shape(self) -> tuple[int, ...]:
        """Shape of the output in memory."""
        size = self.out_size if self.interleave is None else self.interleave.size
        return (self.batch, self.blocks, *size, self.block)

    @property
    def phases(self) -> int:
        """Sets of weights: pixels of a window."""
        return 1 if self.interleave is None else self.interleave.phases

    @property
    def parameter_shape(self) -> tuple[int, int]:
        """Shape of bias and scale in memory."""
        return (self.phases * self.blocks, self.block)

    @property
    def images(self) -> int:
        """Channel blocks of all samples."""
        return self.batch * self.blocks

    @property
    def octets(self) -> int:
        """Threads that share a pixel of a channel block."""
        return self.block // CHANNELS

    @cached_property
    def columns(self) -> tuple[int, ...]:
        """Input columns that a thread reads, relative to its first."""
        taps = range(self.kernel[1])
        return tuple(
            sorted({x * self.strides[1] + s * self.dilation[1] for x in range(self.tile.columns) for s in taps})
        )

    @cached_property
    def plan(self) -> WordPlan:
        """Rows and words of a thread."""
        if self.group > 1:
            return plan_groups(self.tile.rows, self.kernel[0], self.strides[0], self.dilation[0], self.group)
        pairs = self.tile.columns * self.kernel[1]
        return plan_words(self.tile.rows, (len(self.columns), pairs), self.kernel[0], self.strides[0], self.dilation[0])

    @property
    def strips(self) -> tuple[int, int]:
        """Threads along height and width."""
        return -(-self.out_size[0] // self.tile.rows), -(-self.out_size[1] // self.tile.columns)

    @cached_property
    def block_shape(self) -> tuple[int, int, int]:
        """Threads of a block along channel blocks, height and width: few warps with nothing to do, and about a square
        of pixels, so that what windows share is read into the block's cache once.
        """
        room = max(1, self.tile.threads // self.octets)
        height, width = self.strips
        shapes = [
            (min(self.images, max(1, room // (y * x))), y, x)
            for y in range(1, min(height, room) + 1)
            for x in range(1, min(width, room // y) + 1)
        ]
        return min(shapes, key=self._waste)

    def _waste(self, shape: tuple[int, int, int]) -> float:
        """Warps of all blocks, and some more for what several blocks read."""
        blocks = prod(-(-total // part) for total, part in zip((self.images, *self.strips), shape, strict=True))
        warps = blocks * -(-prod(shape) * self.octets // WARP)
        read = 1.0
        for i, (along, outputs) in enumerate(zip(shape[1:], (self.tile.rows, self.tile.columns), strict=True)):
            step = along * outputs * self.strides[i]
            read *= 1 + max(0, (self.kernel[i] - 1) * self.dilation[i] + 1 - self.strides[i]) / step
        return warps * (1 + 0.2 * (read - 1))

    @property
    def threads(self) -> int:
        """Threads of a block."""
        z, y, x = self.block_shape
        return z * y * x * self.octets

    @property
    def grid(self) -> tuple[int, int, int]:
        """Blocks along channel blocks, height and width."""
        z, y, x = (-(-total // part) for total, part in zip((self.images, *self.strips), self.block_shape, strict=True))
        return z, y, x

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the packed weight: channel blocks, filter columns and sets of weights, channels, bytes of a word."""
        return (self.phases * self.blocks, self.kernel[1] * len(self.plan.factors), self.block, WORD)

    @property
    def padding_shape(self) -> tuple[int, int]:
        """A row of padding as wide as what a thread reads."""
        return (self.columns[-1] + 1, self.block)


def instructions(g: DepthwiseGeometry) -> int:
    """Instructions of a thread, roughly: counted as the code generator emits them."""
    plan, outputs = g.plan, g.tile.columns * g.tile.rows
    loads = len(plan.rows) * (len(g.columns) + 4)
    products = len(plan.uses) * CHANNELS * g.tile.columns * g.kernel[1]
    weights = len(plan.factors) * HALVES * g.kernel[1]
    # An output that may not exist is asked whether it does.
    is_ragged = g.out_size[0] % g.tile.rows or g.out_size[1] % g.tile.columns
    finish = {"": 6, "full": 4.5, "zero": 3.5}[g.saturation] + (3 if g.has_table else 0)
    outputs_and_checks = outputs * int(CHANNELS * finish + (12 if is_ragged or g.interleave else 6))
    per_phase = products + weights + outputs_and_checks
    return loads + plan.permutes * HALVES * len(g.columns) + g.phases * per_phase + 60


def registers_of(g: DepthwiseGeometry) -> int:
    """Registers of a thread, roughly as the compiler uses them: what is loaded, and sums, of which it finishes some
    before it begins others.
    """
    loaded = len(g.plan.rows) * len(g.columns) * HALVES
    return 30 + 3 * (loaded + g.tile.columns * g.tile.rows * CHANNELS) // 4


MOST_REGISTERS = 160
LATENCY = 1500
"""Cycles of a thread that no amount of work hides: launch, addresses, one load, one store."""
BYTES_PER_CYCLE = 14
"""From device memory per multiprocessor, by the data sheet of sm_90; others have less."""


COLUMNS, ROWS, THREADS = (1, 2, 3, 4, 5, 6, 7, 8), (1, 2, 3, 4), (64, 128, 256)
"""What a thread and a block may be asked to compute."""


def candidates(out_size: tuple[int, int]) -> Iterator[DepthwiseTile]:
    """Tiles for an output of this height and width."""
    for columns in COLUMNS:
        for rows in ROWS:
            if columns <= out_size[1] and rows <= out_size[0]:
                yield DepthwiseTile(columns, rows)


def estimate(g: DepthwiseGeometry, isa: CudaIsa) -> float:
    """Cycles, roughly: rounds of resident warps, bound by memory, by the instructions they issue or by one thread's own
    chain. Reasoned, not measured.
    """
    count = instructions(g)
    z, y, x = g.grid
    total = z * y * x * -(-g.threads // WARP)
    resident = max(1, min(64, isa.max_registers // (WARP * registers_of(g))))
    warps = min(resident, ceil(total / isa.multiprocessors))
    rounds = total / (isa.multiprocessors * warps)
    # The last round is seldom a full one.
    rounds = rounds + 0.3 if rounds > 1 else 1.0
    # Four schedulers that find something to issue in seven cycles of ten.
    issue = rounds * max(LATENCY + 2.0 * count, warps * count / 2.8)
    bytes_moved = prod(g.in_shape) + prod(g.out_shape) * (2 if g.has_residual else 1)
    memory = bytes_moved / (isa.multiprocessors * BYTES_PER_CYCLE)
    return max(issue, memory) + min(issue, memory) / 4


def features(g: DepthwiseGeometry, isa: CudaIsa) -> tuple[float, ...]:
    """What a cost model learns from: the tile, the work of a thread, how much of it there is, and the estimate."""
    blocks = prod(g.grid)
    return (
        float(g.tile.columns),
        float(g.tile.rows),
        float(g.threads),
        float(instructions(g)),
        float(registers_of(g)),
        blocks / isa.multiprocessors,
        blocks * g.threads * g.tile.columns * g.tile.rows * CHANNELS * g.phases / prod(g.out_shape),
        estimate(g, isa),
    )
