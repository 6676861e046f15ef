# %% [markdown]
# # A network on an NVIDIA GPU, built where there is none
# A network trained on Fashion-MNIST is compressed and compiled for named GPUs on a machine without one, looked into,
# deployed as one file, run from torch tensors without copies, measured, and tuned on the device. Everything up to the
# device runs anywhere; what needs a GPU runs where one is, and says here that it was left out where none is. (So far
# nothing of it has met a real GPU: kernels are tested in an emulation, their machine code by reading it.)
# Run it as a script (`python tutorials/03_cuda.py`) or cell by cell in an editor that knows `# %%`. Files go to `out/`.

# %%
from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "models"))

import train  # the script that trained the network; it also reads the data

import lpsn_tvm

OUT = Path(os.environ.get("LPSN_OUT", "out"))
OUT.mkdir(exist_ok=True)

MODEL = HERE / "models" / "fashion_resnet14.onnx"
calibration = train.fashion_mnist("train")[0][:512]
test_images, test_labels = train.fashion_mnist("t10k")
BATCH = 8

# %% [markdown]
# ## 1. Cross-compile for a named GPU
# `cuda -arch=sm_86` is a desktop Ampere (RTX 30xx), sm_80 an A100, sm_89 Ada, sm_90 an H100, sm_75 a T4. Needed are
# nvcc (CUDA toolkit 12 or later), not a GPU and not a driver. Several architectures go into one file: each gets kernels
# for its own tensor cores, the newest also PTX, which later GPUs compile when they load it.

# %%
if shutil.which("nvcc") is None:
    raise SystemExit("this tutorial needs nvcc (CUDA toolkit 12 or later) on PATH; a GPU is not needed")
module = lpsn_tvm.build(
    MODEL, target="cuda -arch=sm_80,sm_86", bits=8, sparsity=None, calibration=calibration, batch=BATCH
)
print(module.report)

# %% [markdown]
# ## 2. What is in it
# One program per architecture: a list of launches over planned memory, machine code, constants. A launch is a layer;
# where a small batch would leave most of the GPU idle, a layer's inner dimension is shared by several blocks and a
# second launch adds their sums.

# %%
for program in module.details()["programs"]:
    print(
        f"{program['arch']}: {program['launches']} launches of {program['kernels']} kernels, "
        f"{program['binary_bytes'] / 1024:.0f} KiB of code, {program['constant_bytes'] / 1024:.0f} KiB of constants, "
        f"{program['arena_bytes'] / 1024:.0f} KiB of memory for activations"
    )

# %% [markdown]
# ## 3. Four bits, fewer channels
# `bits=(4, 8)`: weights of four bits, activations of eight. Weights take half the bytes on the device and are unpacked
# in registers. `bits=4`: both; architectures up to sm_89 multiply four bits natively, later ones store four and
# multiply eight. Removed channels are removed work where whole blocks of 32 disappear.

# %%
modules = {"W8A8": module}
for name, bits, sparsity in (("W4A8", (4, 8), None), ("W4A4", 4, None), ("W8A8, 50 % removed", 8, 0.5)):
    modules[name] = lpsn_tvm.build(
        MODEL, target="cuda -arch=sm_86", bits=bits, sparsity=sparsity, calibration=calibration, batch=BATCH
    )
for name, compressed in modules.items():
    program = compressed.details()["programs"][0]
    print(f"{name:20s} {program['constant_bytes'] / 1024:7.0f} KiB of constants on the device")

# %% [markdown]
# ## 4. Deploy
# One file. The machine that runs it needs this package, numpy and NVIDIA's driver, of the nvcc's CUDA major version or
# later (525 for CUDA 12, 580 for CUDA 13): no nvcc, no torch, no TVM. Loading and looking into it needs no driver.

# %%
path = OUT / "fashion_cuda.lpsn"
module.save(path)
deployed = lpsn_tvm.load(path)
print(f"{path}: {path.stat().st_size / 1024:.0f} KiB")
try:
    deployed.prepare()
    has_gpu = True
except lpsn_tvm.LpsnError as error:
    has_gpu = False
    print(f"left out from here on what needs a GPU: {error}")

# %% [markdown]
# ## 5. Run
# With numpy arrays inputs and outputs are copied. Tensors on the GPU (torch, cupy, anything with DLPack) are read in
# place, the result is a tensor of the same library, in order with the caller's stream, and nothing waits.

# %%
if has_gpu:
    logits = np.asarray(deployed(test_images))
    print(f"{float((logits.argmax(1) == test_labels).mean() * 100):.2f} % of 10,000 test images right")
    import torch

    if torch.cuda.is_available():
        on_device = deployed(torch.from_numpy(test_images[:BATCH]).cuda())
        print("from a torch tensor:", on_device.device, tuple(on_device.shape), on_device.argmax(1).tolist())
    print(f"{deployed.benchmark():.4f} ms per batch of {BATCH} ({deployed.timing})")

# %% [markdown]
# ## 6. Tune on the GPU
# Default schedules are chosen by a cost model. `tune="10m"` measures others on the device for ten minutes, keeps what
# is clearly faster, and can be killed and started again: it goes on from its directory. The default is always a
# candidate, so tuning never makes a module slower. From the command line, also on a GPU elsewhere through TVM's RPC:
#
#     lpsn-tvm tune fashion_resnet14.onnx --target cuda --tune 10m --directory tuning/ --output records.json
#     lpsn-tvm build fashion_resnet14.onnx --target "cuda -arch=sm_86" --records records.json -o net.lpsn

# %%
if has_gpu:
    tuned = lpsn_tvm.build(MODEL, target="cuda", bits=8, sparsity=None, calibration=calibration, batch=BATCH, tune="2m")
    print(f"default {deployed.benchmark():.4f} ms, tuned {tuned.benchmark():.4f} ms per batch of {BATCH}")
