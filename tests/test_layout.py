"""The house: packages listed, layers respected, imports quick."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[no-redef, import-not-found]

ROOT = Path(__file__).resolve().parents[1]
LINKED = ("passes", "schedules", "targets")
LAYERS = {"passes": 1, "schedules": 1, "targets": 2, "tuning": 3}
TOP = {
    "records": 1,
    "export": 2,
    "reporting": 3,
    "loading": 3,
    "driver": 4,
    "analysis": 4,
    "cli": 5,
    "cli_vta": 5,
    "cli_tune": 5,
    "cli_rpc": 5,
    "__init__": 5,
}


def _sources() -> list[tuple[str, Path]]:
    """(module name below lpsn_tvm, file) of everything the wheel ships."""
    found = [
        (".".join(path.relative_to(ROOT / "lpsn_tvm").with_suffix("").parts), path)
        for path in (ROOT / "lpsn_tvm").rglob("*.py")
        if path.relative_to(ROOT / "lpsn_tvm").parts[0] not in LINKED
    ]
    for folder in LINKED:
        found += [
            (".".join(path.relative_to(ROOT).with_suffix("").parts), path) for path in (ROOT / folder).rglob("*.py")
        ]
    return found


def _level(module: str) -> int:
    head = module.split(".")[0]
    return LAYERS.get(head, TOP.get(head, 0))


def test_every_package_is_in_the_wheel() -> None:
    """A folder with Python files that pyproject does not list would be missing from the wheel."""
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    present = {".".join(["lpsn_tvm", *module.split(".")[:-1]]) for module, _ in _sources()}
    assert present == listed


@pytest.mark.parametrize("folder", LINKED)
def test_links_point_to_the_folders(folder: str) -> None:
    assert (ROOT / "lpsn_tvm" / folder).is_symlink()
    assert (ROOT / "lpsn_tvm" / folder).resolve() == ROOT / folder


def _statements(tree: ast.AST) -> Iterator[ast.stmt]:
    """All statements, in whatever they are; none that only a type checker sees."""
    for node in ast.iter_child_nodes(tree):
        # Expressions hold no statements.
        if isinstance(node, ast.expr):
            continue
        if isinstance(node, ast.stmt):
            yield node
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            for other in node.orelse:
                yield from (other, *_statements(other))
        else:
            yield from _statements(node)


def _imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in _statements(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.removeprefix("lpsn_tvm.") for name in names if name.startswith("lpsn_tvm.")}


def test_imports_follow_the_layers() -> None:
    """errors <- core <- {passes, schedules} <- targets <- tuning <- driver <- cli; passes and schedules do not know
    each other.
    """
    wrong = []
    for module, path in _sources():
        head, level = module.split(".")[0], _level(module)
        for name in _imports(path):
            other = name.split(".")[0]
            crosses = {head, other} == {"passes", "schedules"}
            if _level(name) > level or crosses:
                wrong.append(f"{module} imports {name}")
    assert not wrong, "\n".join(sorted(wrong))


def _modules_after(statement: str) -> set[str]:
    heavy = ("tvm", "torch", "onnx", "tvm_ffi", "scipy", "rich")
    code = f"import sys; {statement}; print(' '.join(m for m in {heavy} if m in sys.modules))"
    return set(
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
        ).stdout.split()
    )


def test_importing_the_package_is_light() -> None:
    assert _modules_after("import lpsn_tvm") == set()
    assert _modules_after("import lpsn_tvm.cli") <= {"rich"}
    assert _modules_after("from lpsn_tvm import load") <= {"rich"}
