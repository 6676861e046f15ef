"""Greedy removal on small networks: residual, depthwise, concatenation, grouped and transposed convolution, flatten."""

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from lpsn_tvm.calibration import CalibrationSet
from lpsn_tvm.errors import RecipeError
from lpsn_tvm.graph import find_layers
from lpsn_tvm.interpreter import TorchInterpreter
from lpsn_tvm.passes.prune import prune
from lpsn_tvm.passes.ranking import compare_rankings

SHAPE = (1, 3, 12, 12)


class Builder:
    """Writes ONNX; `dead` output channels of a layer get zero weight and zero bias."""

    def __init__(self, seed=0):
        self.rng, self.nodes, self.weights, self.channels = np.random.default_rng(seed), [], [], {"x": 3}

    def const(self, name, value):
        self.weights.append(numpy_helper.from_array(value.astype(np.float32), name))
        return name

    def conv(self, name, x, out, kernel=3, stride=1, groups=1, dead=(), op="Conv"):
        cin = self.channels[x]
        shape = (cin, out // groups, kernel, kernel) if op == "ConvTranspose" else (out, cin // groups, kernel, kernel)
        weight = self.rng.normal(size=shape) * np.sqrt(2 * groups / (cin * kernel * kernel))
        bias = self.rng.normal(size=out) * 0.1
        if op == "Conv":
            weight[list(dead)] = 0
        bias[list(dead)] = 0
        pad = [kernel // 2] * 4 if op == "Conv" else [0] * 4
        inputs = [x, self.const(name + ".w", weight), self.const(name + ".b", bias)]
        attrs = dict(kernel_shape=[kernel] * 2, strides=[stride] * 2, pads=pad, group=groups)
        return self.node(op, inputs, name, out, **attrs)

    def node(self, op, inputs, name, channels, **attrs):
        self.nodes.append(helper.make_node(op, inputs, [name], name=name, **attrs))
        self.channels[name] = channels
        return name

    def relu(self, x):
        return self.node("Relu", [x], x + ".relu", self.channels[x])

    def dense(self, name, x, features, out):
        inputs = [
            x,
            self.const(name + ".w", self.rng.normal(size=(features, out)) / np.sqrt(features)),
            self.const(name + ".b", np.zeros(out)),
        ]
        return self.node("Gemm", inputs, name, out)

    def module(self, output, shape):
        graph = helper.make_graph(
            self.nodes,
            "net",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, SHAPE)],
            [helper.make_tensor_value_info(output, TensorProto.FLOAT, shape)],
            self.weights,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        from lpsn_tvm.frontend import import_model, load_model
        from lpsn_tvm.passes.canonicalize import canonicalize

        onnx.checker.check_model(model)
        return canonicalize(import_model(load_model(model)).mod)


def residual(dead=()):
    b = Builder()
    stem = b.relu(b.conv("stem", "x", 8, dead=dead))
    mid = b.relu(b.conv("mid", stem, 12, dead=dead))
    back = b.conv("back", mid, 8, dead=dead)
    stream = b.relu(b.node("Add", [back, stem], "sum", 8))
    wide = b.relu(b.conv("expand", stream, 16, kernel=1, dead=dead))
    depth = b.node(
        "Clip",
        [
            b.conv("depth", wide, 16, groups=16, stride=2, dead=dead),
            b.const("lo", np.zeros(())),
            b.const("hi", np.full((), 6.0)),
        ],
        "c",
        16,
    )
    project = b.relu(b.conv("project", depth, 8, kernel=1, dead=dead))
    flat = b.node("Flatten", [project], "flat", 8 * 36)
    return b.module(b.dense("fc", flat, 8 * 36, 5), (1, 5))


def branches(dead=()):
    b = Builder(1)
    one = b.relu(b.conv("one", "x", 8, dead=dead))
    two = b.relu(b.conv("two", "x", 4))
    both = b.node("Concat", [one, two], "cat", 12, axis=1)
    three = b.relu(b.conv("three", both, 8, groups=2))
    up = b.conv("up", three, 6, kernel=2, stride=2, op="ConvTranspose")
    return b.module(b.conv("last", b.relu(up), 2), (1, 2, 24, 24))


NETWORKS = {"residual": residual, "branches": branches}


def calibration(samples=96, seed=0):
    images = np.random.default_rng(seed).normal(size=(samples, *SHAPE[1:])).astype(np.float32)
    return CalibrationSet.from_any(images, {"x": SHAPE}, batch=16)


def outputs(mod, samples=24, seed=9):
    images = np.random.default_rng(seed).normal(size=(samples, *SHAPE[1:])).astype(np.float32)
    return next(iter(TorchInterpreter(mod).run({"x": images}).values()))


def channels(mod):
    return {name: layer.out_channels for name, layer in find_layers(mod).items()}


def output_error(mod, reference):
    truth = outputs(reference)
    return float((outputs(mod) - truth).square().sum() / (truth - truth.mean(0)).square().sum())


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("order", ["greedy", "one_shot"])
@pytest.mark.parametrize("score", ["output_error", "mean_activation", "zero_fraction", "random"])
def test_every_score_and_order_removes_the_fraction(network, order, score):
    mod = NETWORKS[network]()
    result = prune(mod, calibration(48), sparsity=0.25, score=score, order=order)
    assert torch.isfinite(outputs(result.mod)).all()
    assert sum(record.before - record.after for record in result.layers) > 0
    for record in result.layers:
        units = len(record.scores) if record.scores is not None else record.before
        assert record.reason or record.after == (units - int(0.25 * units)) * (record.before // units)
    if network == "residual":
        expected = {"stem": 6, "mid": 9, "back": 6, "expand": 12, "depth": 12, "project": 6, "fc": 5}
        assert channels(result.mod) == expected


def test_removing_channels_of_zero_weight_changes_nothing():
    """Half of the channels are always zero, half are removed: the outputs stay, whatever was re-solved."""
    mod = residual(dead=(1, 2, 5, 7))
    fractions = {"stem": 0.5, "mid": 4 / 12, "expand": 0.25, "project": 0.5}
    result = prune(mod, calibration(), sparsity=fractions)
    assert channels(result.mod)["stem"] == 4 and channels(result.mod)["expand"] == 12
    torch.testing.assert_close(outputs(result.mod), outputs(mod), rtol=1e-4, atol=1e-4)


def test_elimination_beats_random_and_resolving_beats_slicing():
    mod = residual()
    best = output_error(prune(mod, calibration(), sparsity=0.4).mod, mod)
    random = output_error(prune(mod, calibration(), sparsity=0.4, score="random").mod, mod)
    sliced = output_error(prune(mod, calibration(), sparsity=0.4, score="random", resolve=False).mod, mod)
    assert best < random < sliced


def test_the_same_seed_gives_the_same_network_and_the_input_stays():
    mod = residual()
    before = outputs(mod)
    first, second = (prune(mod, calibration(), sparsity=0.5, score=score, seed=3) for score in ("random", "random"))
    assert torch.equal(outputs(first.mod), outputs(second.mod))
    assert torch.equal(outputs(mod), before)


def test_auto_removes_more_at_fewer_bits():
    mod = residual(dead=(1, 2))
    removed = {}
    for bits in ((8, 8), (4, 4), (2, 2)):
        result = prune(mod, calibration(), sparsity="auto", bits=bits)
        removed[bits] = sum(record.before - record.after for record in result.layers)
    assert 0 < removed[8, 8] <= removed[4, 4] < removed[2, 2]


def test_fractions_by_layer_patterns_and_ignored_layers():
    mod = residual()
    result = prune(mod, calibration(48), sparsity={"mid": 0.5, "exp*": 0.25}, ignore=["mid"])
    assert channels(result.mod) == channels(mod) | {"expand": 12, "depth": 12}
    assert result.frozen["mid"] == "layer mid is ignored" and "fc" in result.frozen


def test_kept_counts_are_whole_tiles_where_the_layer_is_wide_enough():
    result = prune(residual(), calibration(48), sparsity=0.4, align=4)
    assert channels(result.mod) == {"stem": 4, "mid": 8, "back": 4, "expand": 12, "depth": 12, "project": 4, "fc": 5}


def test_nonuniform_allocation_keeps_the_macs_of_the_uniform_one():
    mod = residual()
    macs = {
        allocation: sum(
            layer.macs
            for layer in find_layers(prune(mod, calibration(48), sparsity=0.4, allocation=allocation).mod).values()
        )
        for allocation in ("uniform", "nonuniform")
    }
    assert macs["nonuniform"] <= macs["uniform"] * 1.001
    assert macs["nonuniform"] > 0.6 * macs["uniform"]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"ignore": ["stemm"]}, "close matches: stem"),
        ({"sparsity": {"nothing": 0.5}}, "sparsity: no layer"),
        ({"sparsity": 1.0}, "out of range"),
        ({"sparsity": -0.1}, "out of range"),
        ({"score": "magic"}, "is not one of"),
        ({"sparsity": "auto", "order": "one_shot"}, "auto"),
    ],
    ids=str,
)
def test_bad_options(options, message):
    with pytest.raises(RecipeError, match=message):
        prune(residual(), calibration(16), **{"sparsity": 0.5, **options})


def test_progress_reaches_the_end_of_every_stage():
    seen = {}
    prune(
        residual(),
        calibration(40),
        sparsity=0.5,
        progress=lambda stage, done, total: seen.__setitem__(stage, (done, total)),
    )
    assert set(seen) == {"read the dense network", "remove channels"}
    assert all(done == total for done, total in seen.values())


def test_interrupting_leaves_the_module_as_it_was():
    mod = residual()
    before = outputs(mod)

    def interrupt(stage, done, total):
        if stage == "remove channels" and done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune(mod, calibration(40), sparsity=0.5, progress=interrupt)
    assert torch.equal(outputs(mod), before)


def test_rankings_of_the_first_group_agree_and_later_ones_change():
    changes = compare_rankings(residual(), calibration(), sparsities=(0.5,))
    assert changes[0].tau == pytest.approx(1.0) and changes[0].levenshtein == 0
    assert min(change.tau for change in changes[1:]) < 1.0
