"""One built candidate as a file: machine code, the buffers of its arguments, and its constants; measured here or sent
to another machine.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from lpsn_tvm.container import read_container, write_container
from lpsn_tvm.schedules.kernel import Array, TensorSpec

if TYPE_CHECKING:
    from lpsn_tvm.targets.cuda_program import CudaProgram

Kind = Literal["llvm", "cuda"]
LIBRARY, CONSTANTS = "library.so", "constants.bin"


@dataclass(frozen=True)
class CandidateFile:
    """What measuring a kernel needs.

    Parameters
    ----------
    kind : str
        "llvm": `library` holds a function `main` of inputs, constants and output. "cuda": `program` holds all.
    inputs : tuple of TensorSpec
    out : TensorSpec
    input_range : (int, int), optional
        Values of the first input that the kernel is made for, where these are fewer than its type has.
    """

    kind: Kind
    inputs: tuple[TensorSpec, ...]
    out: TensorSpec
    input_range: tuple[int, int] | None = None
    library: bytes = field(default=b"", repr=False)
    constants: tuple[Array, ...] = field(default=(), repr=False)
    program: CudaProgram | None = None

    def write(self, path: Path) -> None:
        """Write the file."""
        manifest: dict[str, Any] = {
            "kind": self.kind,
            "inputs": [asdict(spec) for spec in self.inputs],
            "out": asdict(self.out),
            "input_range": self.input_range,
        }
        if self.program is not None:
            from lpsn_tvm.targets.cuda_program import programs_to_files

            manifest["programs"], members = programs_to_files((self.program,))
        else:
            manifest["constants"] = [[list(array.shape), str(array.dtype)] for array in self.constants]
            members = {LIBRARY: self.library, CONSTANTS: b"".join(array.tobytes() for array in self.constants)}
        write_container(path, manifest, members)

    @classmethod
    def read(cls, path: Path) -> CandidateFile:
        """Read a file.

        Raises
        ------
        ArtifactError
            It is damaged, or not such a file.
        """
        manifest, members = read_container(path)
        kind, program = manifest["kind"], None
        constants: tuple[Array, ...] = ()
        if kind == "cuda":
            from lpsn_tvm.targets.cuda_program import programs_from_files

            (program,) = programs_from_files(manifest["programs"], members)
        else:
            constants = tuple(_arrays(members[CONSTANTS], manifest["constants"]))
        limits = manifest["input_range"]
        return cls(
            kind=kind,
            inputs=tuple(_spec(item) for item in manifest["inputs"]),
            out=_spec(manifest["out"]),
            input_range=None if limits is None else (int(limits[0]), int(limits[1])),
            library=members.get(LIBRARY, b""),
            constants=constants,
            program=program,
        )


def _spec(record: Mapping[str, Any]) -> TensorSpec:
    return TensorSpec(tuple(int(extent) for extent in record["shape"]), str(record["dtype"]), int(record["block"]))


def _arrays(data: bytes, kinds: Sequence[tuple[Sequence[int], str]]) -> Iterator[Array]:
    offset = 0
    for shape, dtype in kinds:
        array = np.frombuffer(data, dtype, int(np.prod(shape, dtype=np.int64)), offset).reshape(shape)
        yield array
        offset += array.nbytes


def random_input(spec: TensorSpec, limits: tuple[int, int] | None, seed: int) -> Array:
    """An input as it lies in memory, equal for equal seeds; lanes beyond the channels hold values of their own, as in
    a network.

    Parameters
    ----------
    spec : TensorSpec
        Shape, type and layout.
    limits : (int, int), optional
        Smallest and largest value of integer types; all values by default.
    seed : int
        Of the generator.
    """
    generator = np.random.default_rng(seed)
    dtype = np.dtype(spec.dtype)
    if dtype.kind == "f":
        return generator.standard_normal(spec.memory_shape).astype(dtype)
    low, high = limits or (np.iinfo(dtype).min, np.iinfo(dtype).max)
    if limits is None and dtype.itemsize > 2:
        low, high = -(2**15), 2**15 - 1  # Sums, and what becomes indices nowhere.
    return generator.integers(low, high, spec.memory_shape, dtype, endpoint=True)
