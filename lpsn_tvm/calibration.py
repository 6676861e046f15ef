"""Calibration data: whatever the user has, as checked float32 batches that can be walked through any number of times.

Neither torch nor TVM is imported here.
"""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Callable, Iterator, Mapping
from typing import Any, overload

import numpy as np

from lpsn_tvm.calibration_preparation import Preprocessing, as_float, preparation
from lpsn_tvm.calibration_sources import Arrays, Signature, check_shape, open_source
from lpsn_tvm.errors import CalibrationError
from lpsn_tvm.images import CHANNELS

LARGEST = 1e12


class _Synthetic:
    """`CalibrationSet.synthetic(...)` makes a set, `calibration_set.synthetic` says whether it was made that way."""

    @overload
    def __get__(self, instance: None, owner: type) -> Callable[..., CalibrationSet]: ...

    @overload
    def __get__(self, instance: CalibrationSet, owner: type) -> bool: ...

    def __get__(self, instance: CalibrationSet | None, owner: type) -> Callable[..., CalibrationSet] | bool:
        return _synthetic_set if instance is None else instance.is_synthetic


class CalibrationSet:
    """Samples for every input of a model, checked; made by `from_any` or `synthetic`.

    Iterating yields `dict[str, float32 ndarray]` batches of at most `batch` samples, in the same order every time;
    nothing but one batch is held.

    Attributes
    ----------
    signature : dict of str to tuple of int
        Input names to shapes in the model.
    batch : int
        Samples per batch when iterating.
    synthetic, is_synthetic : bool
        Made up, not the user's data. On the class, `synthetic(signature, n, seed)` is the constructor of such a set.
    notes : tuple of str
        What was decided for the user, in sentences for the report.
    """

    synthetic = _Synthetic()

    def __init__(
        self,
        arrays: Arrays,
        signature: Mapping[str, tuple[int, ...]],
        *,
        batch: int,
        prepare: Callable[[Arrays], Arrays],
        notes: tuple[str, ...] = (),
        is_synthetic: bool = False,
        index: np.ndarray | None = None,
    ) -> None:
        self.signature = dict(signature)
        self.batch = batch
        self.notes = notes
        self.is_synthetic = is_synthetic
        self._arrays = arrays
        self._prepare = prepare
        self._index = index
        self._digest: str | None = None

    @classmethod
    def from_any(
        cls,
        source: Any,
        signature: Mapping[str, tuple[int, ...]],
        *,
        batch: int = 16,
        input_range: tuple[float, float] | None = None,
        preprocessing: Preprocessing | None = None,
        limit: int | None = None,
    ) -> CalibrationSet:
        """Reads calibration data of any kind.

        Parameters
        ----------
        source : object
            ndarray or tensor [n, ...] or one sample; dict of arrays by input name; list, iterator, generator function
            or data loader of samples, batches, dicts or (x, labels) tuples; path of an .npy (streamed, never loaded
            whole) or .npz file, or of a folder of images (resized until they cover the model's height and width,
            cropped in the middle); a CalibrationSet.
        signature : mapping of str to tuple of int
            Input names to shapes, batch axis first.
        batch : int
            Samples per batch when iterating; has nothing to do with how the source is batched.
        input_range : (float, float), optional
            What 0 and 255 of 8-bit data (uint8, images) become. [0, 1] by default, which `notes` then says. Other types
            are taken as they are.
        preprocessing : dict or callable, optional
            `{"mean": ..., "std": ...}`: `(x - mean) / std`, one value or one per channel, after `input_range`; or
            `{input name: {...}}`. A callable gets the batch as it was read (a dict if there are several inputs; mapped
            if `input_range` is given) and returns what the model reads.
        limit : int, optional
            Only the first `limit` samples are used (and read, where reading can stop).

        Returns
        -------
        CalibrationSet

        Raises
        ------
        CalibrationError
            Nothing there, of wrong type or shape, not finite, inputs missing or unknown; says which input and sample.
        """
        if isinstance(source, CalibrationSet):
            return source
        _check_options(batch, limit, input_range)
        wanted = Signature(dict(signature), is_raw=callable(preprocessing))
        arrays = open_source(source, wanted, limit)
        if not len(next(iter(arrays.values()))):
            raise CalibrationError("the calibration data is empty: at least one sample is needed")
        steps, notes = preparation(arrays, wanted, input_range, preprocessing)
        result = cls(arrays, signature, batch=batch, prepare=steps, notes=notes)
        result._digest = result._checked_digest()
        return result

    def __len__(self) -> int:
        return len(next(iter(self._arrays.values()))) if self._index is None else len(self._index)

    def __iter__(self) -> Iterator[Arrays]:
        return self.batches(self.batch)

    def batches(self, batch: int) -> Iterator[Arrays]:
        """Walks through the samples in batches of another size."""
        for start in range(0, len(self), batch):
            stop = min(start + batch, len(self))
            key: Any = slice(start, stop) if self._index is None else self._index[start:stop]
            yield self._prepare({name: array[key] for name, array in self._arrays.items()})
            for array in self._arrays.values():
                _release_pages(array)

    @property
    def digest(self) -> str:
        """sha256 over names, shapes and all values as the model sees them (hexadecimal); does not depend on `batch`."""
        if self._digest is None:
            self._digest = self._checked_digest()
        return self._digest

    def take(self, n: int, seed: int = 0) -> CalibrationSet:
        """A deterministic random subset of at most `n` samples, in their old order."""
        if n < 1:
            raise CalibrationError(f"cannot take {n} samples; at least 1")
        if n >= len(self):
            return self
        chosen = np.sort(np.random.default_rng(seed).permutation(len(self))[:n])
        index = chosen if self._index is None else self._index[chosen]
        return CalibrationSet(
            self._arrays, self.signature, batch=self.batch, prepare=self._prepare, notes=self.notes,
            is_synthetic=self.is_synthetic, index=index,
        )  # fmt: skip

    def _checked_digest(self) -> str:
        """One pass: every batch is checked for shape and finiteness, and hashed.

        Inputs are hashed apart, so that the batch size does not matter.
        """
        hashes = {name: hashlib.sha256() for name in self.signature}
        position = 0
        for arrays in self.batches(64):
            for name, array in arrays.items():
                check_shape(array, name, self.signature[name])
                if not np.isfinite(array).all():
                    bad = np.flatnonzero(~np.isfinite(array.reshape(len(array), -1)).all(axis=1))
                    what = "NaN" if np.isnan(array).any() else "infinite values"
                    raise CalibrationError(f"sample {position + int(bad[0])} has {what}", where=name)
                if array.size and float(np.abs(array).max()) > LARGEST:
                    raise CalibrationError(
                        f"has values up to {float(np.abs(array).max()):.1e}, whose squares overflow float32; "
                        f"allowed is up to {LARGEST:.0e}",
                        where=name,
                    )
                hashes[name].update(np.ascontiguousarray(array).data)
            position += len(next(iter(arrays.values())))
        total = hashlib.sha256()
        for name, part in hashes.items():
            total.update(f"{name}:{position}:{self.signature[name][1:]};".encode() + part.digest())
        return total.hexdigest()


def _check_options(batch: int, limit: int | None, input_range: tuple[float, float] | None) -> None:
    if batch < 1:
        raise CalibrationError(f"batch is {batch}; at least 1")
    if limit is not None and limit < 1:
        raise CalibrationError(f"limit is {limit}; at least 1, or None")
    if input_range is not None and not _is_interval(input_range):
        raise CalibrationError(f"input_range is {input_range}; two finite numbers, the smaller first")


def _is_interval(value: Any) -> bool:
    try:
        low, high = (float(bound) for bound in value)
    except (TypeError, ValueError):
        return False
    return bool(np.isfinite([low, high]).all()) and low < high


def _synthetic_set(
    signature: Mapping[str, tuple[int, ...]], n: int = 64, seed: int = 0, *, batch: int = 16,
    ranges: Mapping[str, tuple[float, float]] | None = None,
) -> CalibrationSet:  # fmt: skip
    """Seeded made-up inputs: smooth noise with the 1/f spectrum of natural images.

    Channels are correlated, contrast and brightness vary. Values have mean 0 and standard deviation 1 over the set, so
    that they cover what [0, 1] images and normalised images both excite; inputs in `ranges` fill the given interval.
    """
    rng = np.random.default_rng(seed)
    arrays = {name: _natural_noise((n, *shape[1:]), rng) for name, shape in signature.items()}
    for name, (low, high) in (ranges or {}).items():
        arrays[name] = (np.clip(arrays[name], -3.0, 3.0) + np.float32(3.0)) * np.float32((high - low) / 6.0)
        arrays[name] += np.float32(low)
    note = f"no calibration data was given: {n} seeded synthetic inputs (seed {seed}) stand in for it"
    return CalibrationSet(arrays, signature, batch=batch, prepare=as_float, notes=(note,), is_synthetic=True)


def _natural_noise(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """float32[shape], mean 0 and standard deviation 1: 1/f noise over height and width, Gaussian if flat."""
    noise = np.empty(shape, np.float32)
    # In pieces: spectra take eight times the memory of the images.
    for start in range(0, shape[0], 16):
        part = rng.standard_normal((min(16, shape[0] - start), *shape[1:]), dtype=np.float32)
        noise[start : start + len(part)] = _natural_images(part, rng) if len(shape) == 4 else part
    noise -= noise.mean(dtype=np.float64)
    noise /= max(float(noise.std(dtype=np.float64)), 1e-6)
    return noise


def _natural_images(noise: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """White noise [N, C, H, W] or [N, H, W, C] made smooth, with contrast and brightness of its own for each image."""
    is_nhwc = noise.shape[3] in CHANNELS and noise.shape[1] not in CHANNELS
    rows, columns, channel = (1, 2, 3) if is_nhwc else (2, 3, 1)
    size = (noise.shape[rows], noise.shape[columns])
    frequency = np.hypot(np.fft.fftfreq(size[0])[:, None], np.fft.rfftfreq(size[1])[None, :])
    frequency = np.maximum(frequency, 1.0 / max(size))
    spectrum = np.fft.rfft2(noise, axes=(rows, columns))
    spectrum /= frequency[..., None] if is_nhwc else frequency
    smooth = np.fft.irfft2(spectrum, s=size, axes=(rows, columns)).astype(np.float32)
    # Channels of images share most of their structure.
    smooth = 0.8 * smooth.mean(axis=channel, keepdims=True) * np.sqrt(noise.shape[channel]) + 0.6 * smooth
    smooth /= np.maximum(smooth.std(axis=(1, 2, 3), keepdims=True), 1e-6)
    contrast = rng.uniform(0.5, 1.5, (len(noise), 1, 1, 1))
    brightness = rng.normal(0.0, 0.3, (len(noise), 1, 1, 1))
    return np.asarray(smooth * contrast + brightness, np.float32)


def _release_pages(array: Any) -> None:
    """Let the pages of a memory-mapped file go, so that walking through it does not count as memory of this process.

    They stay in the file (and the system's cache) and are read again when touched.
    """
    mapping = getattr(array, "_mmap", None)
    if mapping is not None and array.mode in ("r", "r+", "w+") and hasattr(mapping, "madvise"):
        mapping.madvise(mmap.MADV_DONTNEED)
