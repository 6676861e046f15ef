"""Trains the three small networks that this repository ships and writes them as ONNX (CPU, about 20 minutes in
all, seed 0).

    pip install torch scikit-image scikit-learn onnx
    apt-get install dataset-fashion-mnist        # Fashion-MNIST (MIT) as a Debian package
    python tutorials/models/train.py [resnet14 | mobilenet | espcn]

* `fashion_resnet14.onnx`: ResNet-14, 16 / 32 / 64 channels, batch norm.
* `fashion_mobilenet.onnx`: MobileNetV2-like, depthwise convolutions, ReLU6, batch norm.
* `espcn_x2.onnx`: super-resolution by two on luma, global skip connection, trained on photographs that scikit-image
  and scikit-learn ship.
"""

from __future__ import annotations

import gzip
import io
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import torch
import torch.nn as nn
import torch.nn.functional as F

HERE = Path(__file__).resolve().parent
FASHION = Path("/usr/share/datasets/fashion-mnist")


def fashion_mnist(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images float32[N, 1, 28, 28] in [0, 1] and labels int64[N]; split is "train" or "t10k"."""
    with gzip.open(FASHION / f"{split}-images-idx3-ubyte.gz") as file:
        images = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 1, 28, 28).astype(np.float32) / 255
    with gzip.open(FASHION / f"{split}-labels-idx1-ubyte.gz") as file:
        return images, np.frombuffer(file.read(), np.uint8, offset=8).astype(np.int64)


class ConvNorm(nn.Sequential):
    def __init__(
        self, cin: int, cout: int, kernel: int = 3, stride: int = 1, groups: int = 1, act: nn.Module | None = None
    ) -> None:
        layers = [nn.Conv2d(cin, cout, kernel, stride, kernel // 2, groups=groups, bias=False), nn.BatchNorm2d(cout)]
        super().__init__(*layers, *([act] if act else []))


class BasicBlock(nn.Module):
    def __init__(self, cin: int, cout: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = ConvNorm(cin, cout, 3, stride, act=nn.ReLU()), ConvNorm(cout, cout)
        self.short = ConvNorm(cin, cout, 1, stride) if stride != 1 or cin != cout else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.conv2(self.conv1(x)) + self.short(x))


class InvertedResidual(nn.Module):
    def __init__(self, cin: int, cout: int, stride: int, expand: int) -> None:
        super().__init__()
        width = cin * expand
        self.body = nn.Sequential(
            ConvNorm(cin, width, 1, act=nn.ReLU6()),
            ConvNorm(width, width, 3, stride, width, act=nn.ReLU6()),
            ConvNorm(width, cout, 1),
        )
        self.has_skip = stride == 1 and cin == cout

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.body(x) if self.has_skip else self.body(x)


class Pooled(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc = nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


def resnet14() -> nn.Module:
    blocks, cin = [], 16
    for cout, stride in ((16, 1), (16, 1), (32, 2), (32, 1), (64, 2), (64, 1)):
        blocks.append(BasicBlock(cin, cout, stride))
        cin = cout
    return nn.Sequential(ConvNorm(1, 16, act=nn.ReLU()), *blocks, Pooled(64))


def mobilenet() -> nn.Module:
    plan = ((16, 16, 1), (16, 24, 1), (24, 24, 1), (24, 40, 2), (40, 40, 1), (40, 40, 1))
    return nn.Sequential(
        ConvNorm(1, 16, stride=2, act=nn.ReLU6()),
        *(InvertedResidual(a, b, s, 4) for a, b, s in plan),
        ConvNorm(40, 128, 1, act=nn.ReLU6()),
        Pooled(128),
    )


def train_classifier(net: nn.Module, epochs: int = 5, batch: int = 128, peak: float = 0.1) -> None:
    net.to(memory_format=torch.channels_last)
    images, labels = (torch.from_numpy(a) for a in fashion_mnist("train"))
    optimizer = torch.optim.SGD(net.parameters(), lr=peak, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, epochs * (len(images) // batch))
    for epoch in range(epochs):
        net.train()
        order, start = torch.randperm(len(images)), time.perf_counter()
        for index in range(len(images) // batch):
            pick = order[index * batch : (index + 1) * batch]
            x, y = images[pick], labels[pick]
            x = torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, x.flip(3), x)
            dy, dx = (int(v) for v in torch.randint(0, 5, (2,)))
            x = F.pad(x, (2, 2, 2, 2))[:, :, dy : dy + 28, dx : dx + 28].contiguous(memory_format=torch.channels_last)
            optimizer.zero_grad()
            loss = F.cross_entropy(net(x), y)
            loss.backward()
            optimizer.step()
            schedule.step()
        print(f"epoch {epoch}: loss {loss.item():.3f}, {time.perf_counter() - start:.0f} s", flush=True)
    net.eval()
    images, labels = (torch.from_numpy(a) for a in fashion_mnist("t10k"))
    with torch.no_grad():
        right = sum(
            int((net(images[i : i + 500]).argmax(1) == labels[i : i + 500]).sum()) for i in range(0, len(images), 500)
        )
    print(f"test accuracy {right / len(images):.4f}", flush=True)


class Espcn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 32, 5, 1, 2),
            nn.ReLU(),
            nn.Conv2d(32, 32, 3, 1, 1),
            nn.ReLU(),
            nn.Conv2d(32, 16, 3, 1, 1),
            nn.ReLU(),
            nn.Conv2d(16, 4, 3, 1, 1),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.pixel_shuffle(self.body(x) + x, 2)


def luma(image: np.ndarray) -> np.ndarray:
    """float32[H, W] in [0, 1], even height and width, BT.601 luma of an RGB image of bytes."""
    y = image[..., :3].astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32) / 255
    return y[: y.shape[0] // 2 * 2, : y.shape[1] // 2 * 2]


def halve(image: np.ndarray) -> np.ndarray:
    """Bicubic reduction by two with antialiasing, as Pillow does it; float32[H/2, W/2]."""
    from PIL import Image

    picture = Image.fromarray(image, mode="F")
    return np.asarray(picture.resize((image.shape[1] // 2, image.shape[0] // 2), Image.Resampling.BICUBIC), np.float32)


def photographs(split: str) -> dict[str, np.ndarray]:
    """Luma of the photographs that scikit-image and scikit-learn ship; "train" or "test" (chelsea and flower)."""
    import skimage.data
    from sklearn.datasets import load_sample_image

    if split == "test":
        return {"chelsea": luma(skimage.data.chelsea()), "flower": luma(load_sample_image("flower.jpg"))}
    names = ("astronaut", "coffee", "rocket", "hubble_deep_field", "immunohistochemistry")
    return {
        **{n: luma(getattr(skimage.data, n)()) for n in names},
        "motorcycle": luma(skimage.data.stereo_motorcycle()[0]),
        "china": luma(load_sample_image("china.jpg")),
    }


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of images in [0, 1], a border of 4 pixels left out."""
    return float(-10 * np.log10(np.mean((a[4:-4, 4:-4] - b[4:-4, 4:-4]) ** 2)))


def train_espcn(net: nn.Module, steps: int = 4000) -> None:
    pairs = [(torch.from_numpy(halve(y)), torch.from_numpy(y)) for y in photographs("train").values()]
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    for step in range(steps):
        low, high = [], []
        for _ in range(16):
            small, large = pairs[int(torch.randint(len(pairs), ()))]
            i, j = (int(torch.randint(0, extent - 31, ())) for extent in small.shape)
            low.append(small[i : i + 32, j : j + 32])
            high.append(large[2 * i : 2 * i + 64, 2 * j : 2 * j + 64])
        optimizer.zero_grad()
        loss = F.mse_loss(net(torch.stack(low)[:, None]), torch.stack(high)[:, None])
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 1000 == 999:
            print(f"step {step + 1}: loss {loss.item():.6f}", flush=True)
    for name, y in photographs("test").items():
        with torch.no_grad():
            out = net(torch.from_numpy(halve(y))[None, None])[0, 0].numpy()
        from PIL import Image

        bicubic = np.asarray(Image.fromarray(halve(y), mode="F").resize(y.shape[::-1], Image.Resampling.BICUBIC))
        print(f"{name}: bicubic {psnr(bicubic, y):.2f} dB, network {psnr(np.clip(out, 0, 1), y):.2f} dB", flush=True)


def export(net: nn.Module, sample: torch.Tensor, path: Path, axes: dict[int, str]) -> None:
    """ONNX with batch norm kept, so that what the package folds is what a user's model has."""
    net.eval().to(memory_format=torch.contiguous_format)
    buffer = io.BytesIO()
    torch.onnx.export(
        net,
        (sample,),
        buffer,
        input_names=["input"],
        output_names=["output"],
        opset_version=17,
        dynamo=False,
        do_constant_folding=False,
        training=torch.onnx.TrainingMode.PRESERVE,
        dynamic_axes={"input": axes, "output": axes},
    )
    onnx.save(onnx.load_from_string(buffer.getvalue()), path)
    print(f"{path.name}: {path.stat().st_size / 1024:.0f} KiB", flush=True)


def main(which: str) -> None:
    torch.manual_seed(0)
    if which == "resnet14":
        net = resnet14()
        train_classifier(net)
        export(net, torch.zeros(1, 1, 28, 28), HERE / "fashion_resnet14.onnx", {0: "N"})
    elif which == "mobilenet":
        net = mobilenet()
        train_classifier(net, epochs=4, peak=0.2)
        export(net, torch.zeros(1, 1, 28, 28), HERE / "fashion_mobilenet.onnx", {0: "N"})
    else:
        net = Espcn()
        train_espcn(net)
        export(net, torch.zeros(1, 1, 64, 64), HERE / "espcn_x2.onnx", {0: "N", 2: "H", 3: "W"})


if __name__ == "__main__":
    for choice in sys.argv[1:] or ("resnet14", "mobilenet", "espcn"):
        main(choice)
