"""Found schedules on disk: one small JSON file per key, safe to share between processes and to lose.

An entry is written to a temporary file beside its place and renamed, so that a reader sees all of it or nothing. A
damaged or foreign entry counts as absent and is overwritten by the next search.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lpsn_tvm.cache import cache_directory

FORMAT = 1


def default_directory() -> Path:
    """`$XDG_CACHE_HOME/lpsn_tvm/vta`, else `~/.cache/lpsn_tvm/vta`."""
    return cache_directory("vta")


@dataclass(frozen=True)
class ScheduleCache:
    """Entries by key in one directory.

    Parameters
    ----------
    directory : Path
        Created at the first write; a directory that cannot be written makes a cache that holds nothing.
    """

    directory: Path

    def path(self, key: Mapping[str, Any]) -> Path:
        """File of a key: the name is the SHA-256 of its canonical JSON."""
        return self.directory / f"{digest_of(key)}.json"

    def read(self, key: Mapping[str, Any]) -> dict[str, Any] | None:
        """The value stored under `key`; None if there is none, or none that can be trusted."""
        try:
            entry = json.loads(self.path(key).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return None
        if not isinstance(entry, dict) or entry.get("format") != FORMAT:
            return None
        value = entry.get("value")
        # The key is kept in full: a renamed or hand-edited file never answers for another layer.
        if not isinstance(value, dict) or entry.get("key") != json.loads(json.dumps(key)):
            return None
        return value if entry.get("digest") == digest_of(value) else None

    def write(self, key: Mapping[str, Any], value: Mapping[str, Any]) -> bool:
        """Store `value`; False where the directory cannot be written, which is no error for a cache."""
        entry = {"format": FORMAT, "key": key, "digest": digest_of(value), "value": value}
        text = json.dumps(entry, sort_keys=True, indent=1) + "\n"
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            descriptor, name = tempfile.mkstemp(dir=self.directory, prefix=".", suffix=".tmp")
        except OSError:
            return False
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(text)
            os.replace(name, self.path(key))
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(name)
            return False
        return True


def digest_of(value: Mapping[str, Any]) -> str:
    """SHA-256 of the canonical JSON of `value`."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def open_cache(cache: ScheduleCache | str | os.PathLike[str] | bool | None) -> ScheduleCache | None:
    """None and True mean the user's cache directory, False none at all, a path that directory."""
    if cache is False:
        return None
    if cache is None or cache is True:
        return ScheduleCache(default_directory())
    return cache if isinstance(cache, ScheduleCache) else ScheduleCache(Path(cache))
