"""Draw the picture of the README: drift found against the truth, and the mean frame before and after alignment.

    python tests/benchmarks/picture.py [tests/benchmarks/picture.png]

The simulated run has 240 frames of 512² pixels with rings, at most 20 counts per pixel and up to 12 px of drift.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

import stillframe as sf
from stillframe.simulation.experiment import Experiment
from stillframe.simulation.write import simulate

EXPERIMENT = Experiment(frames=240, shape=(512, 512), dose=20.0, max_drift=12.0, seed=4)
CROP = slice(150, 362), slice(260, 472)
COLOURS = 96


def measure(folder):
    """Return the shifts, the true shifts, and the mean frame before and after alignment."""
    store, mask_file = simulate(EXPERIMENT, folder)
    frames, mask = sf.open_frames(store), sf.load_mask(mask_file)
    reference = sf.make_reference(frames, mask)
    shifts = sf.register(frames, reference).compute()
    good = (shifts["flag"] == 0).values
    before = np.where(mask, frames[good].mean("frame"), np.nan)
    after = sf.align(frames, shifts, interpolation="linear")[good].mean("frame").values
    measured, truth = shifts["shift"].values, EXPERIMENT.shifts
    return measured - np.nanmedian(measured - truth, axis=0), truth, before, after


def draw(measured, truth, before, after):
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, *pictures = figure.subplots(1, 3, width_ratios=[1.5, 1, 1])
    minutes = np.arange(len(truth)) * EXPERIMENT.interval / 60
    for axis, colour in enumerate(("C0", "C1")):
        left.plot(minutes, truth[:, axis], color="0.75", linewidth=4, label="truth" if axis == 0 else None)
        left.plot(minutes, measured[:, axis], ".", color=colour, markersize=3, label=f"stillframe, {'yx'[axis]}")
    left.set(xlabel="lab time (min)", ylabel="shift to apply (px)", title=f"drift of {len(truth)} simulated frames")
    left.legend(fontsize="small")
    limit = np.nanpercentile(after[CROP], 99.5)
    for panel, image, title in zip(pictures, (before, after), ("mean of the frames", "after alignment"), strict=True):
        panel.imshow(image[CROP], vmin=0, vmax=limit, cmap="magma", interpolation="nearest")
        panel.set(title=title, xticks=[], yticks=[])
    return figure


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("picture.png")
    with tempfile.TemporaryDirectory() as made:
        results = measure(Path(made))
    draw(*results).savefig(target, dpi=100, metadata={"Software": None})
    print("rms error, y and x (px):", np.sqrt(np.nanmean((results[0] - results[1]) ** 2, axis=0)).round(3))
    Image.open(target).convert("RGB").quantize(COLOURS).save(target, optimize=True)
