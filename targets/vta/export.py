"""Programs and networks as directories for any simulator or loader: one place to import from."""

from __future__ import annotations

from lpsn_tvm.targets.vta.network_directory import export_network, program_folders
from lpsn_tvm.targets.vta.program_directory import export_program, read_program

__all__ = ["export_network", "export_program", "program_folders", "read_program"]
