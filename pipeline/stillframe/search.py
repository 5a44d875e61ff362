"""The exact masked NCC of many frames with one reference, at bounded shifts, in single precision.

Padfield's equation 10 (doi 10.1109/TIP.2011.2181402) needs six correlations a frame. With a static mask and
a fixed reference three of them never change, and two are sums of the frame over the mask's window: a box sum,
read from the frame's border strips, less the sum over the mask's holes. Only one full correlation is left. Of
it only 2·max_shift + 1 rows are wanted, so the inverse transform along x runs on those alone, and a circular
length of N + max_shift keeps every wanted shift free of aliasing. The in-mask mean is removed first: the score
does not change, and single precision suffices whatever the pedestal.

Inside this module lags are those of ``frame(p + lag)``, the negative of the shift that is applied to a frame.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numba
import numpy as np
import numpy.typing as npt
import scipy.fft
import scipy.ndimage

from stillframe.ncc import Image, Lags, Mask, WindowSums, normalize

Float32 = npt.NDArray[np.float32]
Complex64 = npt.NDArray[np.complex64]

_COLUMNS = 32
"""Columns transformed along y at a time: a block of them stays in the second-level cache."""
_SCATTERED = 16
"""A hole of at most this many pixels is summed pixel by pixel, a larger one through its bounding box."""
_MOST_POINTS = 8192
"""Beyond this many scattered pixels one correlation over the box costs less."""


class Statistics(NamedTuple):
    """What a first pass over a frame's valid pixels tells."""

    mean: float
    smallest: float
    largest: float
    not_finite: int
    saturated: int


@numba.njit(nogil=True, cache=True)
def statistics(frame: npt.NDArray[Any], mask: Mask, limit: float) -> Statistics:
    """Mean and range of the valid pixels, how many are not finite, and how many reach the limit."""
    total, count, not_finite, saturated = 0.0, 0, 0, 0
    smallest, largest = np.inf, -np.inf
    for y in range(frame.shape[0]):
        row_total = 0.0
        for x in range(frame.shape[1]):
            if mask[y, x]:
                value = np.float64(frame[y, x])
                if not np.isfinite(value):
                    not_finite += 1
                    continue
                row_total += value
                count += 1
                saturated += int(value >= limit)
                smallest = min(smallest, value)
                largest = max(largest, value)
        total += row_total
    return Statistics(total / max(count, 1), smallest, largest, not_finite, saturated)


@numba.njit(nogil=True, cache=True, fastmath={"reassoc", "contract"})
def _centre(
    frame: npt.NDArray[Any],
    mask: Mask,
    mean: float,
    edges: tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]],
    out: Float32,
    sums: npt.NDArray[np.float64],
) -> None:
    """Write frame − mean (0 where invalid) to ``out``, and its sums and sums of squares between the edges."""
    edges_y, edges_x = edges
    for j in range(len(edges_y) - 1):
        for y in range(edges_y[j], edges_y[j + 1]):
            for x in range(frame.shape[1]):
                out[y, x] = np.float32(np.float64(frame[y, x]) - mean) if mask[y, x] else np.float32(0)
            for i in range(len(edges_x) - 1):
                total, squares = 0.0, 0.0
                for x in range(edges_x[i], edges_x[i + 1]):
                    value = np.float64(out[y, x])
                    total += value
                    squares += value * value
                sums[0, j, i] += total
                sums[1, j, i] += squares


@numba.njit(nogil=True, cache=True)
def _add_points(values: Float32, points: npt.NDArray[np.int64], radius: int, out: npt.NDArray[np.float64]) -> None:
    """Add ``values(point + lag)`` and its square to ``out[:, lag]`` for every point, lags outside the image being 0."""
    height, width = values.shape
    for k in range(points.shape[0]):
        top, left = points[k, 0] - radius, points[k, 1] - radius
        for i in range(max(0, -top), min(2 * radius + 1, height - top)):
            for j in range(max(0, -left), min(2 * radius + 1, width - left)):
                value = np.float64(values[top + i, left + j])
                out[0, i, j] += value
                out[1, i, j] += value * value


@dataclass(frozen=True, eq=False)
class Holes:
    """The invalid pixels of a mask, laid out so that sums over them at bounded lags are cheap."""

    mask: Mask
    radius: int

    @cached_property
    def points(self) -> npt.NDArray[np.int64]:
        """Scattered invalid pixels (n, 2)."""
        return np.argwhere(self._scattered)

    @cached_property
    def _scattered(self) -> Mask:
        labels, count = scipy.ndimage.label(~self.mask)
        sizes = np.bincount(labels.ravel(), minlength=count + 1)
        small = (sizes <= _SCATTERED)[labels] & ~self.mask
        return small if np.count_nonzero(small) <= _MOST_POINTS else np.zeros_like(self.mask)

    @cached_property
    def box(self) -> tuple[slice, slice] | None:
        """Bounding box of the other invalid pixels; None where there are none."""
        large = ~self.mask & ~self._scattered
        boxes = scipy.ndimage.find_objects(large.astype(np.int8))
        return (boxes[0][0], boxes[0][1]) if boxes and boxes[0] else None

    @cached_property
    def _window(self) -> tuple[tuple[slice, slice], tuple[int, int], tuple[int, int]]:
        """The box grown by the radius: its part inside the image, where that starts in it, and its FFT shape."""
        assert self.box is not None
        grown = [(side.start - self.radius, side.stop + self.radius) for side in self.box]
        inside = [slice(max(0, a), min(n, b)) for (a, b), n in zip(grown, self.mask.shape, strict=True)]
        start = [part.start - a for part, (a, _) in zip(inside, grown, strict=True)]
        size = [int(scipy.fft.next_fast_len(b - a, real=True)) for a, b in grown]
        return (inside[0], inside[1]), (start[0], start[1]), (size[0], size[1])

    @cached_property
    def _spectrum(self) -> Complex64:
        hole = (~self.mask & ~self._scattered)[self.box]
        return np.conj(scipy.fft.rfft2(hole.astype(np.float32), s=self._window[2])).astype(np.complex64)

    def sums(self, values: Float32) -> npt.NDArray[np.float64]:
        """Sums of values and of their squares over the holes moved by each lag, (2, 2·radius+1, 2·radius+1)."""
        size = 2 * self.radius + 1
        out = np.zeros((2, size, size))
        if self.points.size:
            _add_points(values, self.points, self.radius, out)
        if self.box is not None:
            out += self._box_sums(values)
        return out

    def _box_sums(self, values: Float32) -> npt.NDArray[np.float64]:
        inside, start, shape = self._window
        part = values[inside]
        padded = np.zeros((2, *shape), np.float32)
        target = padded[:, start[0] : start[0] + part.shape[0], start[1] : start[1] + part.shape[1]]
        target[0] = part
        np.square(part, out=target[1])
        product = scipy.fft.rfft2(padded, axes=(1, 2), overwrite_x=True) * self._spectrum
        size = 2 * self.radius + 1
        sums = scipy.fft.irfft2(product, s=shape, axes=(1, 2), overwrite_x=True)[:, :size, :size]
        return np.asarray(sums, dtype=np.float64)


def _edges(length: int, radius: int) -> npt.NDArray[np.int64]:
    """Where a box of this length moved by up to ±radius can begin or end inside the image."""
    near = np.arange(min(radius, length) + 1)
    return np.unique(np.concatenate([near, length - near]))


@dataclass(frozen=True, eq=False)
class Search:
    """Everything about one reference and one static mask that does not depend on the frame.

    ``image`` is the reference (y, x), finite where ``mask`` is True.
    """

    image: npt.NDArray[Any]
    mask: Mask
    radius: int
    overlap_ratio: float

    def prepare(self) -> None:
        """Compute now what every frame needs, so that threads find it ready."""
        _ = self._spectrum, self.reference_sums, self._box_edges
        self._holes.sums(np.zeros(self.mask.shape, np.float32))

    @cached_property
    def _centred(self) -> Image:
        mean = float(np.mean(self.image, where=self.mask, dtype=np.float64))
        return np.where(self.mask, self.image.astype(np.float64) - mean, 0)

    @cached_property
    def _lags(self) -> Lags:
        return Lags(-self.radius, self.radius)

    @cached_property
    def _rows(self) -> npt.NDArray[np.int64]:
        return np.arange(-self.radius, self.radius + 1)

    @cached_property
    def _lengths(self) -> tuple[int, int]:
        height, width = self.mask.shape
        return int(scipy.fft.next_fast_len(height + self.radius)), self._lags.fft_length(width, width)

    @cached_property
    def _spectrum(self) -> Complex64:
        """Conjugate half spectrum of the reference, stored (block, y, column) as it is read."""
        length_y, length_x = self._lengths
        spectrum = scipy.fft.fft(scipy.fft.rfft(self._centred, n=length_x, axis=1), n=length_y, axis=0)
        return np.ascontiguousarray(spectrum.conj(), dtype=np.complex64)

    @cached_property
    def _holes(self) -> Holes:
        return Holes(self.mask, self.radius)

    @cached_property
    def _box_edges(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        height, width = self.mask.shape
        return _edges(height, self.radius), _edges(width, self.radius)

    @cached_property
    def reference_sums(self) -> WindowSums:
        """Overlap and the reference's window sums under the frames' static mask."""
        return self.sums_under(self.mask)

    def sums_under(self, frame_mask: Mask) -> WindowSums:
        """Overlap and the reference's window sums under any frame mask, each (2·radius+1, 2·radius+1)."""
        height, width = self.mask.shape
        shape = [self._lags.fft_length(n, n) for n in (height, width)]
        other = scipy.fft.rfft2(frame_mask.astype(np.float64), s=shape)
        index = np.ix_(self._rows, self._rows)
        images = (self.mask.astype(np.float64), self._centred, self._centred**2)
        spectra = (scipy.fft.rfft2(image, s=shape) for image in images)
        overlap, total, squares = (scipy.fft.irfft2(other * one.conj(), s=shape)[index] for one in spectra)
        return WindowSums(np.rint(overlap), total, squares)

    def surface(self, frame: npt.NDArray[Any], mean: float, frame_mask: Mask | None = None) -> tuple[Image, Image]:
        """Scores and overlaps of one frame (y, x), each (2·radius+1, 2·radius+1), indexed by applied shift.

        ``frame_mask`` is needed only where it differs from the static one.
        """
        valid = self.mask if frame_mask is None else frame_mask
        fixed = self.reference_sums if frame_mask is None else self.sums_under(frame_mask)
        values, blocks = self._centre_frame(frame, valid, mean)
        total, squares = self._box_sums(blocks) - self._holes.sums(values)
        product = self._product(values)
        ncc = normalize(product, fixed, WindowSums(fixed.overlap, total, squares), self.overlap_ratio)
        return ncc[::-1, ::-1], fixed.overlap[::-1, ::-1]

    def _centre_frame(
        self, frame: npt.NDArray[Any], valid: Mask, mean: float
    ) -> tuple[Float32, npt.NDArray[np.float64]]:
        values = np.empty(frame.shape, np.float32)
        blocks = np.zeros((2, *(len(edges) - 1 for edges in self._box_edges)))
        _centre(frame, valid, mean, self._box_edges, values, blocks)
        return values, blocks

    def _box_sums(self, blocks: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Sums over the image's rectangle moved by each lag, from the sums between its border strips."""
        table = np.pad(blocks.cumsum(1).cumsum(2), ((0, 0), (1, 0), (1, 0)))
        bounds = []
        for edges, length in zip(self._box_edges, self.mask.shape, strict=True):
            first = np.clip(self._rows, 0, length)
            last = np.clip(length + self._rows, first, length)
            bounds.append((np.searchsorted(edges, first), np.searchsorted(edges, last)))
        (top, bottom), (left, right) = bounds
        across = table[:, :, right] - table[:, :, left]
        return np.asarray(across[:, bottom] - across[:, top])

    def _product(self, values: Float32) -> Image:
        """Correlation of the centred frame with the centred reference at the wanted lags."""
        length_y, length_x = self._lengths
        rows = scipy.fft.rfft(values, n=length_x, axis=1)
        wanted = np.empty((len(self._rows), rows.shape[1]), np.complex64)
        for start in range(0, rows.shape[1], _COLUMNS):
            columns = slice(start, start + _COLUMNS)
            block = scipy.fft.fft(rows[:, columns], n=length_y, axis=0)
            block *= self._spectrum[:, columns]
            wanted[:, columns] = scipy.fft.ifft(block, axis=0, overwrite_x=True)[self._rows]
        lags = scipy.fft.irfft(wanted, n=length_x, axis=1)[:, self._rows]
        return lags.astype(np.float64)
