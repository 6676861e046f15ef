"""The pinned TVM release: a clear refusal of others, cheap imports, and a smoke test of what a wrong pin breaks."""

import inspect
import subprocess
import sys
from importlib import metadata

import pytest

from lpsn_tvm import compat
from lpsn_tvm.errors import CompileError


def test_installed_versions_are_accepted():
    compat.check_versions()


@pytest.mark.parametrize("package", compat.PINS)
def test_other_versions_are_refused(monkeypatch, package):
    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "9.9" if name == package else real(name))
    with pytest.raises(
        CompileError, match=f"{package} is 9.9, this release needs {compat.PINS[package]}: python -m pip install"
    ):
        compat.check_versions()


def test_light_stack_is_taken_back_after_an_error():
    original = inspect.stack
    with pytest.raises(ZeroDivisionError), compat.light_stack():
        assert inspect.stack()[0].function == "test_light_stack_is_taken_back_after_an_error"
        raise ZeroDivisionError
    assert inspect.stack is original


@pytest.mark.slow
def test_tune_context_with_a_space_generator_survives():
    """FFI releases after the pinned one crash the process here, hence the process of its own."""
    program = """
import tvm
from lpsn_tvm.compat import import_tensor_intrinsics
import_tensor_intrinsics()
from tvm import te
from tvm.s_tir import meta_schedule as ms
a = te.placeholder((16, 16), name="a")
b = te.compute((16, 16), lambda i, j: a[i, j] + 1, name="b")
target = tvm.target.Target({"kind": "llvm", "mcpu": "haswell", "num-cores": 1})
context = ms.TuneContext(tvm.IRModule({"main": te.create_prim_func([a, b])}), target=target, space_generator="post-
order-apply") print(len(context.generate_design_space()))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.split()[-1]) >= 1
