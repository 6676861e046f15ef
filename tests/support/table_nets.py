"""A small network in the way of MobileNetV3 and ESPCN: activations that become tables behind layers of every kind."""

from __future__ import annotations

import onnx
import random_graphs
from random_graphs import Net, SeededChoices


def activated_network(seed: int = 0) -> onnx.ModelProto:
    """Hard swish, SiLU, sigmoid, hard sigmoid and tanh behind convolutions (1x1, 3x3, depthwise, transposed, with a
    residual) and a dense layer.
    """
    net = Net(SeededChoices(seed), (1, 3, 12, 14))
    stem = net.x = net.activate(net.conv(net.x, 24, 3, stride=2), "HardSwish")
    wide = net.activate(net.conv(net.x, 40, 1), "SiLU")
    wide = net.activate(net.conv(wide, 40, 3, groups=40), "HardSwish")
    gate = net.activate(net.conv(net.node("GlobalAveragePool", [wide]), 12, 1), "Relu")
    gate = net.activate(net.conv(gate, 40, 1), "HardSigmoid")
    narrow = net.conv(net.node("Mul", [wide, gate]), 24, 1)
    net.x = net.activate(net.node("Add", [narrow, stem]), "SiLU")
    weight, bias = net.weight(24, 10, 2, 2, fan=24), net.constant(net.rng.standard_normal(10).astype("float32"))
    up = net.node("ConvTranspose", [net.x, weight, bias], kernel_shape=[2, 2], strides=[2, 2])
    image = net.conv(net.activate(up, "Tanh"), 3, 3)
    flat = net.node("Flatten", [net.node("GlobalAveragePool", [net.x])])
    vectors = [net.weight(9, 24, fan=24), net.weight(5, 9, fan=9)]
    flat = net.activate(net.node("Gemm", [flat, vectors[0]], transB=1), "Sigmoid")
    return random_graphs._finish(net, [image, net.node("Gemm", [flat, vectors[1]], transB=1)])
