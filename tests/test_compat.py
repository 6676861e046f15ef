"""The pinned TVM release: a clear refusal of others, cheap imports, and a smoke test of what a wrong pin breaks."""

import inspect
import logging
import subprocess
import sys
from importlib import metadata
from types import ModuleType

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


def test_tune_context_with_a_space_generator_survives():
    """FFI releases after the pinned one crash the process here, hence the process of its own."""
    compat.smoke_test()


@pytest.mark.parametrize("program", ["import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "print(0)", "1 / 0"])
def test_a_crash_of_the_smoke_test_names_the_wanted_releases(program):
    with pytest.raises(CompileError, match=r"MetaSchedule does not work .*apache-tvm-ffi==0.1.14.post1"):
        compat.smoke_test((sys.executable, "-c", program))


def test_a_tune_context_does_without_tensor_intrinsics(monkeypatch):
    name = "tvm.s_tir.tensor_intrin"
    compat.import_tvm()
    from tvm.s_tir import meta_schedule

    monkeypatch.delitem(sys.modules, name, raising=False)
    with compat.without_tensor_intrinsics():
        meta_schedule.TuneContext()
        assert not hasattr(sys.modules[name], "__file__")
    assert name not in sys.modules, "whoever needs them can import them"
    real = ModuleType(name)
    monkeypatch.setitem(sys.modules, name, real)
    with compat.without_tensor_intrinsics():
        assert sys.modules[name] is real
    assert sys.modules[name] is real


def test_workers_import_tvm_without_torch():
    program = "import sys; from lpsn_tvm.compat import import_tvm; import_tvm(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout.strip() == "False"


def test_metaschedule_is_quiet_and_its_level_is_put_back():
    logger = logging.getLogger(compat.METASCHEDULE)
    before = logger.level
    with pytest.raises(ZeroDivisionError), compat.quiet_metaschedule():
        assert not logger.isEnabledFor(logging.WARNING)
        raise ZeroDivisionError
    assert logger.level == before
