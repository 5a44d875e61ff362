"""The kernel beside scikit-image's masked registration, one thread, in one run.

    python tests/benchmarks/kernel.py [--size 2048] [--repeats 5]

Prints a table; ratios hold on a noisy machine because both are timed in turn, each at its best.
"""

import argparse
import os
import time
from dataclasses import replace

for library in ("OMP", "OPENBLAS", "MKL", "NUMBA"):
    os.environ[f"{library}_NUM_THREADS"] = "1"

import numpy as np
import scipy.fft
from rich.console import Console
from rich.table import Table
from skimage.registration import phase_cross_correlation

from stillframe import Reference, match_frames
from stillframe.scene import Experiment


def best(work, repeats):
    """Shortest of several times, seconds, and the last result."""
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        result = work()
        times.append(time.perf_counter() - began)
    return min(times), result


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    experiment = Experiment(frames=40, shape=(options.size, options.size), dead_pixels=1000 / options.size**2, seed=11)
    mask, fixed, frame = experiment.detector.mask, experiment.render(0), experiment.render(30)
    reference = Reference(fixed, mask, max_shift=32)
    began = time.perf_counter()
    match_frames(frame[None], reference)
    first = time.perf_counter() - began

    ours, match = best(lambda: match_frames(frame[None], reference)[0], options.repeats)
    plain = replace(reference, subpixel=False)
    match_frames(frame[None], plain)
    whole, coarse = best(lambda: match_frames(frame[None], plain)[0], options.repeats)
    theirs, answer = best(
        lambda: phase_cross_correlation(fixed, frame, reference_mask=mask, moving_mask=mask, overlap_ratio=0.3), 1
    )
    yardstick, _ = best(lambda: scipy.fft.rfft2(frame.astype(np.float32)), options.repeats)

    table = Table(
        "method", "ms per frame", "scikit-image over it", "shift", title=f"{options.size}² uint16, one thread"
    )
    for name, seconds, found in (("whole pixels", whole, coarse), ("sub-pixel with sigma", ours, match)):
        shift = f"({found['dy']:.2f}, {found['dx']:.2f})"
        table.add_row(f"stillframe, {name}", f"{1e3 * seconds:.1f}", f"{theirs / seconds:.0f}", shift)
    table.add_row("scikit-image, masked, whole pixels", f"{1e3 * theirs:.0f}", "1", str(np.ravel(answer[0])[:2]))
    table.add_row("scipy.fft.rfft2, float32", f"{1e3 * yardstick:.1f}", "", "")
    Console().print(table)
    print(
        f"first match, with what is prepared once: {first:.2f} s; true shift between the frames: "
        f"{(experiment.shifts[30] - experiment.shifts[0]).round(2)}"
    )


if __name__ == "__main__":
    main()
