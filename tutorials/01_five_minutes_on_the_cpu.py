# %% [markdown]
# # Five minutes on the CPU
# Two trained networks that this repository ships are made small and fast without any training: a Fashion-MNIST
# classifier and a super-resolution network. Run it as a script (`python tutorials/01_five_minutes_on_the_cpu.py`) or
# cell by cell in an editor that knows `#
# %%`. Pictures go to `out/`.

# %%
from __future__ import annotations

import os
import sys
from pathlib import Path

import matplotlib

if not hasattr(sys, "ps1"):
    matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "models"))

import train  # the script that trained the networks; it also reads the data

import lpsn_tvm

OUT = Path(os.environ.get("LPSN_OUT", "out"))
OUT.mkdir(exist_ok=True)

# %% [markdown]
# ## 1. The classifier
# Calibration takes a few hundred training images WITHOUT labels. The 10,000 test images are only used for the final
# numbers.

# %%
MODEL = HERE / "models" / "fashion_resnet14.onnx"
calibration = train.fashion_mnist("train")[0][:512]
test_images, test_labels = train.fashion_mnist("t10k")


def accuracy(module: lpsn_tvm.Artifact) -> float:
    """Percent right on the test images."""
    return float((np.asarray(module(test_images)).argmax(1) == test_labels).mean() * 100)


reference = lpsn_tvm.build(MODEL, bits=None, sparsity=None, calibration=calibration, measure=False, batch=1)
rows = [("float", accuracy(reference), reference.benchmark(), 4 * reference.report.totals["parameters"][1] / 1024)]

# %% [markdown]
# ## 2. Eight bits, four bits, half of the channels
# One call each. `sparsity=0.5` removes half of the channels of every layer, residual streams too, and re-solves the
# weights that are left so that every layer's output stays as close as possible to the dense network's. `align=1` asks
# for exact fractions; by default wide layers keep multiples of 16 channels, because that is what the CPU's registers
# hold.

# %%
modules = {}
for bits, sparsity in ((8, None), (4, None), (8, 0.5), (4, 0.5)):
    module = lpsn_tvm.build(
        MODEL,
        target="llvm",
        bits=bits,
        sparsity=sparsity,
        align=1 if sparsity else None,
        calibration=calibration,
        measure=False,
    )
    name = f"{bits} bits" + (f", {sparsity:.0%} of the channels removed" if sparsity else "")
    modules[name] = module
    rows.append((name, accuracy(module), module.benchmark(), module.report.totals["weight_bytes"][1] / 1024))

print(f"\n{'':40s} {'accuracy %':>10s} {'ms':>8s} {'weights KiB':>12s}")
for name, percent, ms, size in rows:
    print(f"{name:40s} {percent:10.2f} {ms:8.3f} {size:12.1f}")

# %% [markdown]
# ## 3. What was removed
# The report says it layer by layer; the plot shows the channels kept.

# %%
smallest = modules["4 bits, 50% of the channels removed"]
print(smallest.report)
layers = smallest.report.layers
fig, axes = plt.subplots(figsize=(9, 3.6), layout="constrained")
place = np.arange(len(layers))
axes.bar(place, [layer.out_channels[0] for layer in layers], color="#d0d7de", label="trained network")
axes.bar(place, [layer.out_channels[1] for layer in layers], color="#0969da", label="kept")
axes.set_xticks(
    place,
    [layer.name.strip("/").split("/")[-2] if layer.name.count("/") > 1 else layer.name for layer in layers],
    rotation=75,
    fontsize=7,
)
axes.set_ylabel("output channels")
axes.set_title("Channels kept per layer at sparsity 0.5")
axes.legend(frameon=False)
fig.savefig(OUT / "channels_kept.png", dpi=130)

# %% [markdown]
# ## 4. One file, and ONNX out
# The file loads with TVM's runtime only. The compressed network is also plain ONNX, float or with QuantizeLinear /
# DequantizeLinear nodes.

# %%
path = smallest.save(OUT / "fashion.lpsn")
loaded = lpsn_tvm.load(path)
assert np.array_equal(loaded(test_images[:8]), smallest(test_images[:8]))
smallest.to_onnx(OUT / "fashion_small_qdq.onnx")
smallest.to_onnx(OUT / "fashion_small_float.onnx", quantized=False)
print(
    f"{path}: {path.stat().st_size / 1024:.0f} KiB; the ONNX model it came from: {MODEL.stat().st_size / 1024:.0f} KiB"
)

# %% [markdown]
# ## 5. Super-resolution
# The second network doubles the resolution of a photograph. It is calibrated on patches of training photographs and
# judged on two others.

# %%
rng = np.random.default_rng(0)
patches = []
for picture in (train.halve(luma) for luma in train.photographs("train").values()):
    for _ in range(24):
        i, j = (int(rng.integers(0, extent - 63)) for extent in picture.shape)
        patches.append(picture[None, i : i + 64, j : j + 64])
SUPER = HERE / "models" / "espcn_x2.onnx"


def enlarge(name: str, low: np.ndarray, **options: object) -> np.ndarray:
    """The network compiled for the size of `low`, applied to it. Calibrated on patches of another size: only the
    batch is fixed by the file.
    """
    shape = (1, 1, *low.shape)
    tiled = [
        np.tile(p, (1, -(-low.shape[0] // 64), -(-low.shape[1] // 64)))[:, : low.shape[0], : low.shape[1]]
        for p in patches[::12]
    ]
    module = lpsn_tvm.build(SUPER, input_shapes={"input": shape}, calibration=np.stack(tiled), measure=False, **options)
    print(f"{name}: {module.benchmark():.1f} ms")
    return np.clip(np.asarray(module(low[None, None]))[0, 0], 0, 1)


fig, grid = plt.subplots(2, 4, figsize=(13, 6.4), layout="constrained")
for row, (name, luma) in zip(grid, train.photographs("test").items(), strict=True):
    low = train.halve(luma)
    pictures = {
        "low resolution": np.kron(low, np.ones((2, 2), np.float32)),
        "float": enlarge(f"{name}, float", low, bits=None, sparsity=None),
        "8 bits": enlarge(f"{name}, 8 bits", low, bits=8, sparsity=None),
        "8 bits, 25 % removed": enlarge(f"{name}, 8 bits, 25 % removed", low, bits=8, sparsity=0.25, align=1),
    }
    top, left = luma.shape[0] // 3, luma.shape[1] // 3
    for axes, (title, picture) in zip(row, pictures.items(), strict=True):
        axes.imshow(picture[top : top + 120, left : left + 160], cmap="gray", vmin=0, vmax=1)
        axes.set_title(f"{name}: {title}, {train.psnr(picture, luma):.2f} dB", fontsize=9)
        axes.axis("off")
fig.savefig(OUT / "super_resolution.png", dpi=130)
print("pictures in", OUT.resolve().name)
