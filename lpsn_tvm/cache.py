"""Where the package keeps what took long to find."""

from __future__ import annotations

import os
from pathlib import Path


def cache_directory(name: str) -> Path:
    """`$XDG_CACHE_HOME/lpsn_tvm/<name>`, else `~/.cache/lpsn_tvm/<name>`; not made here."""
    root = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification: a relative path in the variable is invalid and to be ignored.
    base = Path(root) if os.path.isabs(root) else Path.home() / ".cache"
    return base / "lpsn_tvm" / name
