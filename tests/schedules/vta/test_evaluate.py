"""Tile operators against the same sums written out position by position."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from lpsn_tvm.schedules.vta.evaluate import evaluate, plane_tiles
from lpsn_tvm.schedules.vta.ops import Gemm, Plane, Pool, Scalar, Span, Step, Store, Tap, TileOp, Vector


@dataclass(frozen=True)
class Geometry:
    """The part of a configuration that the meaning depends on."""

    batch: int
    block_in: int
    block_out: int
    out_bits: int = 8


SMALL = Geometry(2, 3, 3)


def run(op: TileOp, memory: dict[str, np.ndarray], config: Geometry = SMALL) -> None:
    evaluate(op, memory, config)  # type: ignore[arg-type]


def data(rng: np.random.Generator, tiles: int, low: int = -8, high: int = 8) -> np.ndarray:
    return rng.integers(low, high, (tiles, SMALL.batch, SMALL.block_in))


def whole(height: int, width: int, weight: int = 0) -> Tap:
    y, x = Span(0, 1, height), Span(0, 1, width)
    return Tap(y, x, y, x, weight)


def identity_op(source: Plane, target: Plane, *steps: Step) -> TileOp:
    blocks = tuple(range(source.blocks))
    gemm = Gemm(source, (whole(source.height, source.width),), "w", 0, 0, 0, 1, blocks)
    return TileOp("op", source.batches, source.blocks, source.height, source.width, (gemm, *steps, Store(target)))


def identity_memory(source: np.ndarray, tiles: int) -> dict[str, np.ndarray]:
    shape = (tiles, SMALL.batch, SMALL.block_out)
    return {"x": source, "w": np.eye(SMALL.block_in, dtype=int)[None], "y": np.zeros(shape, int)}


def test_gemm_sums_taps_and_blocks() -> None:
    """Strided source, fan-in of two blocks, one tap that misses the first row, written out in loops."""
    rng = np.random.default_rng(0)
    source = Plane.dense("x", 1, 2, 3, 5, 4)
    memory = {
        "x": data(rng, 1 + source.tiles),
        "w": rng.integers(-8, 8, (20, 3, 3)),
        "y": np.zeros((60, 2, 3), int),
    }
    taps = (
        Tap(Span(1, 1, 2), Span(0, 1, 2), Span(1, 2, 2), Span(1, 2, 2), 0),
        Tap(Span(0, 1, 3), Span(0, 1, 2), Span(0, 2, 3), Span(0, 2, 2), 1),
    )
    gemm = Gemm(source, taps, "w", 2, 8, 3, 2, (1, 0), passes=2)
    target = Plane.dense("y", 3, 2, 2, 3, 2)
    run(TileOp("op", 2, 2, 3, 2, (gemm, Scalar("shr", 2), Store(target))), memory)
    expected = np.zeros((2, 2, 3, 2, 2, 3), int)
    for n, o, k, b in np.ndindex(2, 2, 2, 2):
        for tap in taps:
            for i, j in np.ndindex(tap.dst_y.count, tap.dst_x.count):
                sy, sx = tap.src_y.start + i * tap.src_y.step, tap.src_x.start + j * tap.src_x.step
                tile = memory["x"][plane_tiles(source)[n, gemm.first_input[o] + k, sy, sx], b]
                weight = memory["w"][2 + o * 8 + k * 3 + tap.weight]
                expected[n, o, tap.dst_y.start + i, tap.dst_x.start + j, b] += 2 * (weight @ tile)
    expected = ((expected >> 2) + 128) % 256 - 128
    assert np.array_equal(memory["y"][plane_tiles(target)], expected)
    assert not memory["y"][:3].any()


def test_vectors_and_scalars_follow_each_other() -> None:
    rng = np.random.default_rng(1)
    source = Plane.dense("x", 0, 1, 2, 2, 2)
    memory = identity_memory(data(rng, 8), 8)
    memory["v"] = rng.integers(0, 5, (3, 2, 3)).astype(np.int32)
    steps = (Vector("add", "v", 1), Scalar("double"), Scalar("add", 3), Vector("shr", "v", 0), Scalar("max", -2))
    run(identity_op(source, source.dense("y", 0, 1, 2, 2, 2), *steps, Scalar("min", 3)), memory)
    for block in range(2):
        for pixel in range(4):
            value = 2 * (memory["x"][block * 4 + pixel] + memory["v"][1 + block]) + 3
            expected = np.clip(value >> memory["v"][block], -2, 3)
            assert np.array_equal(memory["y"][block * 4 + pixel], expected)


def test_accumulators_wrap_and_stores_keep_the_low_bits() -> None:
    source = Plane.dense("x", 0, 1, 1, 1, 1)
    memory = identity_memory(np.full((1, 2, 3), 100), 2)
    doubles = (Scalar("double"),) * 25  # 100 * 2**25 leaves int32
    first, second = Plane.dense("y", 0, 1, 1, 1, 1), Plane.dense("y", 1, 1, 1, 1, 1)
    run(identity_op(source, second, Scalar("double"), Store(first), *doubles[1:], Scalar("shr", 15)), memory)
    assert np.all(memory["y"][0] == 200 - 256)
    wrapped = np.int64(100 << 25).astype(np.int32) >> 15
    assert np.all(memory["y"][1] == (int(wrapped) + 128) % 256 - 128)


def test_pool_ignores_what_lies_outside() -> None:
    rng = np.random.default_rng(2)
    source = Plane.dense("x", 0, 1, 1, 5, 5)
    memory = identity_memory(data(rng, 25, -8, 0), 9)
    run(identity_op(source, Plane.dense("y", 0, 1, 1, 3, 3), Pool((3, 3), (2, 2), (1, 1), 3, 3)), memory)
    image = memory["x"].reshape(5, 5, 2, 3)
    for y, x in np.ndindex(3, 3):
        window = image[max(0, 2 * y - 1) : 2 * y + 2, max(0, 2 * x - 1) : 2 * x + 2]
        assert np.array_equal(memory["y"][3 * y + x], window.max(axis=(0, 1)))


def test_leaving_a_plane_is_an_error() -> None:
    source = Plane.dense("x", 0, 1, 1, 2, 2)
    memory = identity_memory(np.zeros((4, 2, 3), int), 4)
    y, x = Span(0, 1, 2), Span(1, 1, 2)
    gemm = Gemm(source, (Tap(y, y, y, x, 0),), "w", 0, 0, 0, 1, (0,))
    with pytest.raises(IndexError, match="leave an extent of 2"):
        run(TileOp("op", 1, 1, 2, 2, (gemm, Store(source.dense("y", 0, 1, 1, 2, 2)))), memory)
    with pytest.raises(ValueError, match="does not fit"):
        run(identity_op(source, Plane.dense("y", 0, 1, 1, 1, 2)), memory)
    with pytest.raises(IndexError, match="leaves region x"):
        run(identity_op(Plane.dense("x", 1, 1, 1, 2, 2), Plane.dense("y", 0, 1, 1, 2, 2)), memory)
