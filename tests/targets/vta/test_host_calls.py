"""Float operators that no fused form covers run on the host, in numpy, as torch computes them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from lpsn_tvm.frontend import import_model, load_model
from lpsn_tvm.passes.canonicalize import canonicalize
from lpsn_tvm.passes.fuse_float import fuse_float
from lpsn_tvm.reference import run_reference
from lpsn_tvm.targets.vta.assemble_network import assemble
from lpsn_tvm.targets.vta.config import PRESETS
from lpsn_tvm.targets.vta.lowering import lower
from tests.frontend.operator_cases import CASES, LEGACY_CASES
from tests.support.onnx_nets import OnnxNet


def check(model: Any) -> None:
    """The float network, all on the host, against the reference."""
    imported = import_model(load_model(model, batch=1))
    mod = fuse_float(canonicalize(imported.mod))
    network = assemble(lower(mod, PRESETS["pynq"]), emit=_never, choose=_never)
    assert not network.device_steps
    rng = np.random.default_rng(0)
    feeds = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in imported.signature.items()}
    outputs = network.run(feeds)
    for name, expected in run_reference(mod, feeds).items():
        assert outputs[name].shape == expected.shape
        np.testing.assert_allclose(outputs[name], expected, rtol=2e-5, atol=2e-5)


def _never(*_: Any) -> None:
    raise AssertionError("a float network has no operator for the accelerator")


def _case(name: str, legacy: bool) -> Any:
    net = OnnxNet()
    case = (LEGACY_CASES if legacy else CASES)[name]
    return net.model(case(net, net.input("x", 1, 8, 9, 7)), opset=9 if legacy else 17)


@pytest.mark.parametrize("name", list(CASES))
def test_operator(name: str) -> None:
    check(_case(name, False))


@pytest.mark.parametrize("name", list(LEGACY_CASES))
def test_operator_of_opset_9(name: str) -> None:
    check(_case(name, True))


@pytest.mark.parametrize(
    ("op", "attrs", "extra"),
    [
        ("ReduceMean", {"axes": [1]}, ()),
        ("ReduceMin", {"axes": [2], "keepdims": 0}, ()),
        ("Tile", {}, ("repeats",)),
    ],
    ids=lambda value: str(value)[:16],
)
def test_rare_operators(op: str, attrs: dict[str, Any], extra: tuple[str, ...]) -> None:
    shape = [1, 4, 5, 6]
    repeats = numpy_helper.from_array(np.array([1, 1, 2, 3], np.int64), "repeats")
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node(op, ["x", *extra], ["y"], name="rare", **attrs)],
        "rare",
        [info("x", TensorProto.FLOAT, shape)],
        [info("y", TensorProto.FLOAT, None)],
        [repeats] if extra else [],
    )
    check(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)]))
