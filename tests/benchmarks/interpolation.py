"""What each interpolation of ``align`` does to counts, noise and peak widths; averages over all fractions of a pixel.

python tests/benchmarks/interpolation.py
"""

import numpy as np
from rich.console import Console
from rich.table import Table

from stillframe.images.resample import resample_frames

WIDTH = 2.0
REPEATS = 200


def peak(shift=(0.0, 0.0), size=64):
    """A Gaussian peak of unit height and standard deviation WIDTH."""
    y, x = np.mgrid[:size, :size] - (size - 1) / 2
    return np.exp(-((y + shift[0]) ** 2 + (x + shift[1]) ** 2) / (2 * WIDTH**2))


def spread(image):
    """Standard deviation of a peak along x, pixels, from its second moment."""
    x = np.arange(image.shape[1]) - (image.shape[1] - 1) / 2
    profile = np.nansum(image, axis=0)
    return np.sqrt((profile * x**2).sum() / profile.sum())


def displacement(laid):
    """Root mean square of the distance of a laid peak from where it belongs, pixels, along one axis."""
    seen = np.where(np.isfinite(laid), laid, 0)[:, 12:-12, 12:-12]
    places = np.arange(seen.shape[2]) - (seen.shape[2] - 1) / 2
    return np.sqrt(np.mean((seen.sum(axis=1) @ places / seen.sum(axis=(1, 2))) ** 2))


def measure(interpolation):
    rng = np.random.default_rng(0)
    shifts = rng.uniform(-4, 4, (REPEATS, 2))
    valid = np.ones((64, 64), bool)
    moved = np.stack([peak(shift) for shift in shifts])
    laid = resample_frames(moved, shifts, valid, interpolation=interpolation)
    noise = resample_frames(rng.normal(size=moved.shape), shifts, valid, interpolation=interpolation)
    seen = np.where(np.isfinite(laid), laid, 0)
    flux = seen[:, 16:-16, 16:-16].sum(axis=(1, 2)) / peak()[16:-16, 16:-16].sum()
    inner = noise[:, 16:-16, 16:-16]
    neighbours = np.mean(inner[..., :-1] * inner[..., 1:]) / np.mean(inner**2)
    ringing = seen.mean(axis=0)[12:-12, 12:-12].min()
    return [
        f"{flux.mean() - 1:+.4f} ± {flux.std():.4f}",
        f"{100 * (spread(seen.mean(axis=0)[12:-12, 12:-12]) / spread(peak()[12:-12, 12:-12]) - 1):+.2f} %",
        f"{100 * (seen.mean(axis=0).max() / peak().max() - 1):+.2f} %",
        f"{inner.var():.2f}",
        f"{neighbours:+.2f}",
        f"{ringing:+.4f}",
        f"{displacement(laid):.4f}",
    ]


def main():
    heads = (
        "interpolation",
        "flux",
        "width of the mean",
        "height of the mean",
        "noise variance",
        "neighbours",
        "lowest",
        "displaced (px)",
    )
    table = Table(
        *heads, title=f"a peak of sigma {WIDTH} px laid back from {REPEATS} shifts, white noise of variance 1"
    )
    for interpolation in ("nearest", "linear", "cubic", "lanczos"):
        table.add_row(interpolation, *measure(interpolation))
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
