"""Whatever a user hands in as calibration data, as arrays that can be indexed: `{input name: array [samples, ...]}`.

Arrays and memory-mapped files are used where they are. Everything that can only be walked through (iterators,
generators, data loaders, lists, folders of images) is walked once and spooled: kept in memory while small, in an
unlinked temporary file from `SPOOL_BYTES` on, so that memory does not grow with the number of samples and every later
pass sees the same samples in the same order.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lpsn_tvm.arrays import as_array
from lpsn_tvm.errors import CalibrationError
from lpsn_tvm.images import load_images

SPOOL_BYTES = 64 << 20
SPOOL_LIMIT = 64 << 30


@dataclass(frozen=True)
class Signature:
    """The inputs that data is wanted for.

    Parameters
    ----------
    shapes : mapping of str to tuple of int
        Input name to shape in the model, batch axis included.
    is_raw : bool
        The data goes through the user's own preprocessing first: its shapes are not the model's, only their rank is
        trusted.
    """

    shapes: Mapping[str, tuple[int, ...]]
    is_raw: bool = False

    def only(self, what: str) -> str:
        """The single input's name; an error that calls the data `what` if there are several inputs."""
        if len(self.shapes) != 1:
            raise CalibrationError(
                f"{what} was given, but the model has {len(self.shapes)} inputs ({', '.join(self.shapes)}); "
                "use a dict of arrays"
            )
        return next(iter(self.shapes))

    def batched(self, name: str, value: Any) -> np.ndarray:
        """`value` as an array with a batch axis (a single sample gets one), type and shape checked."""
        array, shape = as_array(value, name or None, CalibrationError), self.shapes[name]
        check_dtype(array.dtype, name)
        is_sample = array.ndim == len(shape) - 1 if self.is_raw else array.shape == shape[1:]
        array = array[None] if is_sample else array
        if not self.is_raw:
            check_shape(array, name, shape)
        return array


Arrays = dict[str, np.ndarray]


def open_source(source: Any, signature: Signature, limit: int | None) -> Arrays:
    """Arrays [samples, ...] for every input, of checked type and (unless the signature is raw) shape.

    Raises
    ------
    CalibrationError
        The source is of no known kind, is empty, or lacks an input.
    """
    if isinstance(source, (str, os.PathLike)):
        return _open_path(Path(source), signature, limit)
    if is_array(source):
        name = signature.only("one array")
        return {name: signature.batched(name, source)[:limit]}
    if isinstance(source, Mapping):
        return _from_mapping(source, signature, limit)
    if callable(source) and not isinstance(source, Iterable):
        source = source()
    if not isinstance(source, Iterable):
        raise CalibrationError(
            f"{type(source).__name__} is no calibration data; allowed are arrays, dicts of arrays, lists, iterators, "
            "generator functions, data loaders, .npy and .npz files, and folders of images"
        )
    return _spool(_items(source, signature), signature, limit)


def is_array(value: Any) -> bool:
    """Whether `value` is a numpy array or a tensor of a framework that numpy can read."""
    return isinstance(value, np.ndarray) or (hasattr(value, "__array__") and hasattr(value, "shape"))


def check_shape(array: np.ndarray, name: str, shape: tuple[int, ...]) -> None:
    """Refuses samples of the wrong shape; says what was expected and guesses at swapped layouts.

    Parameters
    ----------
    array : ndarray
        [samples, ...].
    name : str
        The input.
    shape : tuple of int
        The input's shape in the model, batch axis included.

    Raises
    ------
    CalibrationError
    """
    want, got = shape[1:], array.shape[1:] if array.ndim else ()
    if got == want:
        return
    hint = ""
    if len(want) == 3 and len(got) == 3:
        if got == (want[1], want[2], want[0]):
            hint = "; the data looks like NHWC and the model reads NCHW: use data.transpose(0, 3, 1, 2)"
        elif got == (want[2], want[0], want[1]):
            hint = "; the data looks like NCHW and the model reads NHWC: use data.transpose(0, 2, 3, 1)"
    if len(got) == len(want) - 1 and want and 1 in want:
        hint = "; an axis of extent 1 is missing (channels?)"
    raise CalibrationError(
        f"samples have shape {got} (array {array.shape}), the model expects {want} (batches of shape (N, "
        f"{', '.join(map(str, want))})){hint}",
        where=name,
    )


def check_dtype(dtype: np.dtype[Any], name: str) -> None:
    """Refuses strings, objects, complex numbers and dates."""
    if dtype.kind not in "fiub":
        raise CalibrationError(
            f"data of type {dtype} cannot be fed to the network; allowed are floats, integers and booleans", where=name
        )


def check_names(names: Iterable[str], signature: Signature) -> None:
    """Refuses missing and unknown inputs."""
    names = list(names)
    missing = [n for n in signature.shapes if n not in names]
    extra = [str(n) for n in names if n not in signature.shapes]
    if missing or extra:
        parts = ([f"missing {', '.join(missing)}"] if missing else []) + (
            [f"unknown {', '.join(extra)}"] if extra else []
        )
        raise CalibrationError(f"{'; '.join(parts)}; the model's inputs are {', '.join(signature.shapes)}")


def _from_mapping(source: Mapping[str, Any], signature: Signature, limit: int | None) -> Arrays:
    check_names(source, signature)
    return check_counts({name: signature.batched(name, source[name])[:limit] for name in signature.shapes})


def check_counts(arrays: Arrays) -> Arrays:
    """Refuses inputs with different numbers of samples."""
    counts = {name: len(array) if array.ndim else 0 for name, array in arrays.items()}
    if len(set(counts.values())) > 1:
        raise CalibrationError(f"inputs have different numbers of samples: {counts}")
    return arrays


# --- files ------------------------------------------------------------------------------------------------------------


def _open_path(path: Path, signature: Signature, limit: int | None) -> Arrays:
    if not path.exists():
        raise CalibrationError("no such file or folder", where=str(path))
    if path.is_dir():
        name = signature.only("a folder of images")
        images = load_images(path, signature.shapes[name][1:], name, limit)
        return _spool(({name: image[None]} for image in images), signature, limit)
    try:
        if path.suffix == ".npy":
            name = signature.only("a .npy file")
            return {name: signature.batched(name, np.load(path, mmap_mode="r", allow_pickle=False))[:limit]}
        if path.suffix == ".npz":
            return _open_npz(path, signature, limit)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise CalibrationError(f"cannot be read: {error}", where=str(path)) from error
    raise CalibrationError(f"unknown kind of file {path.suffix!r}; allowed are .npy, .npz and folders", where=str(path))


def _open_npz(path: Path, signature: Signature, limit: int | None) -> Arrays:
    """Members are unpacked to temporary files and mapped: an archive never has to fit into memory."""
    folder = Path(tempfile.mkdtemp(prefix="lpsn-"))
    try:
        with zipfile.ZipFile(path) as archive:
            members = {m.removesuffix(".npy"): m for m in archive.namelist() if m.endswith(".npy")}
            if len(signature.shapes) == 1 and len(members) == 1:
                # One array for one input: its name does not matter (numpy calls it arr_0).
                members = {next(iter(signature.shapes)): next(iter(members.values()))}
            check_names(members, signature)
            arrays = {}
            for position, name in enumerate(signature.shapes):
                target = folder / f"{position}.npy"
                with archive.open(members[name]) as packed, target.open("wb") as unpacked:
                    shutil.copyfileobj(packed, unpacked, 1 << 20)
                arrays[name] = signature.batched(name, np.load(target, mmap_mode="r", allow_pickle=False))[:limit]
    finally:
        # A mapped file lives on until its last mapping is gone.
        shutil.rmtree(folder, ignore_errors=True)
    return check_counts(arrays)


# --- things that can only be walked through ---------------------------------------------------------------------------


def _items(source: Iterable[Any], signature: Signature) -> Iterator[Arrays]:
    """Each item of an iterable as one batch of arrays; items may be single samples."""
    names = list(signature.shapes)
    for position, item in enumerate(source):
        if isinstance(item, Mapping):
            check_names(item, signature)
            values = [item[name] for name in names]
        elif isinstance(item, (tuple, list)) and item and (is_array(item[0]) or len(names) > 1):
            # (x, y) pairs of a data loader: what exceeds the model's inputs is labels.
            if len(item) < len(names):
                raise CalibrationError(
                    f"has {len(item)} values, the model has {len(names)} inputs", where=f"calibration item {position}"
                )
            values = list(item[: len(names)])
        else:
            values = [item]
            signature.only("one array per sample")
        yield {name: signature.batched(name, value) for name, value in zip(names, values, strict=True)}


def _spool(items: Iterable[Arrays], signature: Signature, limit: int | None) -> Arrays:
    """Walks through `items` once and keeps them, in memory while small, else in a file."""
    spools = {name: _Spool(name) for name in signature.shapes}
    count = 0
    if limit != 0:
        for item in items:
            check_counts(item)
            room = None if limit is None else limit - count
            for name, array in item.items():
                spools[name].write(array[:room])
            count += len(next(iter(item.values()))[:room])
            if limit is not None and count >= limit:
                break
    if not count:
        raise CalibrationError("the calibration data is empty: at least one sample is needed")
    return {name: spool.array() for name, spool in spools.items()}


class _Spool:
    """Arrays of one input, appended; all of the type of the first."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.shape: tuple[int, ...] = ()
        self.count = 0
        self.parts: list[np.ndarray] = []
        self.dtype: np.dtype[Any] | None = None
        self.nbytes = 0
        self.file: Any = None

    def write(self, array: np.ndarray) -> None:
        check_dtype(array.dtype, self.name)
        if self.dtype is None:
            self.dtype, self.shape = array.dtype, array.shape[1:]
        if array.shape[1:] != self.shape:
            raise CalibrationError(f"samples differ in shape: {self.shape} and {array.shape[1:]}", where=self.name)
        if array.dtype != self.dtype:
            if not np.can_cast(array.dtype, self.dtype, "same_kind") or self.dtype == np.uint8:
                raise CalibrationError(
                    f"samples are of different types: {self.dtype} and {array.dtype}", where=self.name
                )
            array = array.astype(self.dtype)
        self.nbytes += array.nbytes
        self.count += len(array)
        if self.nbytes > SPOOL_LIMIT:
            raise CalibrationError(
                f"more than {SPOOL_LIMIT >> 30} GiB of calibration data came and no end was seen; give a limit",
                where=self.name,
            )
        # A copy: iterators like to hand out the same buffer again and again.
        self.parts.append(np.array(array))
        if self.file is not None or self.nbytes > SPOOL_BYTES:
            self._flush()

    def _flush(self) -> None:
        if self.file is None:
            # Without a name from the start: nothing is left behind, whatever happens. The mapping keeps the data alive.
            self.file = tempfile.TemporaryFile(prefix="lpsn-")
        for part in self.parts:
            self.file.write(np.ascontiguousarray(part).data)
        self.parts.clear()

    def array(self) -> np.ndarray:
        if self.file is None:
            return np.concatenate(self.parts)
        self.file.flush()
        with self.file:
            mapped: np.ndarray = np.memmap(
                self.file, dtype=self.dtype or np.float32, mode="r", shape=(self.count, *self.shape)
            )
        return mapped
