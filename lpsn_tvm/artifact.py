"""The module that a build returns: run it, measure it, save it, load it.

File format 1: a zip of `manifest.json`, `library.so`, `params.bin` and `digest.txt` (SHA-256 of the other three). The
library is native code: load only files from a source you trust, as with any program. Nothing is executed before
digest, format and CPU features have been checked.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import platform
import tempfile
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lpsn_tvm.errors import ArtifactError, LpsnError
from lpsn_tvm.packing import bits_needed, common_shift, pack, unpack
from lpsn_tvm.recipe import Recipe
from lpsn_tvm.report import Report
from lpsn_tvm.runtime import Executable, check_machine, set_num_threads

if TYPE_CHECKING:
    import onnx

FORMAT = 1
SUFFIX = ".lpsn"
_FILES = ("manifest.json", "library.so", "params.bin")


@dataclass(frozen=True)
class TensorInfo:
    """Name, shape and dtype of an input or output."""

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"


@dataclass(frozen=True)
class Sources:
    """What a fresh build still knows and a loaded file does not: the pruned float graph, the quantization plan,
    and how to export them.
    """

    mod: Any
    plan: Any
    export: Callable[..., Any]


@dataclass
class Artifact:
    """A compiled network.

    Parameters
    ----------
    library : bytes
        Shared library.
    params : sequence of ndarray
        Constants of the library, in order.
    inputs, outputs : sequence of TensorInfo
    recipe : Recipe
    report : Report
    target : str
        TVM target string.
    cpu_features : sequence of str
        Features that the library needs.
    sources : Sources, optional
        Kept in memory after a build.
    """

    library: bytes
    params: Sequence[np.ndarray]
    inputs: Sequence[TensorInfo]
    outputs: Sequence[TensorInfo]
    recipe: Recipe
    report: Report
    target: str
    cpu_features: Sequence[str] = ()
    machine: str = field(default_factory=platform.machine)
    sources: Sources | None = None
    _executable: Executable | None = field(default=None, repr=False)

    @property
    def batch(self) -> int:
        """Batch size that the module was compiled for; other sizes are run in pieces."""
        return self.inputs[0].shape[0]

    @property
    def executable(self) -> Executable:
        """The loaded library (loaded on first use)."""
        if self._executable is None:
            check_machine(self.cpu_features, self.machine, "module")
            self._executable = Executable(self.library, self.params)
            set_num_threads(self.recipe.num_threads)
        return self._executable

    def __call__(self, *args: Any, **kwargs: Any) -> np.ndarray | dict[str, np.ndarray]:
        """Run the network.

        Parameters
        ----------
        *args, **kwargs : array-like[N, ...]
            One positional argument per input, keywords by input name, or one dict by input name.
            Any N: batches other than the compiled one are run in pieces, the last one padded.

        Returns
        -------
        float32[N, ...], or a dict of them when the model has several outputs.
        """
        arrays = self._arrays(args, kwargs)
        count = arrays[0].shape[0]
        pieces = [self._run_piece([a[i : i + self.batch] for a in arrays]) for i in range(0, max(count, 1), self.batch)]
        results = [np.concatenate(parts) if len(parts) > 1 else parts[0] for parts in zip(*pieces, strict=True)]
        if len(results) == 1:
            return results[0]
        return {info.name: result for info, result in zip(self.outputs, results, strict=True)}

    def _run_piece(self, arrays: list[np.ndarray]) -> list[np.ndarray]:
        missing = self.batch - arrays[0].shape[0]
        if missing:
            arrays = [np.concatenate([a, np.repeat(a[-1:], missing, axis=0)]) for a in arrays]
        outputs = self.executable(arrays)
        return [out[: self.batch - missing] for out in outputs] if missing else outputs

    def _arrays(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[np.ndarray]:
        names = [info.name for info in self.inputs]
        if len(args) == 1 and isinstance(args[0], Mapping):
            kwargs, args = {**args[0], **kwargs}, ()
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        if len(args) > len(names) or set(given) != set(names):
            raise LpsnError(
                f"expected inputs {names}, got {len(args)} positional and {sorted(kwargs)}", where="module call"
            )
        arrays = []
        for info in self.inputs:
            array = np.asarray(given[info.name])
            if array.dtype.kind not in "fiub":
                raise LpsnError(f"dtype {array.dtype} is not a real number type", where=f"input {info.name!r}")
            if array.shape[1:] != info.shape[1:] or array.ndim != len(info.shape) or array.shape[0] == 0:
                raise LpsnError(
                    f"shape {array.shape} does not fit {('N', *info.shape[1:])}", where=f"input {info.name!r}"
                )
            arrays.append(np.ascontiguousarray(array, info.dtype))
        if len({array.shape[0] for array in arrays}) > 1:
            raise LpsnError("all inputs must have the same batch size", where="module call")
        return arrays

    def benchmark(self, *, repeats: int = 30, warmup: int = 5) -> float:
        """Median milliseconds of one run on constant data of the compiled batch size, conversions from numpy left
        out.
        """
        tensors = self.executable.prepare([np.full(info.shape, 0.5, info.dtype) for info in self.inputs])
        times = []
        for index in range(warmup + repeats):
            start = time.perf_counter()
            self.executable.run(tensors)
            if index >= warmup:
                times.append(time.perf_counter() - start)
        return float(np.median(times)) * 1e3

    def to_onnx(self, path: str | os.PathLike[str] | None = None, *, quantized: bool | None = None) -> onnx.ModelProto:
        """The pruned network as ONNX: QDQ when it was quantized (`quantized=None` or True), else float; written
        atomically when a path is given.

        Raises
        ------
        ArtifactError
            On a module that was loaded from a file (build it again), or `quantized=True` on a float build.
        """
        if self.sources is None:
            raise ArtifactError(
                "a loaded module has no graph any more; call to_onnx on the module that build() returned",
                where="to_onnx",
            )
        if quantized and self.sources.plan is None:
            raise ArtifactError("this module was built with bits=None: there is no quantized form", where="to_onnx")
        plan = self.sources.plan if quantized is not False else None
        names = [info.name for info in self.outputs]
        model: onnx.ModelProto = self.sources.export(self.sources.mod, path, plan, output_names=names)
        return model

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write one file, atomically: either the whole new file is there or the old one is untouched.

        Raises
        ------
        ArtifactError
            If the folder is missing or not writable.
        """
        target = Path(path)
        payload, entries = io.BytesIO(), []
        for array in self.params:
            shift = common_shift(array)
            values = array >> shift if shift else array
            bits = bits_needed(values)
            data = pack(values, bits)
            entries.append(
                {
                    "shape": list(array.shape),
                    "dtype": str(array.dtype),
                    "bits": bits,
                    "shift": shift,
                    "offset": payload.tell(),
                    "size": len(data),
                }
            )
            payload.write(data)
        manifest = {
            "format": FORMAT,
            "package": "lpsn_tvm",
            "target": self.target,
            "machine": self.machine,
            "cpu_features": list(self.cpu_features),
            "inputs": [asdict(info) for info in self.inputs],
            "outputs": [asdict(info) for info in self.outputs],
            "recipe": self.recipe.to_json(),
            "report": self.report.to_json(),
            "params": entries,
        }
        contents = dict(
            zip(_FILES, (json.dumps(manifest, indent=1).encode(), self.library, payload.getvalue()), strict=True)
        )
        digests = "".join(f"{hashlib.sha256(data).hexdigest()}  {name}\n" for name, data in contents.items())
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in (*contents.items(), ("digest.txt", digests.encode())):
                archive.writestr(zipfile.ZipInfo(name), data, zipfile.ZIP_DEFLATED)
        write_atomically(target, buffer.getvalue())
        return target


def write_atomically(path: Path, data: bytes) -> None:
    """Write to a temporary file beside `path`, then rename; ArtifactError if that is not possible."""
    if path.is_dir():
        raise ArtifactError("is a folder; give a file name", where=str(path))
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)
        raise ArtifactError(f"cannot be written: {error.strerror or error}", where=str(path)) from error


def load(path: str | os.PathLike[str]) -> Artifact:
    """Read a saved module; needs only TVM's runtime.

    Raises
    ------
    ArtifactError
        If the file is missing, truncated, altered, of a newer format, or needs CPU features that this machine lacks.
    """
    where = str(path)
    contents = _read_checked(Path(path), where)
    try:
        manifest = json.loads(contents["manifest.json"])
        version = int(manifest["format"])
        if version > FORMAT:
            raise ArtifactError(
                f"has format {version}; this version of lpsn_tvm reads up to {FORMAT}: upgrade the package", where=where
            )
        check_machine(manifest["cpu_features"], manifest["machine"], where)
        blob = contents["params.bin"]
        params = [_parameter(blob, entry) for entry in manifest["params"]]
        artifact = Artifact(
            library=contents["library.so"],
            params=params,
            target=manifest["target"],
            machine=manifest["machine"],
            cpu_features=tuple(manifest["cpu_features"]),
            recipe=Recipe.from_json(manifest["recipe"]),
            report=Report.from_json(manifest["report"]),
            inputs=[_info(i) for i in manifest["inputs"]],
            outputs=[_info(o) for o in manifest["outputs"]],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"is not a valid module file ({type(error).__name__}: {error})", where=where) from error
    return artifact


def _parameter(blob: bytes, entry: Mapping[str, Any]) -> np.ndarray:
    """One array of `params.bin`."""
    data = blob[entry["offset"] : entry["offset"] + entry["size"]]
    values = unpack(data, tuple(entry["shape"]), entry["dtype"], entry["bits"])
    return values << entry["shift"] if entry["shift"] else values


def _info(record: Mapping[str, Any]) -> TensorInfo:
    return TensorInfo(str(record["name"]), tuple(int(v) for v in record["shape"]), str(record["dtype"]))


def _read_checked(path: Path, where: str) -> dict[str, bytes]:
    """All files of the archive after their digests have been compared."""
    try:
        with zipfile.ZipFile(path) as archive:
            contents = {name: archive.read(name) for name in (*_FILES, "digest.txt")}
    except FileNotFoundError as error:
        raise ArtifactError("does not exist", where=where) from error
    except OSError as error:
        raise ArtifactError(f"cannot be read: {error.strerror or error}", where=where) from error
    except (zipfile.BadZipFile, KeyError, ValueError, EOFError, NotImplementedError) as error:
        raise ArtifactError(f"is not a module file or is truncated ({error})", where=where) from error
    except Exception as error:  # zlib.error and its like have no common base
        raise ArtifactError(f"is damaged ({error})", where=where) from error
    lines = [line.partition("  ") for line in contents["digest.txt"].decode("ascii", "replace").splitlines()]
    expected = {name: digest for digest, _, name in lines}
    for name in _FILES:
        if expected.get(name) != hashlib.sha256(contents[name]).hexdigest():
            raise ArtifactError(f"has a wrong digest for {name}: the file was altered or damaged", where=where)
    return contents
