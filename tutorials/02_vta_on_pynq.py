# %% [markdown]
# # A network on the VTA accelerator, from ONNX to a PYNQ board
# VTA is an open accelerator for FPGAs: a 16 x 16 array of multipliers, its own memories, a 128-bit instruction set. A
# network trained on Fashion-MNIST is compressed, compiled to instruction streams, simulated cycle by cycle, and packed
# into a bundle that a PYNQ board runs. Everything up to the board runs here; what to do on the board is section 6.
# Run it as a script (`python tutorials/02_vta_on_pynq.py`) or cell by cell in an editor that knows `# %%`. Pictures and
# bundles go to `out/`.

# %%
from __future__ import annotations

import os
import shutil
import sys
import time
from pathlib import Path

import matplotlib

if not hasattr(sys, "ps1"):
    matplotlib.use("Agg")
import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "models"))

import train  # the script that trained the network; it also reads the data

import lpsn_tvm
from lpsn_tvm.targets.vta.timeline import plot

OUT = Path(os.environ.get("LPSN_OUT", "out"))
OUT.mkdir(exist_ok=True)

MODEL = HERE / "models" / "fashion_resnet14.onnx"
calibration = train.fashion_mnist("train")[0][:512]
test_images, test_labels = train.fashion_mnist("t10k")
FEW = 100  # test images through the simulator here; `benchmarks/vta_accuracy.py` takes all 10,000

# %% [markdown]
# ## 1. Compress and compile
# One call. Eight bits run on the bitstreams that the VTA project published. The hardware has no multiplier behind its
# accumulators, so requantization is a shift: scales are chosen on a power-of-two grid, per channel. The report names
# every step, where it runs, and what it costs.

# %%
dense = lpsn_tvm.build(MODEL, target="vta", bits=8, sparsity=None, calibration=calibration)
print(dense.report)

# %% [markdown]
# ## 2. Simulate
# `module(x)` runs the very instructions that a board would get, through a simulator that refuses whatever the hardware
# designs do not agree on: a race between units, a read of memory nobody wrote, a shift too far. `simulate` counts, too.
# Two cycle models: "rtl" (the generated hardware, 8 bytes per cycle from memory) and "pynq" (a PYNQ-Z1 at 100 MHz).

# %%
right = float((np.asarray(dense(test_images[:FEW])).argmax(1) == test_labels[:FEW]).mean() * 100)
run = dense.simulate(test_images[:1], model="pynq")
print(f"{right:.0f} of {FEW} right; {run.cycles:,} cycles = {run.milliseconds:.3f} ms per image at 100 MHz")
slowest = sorted(run.layers.items(), key=lambda item: -item[1])[:5]
print("most cycles:", ", ".join(f"{name} {cycles:,}" for name, cycles in slowest))

# %% [markdown]
# ## 3. Read the timeline
# Three units work at the same time: load (inputs and weights), compute (GEMM, ALU, micro-ops), store. Gaps in compute
# are what a better schedule can win: load bars before a gap mean the memory is too slow for the layer, none mean
# that it waits for a store or for the layer before.

# %%
plot(run.programs[0], OUT / "vta_timeline.png")
counters = run.counters
print(
    f"GEMM micro-operations {counters['gemm_uops']:,} in {run.cycles:,} cycles; compute waited "
    f"{counters['load_to_compute_wait']:,} cycles for loads and {counters['store_to_compute_wait']:,} for stores"
)

# %% [markdown]
# ## 4. Schedules are searched, and remembered
# Tile sizes, loop order and double buffering of every layer are searched against the cycle model; the results are kept
# on disk, so the next build is quick. `search=False` takes the default schedules: see what the search is worth.

# %%
for name, options in (("default schedules", {"search": False}), ("searched, from the cache", {})):
    start = time.perf_counter()
    module = lpsn_tvm.build(
        MODEL, target="vta", bits=8, sparsity=None, calibration=calibration, measure=False, **options
    )
    print(f"{name:26s} {module.cycles:>10,} cycles, built in {time.perf_counter() - start:.1f} s")

# %% [markdown]
# ## 5. Smaller: fewer channels, four bits
# Removed channels are removed work where whole blocks of 16 disappear. Four bits need another bitstream (geometry
# `1x16_i4w4a32_15_14_17_17`), which you build from the public hardware sources with the `vta_config.json` in the
# bundle; half the bytes per value then move over the bus.

# %%
modules = {"8 bits": dense}
for bits, sparsity in ((8, 0.5), (4, None)):
    name = f"{bits} bits" + (f", {sparsity:.0%} of the channels removed" if sparsity else "")
    modules[name] = lpsn_tvm.build(
        MODEL, target="vta", bits=bits, sparsity=sparsity, calibration=calibration, measure=False
    )
print(f"\n{'':40s} {'right':>6s} {'cycles':>10s} {'ms':>7s} {'bytes moved':>12s}")
for name, module in modules.items():
    right = int((np.asarray(module(test_images[:FEW])).argmax(1) == test_labels[:FEW]).sum())
    profile = module.profile(("pynq",))
    cycles, ms = profile.cycles["pynq"], profile.milliseconds["pynq"]
    print(f"{name:40s} {right:6d} {cycles:10,} {ms:7.3f} {profile.dram_bytes:12,}")

# %% [markdown]
# ## 6. The board
# The bundle holds the programs, the weights, a runner that needs only Python 3.8, numpy and pynq, a self-test and
# `vta_config.json`. The program directory is for other simulators and loaders.

# %%
bundle = dense.export_pynq(OUT / "fashion_pynq.zip")
directory = OUT / "fashion_vta"
shutil.rmtree(directory, ignore_errors=True)
dense.export_vta(directory)
print(f"{bundle}: {bundle.stat().st_size / 1024:.0f} KiB; {directory}: {len(list(directory.rglob('*')))} files")
print(f"try it here first: lpsn-tvm vta run {bundle} --sim")

# %% [markdown]
# On the board (PYNQ-Z1 or Z2; nothing below was run for this tutorial, no board was at hand). The README in the bundle
# says the same with the names of your network:
#
# 1. Image: flash an SD card with PYNQ image 2.7 or later (Python 3.8 or later), boot, find the board in your network.
# 2. Bitstream: `bitstreams/pynq/0.0.1/1x16_i8w8a32_15_15_18_17.bit` of https://github.com/uwsampl/vta-distro. It comes
#    without a `.hwh`; the runner then loads it with `Bitstream(path).download()`, which needs none.
# 3. Copy: `scp out/fashion_pynq.zip 1x16_i8w8a32_15_15_18_17.bit xilinx@pynq:~`
# 4. On the board, `unzip -d fashion fashion_pynq.zip`, then become root with pynq's environment: `sudo -i`,
#    `source /etc/profile.d/pynq_venv.sh`, `source /etc/profile.d/xrt_setup.sh`, `cd /home/xilinx/fashion`.
# 5. Test: `python3 runner.py --bitstream ../1x16_i8w8a32_15_15_18_17.bit --self-test`. One should see
#
#        ok: the bitstream speaks instruction set 0.0.1 and computes the known answer
#        ok: host operations in C
#        ok: the network gives the 1 output(s) that it gave when it was exported
#
# 6. Run: `python3 runner.py --bitstream ../1x16_i8w8a32_15_15_18_17.bit --input x.npy --output y.npy`, any batch size.
#
# When the self-test fails, its message says which of these it is:
#
# * *speaks instruction set 0.0.2*: bitstreams of both versions exist under one name. Take the one of `pynq/0.0.1`, or
#   build again with `target="vta -preset=pynq-0.0.2"`. Never run the bundle anyway: its stores would go astray.
# * *bytes of the known answer are wrong*: another geometry was built into the bitstream, or its timing fails; compare
#   `vta_config.json`, check the power supply.
# * *did not finish*: the file is not this accelerator's, or another overlay was loaded after it; run again.
# * *needs root*: device memory does; see step 4.
