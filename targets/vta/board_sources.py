"""The package's own arithmetic and layouts as modules that a board's Python 3.8 runs: the same source, with the syntax
of later versions taken out, so that nothing is written twice.

Rewritten: `zip(strict=)`, `dict | dict`, aliases of types, imports of the package, `np.broadcast_shapes` (numpy 1.20)
and scipy's `erf`. Annotations stay; they are never evaluated.
"""

from __future__ import annotations

import ast
import inspect
from types import ModuleType

from lpsn_tvm import float_ops, quant
from lpsn_tvm.targets.vta import host_float, host_steps, layout

BOARD_PYTHON = (3, 8)
_PREAMBLE = '''
import math


class CompileError(ValueError):
    """A value does not fit its layout."""

    def __init__(self, message, where=None):
        super().__init__("%s: %s" % (where, message) if where else message)


def _broadcast_shapes(*shapes):
    return np.broadcast(*[np.empty(shape, np.int8) for shape in shapes]).shape


def _erf(x):
    return np.vectorize(math.erf, otypes=[np.float64])(x)
'''


def board_modules() -> dict[str, str]:
    """File name -> source, valid Python 3.8: `lpsn_quant.py`, `lpsn_float_ops.py`, `lpsn_host_float.py`,
    `lpsn_host_steps.py`, `lpsn_layout.py`.
    """
    own = {"host_float": host_float, "host_steps": host_steps, "layout": layout}
    modules = {"quant": quant, "float_ops": float_ops, **own}
    return {f"lpsn_{name}.py": for_board(inspect.getsource(module), module) for name, module in modules.items()}


def for_board(source: str, module: ModuleType) -> str:
    """`source` of `module` in the syntax of Python 3.8."""
    tree = _Older().visit(ast.parse(source))
    tree.body = [statement for statement in tree.body if not _is_alias(statement)]
    first = next(i for i, statement in enumerate(tree.body) if isinstance(statement, (ast.FunctionDef, ast.ClassDef)))
    tree.body[first:first] = ast.parse(_PREAMBLE).body
    text = f"# Generated from {module.__name__}; do not edit.\n" + ast.unparse(ast.fix_missing_locations(tree)) + "\n"
    ast.parse(text, feature_version=BOARD_PYTHON)
    return text


def _is_alias(statement: ast.stmt) -> bool:
    """`Name = Literal[...]`, `list[...]`, `A | B`, `npt.NDArray[...]`: only annotations use these."""
    if not isinstance(statement, ast.Assign):
        return False
    value = statement.value
    if isinstance(value, ast.BinOp) and isinstance(value.op, ast.BitOr):
        return isinstance(value.left, ast.Name) and isinstance(value.right, ast.Name)
    return isinstance(value, ast.Subscript) and ast.unparse(value.value) in ("Literal", "list", "dict", "npt.NDArray")


class _Older(ast.NodeTransformer):
    """Statements and expressions of Python 3.9 and later -> 3.8."""

    def visit_Import(self, node: ast.Import) -> ast.stmt | None:
        return None if any(alias.name == "numpy.typing" for alias in node.names) else node

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.stmt | None:
        if node.module == "lpsn_tvm" and [alias.name for alias in node.names] == ["quant"]:
            return ast.parse("import lpsn_quant as quant").body[0]
        if node.module == "lpsn_tvm.targets.vta" and [alias.name for alias in node.names] == ["host_float"]:
            return ast.parse("import lpsn_host_float as host_float").body[0]
        return None if (node.module or "").startswith("lpsn_tvm") else node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.stmt | None:
        return None if node.name == "_erf" else self.generic_visit(node)  # type: ignore[return-value]

    def visit_Call(self, node: ast.Call) -> ast.expr:
        self.generic_visit(node)
        if ast.unparse(node.func) == "zip":
            node.keywords = [keyword for keyword in node.keywords if keyword.arg != "strict"]
        return node

    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
        self.generic_visit(node)
        return ast.Name("_broadcast_shapes", ast.Load()) if ast.unparse(node) == "np.broadcast_shapes" else node

    def visit_AugAssign(self, node: ast.AugAssign) -> ast.stmt:
        self.generic_visit(node)
        if isinstance(node.op, ast.BitOr) and isinstance(node.value, ast.Dict):
            return ast.Expr(
                ast.Call(ast.Attribute(ast.Name(ast.unparse(node.target), ast.Load()), "update"), [node.value], [])
            )
        return node

    def visit_BinOp(self, node: ast.BinOp) -> ast.expr:
        self.generic_visit(node)
        dicts = (ast.Dict, ast.DictComp)
        if isinstance(node.op, ast.BitOr) and isinstance(node.left, dicts) and isinstance(node.right, dicts):
            return ast.Dict([None, None], [node.left, node.right])
        return node
