"""Records: which configuration of a kernel template was measured to be faster than the default one, on which device.

A file of records is JSON and says where and when each was measured. Building with records changes speed, never results:
a template's configurations compute equal values.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lpsn_tvm.container import write_atomically
from lpsn_tvm.errors import TuningError
from lpsn_tvm.schedules.template import Config, canonical, template_key

if TYPE_CHECKING:
    from lpsn_tvm.schedules.template import Template

FORMAT = 1
SHIPPED = Path(__file__).parent / "tuning" / "shipped"


@dataclass(frozen=True)
class Record:
    """One kernel's best known configuration on one device.

    Parameters
    ----------
    device : str
        What the record is good for, as `Backend.device` says: "sm_90", or an llvm CPU and its features.
    template : str
    workload : mapping
        As in `Template`.
    config : Config
    seconds, default_seconds : float
        Medians of one call, measured in turn in one process.
    machine : str
        Where it was measured.
    date : str
        UTC, ISO 8601.
    """

    device: str
    template: str
    workload: Mapping[str, Any]
    config: Config
    seconds: float
    default_seconds: float
    machine: str = ""
    date: str = ""

    @cached_property
    def key(self) -> tuple[str, str]:
        """(device, key of the template): what it is filed under."""
        return self.device, template_key(self.template, self.workload)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Record:
        """Inverse of `dataclasses.asdict`; KeyError, TypeError or ValueError where it is not one."""
        times = [float(record[name]) for name in ("seconds", "default_seconds")]
        if not all(math.isfinite(value) and value > 0 for value in times):
            raise ValueError("times must be positive")
        config = {str(knob): value for knob, value in record["config"].items()}
        if not all(isinstance(value, (int, str)) for value in config.values()):
            raise ValueError("a knob's value is a whole number or text")
        device, template, machine, date = (str(record[n]) for n in ("device", "template", "machine", "date"))
        return cls(device, template, dict(record["workload"]), config, times[0], times[1], machine, date)


class Records:
    """An immutable set of records, one per device and template.

    Parameters
    ----------
    records : iterable of Record
        Of two with the same key the later one counts.
    """

    def __init__(self, records: Iterable[Record] = ()) -> None:
        self._records = {record.key: record for record in records}

    def find(self, device: str, template: Template) -> Record | None:
        """The record of a template on a device, if its configuration is still one of the template's."""
        record = self._records.get((device, template.key))
        return record if record is not None and template.is_valid(record.config) else None

    def misfit(self, device: str, template: Template) -> str:
        """Why a record of this template is not used; "" where there is none or it is used."""
        record = self._records.get((device, template.key))
        if record is None or template.is_valid(record.config):
            return ""
        return f"a record of {template.name} is ignored: this release does not offer {canonical(record.config)}"

    def merge(self, other: Records) -> Records:
        """Both; `other` counts where both have a record."""
        return Records([*self, *other])

    def for_device(self, device: str) -> Records:
        """Those of one device."""
        return Records(record for record in self if record.device == device)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the records, whatever their order; "" of none."""
        if not self._records:
            return ""
        lines = sorted(canonical(asdict(record)) for record in self)
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def __iter__(self) -> Iterator[Record]:
        return iter(self._records.values())

    def __len__(self) -> int:
        return len(self._records)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Records) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        return f"Records({len(self)} of {', '.join(sorted({r.device for r in self})) or 'no device'})"

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write a JSON file, atomically.

        Raises
        ------
        ArtifactError
            If the folder is missing or not writable.
        """
        content = {"package": "lpsn_tvm", "format": FORMAT, "records": [asdict(record) for record in self]}
        write_atomically(Path(path), json.dumps(content, indent=1).encode())
        return Path(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Records:
        """Read a JSON file.

        Raises
        ------
        TuningError
            It cannot be read, is not a file of records, or is of a newer format.
        """
        try:
            content = json.loads(Path(path).read_text())
            version = int(content["format"])
            if version > FORMAT:
                raise TuningError(f"is of format {version}, this release reads up to {FORMAT}", where=str(path))
            return cls(Record.from_json(record) for record in content["records"])
        except OSError as error:
            raise TuningError(f"cannot be read: {error.strerror or error}", where=str(path)) from error
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise TuningError(f"is not a file of tuning records: {error!r}", where=str(path)) from error

    @classmethod
    def from_any(cls, source: Records | str | os.PathLike[str] | None) -> Records:
        """Records, or the file that holds them; none for None.

        Raises
        ------
        TuningError
            Neither of these, or the file cannot be read.
        """
        if source is None:
            return cls()
        if isinstance(source, Records):
            return source
        if not isinstance(source, (str, os.PathLike)):
            raise TuningError(f"must be a file of records or Records, got {type(source).__name__}", where="records")
        return cls.load(source)


@cache
def shipped() -> Records:
    """What the package ships."""
    found = Records()
    for path in sorted(SHIPPED.glob("*.json")):
        found = found.merge(Records.load(path))
    return found
