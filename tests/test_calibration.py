from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lpsn_tvm.calibration_sources as sources
from lpsn_tvm.calibration import CalibrationSet
from lpsn_tvm.errors import CalibrationError

SHAPE = (1, 3, 6, 5)
SIGNATURE = {"image": SHAPE}
X = np.random.default_rng(0).standard_normal((20, 3, 6, 5)).astype(np.float32)
TWO = {"left": (1, 3), "right": (1, 2, 2)}


def values(data: CalibrationSet, name: str = "image") -> np.ndarray:
    return np.concatenate([batch[name] for batch in data])


def write(path: Path, save: Callable[[Path], None]) -> Path:
    save(path)
    return path


def loader(batch: int) -> Any:
    return torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(torch.from_numpy(X), torch.zeros(len(X))), batch_size=batch
    )


def generator() -> Iterator[np.ndarray]:
    """Hands out one buffer again and again, as decoders do."""
    buffer = np.empty((3, 6, 5), np.float32)
    for sample in X:
        buffer[...] = sample
        yield buffer


KINDS: dict[str, Callable[[Path], Any]] = {
    "array": lambda tmp: X,
    "float64": lambda tmp: X.astype(np.float64),
    "tensor": lambda tmp: torch.from_numpy(X),
    "dict": lambda tmp: {"image": X},
    "list of samples": lambda tmp: list(X),
    "tuple of batches": lambda tmp: (X[:7], X[7:]),
    "list of dicts": lambda tmp: [{"image": x} for x in X],
    "list of pairs": lambda tmp: [(x, 3) for x in X],
    "nested lists": lambda tmp: [x.tolist() for x in X],
    "iterator": lambda tmp: iter(X),
    "generator": lambda tmp: generator(),
    "generator function": lambda tmp: generator,
    "loader": lambda tmp: loader(7),
    "npy": lambda tmp: write(tmp / "x.npy", lambda p: np.save(p, X)),
    "npz": lambda tmp: str(write(tmp / "x.npz", lambda p: np.savez_compressed(p, image=X))),
    "npz of one unnamed array": lambda tmp: write(tmp / "x.npz", lambda p: np.savez(p, X)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_source_gives_the_same_batches(kind: str, tmp_path: Path) -> None:
    data = CalibrationSet.from_any(KINDS[kind](tmp_path), SIGNATURE, batch=6)
    assert len(data) == 20
    assert [len(batch["image"]) for batch in data] == [6, 6, 6, 2]
    tolerance = 1e-6 if kind in ("float64", "nested lists") else 0
    np.testing.assert_allclose(values(data), X, atol=tolerance)
    np.testing.assert_array_equal(values(data), values(data))
    assert data.digest == CalibrationSet.from_any(X, SIGNATURE).digest
    assert data.synthetic is False


def test_one_sample_without_batch_axis() -> None:
    assert len(CalibrationSet.from_any(X[0], SIGNATURE)) == 1
    assert len(CalibrationSet.from_any({"image": X[0]}, SIGNATURE)) == 1


def test_two_inputs_by_name_or_in_order() -> None:
    left, right = np.ones((4, 3), np.float32), np.zeros((4, 2, 2), np.float32)
    by_name = CalibrationSet.from_any({"right": right, "left": left}, TWO)
    in_order = CalibrationSet.from_any([(a, b, "label") for a, b in zip(left, right, strict=True)], TWO)
    assert by_name.digest == in_order.digest
    assert list(next(iter(by_name))) == ["left", "right"]


def test_limit_stops_reading() -> None:
    def endless() -> Iterator[np.ndarray]:
        while True:
            yield X[0]

    assert len(CalibrationSet.from_any(endless, SIGNATURE, limit=5)) == 5
    assert len(CalibrationSet.from_any(loader(7), SIGNATURE, limit=10)) == 10
    np.testing.assert_array_equal(values(CalibrationSet.from_any(X, SIGNATURE, limit=3)), X[:3])


def test_take_is_a_deterministic_subset_in_order() -> None:
    data = CalibrationSet.from_any(X, SIGNATURE)
    first, again, other = data.take(6, seed=1), data.take(6, seed=1), data.take(6, seed=2)
    assert len(first) == 6 and first.digest == again.digest != other.digest
    positions = [int(np.flatnonzero((X == x).all(axis=(1, 2, 3)))[0]) for x in values(first)]
    assert positions == sorted(set(positions))
    assert len(first.take(2)) == 2
    assert len(data.take(100)) == 20


def test_batches_are_copies() -> None:
    source = X.copy()
    data = CalibrationSet.from_any(source, SIGNATURE)
    for batch in data:
        batch["image"][...] = 7
    np.testing.assert_array_equal(source, X)


def test_large_iterators_are_spooled_to_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sources, "SPOOL_BYTES", 1000)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    data = CalibrationSet.from_any(generator(), SIGNATURE)
    assert isinstance(data._arrays["image"], np.memmap)
    np.testing.assert_array_equal(values(data), X)
    assert not list(tmp_path.iterdir()), "nothing is left behind"


def test_npy_files_are_mapped_not_loaded(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", X)
    data = CalibrationSet.from_any(tmp_path / "x.npy", SIGNATURE)
    base: Any = data._arrays["image"]
    while isinstance(base, np.ndarray) and not isinstance(base, np.memmap):
        base = base.base
    assert isinstance(base, np.memmap)


# --- 8-bit data and preprocessing ---

BYTES = np.random.default_rng(0).integers(0, 256, (4, 3, 6, 5)).astype(np.uint8)


def test_bytes_become_0_to_1_and_the_set_says_so() -> None:
    data = CalibrationSet.from_any(BYTES, SIGNATURE)
    np.testing.assert_allclose(values(data), BYTES / 255, atol=1e-6)
    assert "input_range" in data.notes[0]
    assert not CalibrationSet.from_any(X, SIGNATURE).notes


def test_input_range_maps_bytes_only() -> None:
    data = CalibrationSet.from_any(BYTES, SIGNATURE, input_range=(-1, 1))
    np.testing.assert_allclose(values(data), BYTES / 127.5 - 1, atol=1e-6)
    assert not data.notes
    np.testing.assert_array_equal(values(CalibrationSet.from_any(X, SIGNATURE, input_range=(-1, 1))), X)


@pytest.mark.parametrize("name", [None, "image"], ids=["for all", "by name"])
def test_mean_and_std_per_channel(name: str | None) -> None:
    options: dict[str, Any] = {"mean": [0.1, 0.2, 0.3], "std": [1, 2, 4]}
    data = CalibrationSet.from_any(BYTES, SIGNATURE, preprocessing={name: options} if name else options)
    mean, std = np.reshape([0.1, 0.2, 0.3], (1, 3, 1, 1)), np.reshape([1, 2, 4], (1, 3, 1, 1))
    np.testing.assert_allclose(values(data), (BYTES / 255 - mean) / std, atol=1e-6)


def test_mean_of_channels_last_input() -> None:
    data = CalibrationSet.from_any(
        BYTES.transpose(0, 2, 3, 1), {"image": (1, 6, 5, 3)}, preprocessing={"mean": [1, 2, 3]}
    )
    np.testing.assert_allclose(values(data), BYTES.transpose(0, 2, 3, 1) / 255 - [1, 2, 3], atol=1e-6)


def test_callable_preprocessing_sees_the_raw_batch() -> None:
    def prepare(batch: np.ndarray) -> np.ndarray:
        assert batch.dtype == np.uint8 and batch.shape[1:] == (6, 5, 3)
        return batch.transpose(0, 3, 1, 2) / 100

    for source in (BYTES.transpose(0, 2, 3, 1), iter(BYTES.transpose(0, 2, 3, 1))):
        data = CalibrationSet.from_any(source, SIGNATURE, preprocessing=prepare)
        np.testing.assert_allclose(values(data), BYTES / 100, atol=1e-6)


def test_callable_preprocessing_is_checked() -> None:
    with pytest.raises(CalibrationError, match="NHWC"):
        CalibrationSet.from_any(X, SIGNATURE, preprocessing=lambda b: b.transpose(0, 2, 3, 1))
    with pytest.raises(CalibrationError, match="sample 0 has NaN"):
        CalibrationSet.from_any(X, SIGNATURE, preprocessing=lambda b: b * np.nan)


# --- bad input ---


def spoiled(value: float, sample: int) -> np.ndarray:
    bad = X.copy()
    bad[sample, 1, 2, 3] = value
    return bad


BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "empty list": (lambda tmp: [], "empty"),
    "empty array": (lambda tmp: X[:0], "empty"),
    "empty iterator": (lambda tmp: iter(()), "empty"),
    "nan": (lambda tmp: spoiled(np.nan, 7), "image: sample 7 has NaN"),
    "infinity": (lambda tmp: spoiled(np.inf, 19), "image: sample 19 has infinite"),
    "float64 overflow": (lambda tmp: X.astype(np.float64) * 1e300, "infinite"),
    "channels last": (lambda tmp: X.transpose(0, 2, 3, 1), r"NHWC.*transpose\(0, 3, 1, 2\)"),
    "missing channels": (lambda tmp: X[:, 0], r"\(6, 5\).*\(3, 6, 5\)"),
    "wrong size": (lambda tmp: X[:, :, :3], r"\(3, 3, 5\).*\(3, 6, 5\)"),
    "wrong size in list": (lambda tmp: [X[0], X[1, :, :2]], r"\(6, 5\)|\(3, 6, 5\)"),
    "strings": (lambda tmp: np.full(SHAPE, "a"), "<U1"),
    "complex": (lambda tmp: X.astype(complex), "complex"),
    "objects": (lambda tmp: X.astype(object), "object"),
    "ragged": (lambda tmp: [[[1.0], [1.0, 2.0]]], "cannot be read as an array"),
    "unknown input": (lambda tmp: {"picture": X}, "missing image; unknown picture"),
    "extra input": (lambda tmp: {"image": X, "mask": X}, "unknown mask"),
    "list with missing input": (lambda tmp: [{"img": X[0]}], "missing image"),
    "mixed types": (lambda tmp: [BYTES[0], X[0]], "different types"),
    "number": (lambda tmp: 5, "int is no calibration data"),
    "none": (lambda tmp: None, "NoneType is no calibration data"),
    "no file": (lambda tmp: tmp / "none.npy", "no such file"),
    "other file": (lambda tmp: write(tmp / "x.csv", lambda p: p.write_text("1")), r"\.npy, \.npz"),
    "broken npy": (lambda tmp: write(tmp / "x.npy", lambda p: p.write_bytes(b"nothing")), "cannot be read"),
    "truncated npy": (
        lambda tmp: write(tmp / "x.npy", lambda p: (np.save(p, X), p.write_bytes(p.read_bytes()[:500]))),
        "cannot be read",
    ),
    "pickled npy": (
        lambda tmp: write(tmp / "x.npy", lambda p: np.save(p, X.astype(object), allow_pickle=True)), "cannot|object"
    ),
    "broken npz": (lambda tmp: write(tmp / "x.npz", lambda p: p.write_bytes(b"nothing")), "cannot be read"),
    "npz without the input": (lambda tmp: write(tmp / "x.npz", lambda p: np.savez(p, a=X, b=X)), "missing image"),
    "folder without images": (lambda tmp: tmp, "no images"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_bad_data_is_refused_with_a_reason(kind: str, tmp_path: Path) -> None:
    make, message = BAD[kind]
    with pytest.raises(CalibrationError, match=message):
        CalibrationSet.from_any(make(tmp_path), SIGNATURE)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 0}, "batch"),
        ({"limit": 0}, "limit"),
        ({"input_range": (1, 0)}, "input_range"),
        ({"input_range": (0, np.nan)}, "input_range"),
        ({"preprocessing": {"mean": [1, 2]}}, "2 values.*3 channels"),
        ({"preprocessing": {"std": 0}}, "positive"),
        ({"preprocessing": {"average": 0}}, "average"),
        ({"preprocessing": 3}, "callable"),
    ],
    ids=str,
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        CalibrationSet.from_any(X, SIGNATURE, **options)


def test_several_inputs_need_names_and_equal_counts() -> None:
    with pytest.raises(CalibrationError, match=r"2 inputs.*left, right"):
        CalibrationSet.from_any(X, TWO)
    with pytest.raises(CalibrationError, match="different numbers"):
        CalibrationSet.from_any({"left": np.ones((3, 3)), "right": np.ones((4, 2, 2))}, TWO)


# --- synthetic ---


def test_synthetic_inputs_are_seeded_smooth_and_bounded() -> None:
    shape = {"image": (1, 3, 32, 32), "flat": (1, 10), "last": (1, 32, 32, 3)}
    data = CalibrationSet.synthetic(shape, 16, seed=3)
    assert data.synthetic is True and len(data) == 16 and "synthetic" in data.notes[0]
    assert data.digest == CalibrationSet.synthetic(shape, 16, seed=3).digest
    assert data.digest != CalibrationSet.synthetic(shape, 16, seed=4).digest
    for name in ("image", "last"):
        x = values(data, name)
        assert abs(float(x.mean())) < 1e-3 and abs(float(x.std()) - 1) < 1e-2 and float(np.abs(x).max()) < 8
        x = x if name == "image" else x.transpose(0, 3, 1, 2)
        neighbours = np.corrcoef(x[..., 1:].ravel(), x[..., :-1].ravel())[0, 1]
        channels = np.corrcoef(x[:, 0].ravel(), x[:, 1].ravel())[0, 1]
        assert neighbours > 0.6 and channels > 0.4
    assert values(data, "flat").shape == (16, 10)


def test_importing_imports_neither_torch_nor_tvm() -> None:
    code = "import sys, lpsn_tvm.calibration; assert not {'torch', 'tvm', 'onnx', 'PIL'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_streaming_takes_constant_memory(tmp_path: Path) -> None:
    """Ten times the samples, the same peak."""
    import tracemalloc

    peaks = []
    for count in (200, 2000):
        path = tmp_path / f"{count}.npy"
        np.save(path, np.zeros((count, 3, 32, 32), np.float32))
        tracemalloc.start()
        for _ in CalibrationSet.from_any(path, {"x": (1, 3, 32, 32)}, batch=16):
            pass
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0] < 20e6
