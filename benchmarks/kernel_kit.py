"""A folder of kernels with inputs and the outputs that they must give, made without a GPU, for a GPU machine that has
neither tvm nor torch nor nvcc.

    kit.json                         architectures, what nvcc refused
    cases/<digest>.npz               one set of launches: description, buffers, expected output
    sources/<digest>.cu.gz           CUDA source
    binaries/<digest>-sm_90.gz       machine code
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lpsn_tvm.schedules.kernel import Kernel, TensorSpec

Array = npt.NDArray[Any]
WORKSPACE_BYTE, OUT_NUMBER = 0x5A, 77
"""What workspaces and outputs are filled with before a kernel runs."""
REAL = "real size"
"""Origin of cases that are layers of real networks."""

INSTRUCTIONS = "1 instructions"
"""Family of single instructions against the tables of the PTX ISA; the first of all, and never cut down."""


@dataclass(frozen=True)
class KitLaunch:
    """One launch over buffers by name."""

    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int
    arguments: tuple[str, ...]


@dataclass(frozen=True)
class Case:
    """One operator: its launches and what they work on.

    Parameters
    ----------
    family : str
        The kernel's name, and what is special about the way it is made: "conv2d_mma split".
    shapes : str
        Inputs and output, for people.
    origin : str
        The test that it comes from, or `REAL` and a layer.
    arch : str
        Whose instruction set the source was made for; machine code may be of a newer one.
    source : str
        Digest of the CUDA source.
    launches : tuple of KitLaunch
    workspaces : mapping of str to int
        Bytes of device memory that launches share.
    out_name, out : str, TensorSpec
        The buffer of the output, and how it lies there.
    """

    family: str
    shapes: str
    origin: str
    arch: str
    source: str
    launches: tuple[KitLaunch, ...]
    workspaces: Mapping[str, int]
    out_name: str
    out: TensorSpec

    @property
    def name(self) -> str:
        """One line for people."""
        return f"{self.family} ({self.arch}) {self.shapes}; {self.origin}"

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory that the GPU must have."""
        return max(launch.shared_bytes for launch in self.launches)

    def to_json(self) -> str:
        """Text of the description."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Case:
        """The description again."""
        fields = json.loads(text)
        launches = tuple(KitLaunch(**{k: _frozen(v) for k, v in one.items()}) for one in fields.pop("launches"))
        out = fields.pop("out")
        return cls(launches=launches, out=TensorSpec(tuple(out["shape"]), out["dtype"], out["block"]), **fields)


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def digest(text: str) -> str:
    """Name of a file by its content."""
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def family_of(kernel: Kernel) -> str:
    """The kernel's name and the special ways that its geometry takes."""
    words = [str(kernel.key[0])]
    for geometry in kernel.key[1:]:
        tile = getattr(geometry, "tile", None)
        tags = {
            "split": getattr(tile, "splits", 1) > 1,
            "slices": getattr(tile, "slices", 1) > 1,
            "dp4a": getattr(geometry, "uses_dots", False),
            "s4": getattr(geometry, "multiplies_nibbles", False),
            "w4": getattr(geometry, "weight_bits", 8) == 4 and not getattr(geometry, "multiplies_nibbles", False),
            "narrow": 0 < getattr(geometry, "in_block", 32) < 32,
        }
        words += [tag for tag, is_so in tags.items() if is_so and tag not in words]
    return " ".join(words)


def case_of(kernel: Kernel, source: str, function: Any, arch: str, origin: str) -> Case:
    """Describe what `cuda_source` made of a kernel (`function`)."""

    def told(spec: TensorSpec) -> str:
        return f"{spec.dtype}{list(spec.shape)}"

    launches = tuple(KitLaunch(o.kernel, o.grid, o.block, o.shared_bytes, o.arguments) for o in function.launches)
    shapes = f"{', '.join(map(told, kernel.inputs))} -> {told(kernel.out)}"
    return Case(
        family_of(kernel), shapes, origin, arch, digest(source), launches, dict(function.workspaces),
        function.parameters[-1], kernel.out,
    )  # fmt: skip


def write_case(folder: Path, case: Case, source: str, buffers: Mapping[str, Array], expected: Array) -> Path:
    """Put a case into a kit; several processes may do so at once.

    Parameters
    ----------
    buffers : mapping of str to ndarray
        Inputs and constants, as they lie in memory.
    expected : ndarray
        The output in logical shape. It is kept as it lies in memory, where what repeats in inputs repeats in it.
    """
    _write(folder / "sources" / f"{case.source}.cu.gz", gzip.compress(source.encode(), mtime=0))
    packed = case.out.pack(expected)
    arrays = {f"in.{name}": array for name, array in buffers.items()}
    content = hashlib.sha256(case.to_json().encode())
    for array in arrays.values():
        content.update(np.ascontiguousarray(array).tobytes())
    path = folder / "cases" / f"{content.hexdigest()[:24]}.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(f".{os.getpid()}")
    with scratch.open("wb") as file:
        np.savez_compressed(file, case=np.frombuffer(case.to_json().encode(), np.uint8), expected=packed, **arrays)
    scratch.replace(path)
    return path


def _write(path: Path, content: bytes) -> None:
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(f".{os.getpid()}")
    scratch.write_bytes(content)
    scratch.replace(path)


def read_description(path: Path) -> Case:
    """A case without its arrays."""
    with np.load(path, allow_pickle=False) as file:
        return Case.from_json(file["case"].tobytes().decode())


def read_case(path: Path) -> tuple[Case, dict[str, Array], Array]:
    """A case, its buffers as they must be before the first launch (output and workspaces too), the expected output
    in logical shape.
    """
    with np.load(path, allow_pickle=False) as file:
        case = Case.from_json(file["case"].tobytes().decode())
        buffers = {name.removeprefix("in."): file[name] for name in file.files if name.startswith("in.")}
        expected = case.out.unpack(file["expected"])
    buffers[case.out_name] = np.full(case.out.memory_shape, OUT_NUMBER).astype(case.out.dtype)
    buffers |= {name: np.full(size, WORKSPACE_BYTE, np.uint8) for name, size in case.workspaces.items()}
    return case, buffers, expected


def read_source(folder: Path, name: str) -> str:
    """CUDA source by digest."""
    return gzip.decompress((folder / "sources" / f"{name}.cu.gz").read_bytes()).decode()


def binary_path(folder: Path, source: str, arch: str) -> Path:
    """Where a source's machine code lies."""
    return folder / "binaries" / f"{source}-{arch}.gz"


def read_binary(folder: Path, source: str, arch: str) -> bytes | None:
    """Machine code; None where nvcc refused."""
    path = binary_path(folder, source, arch)
    return gzip.decompress(path.read_bytes()) if path.exists() else None


def write_binary(path: Path, content: bytes) -> None:
    """Machine code to `binary_path`."""
    _write(path, gzip.compress(content, mtime=0))


def paths(folder: Path) -> list[Path]:
    """The files of all cases."""
    return sorted((folder / "cases").glob("*.npz"))


def by_family(found: Iterable[Path]) -> dict[str, list[Path]]:
    """Cases by family, the families in alphabetical order."""
    families: dict[str, list[Path]] = {}
    for path in found:
        families.setdefault(read_description(path).family, []).append(path)
    return dict(sorted(families.items()))


def selected(found: Iterable[Path], limit: int) -> Iterator[Path]:
    """At most `limit` recorded cases of every family, from as many tests as possible, and all of real size."""
    for family, group in by_family(found).items():
        tests: dict[str, int] = {}
        ranked = []
        for path in group:
            origin = read_description(path).origin
            if origin.startswith(REAL) or family == INSTRUCTIONS:
                yield path
                continue
            # The first case of every test, then the second of each.
            test = origin.partition("[")[0]
            tests[test] = tests.get(test, 0) + 1
            ranked.append((tests[test], path))
        yield from (path for _, path in sorted(ranked)[:limit])
