"""Small integer networks, operator by operator."""

import numpy as np
from tvm import relax

from lpsn_tvm import graph
from lpsn_tvm.passes.integer_ops import integer_call


class Builder:
    """A small integer network."""

    def __init__(self, shape=(1, 3, 10, 12)):
        self.rng = np.random.default_rng(0)
        self.x = relax.Var("x", relax.TensorType(shape, "float32"))
        self.builder = relax.BlockBuilder()

    def emit(self, name, op, tensors, **attrs):
        return graph.emit_named(self.builder, integer_call(op, tensors, attrs), name)

    def quantize(self, x, name="q"):
        return self.emit(
            name, "lpsn.quantize", [x], inv_scale=40.0, zero_point=110, qmin=0, qmax=255, out_dtype="uint8"
        )

    def conv(self, name, x, out, kernel=3, residual=None, **attrs):
        channels = graph.shape_of(x)[1]
        groups = attrs.get("groups", 1)
        constants = [
            self.rng.integers(-128, 128, (out, channels // groups, kernel, kernel)).astype(np.int8),
            self.rng.integers(-500, 500, out).astype(np.int32),
            (self.rng.random(out) * 4e-3 / np.sqrt(channels * kernel**2)).astype(np.float32),
        ]
        attrs = {"strides": (1, 1), "padding": (kernel // 2,) * 4, "x_zero_point": 110, "out_zero_point": 110, **attrs}
        tensors = [x, *map(graph.constant, constants)]
        if residual is not None:
            tensors.append(residual)
            attrs.update(residual_multiplier=0.5, residual_zero_point=110)
        return self.emit(name, "lpsn.conv2d", tensors, **attrs)

    def build(self, body):
        with self.builder.function("main", [self.x]):
            with self.builder.dataflow():
                output = self.builder.emit_output(body(self))
            self.builder.emit_func_output(output)
        return self.builder.get()


def residual_network(net):
    a = net.conv("block/conv.1", net.quantize(net.x), 20)
    b = net.conv("depthwise", a, 20, groups=20)
    c = net.conv("project", b, 20, kernel=1, residual=a)
    d = net.conv("again", c, 20, kernel=1, residual=b)
    return net.conv("head", d, 5, kernel=1, out_dtype="float32")
