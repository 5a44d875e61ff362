"""Errors of the shifts against the Cramér–Rao bound, on simulated frames, beside what peers give.

    python tests/benchmarks/accuracy.py [--sizes 512 2048] [--frames 200] [--processes 2] [--out accuracy.json]
    python tests/benchmarks/accuracy.py --draw accuracy.json tests/benchmarks/accuracy.png

Every cell draws its own frames with shifts uniform in ±8 px; seeds are in the JSON. ``rms / bound`` is per axis,
after the offset common to all frames was removed. Cells with ``reference`` 64 iterate it from 64 noisy frames of the
run, those with 1 take one frame as it is.
"""

import argparse
import json
import multiprocessing
import os
import platform
import time
from pathlib import Path

for library in ("OMP", "OPENBLAS", "MKL", "NUMBA"):
    os.environ[f"{library}_NUM_THREADS"] = "1"

import numpy as np
from ecc import Ecc, available
from rich.console import Console
from rich.table import Table
from skimage.registration import phase_cross_correlation

import stillframe
from stillframe import Reference, make_reference, masked_ncc, match_frames
from stillframe.registration.prepared_reference import prepare
from stillframe.simulation.experiment import Experiment, evaluate

SEED = 20261122
ECC_FILTER = 11
"""Size of OpenCV's Gaussian filter, pixels; the best one for few counts in ``hard_cases.py --rows peers``."""
DOSES = {("rings", 512): (500, 50, 5, 0.6), ("spots", 512): (2000, 200, 20, 2)}
DOSES |= {("rings", 2048): (500, 5), ("spots", 2048): (2000, 20)}
HEADS = (
    "case|px|dose|reference|bound (px)|rms / bound|slope ± se|sd of z|in 1 sigma|failed|parabola|scikit-image|OpenCV"
)


class Draw:
    """Frames of one cell, each with its true shift."""

    def __init__(self, pattern, size, dose, spikes, seed):
        self.experiment = Experiment(frames=1, shape=(size, size), pattern=pattern, dose=dose, seed=seed)
        self.pattern, self.dose, self.spikes, self.seed = pattern, dose, spikes, seed

    def expected(self, shift):
        pattern = evaluate(self.pattern, self.experiment.shape, shift)
        return self.experiment.detector.see(self.dose * pattern)

    def frame(self, index, shift=None):
        rng = np.random.default_rng([self.seed, index])
        shift = rng.uniform(-8, 8, 2) if shift is None else np.asarray(shift, dtype=float)
        counts = rng.poisson(self.expected(shift))
        if self.spikes:
            hit = rng.random(counts.shape) < self.spikes
            counts = counts + hit * rng.integers(1, int(20 * self.dose) + 20, size=counts.shape)
        return np.minimum(counts, 65535).astype(np.uint16), shift

    def bound(self):
        """Cramér–Rao bound of a shift from the valid pixels, with gain and offset known, (2,) px."""
        mean = np.maximum(self.dose * evaluate(self.pattern, self.experiment.shape, (0, 0)), 1e-12)
        slopes, valid = np.gradient(mean), self.experiment.detector.mask
        information = [[np.sum((a * b / mean)[valid]) for a in slopes] for b in slopes]
        return np.sqrt(np.diag(np.linalg.inv(information)))


def parabola(reference, frame):
    """Peak of the masked NCC interpolated by a parabola along each axis."""
    ncc, lags_y, lags_x = masked_ncc(reference.image, frame, reference.mask, reference.frame_mask, max_shift=12)
    i, j = np.unravel_index(np.nanargmax(ncc), ncc.shape)
    if not (0 < i < len(lags_y) - 1 and 0 < j < len(lags_x) - 1):
        return np.array([np.nan, np.nan])

    def vertex(low, middle, high):
        return 0.5 * (low - high) / (low - 2 * middle + high)

    return np.array(
        [lags_y[i] + vertex(*ncc[i - 1 : i + 2, j]), lags_x[j] + vertex(*ncc[i, j - 1 : j + 2])], dtype=float
    )


def scikit_image(reference, frame):
    shift = phase_cross_correlation(
        reference.image, frame, reference_mask=reference.mask, moving_mask=reference.frame_mask, overlap_ratio=0.3
    )[0]
    return np.asarray(shift, dtype=float)


def opencv(reference, frame, start):
    """OpenCV's masked ECC from our shift at whole pixels; NaN without OpenCV 5."""
    if not available() or not np.isfinite(start).all():
        return np.array([np.nan, np.nan])
    return Ecc(reference.image, reference.mask, reference.frame_mask, ECC_FILTER).shift(frame, np.rint(start))


def relative_rms(errors, bound):
    errors = errors[np.isfinite(errors).all(axis=1)]
    return np.sqrt(np.mean((errors - errors.mean(axis=0)) ** 2, axis=0)) / bound if len(errors) else np.full(2, np.nan)


def cell(case):
    """Measure one cell; returns figures that JSON holds."""
    pattern, size, dose, references, spikes, frames, peers = case
    seed = SEED + size + int(10 * dose) + 7 * references + int(1e4 * spikes) + (31 if pattern == "spots" else 0)
    draw = Draw(pattern, size, dose, spikes, seed)
    mask, bound = draw.experiment.detector.mask, draw.bound()
    began = time.perf_counter()
    if references > 1:
        stack = np.stack([draw.frame(index)[0] for index in range(references)])
        reference = make_reference(stack, mask, use=slice(references), iterations=5, max_shift=16)
    else:
        reference = Reference(draw.frame(10_000, (0, 0))[0], mask, max_shift=16)
    template = prepare(reference).template
    prepared, spent = time.perf_counter() - began, 0.0
    rows = []
    for index in range(frames):
        frame, truth = draw.frame(index)
        began = time.perf_counter()
        match = match_frames(frame[None], reference)[0]
        spent += time.perf_counter() - began
        found = np.array([match["dy"], match["dx"]])
        others = [np.full(2, np.nan)] * 3
        if index < peers:
            others = [parabola(reference, frame), scikit_image(reference, frame), opencv(reference, frame, found)]
        sigma = np.array([match["sigma_y"], match["sigma_x"]])
        rows.append((found - truth, sigma, truth - np.rint(truth), *(other - truth for other in others)))
    error, sigma, fraction, by_parabola, by_peer, by_opencv = (np.array(column) for column in zip(*rows, strict=True))
    good = np.isfinite(error[:, 0])
    error, sigma, fraction = error[good], sigma[good], fraction[good]
    deviation = error - error.mean(axis=0)
    z = deviation / sigma
    slopes = [np.polyfit(fraction[:, axis], deviation[:, axis], 1)[0] for axis in (0, 1)]
    scatter = deviation.std(axis=0) / (fraction.std(axis=0) * np.sqrt(len(fraction)))
    return {
        "case": f"{pattern}{', 1 % spikes' if spikes else ''}",
        "size": size,
        "spikes": spikes,
        "dose": dose,
        "reference": references,
        "seed": seed,
        "bound": bound.tolist(),
        "rms_over_bound": relative_rms(error, bound).tolist(),
        "slope": slopes,
        "slope_error": scatter.tolist(),
        "z_deviation": z.std(axis=0).tolist(),
        "z": z.tolist(),
        "wrong_peaks": int(np.sum((np.abs(deviation).max(axis=1) > 2) & (sigma.max(axis=1) < 0.1))),
        "failed": int(np.sum(~good)),
        "parabola_over_bound": relative_rms(by_parabola, bound).tolist(),
        "scikit_image_over_bound": relative_rms(by_peer, bound).tolist(),
        "opencv_over_bound": relative_rms(by_opencv, bound).tolist(),
        "smoothing": template.smoothing if template else None,
        "ms_per_frame": 1e3 * spent / frames,
        "reference_s": prepared,
    }


def cases(options):
    for size in options.sizes:
        for pattern in options.patterns:
            for dose in DOSES[pattern, size]:
                for references in (64, 1):
                    yield pattern, size, dose, references, 0.0, options.frames, options.peers if size < 1024 else 0
            yield pattern, size, DOSES[pattern, size][1], 64, 0.01, options.frames, 0


def pair(values, form="{:.2f}"):
    return " ".join(form.format(value) for value in values)


def show(results):
    table = Table(*HEADS.split("|"), box=None)
    for one in results:
        inside = np.mean(np.abs(one["z"]) < 1)
        slope = " ".join(f"{s:+.3f}±{e:.3f}" for s, e in zip(one["slope"], one["slope_error"], strict=True))
        table.add_row(
            *(str(one[name]) for name in ("case", "size", "dose", "reference")),
            pair(one["bound"], "{:.4f}"),
            pair(one["rms_over_bound"]),
            slope,
            pair(one["z_deviation"]),
            f"{inside:.2f}",
            str(one["failed"]),
            pair(one["parabola_over_bound"], "{:.1f}"),
            pair(one["scikit_image_over_bound"], "{:.0f}"),
            pair(one["opencv_over_bound"], "{:.1f}"),
        )
    Console(width=170).print(table)
    pooled = np.concatenate([np.ravel(one["z"]) for one in results])
    wrong = sum(one["wrong_peaks"] for one in results)
    print(
        f"all cells pooled: sd of z {pooled.std():.3f}, inside 1 sigma {np.mean(np.abs(pooled) < 1):.3f}, "
        f"wrong peaks with sigma < 0.1 px: {wrong}"
    )


def draw(results, path):
    """Error against dose, for rings of 512 px on a reference of 64 frames."""
    import matplotlib.pyplot as plt

    cells = [
        one for one in results if (one["case"], one["size"], one["reference"], one["spikes"]) == ("rings", 512, 64, 0)
    ]
    cells.sort(key=lambda one: one["dose"])
    doses, bound = [one["dose"] for one in cells], np.array([one["bound"] for one in cells]).mean(axis=1)
    lines = {
        "scikit-image, masked": ("scikit_image_over_bound", "s-", "tab:red"),
        "parabola on the masked NCC": ("parabola_over_bound", "^-", "tab:orange"),
        "stillframe": ("rms_over_bound", "o-", "tab:blue"),
    }
    figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    for label, (name, style, colour) in lines.items():
        error = np.sqrt(np.mean(np.array([one[name] for one in cells]) ** 2, axis=1)) * bound
        axes.loglog(doses, error, style, color=colour, label=label)
    axes.loglog(doses, bound, "k--", label="Cramér–Rao bound")
    axes.set(xlabel="counts per pixel on the brightest ring", ylabel="rms error per axis (pixels)")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--patterns", nargs="+", default=["rings", "spots"])
    parser.add_argument("--frames", type=int, default=200)
    parser.add_argument("--peers", type=int, default=30, help="frames that the peers see too (512 px only)")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--draw", type=Path, nargs=2, metavar=("JSON", "PNG"), help="only draw earlier figures")
    options = parser.parse_args()
    if options.draw:
        draw(json.loads(options.draw[0].read_text())["cells"], options.draw[1])
        return
    with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
        results = []
        for result in pool.imap(cell, cases(options)):
            results.append(result)
            print({name: value for name, value in result.items() if name != "z"}, flush=True)
    show(results)
    if options.out:
        context = {"stillframe": stillframe.__version__, "numpy": np.__version__, "python": platform.python_version()}
        options.out.write_text(json.dumps({"context": context, "cells": results}))


if __name__ == "__main__":
    main()
