"""Rings and spots around a glow, and frames of them, for tests of patterns that change."""

import functools

import numpy as np

from stillframe import make_reference
from synthetic import blocked

SHAPE = (256, 256)
Y, X = (np.arange(length) - (length - 1) / 2 for length in SHAPE)
RADII, HEIGHTS = (30, 44, 58, 75, 90, 106), (1.0, 0.4, 0.9, 0.3, 0.6, 0.5)
NODES = np.random.default_rng(7).uniform(-120, 120, (70, 3)) * (1, 1, 1 / 300) + (0, 0, 0.6)


def rings(shift, heights=HEIGHTS, scale=1.0):
    radius = np.hypot(Y[:, None] + shift[0], X + shift[1])
    sharp = (h * np.exp(-(((radius - scale * r) / 2.5) ** 2) / 2) for h, r in zip(heights, RADII, strict=True))
    return 1.5 * np.exp(-radius / 25) + 0.05 + sum(sharp)


def spots(shift, factor=1.0, nodes=NODES):
    y, x = Y[:, None] + shift[0], X[:, None] + shift[1]
    along_y, along_x = (np.exp(-(((a - nodes[:, k]) / 2.0) ** 2) / 2) for k, a in ((0, y), (1, x)))
    return 1.5 * np.exp(-np.hypot(y, x.T) / 25) + 0.05 + factor * (along_y * nodes[:, 2]) @ along_x.T


PATTERNS = {"rings": (rings, 30.0), "spots": (spots, 30.0)}


def stack(expected, seed=0, frames=30):
    """Return Poisson frames and their shifts; ``expected`` gives the mean of a frame from its shift and number."""
    rng = np.random.default_rng(seed)
    shifts = rng.uniform(-6, 6, (frames, 2))
    counts = [rng.poisson(expected(shift, number)) for number, shift in enumerate(shifts)]
    return np.stack(counts).astype(np.uint16), shifts


@functools.cache
def usual(kind, dose):
    """A reference of 16 frames, which begin every stack of this seed that has nothing unusual in them."""
    frames, _ = stack(lambda shift, _: dose * PATTERNS[kind][0](shift), seed=2, frames=16)
    return make_reference(frames, blocked(SHAPE), iterations=3, max_shift=12)


def errors(matches, shifts):
    error = np.stack([matches["dy"], matches["dx"]], axis=1) - shifts
    error -= np.nanmedian(error, axis=0)
    return error, error / np.stack([matches["sigma_y"], matches["sigma_x"]], axis=1)
