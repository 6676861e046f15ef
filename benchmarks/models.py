"""Networks for tests and benchmarks: real architectures, seeded random weights, warmed batch norm, as ONNX.

Every network is built operator by operator; each operator is evaluated at once on a small smooth random batch, so
that batch norm gets the mean and variance it would have learnt and activations stay in a realistic range to the last
layer.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx
import torch

from benchmarks.eager_onnx import Net, smooth_noise

__all__ = ["LATENCY_NETWORKS", "STRUCTURE_NETWORKS", "VTA_NETWORKS", "smooth_noise"]


def _basic_block(net: Net, x: str, out: int, stride: int) -> str:
    y = net.conv_bn_relu(x, out, 3, stride)
    y = net.norm(net.conv(y, out, 3))
    short = x if stride == 1 and net.channels(x) == out else net.norm(net.conv(x, out, 1, stride))
    return net.relu(net.add(y, short))


@torch.no_grad()
def resnet18(seed: int = 0, classes: int = 1000, size: int = 224) -> onnx.ModelProto:
    """ResNet-18 (He et al. 2016), 11.7 M parameters, 1.8 GMAC at 224."""
    net = Net("resnet18", (3, size, size), seed)
    x = net.max_pool(net.conv_bn_relu("input", 64, 7, 2), 3, 2, 1)
    for width, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        x = _basic_block(net, _basic_block(net, x, width, stride), width, 1)
    return net.model(net.head(x, classes))


@torch.no_grad()
def resnet20(seed: int = 0, classes: int = 10, size: int = 32) -> onnx.ModelProto:
    """The CIFAR ResNet-20, 0.27 M parameters."""
    net = Net("resnet20", (3, size, size), seed)
    x = net.conv_bn_relu("input", 16)
    for width, stride in ((16, 1), (32, 2), (64, 2)):
        for index in range(3):
            x = _basic_block(net, x, width, stride if index == 0 else 1)
    return net.model(net.head(x, classes))


@torch.no_grad()
def lenet5(seed: int = 0, classes: int = 10) -> onnx.ModelProto:
    """LeNet-5 (LeCun et al. 1998) for 28 x 28 images with ReLU and max pooling, 61,706 parameters."""
    net = Net("lenet5", (1, 28, 28), seed)
    x = net.max_pool(net.relu(net.conv("input", 6, 5, bias=True)), 2, 2)
    x = net.max_pool(net.relu(net.conv(x, 16, 5, bias=True, pad=0)), 2, 2)
    x = net.node("Flatten", [x], net.values[x].flatten(1), axis=1)
    for width in (120, 84):
        x = net.relu(net.linear(x, width))
    return net.model(net.linear(x, classes))


@torch.no_grad()
def resnet50(seed: int = 0, classes: int = 1000, size: int = 224) -> onnx.ModelProto:
    """ResNet-50 with the stride in the 3x3 convolution, 25.6 M parameters, 4.1 GMAC at 224."""
    net = Net("resnet50", (3, size, size), seed, samples=2)
    x = net.max_pool(net.conv_bn_relu("input", 64, 7, 2), 3, 2, 1)
    for width, stride, depth in ((64, 1, 3), (128, 2, 4), (256, 2, 6), (512, 2, 3)):
        for index in range(depth):
            s = stride if index == 0 else 1
            y = net.conv_bn_relu(net.conv_bn_relu(x, width, 1), width, 3, s)
            y = net.norm(net.conv(y, width * 4, 1))
            short = net.norm(net.conv(x, width * 4, 1, s)) if index == 0 else x
            x = net.relu(net.add(y, short))
    return net.model(net.head(x, classes))


@torch.no_grad()
def vgg11(seed: int = 0, classes: int = 10, size: int = 32) -> onnx.ModelProto:
    """VGG-11 with batch norm for 32 x 32 images, 9.2 M parameters."""
    net, x = Net("vgg11", (3, size, size), seed), "input"
    for step in (64, "M", 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M"):
        x = net.max_pool(x, 2, 2) if step == "M" else net.conv_bn_relu(x, int(step))
    return net.model(net.linear(net.node("Flatten", [x], net.values[x].flatten(1), axis=1), classes))


@torch.no_grad()
def mobilenet_v2(seed: int = 0, classes: int = 1000, size: int = 224) -> onnx.ModelProto:
    """MobileNetV2 1.0 (Sandler et al. 2018), 3.5 M parameters, 0.3 GMAC at 224."""
    net = Net("mobilenet_v2", (3, size, size), seed)
    x = net.conv_bn_relu("input", 32, 3, 2, act=net.relu6)
    for expand, out, depth, stride in (
        (1, 16, 1, 1),
        (6, 24, 2, 2),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    ):
        for index in range(depth):
            s, width = stride if index == 0 else 1, net.channels(x) * expand
            y = x if expand == 1 else net.conv_bn_relu(x, width, 1, act=net.relu6)
            y = net.conv_bn_relu(y, width, 3, s, groups=width, act=net.relu6)
            y = net.norm(net.conv(y, out, 1))
            x = net.add(x, y) if s == 1 and net.channels(x) == out else y
    return net.model(net.head(net.conv_bn_relu(x, 1280, 1, act=net.relu6), classes))


@torch.no_grad()
def espcn(seed: int = 0, scale: int = 3, height: int = 240, width: int = 320) -> onnx.ModelProto:
    """ESPCN super-resolution (Shi et al. 2016) on luma: 5x5x64, 3x3x32, 3x3xr^2, pixel shuffle."""
    net = Net("espcn", (1, height, width), seed, samples=1)
    x = net.tanh(net.conv("input", 64, 5, bias=True, gain=1.0))
    x = net.tanh(net.conv(x, 32, 3, bias=True, gain=1.0))
    return net.model(net.depth_to_space(net.conv(x, scale * scale, 3, bias=True, gain=1.0), scale))


@torch.no_grad()
def densenet121(seed: int = 0, classes: int = 1000, size: int = 224) -> onnx.ModelProto:
    """DenseNet-121 (Huang et al. 2017), growth 32, 8 M parameters."""
    net = Net("densenet121", (3, size, size), seed, samples=2)
    x = net.max_pool(net.conv_bn_relu("input", 64, 7, 2), 3, 2, 1)
    for stage, depth in enumerate((6, 12, 24, 16)):
        for _ in range(depth):
            y = net.conv(net.relu(net.norm(x)), 128, 1)
            x = net.concat(x, net.conv(net.relu(net.norm(y)), 32, 3))
        if stage < 3:
            x = net.avg_pool(net.conv(net.relu(net.norm(x)), net.channels(x) // 2, 1), 2, 2)
    return net.model(net.head(net.relu(net.norm(x)), classes))


@torch.no_grad()
def preact_resnet18(seed: int = 0, classes: int = 100, size: int = 32) -> onnx.ModelProto:
    """PreActResNet-18 for 32 x 32 images: norm and ReLU before each convolution, so norms follow sums."""
    net = Net("preact_resnet18", (3, size, size), seed)
    x = net.conv("input", 64)
    for width, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        for index in range(2):
            s = stride if index == 0 else 1
            pre = net.relu(net.norm(x))
            short = net.conv(pre, width, 1, s) if s != 1 or net.channels(x) != width else x
            y = net.conv(net.relu(net.norm(net.conv(pre, width, 3, s))), width)
            x = net.add(y, short)
    return net.model(net.head(net.relu(net.norm(x)), classes))


@torch.no_grad()
def unet(seed: int = 0, classes: int = 19, size: int = 128, base: int = 32) -> onnx.ModelProto:
    """U-Net (Ronneberger et al. 2015): four levels, skip concatenation, transposed convolution."""
    net, x, skips = Net("unet", (3, size, size), seed, samples=2), "input", []
    for level in range(4):
        x = net.conv_bn_relu(net.conv_bn_relu(x, base << level), base << level)
        skips.append(x)
        x = net.max_pool(x, 2, 2)
    x = net.conv_bn_relu(net.conv_bn_relu(x, base << 4), base << 4)
    for level in reversed(range(4)):
        x = net.concat(skips[level], net.conv_transpose(x, base << level, 2, 2, 0, bias=True))
        x = net.conv_bn_relu(net.conv_bn_relu(x, base << level), base << level)
    return net.model(net.conv(x, classes, 1, bias=True, gain=1.0))


@torch.no_grad()
def frrn(seed: int = 0, classes: int = 19, size: int = 128) -> onnx.ModelProto:
    """A full-resolution residual network (Pohlen et al. 2017): a 32-channel full-resolution stream beside a pooled
    one.
    """
    net = Net("frrn", (3, size, size), seed, samples=2)
    y = _basic_block(net, net.conv_bn_relu("input", 48, 5), 48, 1)
    z = net.conv(y, 32, 1)
    plan = ((2, 96), (4, 192), (8, 192), (4, 192), (2, 96))
    level = 1
    for scale, width in plan:
        while level < scale:
            y, level = net.max_pool(y, 2, 2), level * 2
        while level > scale:
            y, level = net.upsample(y, 2), level // 2
        joined = net.concat(y, net.max_pool(z, scale, scale))
        y = net.conv_bn_relu(net.conv_bn_relu(joined, width), width)
        z = net.add(z, net.upsample(net.conv(y, 32, 1, bias=True, gain=0.2), scale))
    y = net.upsample(y, 2, mode="linear")
    x = _basic_block(net, net.conv_bn_relu(net.concat(y, z), 48, 1), 48, 1)
    return net.model(net.conv(x, classes, 1, bias=True, gain=1.0))


@torch.no_grad()
def cyclegan_generator(seed: int = 0, size: int = 128, blocks: int = 6, base: int = 32) -> onnx.ModelProto:
    """The CycleGAN generator (Zhu et al. 2017): reflection pads, instance norm, residual blocks, transposed
    convolutions, tanh.
    """
    net = Net("cyclegan_generator", (3, size, size), seed, samples=1)
    x = net.relu(net.instance_norm(net.conv(net.reflect_pad("input", 3), base, 7, pad=0, bias=True)))
    for width in (base * 2, base * 4):
        x = net.relu(net.instance_norm(net.conv(x, width, 3, 2, bias=True)))
    for _ in range(blocks):
        y = net.relu(net.instance_norm(net.conv(net.reflect_pad(x, 1), base * 4, 3, pad=0, bias=True)))
        x = net.add(x, net.instance_norm(net.conv(net.reflect_pad(y, 1), base * 4, 3, pad=0, bias=True)))
    for width in (base * 2, base):
        x = net.relu(net.instance_norm(net.conv_transpose(x, width, 3, 2, 1, 1, bias=True)))
    return net.model(net.tanh(net.conv(net.reflect_pad(x, 3), 3, 7, pad=0, bias=True, gain=1.0)))


LATENCY_NETWORKS: dict[str, Callable[[], onnx.ModelProto]] = {
    "resnet18": resnet18,
    "resnet20": resnet20,
    "vgg11": vgg11,
    "mobilenet_v2": mobilenet_v2,
    "espcn": espcn,
}
VTA_NETWORKS: dict[str, Callable[[], onnx.ModelProto]] = {
    "lenet5": lenet5,
    "resnet18": resnet18,
    "mobilenet_v2": mobilenet_v2,
    "espcn": espcn,
    "unet": unet,
}
STRUCTURE_NETWORKS: dict[str, Callable[[], onnx.ModelProto]] = {
    "densenet121": densenet121,
    "mobilenet_v2": mobilenet_v2,
    "preact_resnet18": preact_resnet18,
    "unet": unet,
    "frrn": frrn,
    "cyclegan_generator": cyclegan_generator,
}
