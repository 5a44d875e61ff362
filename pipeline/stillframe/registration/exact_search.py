"""The exact masked NCC of many frames with one reference at bounded shifts, in single precision.

With a static mask and a fixed reference only three of the six correlations of (3) change from frame to frame. Two are
sums of the frame over the moved mask: a box sum less the sum over the mask's holes (5). The last one is computed in
tiles of the reference, whose short transforms stay in the cache (6). The mean of the valid pixels is subtracted first:
the score does not change, and single precision suffices whatever the pedestal.

Inside this module lags are those of ``frame(p + lag)``, the negative of the shift that is applied to a frame.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
import scipy.fft

from stillframe.images.arrays import Float32, Image, Indices, Mask, Pixels
from stillframe.images.run_lengths import RowRuns, Runs, runs_of
from stillframe.images.statistics import Statistics, statistics
from stillframe.registration.masked_ncc import Correlator, Lags, WindowSums, normalize

Sums = npt.NDArray[np.float64]
"""Sums of a frame and sums of its squares, (2, lag y, lag x)."""

_SINGLE = np.dtype(np.float32)
_TILE = 640
"""Side of tiles, pixels; transforms of about this side fit the second-level cache."""
_MOST_RUNS = 8192
"""With more runs of invalid pixels two more correlations cost less than sums over the runs."""
_LARGEST_IMBALANCE = 400.0
"""Ratio of variations up to which single precision suffices; the error of scores is about 3e-7 times its root."""


@numba.njit(nogil=True, cache=True)
def _centre(
    frame: Pixels, mask: Mask, mean: float, scale: float, edges: tuple[Indices, Indices], out: Float32, sums: Image
) -> None:
    """Write (frame − mean)·scale, 0 where invalid, to ``out``; add its sums and sums of squares between the edges."""
    edges_y, edges_x = edges
    for j in range(len(edges_y) - 1):
        for y in range(edges_y[j], edges_y[j + 1]):
            for x in range(frame.shape[1]):
                out[y, x] = np.float32((np.float64(frame[y, x]) - mean) * scale) if mask[y, x] else np.float32(0)
            for i in range(len(edges_x) - 1):
                total, squares = 0.0, 0.0
                for x in range(edges_x[i], edges_x[i + 1]):
                    value = np.float64(out[y, x])
                    total += value
                    squares += value * value
                sums[0, j, i] += total
                sums[1, j, i] += squares


@numba.njit(nogil=True, cache=True)
def _add_runs(values: Float32, runs: Runs, radius: int, out: Sums) -> None:
    """Add the sums of values and of their squares over each run of pixels moved by each lag to ``out[:, lag]``.

    ``values`` is padded by the radius with zeros; ``runs`` are (row, first, stop) of the image without padding.
    """
    size = 2 * radius + 1
    prefix, prefix_squares = np.zeros(values.shape[1] + 1), np.zeros(values.shape[1] + 1)
    for y in range(values.shape[0]):
        first, last = np.searchsorted(runs[:, 0], y - 2 * radius), np.searchsorted(runs[:, 0], y + 1)
        if first == last:
            continue
        total, total_squares = 0.0, 0.0
        for x in range(values.shape[1]):
            value = np.float64(values[y, x])
            total += value
            total_squares += value * value
            prefix[x + 1] = total
            prefix_squares[x + 1] = total_squares
        for k in range(first, last):
            lag, begin, end = y - runs[k, 0], runs[k, 1], runs[k, 2]
            sums, squares = out[0, lag], out[1, lag]
            ends, begins = prefix[end : end + size], prefix[begin : begin + size]
            for j in range(size):
                sums[j] += ends[j] - begins[j]
            ends, begins = prefix_squares[end : end + size], prefix_squares[begin : begin + size]
            for j in range(size):
                squares[j] += ends[j] - begins[j]


@dataclass(frozen=True, eq=False)
class Tiles:
    """An image in tiles, prepared for correlation with many frames at lags within ±radius."""

    image: Pixels
    radius: int
    dtype: np.dtype[Any] = _SINGLE
    """Precision of the transforms."""

    def _split(self, length: int) -> tuple[int, int]:
        """Return the length of tiles along an axis, and that of the transform of a tile with its surroundings."""
        longest = max(_TILE, 8 * self.radius)
        count = math.ceil(length / (longest - 2 * self.radius))
        tile = math.ceil(length / count)
        return tile, int(scipy.fft.next_fast_len(tile + 2 * self.radius, real=True))

    @cached_property
    def _sizes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        split = [self._split(length) for length in self.image.shape]
        return (split[0][0], split[1][0]), (split[0][1], split[1][1])

    def _places(self) -> Iterator[tuple[slice, slice]]:
        tile, _ = self._sizes
        starts = (range(0, length, step) for length, step in zip(self.image.shape, tile, strict=True))
        return ((slice(y, y + tile[0]), slice(x, x + tile[1])) for y, x in product(*starts))

    @cached_property
    def spectra(self) -> list[npt.NDArray[Any]]:
        """Conjugate half spectra of the tiles."""
        shape = self._sizes[1]
        tiles = (self.image[place].astype(np.float64) for place in self._places())
        precision = np.result_type(self.dtype, np.complex64)
        return [np.conj(scipy.fft.rfft2(tile, s=shape)).astype(precision) for tile in tiles]

    def correlate(self, padded: Float32) -> Sums:
        """Return Σ image(p) frame(p + lag), (2·radius+1, 2·radius+1), of a frame padded by the radius with zeros."""
        shape, around = self._sizes[1], 2 * self.radius
        total = np.zeros_like(self.spectra[0])
        for (rows, columns), spectrum in zip(self._places(), self.spectra, strict=True):
            section = padded[rows.start : rows.stop + around, columns.start : columns.stop + around]
            product = scipy.fft.rfft2(section.astype(self.dtype, copy=False), s=shape)
            product *= spectrum
            total += product
        lags = scipy.fft.irfft2(total, s=shape, overwrite_x=True)[: around + 1, : around + 1]
        return np.asarray(lags, dtype=np.float64)


def _unbalanced(fixed: WindowSums, other: WindowSums, overlap_ratio: float) -> bool:
    """Return whether some window holds so little of the images' variation that single precision does not suffice.

    The round-off of a transform scales with the whole images. A window that does not contain a few very bright pixels
    has a much smaller variation.
    """
    wanted = fixed.overlap >= overlap_ratio * fixed.overlap.max(initial=0)
    variations = [sums.variation()[wanted] for sums in (fixed, other)]
    largest = [max(float(values.max(initial=0)), 1e-300) for values in variations]
    least = [float(values[values > 0].min(initial=size)) for values, size in zip(variations, largest, strict=True)]
    return least[0] * least[1] < largest[0] * largest[1] / _LARGEST_IMBALANCE


def _edges(length: int, radius: int) -> Indices:
    """Return all positions inside the image at which a box moved by up to ±radius can begin or end."""
    near = np.arange(min(radius, length) + 1)
    return np.unique(np.concatenate([near, length - near]))


@dataclass(frozen=True, eq=False)
class ExactSearch:
    """A reference and the static mask of frames, prepared for scores at all shifts within ±radius."""

    image: Pixels
    """The reference (y, x), finite where valid."""
    mask: Mask
    """Valid pixels of the reference."""
    frame_mask: Mask
    """Valid pixels of frames without a mask of their own."""
    radius: int
    """Half width of the window, pixels."""
    overlap_ratio: float

    def prepare(self) -> None:
        """Compute now what every frame needs, so that it is not computed in several threads."""
        _ = self._tiles.spectra, self.reference_sums, self._box_edges, self._holes
        _ = self._mask_tiles and self._mask_tiles.spectra

    @cached_property
    def _centred(self) -> Image:
        """The reference, standardized, 0 where invalid."""
        image = self.image.astype(np.float64)
        pixels = statistics(image, RowRuns.of(self.mask), np.inf)
        return np.where(self.mask, (image - pixels.mean) / (pixels.deviation or 1), 0)

    @cached_property
    def _tiles(self) -> Tiles:
        return Tiles(self._centred, self.radius)

    @cached_property
    def _precise_tiles(self) -> Tiles:
        return Tiles(self._centred, self.radius, np.dtype(np.float64))

    @cached_property
    def _holes(self) -> Runs:
        return runs_of(~self.mask)

    @cached_property
    def _mask_tiles(self) -> Tiles | None:
        """The mask as an image, where it has too many holes for sums over their runs."""
        return Tiles(self.mask, self.radius) if len(self._holes) > _MOST_RUNS else None

    @cached_property
    def _lags(self) -> Indices:
        return np.arange(-self.radius, self.radius + 1)

    @cached_property
    def _box_edges(self) -> tuple[Indices, Indices]:
        height, width = self.mask.shape
        return _edges(height, self.radius), _edges(width, self.radius)

    @cached_property
    def reference_sums(self) -> WindowSums:
        """For each lag: overlap, sum and sum of squares of the reference under the frames' static mask."""
        return self.sums_under(self.frame_mask)

    def sums_under(self, frame_mask: Mask) -> WindowSums:
        """Return overlap and window sums of the reference under a frame mask, each (2·radius+1, 2·radius+1)."""
        correlate = Correlator(self.mask.shape, self.mask.shape, [Lags(-self.radius, self.radius)] * 2)
        other = correlate.spectrum(frame_mask)
        images = (self.mask, self._centred, self._centred**2)
        overlap, total, squares = (correlate(other, correlate.spectrum(image)) for image in images)
        return WindowSums(np.rint(overlap), total, squares)

    def surface(self, frame: Pixels, pixels: Statistics, frame_mask: Mask | None = None) -> tuple[Image, Image]:
        """Return scores and overlaps of one frame (y, x), each (2·radius+1, 2·radius+1), indexed by applied shift.

        The frame is finite where valid, by its own mask or by the static one.
        """
        valid = self.frame_mask if frame_mask is None else frame_mask
        fixed = self.reference_sums if frame_mask is None else self.sums_under(frame_mask)
        padded, blocks = self._centre_frame(frame, valid, pixels)
        total, squares = self._window_sums(padded, blocks)
        own = WindowSums(fixed.overlap, total, squares)
        tiles = self._precise_tiles if _unbalanced(fixed, own, self.overlap_ratio) else self._tiles
        ncc = normalize(tiles.correlate(padded), fixed, own, self.overlap_ratio)
        return ncc[::-1, ::-1], fixed.overlap[::-1, ::-1]

    def _centre_frame(self, frame: Pixels, valid: Mask, pixels: Statistics) -> tuple[Float32, Sums]:
        """Return the frame, standardized and padded by the radius, and its sums between the border strips."""
        height, width = frame.shape
        padded = np.zeros((height + 2 * self.radius, width + 2 * self.radius), np.float32)
        inside = padded[self.radius : self.radius + height, self.radius : self.radius + width]
        blocks = np.zeros((2, *(len(edges) - 1 for edges in self._box_edges)))
        _centre(frame, valid, pixels.mean, 1 / (pixels.deviation or 1), self._box_edges, inside, blocks)
        return padded, blocks

    def _window_sums(self, padded: Float32, blocks: Sums) -> Sums:
        """Return sums of the frame and of its squares over the mask moved by each lag."""
        if self._mask_tiles:
            return np.stack([self._mask_tiles.correlate(padded), self._mask_tiles.correlate(padded**2)])
        holes = np.zeros((2, len(self._lags), len(self._lags)))
        _add_runs(padded, self._holes, self.radius, holes)
        return self._box_sums(blocks) - holes

    def _box_sums(self, blocks: Sums) -> Sums:
        """For each lag, return sums of the frame over the image's rectangle moved by it, from a cumulative table."""
        table = np.pad(blocks.cumsum(1).cumsum(2), ((0, 0), (1, 0), (1, 0)))
        bounds = []
        for edges, length in zip(self._box_edges, self.mask.shape, strict=True):
            first = np.clip(self._lags, 0, length)
            last = np.clip(length + self._lags, first, length)
            bounds.append((np.searchsorted(edges, first), np.searchsorted(edges, last)))
        (top, bottom), (left, right) = bounds
        across = table[:, :, right] - table[:, :, left]
        return np.asarray(across[:, bottom] - across[:, top])
