"""Frames with known motion, small and seeded; the oracles that several tests share."""

from pathlib import Path

import numpy as np
import pytest
import scipy.ndimage
import zarr

DATA = Path(__file__).parents[2] / "shared" / "data"

needs_pictures = pytest.mark.skipif(not DATA.is_dir(), reason="the folder of real pictures is not beside the project")


def texture(shape, seed=0, smooth=2.0):
    """A picture with structure at a few pixels' scale, mean 100, positive."""
    rough = np.random.default_rng(seed).normal(size=shape)
    soft = scipy.ndimage.gaussian_filter(rough, smooth, mode="wrap")
    return 100 * np.exp(0.5 * soft / soft.std())


def blocked(shape, seed=0, bad=0.002):
    """A mask with a beam-block that reaches the left edge, and scattered bad pixels."""
    mask = np.random.default_rng(seed).random(shape) >= bad
    height, width = shape
    mask[height // 2 - height // 16 : height // 2 + height // 16 + 1, : width // 2] = False
    return mask


def windows(shape, shifts, seed=0, counts=1.0):
    """Poisson frames cut from one larger picture at the given whole-pixel shifts to apply, with new pixels entering."""
    shifts = np.asarray(shifts)
    margin = int(np.abs(shifts).max(initial=0))
    big = counts * texture((shape[0] + 2 * margin, shape[1] + 2 * margin), seed)
    rng = np.random.default_rng(seed + 1)
    starts = margin + shifts
    return np.stack([rng.poisson(big[y : y + shape[0], x : x + shape[1]]) for y, x in starts]).astype(np.uint16)


def store_frames(path, frames, chunks=None, shards=None, **options):
    """Write a bare Zarr array of frames."""
    array = zarr.create_array(
        path,
        shape=frames.shape,
        dtype=frames.dtype,
        chunks=chunks or (1, *frames.shape[1:]),
        shards=shards,
        config={"write_empty_chunks": True},
        **options,
    )
    array[:] = frames
    return path


def contents(folder):
    """Every file below a folder with its bytes."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def peak(result):
    """Shift and score at the highest point of a surface."""
    ncc, lags_y, lags_x = result
    i, j = np.unravel_index(np.nanargmax(ncc), ncc.shape)
    return (int(lags_y[i]), int(lags_x[j])), float(ncc[i, j])
