"""The exact masked NCC of many frames with one reference, at bounded shifts, in single precision.

Padfield's equation 10 (doi 10.1109/TIP.2011.2181402) needs six correlations a frame. With a static mask and
a fixed reference three of them never change, and two are sums of the frame over the mask's window: a box sum,
read from the frame's border strips, less the sum over the mask's holes, read run by run from prefix sums of rows.
Only one correlation is left. It is cut into tiles of the reference, each seeing its part of the frame and
max_shift pixels around, with all products summed before a single inverse transform: short transforms that stay in
the cache, and exactly the wanted shifts. The in-mask mean is removed first: the score does not change, and single
precision suffices whatever the pedestal.

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

from stillframe.ncc import Correlator, Image, Lags, Mask, WindowSums, normalize
from stillframe.runs import runs_of
from stillframe.survey import Statistics, statistics

Float32 = npt.NDArray[np.float32]
Sums = npt.NDArray[np.float64]

_SINGLE = np.dtype(np.float32)
_TILE = 640
"""Transforms of about this length, squared, fit the second-level cache."""
_MOST_RUNS = 8192
"""Beyond this many runs of invalid pixels two more correlations cost less than going through them."""

_LARGEST_IMBALANCE = 400.0
"""Single precision gives scores to about 3e-7 times the root of this."""


@numba.njit(nogil=True, cache=True)
def _centre(
    frame: npt.NDArray[Any],
    mask: Mask,
    mean: float,
    scale: float,
    edges: tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]],
    out: Float32,
    sums: npt.NDArray[np.float64],
) -> None:
    """Write (frame − mean)·scale, 0 where invalid, to ``out``, and its sums and sums of squares between the edges."""
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
def _add_runs(values: Float32, runs: npt.NDArray[np.int64], radius: int, out: Sums) -> None:
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
    """An image prepared for correlation with many frames at lags within ±radius."""

    image: npt.NDArray[Any]
    radius: int
    dtype: np.dtype[Any] = _SINGLE

    def _split(self, length: int) -> tuple[int, int]:
        """Tile length along an axis, and that of its transform, which holds the tile and its surroundings."""
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
    def _spectra(self) -> list[npt.NDArray[Any]]:
        """Conjugate half spectra of the tiles."""
        shape = self._sizes[1]
        tiles = (self.image[place].astype(np.float64) for place in self._places())
        return [np.conj(scipy.fft.rfft2(tile, s=shape)).astype(self._complex) for tile in tiles]

    @property
    def _complex(self) -> np.dtype[Any]:
        return np.result_type(self.dtype, np.complex64)

    def prepare(self) -> None:
        """Compute the spectra now."""
        _ = self._spectra

    def correlate(self, padded: Float32) -> Sums:
        """Return Σ image(p) frame(p + lag), (2·radius+1, 2·radius+1), of a frame padded by the radius with zeros."""
        shape, around = self._sizes[1], 2 * self.radius
        total = np.zeros((shape[0], shape[1] // 2 + 1), self._complex)
        for (rows, columns), spectrum in zip(self._places(), self._spectra, strict=True):
            part = padded[rows.start : rows.stop + around, columns.start : columns.stop + around]
            product = scipy.fft.rfft2(part.astype(self.dtype, copy=False), s=shape)
            product *= spectrum
            total += product
        lags = scipy.fft.irfft2(total, s=shape, overwrite_x=True)[: around + 1, : around + 1]
        return np.asarray(lags, dtype=np.float64)


def _unbalanced(fixed: WindowSums, other: WindowSums, overlap_ratio: float) -> bool:
    """Tell whether some window holds so little of the images' variation that single precision does not suffice.

    The round-off of a transform goes with the whole images; a window that a few brilliant pixels have left goes
    with what remains.
    """
    wanted = fixed.overlap >= overlap_ratio * fixed.overlap.max(initial=0)
    parts = [sums.variation()[wanted] for sums in (fixed, other)]
    whole = [max(float(part.max(initial=0)), 1e-300) for part in parts]
    least = [float(part[part > 0].min(initial=size)) for part, size in zip(parts, whole, strict=True)]
    return least[0] * least[1] < whole[0] * whole[1] / _LARGEST_IMBALANCE


def _edges(length: int, radius: int) -> npt.NDArray[np.int64]:
    """Where a box of this length moved by up to ±radius can begin or end inside the image."""
    near = np.arange(min(radius, length) + 1)
    return np.unique(np.concatenate([near, length - near]))


@dataclass(frozen=True, eq=False)
class Search:
    """Everything about one reference and one static mask of frames that does not depend on the frame.

    ``image`` is the reference (y, x), finite where ``mask`` is True; frames are valid where ``frame_mask`` is.
    """

    image: npt.NDArray[Any]
    mask: Mask
    frame_mask: Mask
    radius: int
    overlap_ratio: float

    def prepare(self) -> None:
        """Compute now what every frame needs, so that threads find it ready."""
        self._tiles.prepare()
        _ = self.reference_sums, self._box_edges, self._runs
        if self._mask_tiles:
            self._mask_tiles.prepare()

    @cached_property
    def _centred(self) -> Image:
        seen = statistics(self.image.astype(np.float64), self.mask, np.inf)
        return np.where(self.mask, (self.image.astype(np.float64) - seen.mean) / (seen.deviation or 1), 0)

    @cached_property
    def _tiles(self) -> Tiles:
        return Tiles(self._centred, self.radius)

    @cached_property
    def _precise_tiles(self) -> Tiles:
        return Tiles(self._centred, self.radius, np.dtype(np.float64))

    @cached_property
    def _runs(self) -> npt.NDArray[np.int64]:
        return runs_of(~self.mask)

    @cached_property
    def _mask_tiles(self) -> Tiles | None:
        """The mask as an image, where it has more holes than are gone through one by one."""
        return Tiles(self.mask, self.radius) if len(self._runs) > _MOST_RUNS else None

    @cached_property
    def _lags(self) -> npt.NDArray[np.int64]:
        return np.arange(-self.radius, self.radius + 1)

    @cached_property
    def _box_edges(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        height, width = self.mask.shape
        return _edges(height, self.radius), _edges(width, self.radius)

    @cached_property
    def reference_sums(self) -> WindowSums:
        """Overlap and the reference's window sums under the frames' static mask."""
        return self.sums_under(self.frame_mask)

    def sums_under(self, frame_mask: Mask) -> WindowSums:
        """Overlap and the reference's window sums under any frame mask, each (2·radius+1, 2·radius+1)."""
        correlate = Correlator(self.mask.shape, self.mask.shape, [Lags(-self.radius, self.radius)] * 2)
        other = correlate.spectrum(frame_mask)
        images = (self.mask, self._centred, self._centred**2)
        overlap, total, squares = (correlate(other, correlate.spectrum(image)) for image in images)
        return WindowSums(np.rint(overlap), total, squares)

    def surface(self, frame: npt.NDArray[Any], seen: Statistics, frame_mask: Mask | None = None) -> tuple[Image, Image]:
        """Scores and overlaps of one frame (y, x), each (2·radius+1, 2·radius+1), indexed by applied shift.

        ``seen`` are the frame's statistics; ``frame_mask`` is needed only where it differs from the static one.
        """
        valid = self.frame_mask if frame_mask is None else frame_mask
        fixed = self.reference_sums if frame_mask is None else self.sums_under(frame_mask)
        padded, blocks = self._centre_frame(frame, valid, seen)
        total, squares = self._window_sums(padded, blocks)
        own = WindowSums(fixed.overlap, total, squares)
        tiles = self._precise_tiles if _unbalanced(fixed, own, self.overlap_ratio) else self._tiles
        ncc = normalize(tiles.correlate(padded), fixed, own, self.overlap_ratio)
        return ncc[::-1, ::-1], fixed.overlap[::-1, ::-1]

    def _centre_frame(self, frame: npt.NDArray[Any], valid: Mask, seen: Statistics) -> tuple[Float32, Sums]:
        """Return the frame, standardized and padded by the radius, and its sums between the border strips."""
        height, width = frame.shape
        padded = np.zeros((height + 2 * self.radius, width + 2 * self.radius), np.float32)
        inside = padded[self.radius : self.radius + height, self.radius : self.radius + width]
        blocks = np.zeros((2, *(len(edges) - 1 for edges in self._box_edges)))
        _centre(frame, valid, seen.mean, 1 / (seen.deviation or 1), self._box_edges, inside, blocks)
        return padded, blocks

    def _window_sums(self, padded: Float32, blocks: Sums) -> Sums:
        """Sums of the frame and of its squares over the mask moved by each lag."""
        if self._mask_tiles:
            return np.stack([self._mask_tiles.correlate(padded), self._mask_tiles.correlate(padded**2)])
        holes = np.zeros((2, len(self._lags), len(self._lags)))
        _add_runs(padded, self._runs, self.radius, holes)
        return self._box_sums(blocks) - holes

    def _box_sums(self, blocks: Sums) -> Sums:
        """Sums over the image's rectangle moved by each lag, from the sums between its border strips."""
        table = np.pad(blocks.cumsum(1).cumsum(2), ((0, 0), (1, 0), (1, 0)))
        bounds = []
        for edges, length in zip(self._box_edges, self.mask.shape, strict=True):
            first = np.clip(self._lags, 0, length)
            last = np.clip(length + self._lags, first, length)
            bounds.append((np.searchsorted(edges, first), np.searchsorted(edges, last)))
        (top, bottom), (left, right) = bounds
        across = table[:, :, right] - table[:, :, left]
        return np.asarray(across[:, bottom] - across[:, top])
