"""Instructions of whatever holds a program, as text or JSON values: a program directory, an exported network, a board
bundle, a saved module, or bare encoded instructions.

Relocatable programs (bundles, modules) show addresses from the start of the region that is named behind.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lpsn_tvm.errors import ArtifactError, LpsnError
from lpsn_tvm.targets.vta.config import VtaConfig
from lpsn_tvm.targets.vta.instructions import Flags
from lpsn_tvm.targets.vta.isa import INSTRUCTION_BYTES, Instruction, Load, Store, decode, disassemble
from lpsn_tvm.targets.vta.network_directory import program_folders
from lpsn_tvm.targets.vta.program import LinkedRegion, tile_bytes
from lpsn_tvm.targets.vta.program_directory import NETWORK, PROGRAM, read_program
from lpsn_tvm.targets.vta.serialize import NO_TARGET

_FLAGS = tuple(Flags.__dataclass_fields__)


@dataclass(frozen=True)
class Listing:
    """One program.

    Parameters
    ----------
    name : str
        Where it was found.
    config : VtaConfig
    instructions : sequence of Instruction
    regions : sequence of str or None
        Region that each instruction reads or writes.
    marks : mapping of instruction index to operator
    """

    name: str
    config: VtaConfig
    instructions: Sequence[Instruction]
    regions: Sequence[str | None]
    marks: Mapping[int, str] = field(default_factory=dict)

    def lines(self) -> Iterator[str]:
        """Index, instruction, region; a line per operator where it begins."""
        width = len(str(max(len(self.instructions) - 1, 0)))
        yield f"# {self.name}: {len(self.instructions)} instructions, {self.config.name}, isa {self.config.isa_version}"
        for index, (instruction, region) in enumerate(zip(self.instructions, self.regions, strict=True)):
            if index in self.marks:
                yield f"# {self.marks[index]}"
            comment = f"  # {region}" if region else ""
            yield f"{index:>{width}}  {disassemble(instruction, self.config)}{comment}"

    def to_json(self) -> dict[str, Any]:
        """The same as JSON values."""
        return {
            "name": self.name,
            "config": self.config.to_json(),
            "instructions": [
                _record(index, instruction, region, self.config)
                for index, (instruction, region) in enumerate(zip(self.instructions, self.regions, strict=True))
            ],
            "operators": [{"index": index, "name": name} for index, name in sorted(self.marks.items())],
        }


def _record(index: int, instruction: Instruction, region: str | None, config: VtaConfig) -> dict[str, Any]:
    return {
        "index": index,
        "text": disassemble(instruction, config),
        "kind": type(instruction).__name__.lower(),
        "flags": [flag for flag in _FLAGS if getattr(instruction, flag)],
        "fields": {name: value for name, value in asdict(instruction).items() if name not in _FLAGS},
        "region": region,
    }


def read_listings(path: str | os.PathLike[str], config: VtaConfig | None = None) -> list[Listing]:
    """Every program at `path`.

    Parameters
    ----------
    path : path
        Program directory, exported network, bundle (zip or unpacked), saved module, or a file of bare instructions.
    config : VtaConfig, optional
        For bare instructions, which do not say how they are encoded.

    Raises
    ------
    ArtifactError
        Nothing of that kind is there, or it is damaged; bare instructions without `config`.
    """
    place = Path(path)
    if not place.exists():
        raise ArtifactError("does not exist", where=str(path))
    if place.is_dir() or place.name in (PROGRAM, NETWORK):
        folder = place if place.is_dir() else place.parent
        if (folder / "manifest.json").is_file() and not (folder / PROGRAM).is_file():
            return _relocatable(_json((folder / NETWORK), str(folder)), _Folder(folder), str(folder))
        if not (folder / PROGRAM).is_file() and not (folder / NETWORK).is_file():
            raise ArtifactError(f"has no {PROGRAM} and no {NETWORK}", where=str(path))
        return [_linked(found) for found in program_folders(folder)]
    if zipfile.is_zipfile(place):
        return _archive(place)
    if config is None:
        raise ArtifactError("is neither a directory nor a zip file; bare instructions need --config", where=str(path))
    try:
        instructions = decode(place.read_bytes(), config)
    except OSError as error:
        raise ArtifactError(f"cannot be read: {error.strerror or error}", where=str(path)) from error
    return [Listing(place.name, config, instructions, [None] * len(instructions))]


def _linked(folder: Path) -> Listing:
    """A program directory, whether or not it keeps the rules of the memory map."""
    linked, _, _ = read_program(folder, check=False)
    instructions = decode(linked.insn, linked.config)
    regions = [_region_of(instruction, linked.regions.values(), linked.config) for instruction in instructions]
    return Listing(folder.name, linked.config, instructions, regions)


def _region_of(instruction: Instruction, regions: Any, config: VtaConfig) -> str | None:
    if not isinstance(instruction, (Load, Store)) or not instruction.x_size:
        return None
    address = instruction.dram * tile_bytes(instruction, config)
    found: list[LinkedRegion] = [region for region in regions if region.addr <= address < region.addr + region.size]
    return f"{found[0].name}+0x{address - found[0].addr:x}" if found else "outside of all regions"


class _Folder(Mapping[str, bytes]):
    """Files below a folder by relative name; names that lead out of it are not there."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder.resolve()

    def __getitem__(self, name: str) -> bytes:
        path = (self._folder / name).resolve()
        if self._folder not in path.parents or not path.is_file():
            raise KeyError(name)
        return path.read_bytes()

    def __iter__(self) -> Iterator[str]:
        return (str(path.relative_to(self._folder)) for path in self._folder.rglob("*") if path.is_file())

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _archive(path: Path) -> list[Listing]:
    """A bundle or a saved module."""
    try:
        with zipfile.ZipFile(path) as archive:
            files = {name: archive.read(name) for name in archive.namelist() if not name.endswith((".so", "/"))}
        record = json.loads(files[NETWORK]) if NETWORK in files else json.loads(files["manifest.json"])["network"]
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ArtifactError(f"is neither a bundle nor a VTA module ({error})", where=str(path)) from error
    except OSError as error:
        raise ArtifactError(f"cannot be read: {error.strerror or error}", where=str(path)) from error
    except Exception as error:  # zlib.error, BadZipFile and their like have no common base
        raise ArtifactError(f"is damaged ({error})", where=str(path)) from error
    return _relocatable(record, files, str(path))


def _json(path: Path, where: str) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{path.name} cannot be read: {error}", where=where) from error


def _relocatable(record: Any, files: Mapping[str, bytes], where: str) -> list[Listing]:
    """The programs of a serialized network."""
    try:
        config = VtaConfig.from_json(record["config"])
        steps = [(index, step) for index, step in enumerate(record["steps"]) if step["kind"] == "device"]
        return [_step(f"program{index}", step, files, config) for index, step in steps]
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise ArtifactError(f"holds no valid programs ({type(error).__name__}: {error})", where=where) from error
    except LpsnError as error:
        raise ArtifactError(str(error), where=where) from error


def _step(name: str, step: Mapping[str, Any], files: Mapping[str, bytes], config: VtaConfig) -> Listing:
    data, codes = files[step["insn"]], files[step["targets"]]
    if len(codes) * INSTRUCTION_BYTES != len(data):
        raise ArtifactError(f"{len(codes)} targets for {len(data)} bytes of instructions", where=name)
    names = [str(region["name"]) for region in step["regions"]]
    marks = {int(index): str(operator) for index, operator in step.get("marks", [])}
    regions = [None if code == NO_TARGET else names[code] for code in codes]
    return Listing(name, config, decode(data, config), regions, marks)
