"""Targets by name and string, and what a backend states about itself."""

import json

import pytest

from lpsn_tvm.errors import TargetError
from lpsn_tvm.schedules.llvm.isa import AVX2, AVX512, AVX_VNNI, GENERIC
from lpsn_tvm.targets import get_backend
from lpsn_tvm.targets.backend import parse_target


@pytest.mark.parametrize(
    ("target", "config"),
    [
        ("llvm", {"kind": "llvm"}),
        ("llvm -mcpu=cascadelake", {"kind": "llvm", "mcpu": "cascadelake"}),
        (
            "llvm -mcpu=haswell -mattr=-avx2,-fma -num-cores=2",
            {"kind": "llvm", "mcpu": "haswell", "mattr": ["-avx2", "-fma"], "num-cores": 2},
        ),
        ('{"kind": "llvm", "mcpu": "haswell"}', {"kind": "llvm", "mcpu": "haswell"}),
        ({"kind": "llvm"}, {"kind": "llvm"}),
    ],
    ids=str,
)
def test_parse_target(target, config):
    assert parse_target(target) == config


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("", "unknown target kind ''"),
        ("cdua", "unknown target kind 'cdua'"),
        ("llvm -mcpu=nonesuch", "does not know this CPU"),
        ("llvm mcpu=haswell", "not of the form"),
        ("{kind: llvm}", "not valid JSON"),
        (7, "not int"),
        ({"kind": "llvm", "colour": "red"}, "does not accept"),
        ({"kind": "llvm", "fast-math": True}, "fast-math changes"),
    ],
    ids=str,
)
def test_bad_targets(target, message):
    with pytest.raises(TargetError, match=message):
        get_backend(target)


@pytest.mark.parametrize(
    ("cpu", "isa"),
    [("skylake-avx512", AVX512), ("alderlake", AVX_VNNI), ("haswell", AVX2), ("x86-64", GENERIC)],
    ids=lambda value: str(value)[:16],
)
def test_instruction_set_follows_the_cpu(cpu, isa):
    assert get_backend(f"llvm -mcpu={cpu}").geometry == isa


def test_attributes_take_features_away():
    assert get_backend("llvm -mcpu=cascadelake -mattr=-avx512vnni").geometry == AVX512


def test_other_architectures_get_plain_code():
    assert get_backend({"kind": "llvm", "mtriple": "aarch64-linux-gnu"}).geometry == GENERIC


def test_backend_is_data():
    backend = get_backend("llvm -mcpu=cascadelake")
    assert (backend.name, backend.channel_tile, backend.scheme.activation_signed) == ("llvm", 16, False)
    assert json.loads(backend.tvm_target) == {"kind": "llvm", "mcpu": "cascadelake"}
    assert get_backend(backend) is backend
    assert get_backend(backend.target).tvm_target == backend.tvm_target


def test_host_backend_uses_only_features_of_this_machine():
    from lpsn_tvm import runtime
    from lpsn_tvm.targets.llvm import required_features

    assert set(required_features(get_backend("llvm").target)) <= (runtime.cpu_features() or set())
