"""The module that a build returns, whatever it was compiled for: run it, save it, export it.

`Artifact` is what all targets share; `LibraryArtifact` (compiled code of a CPU) and the accelerator's artifact say how
one batch is executed and what the file holds. `lpsn_tvm.load` reads any of them.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from lpsn_tvm.arrays import as_array
from lpsn_tvm.container import write_container
from lpsn_tvm.errors import ArtifactError, LpsnError
from lpsn_tvm.recipe import Recipe
from lpsn_tvm.report import Report

if TYPE_CHECKING:
    import onnx

    from lpsn_tvm.records import Records

SUFFIX = ".lpsn"


@dataclass(frozen=True)
class TensorInfo:
    """Name, shape and dtype of an input or output."""

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> TensorInfo:
        """Inverse of `dataclasses.asdict`."""
        return cls(str(record["name"]), tuple(int(v) for v in record["shape"]), str(record["dtype"]))


@dataclass(frozen=True)
class Sources:
    """What a fresh build still knows and a loaded file does not: the pruned float graph, the quantization plan,
    how to export them, and what tuning found.
    """

    mod: Any
    plan: Any
    export: Callable[..., Any]
    records: Records | None = None


@dataclass(kw_only=True)
class Artifact(ABC):
    """A compiled network.

    Parameters
    ----------
    inputs, outputs : sequence of TensorInfo
    recipe : Recipe
    report : Report
    target : str
        Target string.
    sources : Sources, optional
        Kept in memory after a build.
    """

    kind: ClassVar[str]
    """What the manifest of a file says it is."""
    timing: ClassVar[str] = "measured on this machine"
    """How `benchmark` comes by its milliseconds."""

    inputs: Sequence[TensorInfo]
    outputs: Sequence[TensorInfo]
    recipe: Recipe
    report: Report
    target: str
    sources: Sources | None = field(default=None, repr=False)

    @property
    def batch(self) -> int:
        """Batch size that the module was compiled for; other sizes are run in pieces."""
        return self.inputs[0].shape[0]

    @property
    def records(self) -> Records | None:
        """What tuning found in this build, to save and to build with later; None without tuning, and of a loaded
        module.
        """
        return None if self.sources is None else self.sources.records

    @abstractmethod
    def execute(self, arrays: list[np.ndarray]) -> list[np.ndarray]:
        """Run one batch of the compiled size: inputs in order, outputs in order."""

    @abstractmethod
    def benchmark(self, *, repeats: int = 30, warmup: int = 5) -> float:
        """Milliseconds of one run of the compiled batch size."""

    @abstractmethod
    def pack(self) -> tuple[dict[str, Any], dict[str, bytes]]:
        """(manifest entries, binary members) that a file holds beside what all kinds share."""

    @classmethod
    @abstractmethod
    def unpack(cls, manifest: Mapping[str, Any], members: Mapping[str, bytes], where: str) -> Artifact:
        """Inverse of `pack`, from a whole manifest; `shared_fields` reads what all kinds have.

        Raises
        ------
        KeyError, TypeError, ValueError
            Something is missing or of the wrong form; `load` names the file.
        ArtifactError
            This machine cannot run it.
        """

    def prepare(self, num_threads: int | None = None) -> None:  # noqa: B027  (nothing to load is a valid answer)
        """Load whatever the first run would load."""

    def details(self) -> dict[str, Any]:
        """What `lpsn-tvm inspect` shows beside the report."""
        return {
            "inputs": {i.name: list(i.shape) for i in self.inputs},
            "outputs": {o.name: list(o.shape) for o in self.outputs},
            "recipe": self.recipe.to_json(),
        }

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
        for index in range(len(self.outputs)):
            self.rows(index, count)
        pieces = [self._run_piece([a[i : i + self.batch] for a in arrays]) for i in range(0, max(count, 1), self.batch)]
        results = [np.concatenate(parts) if len(parts) > 1 else parts[0] for parts in zip(*pieces, strict=True)]
        if len(results) == 1:
            return results[0]
        return {info.name: result for info, result in zip(self.outputs, results, strict=True)}

    def rows(self, index: int, count: int) -> int:
        """First extent of an output for so many samples.

        Raises
        ------
        LpsnError
            It is not the batch size, and `count` is not made of whole batches.
        """
        info = self.outputs[index]
        whole, rest = divmod(count, self.batch)
        if info.shape[:1] == (self.batch,):
            return count
        if rest or (whole > 1 and not info.shape):
            raise LpsnError(
                f"has shape {info.shape} for {self.batch} samples, so that it cannot be cut for {count}; run "
                + (f"a multiple of {self.batch}" if info.shape else f"{self.batch} at once"),
                where=f"output {info.name!r}",
            )
        return info.shape[0] * whole if info.shape else 1

    def _run_piece(self, arrays: list[np.ndarray]) -> list[np.ndarray]:
        count = arrays[0].shape[0]
        outputs = self.execute(self._padded(arrays))
        return [out[:count] for out in outputs] if count < self.batch else outputs

    def _padded(self, arrays: list[np.ndarray]) -> list[np.ndarray]:
        """Arrays of the compiled batch size: the last sample repeated."""
        missing = self.batch - arrays[0].shape[0]
        return [np.concatenate([a, np.repeat(a[-1:], missing, axis=0)]) for a in arrays] if missing else arrays

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
            array = as_array(given[info.name], f"input {info.name!r}")
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
        entries, members = self.pack()
        manifest = {
            "package": "lpsn_tvm",
            "kind": self.kind,
            "target": self.target,
            "inputs": [asdict(info) for info in self.inputs],
            "outputs": [asdict(info) for info in self.outputs],
            "recipe": self.recipe.to_json(),
            "report": self.report.to_json(),
            **entries,
        }
        write_container(Path(path), manifest, members)
        return Path(path)


def shared_fields(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments that every kind of artifact takes, from a manifest."""
    return {
        "inputs": [TensorInfo.from_json(record) for record in manifest["inputs"]],
        "outputs": [TensorInfo.from_json(record) for record in manifest["outputs"]],
        "recipe": Recipe.from_json(manifest["recipe"]),
        "report": Report.from_json(manifest["report"]),
        "target": str(manifest["target"]),
    }
