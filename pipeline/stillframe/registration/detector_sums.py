"""Sums over frames at each pixel of the detector, from which its own pattern is found (:mod:`~.detector_map`)."""

from dataclasses import dataclass, field

import numpy as np
import scipy.ndimage

from stillframe.images.arrays import Float32, Image, Mask, Pixels

_AROUND = 25
"""Side of the square, pixels, in which gains are judged relative to each other: wider structure is the pattern's."""
CLOSE = 9
"""Side of the square, pixels, in which weak deviations are summed."""


@dataclass(eq=False)
class DetectorSums:
    """Sums over frames at each pixel of the detector, (y, x), in corrected counts or their squares."""

    residual: Float32
    """Σ r: frame less what the reference, moved to the frame, predicts."""
    fine: Float32
    """Σ r′: residual of the frame without a map, less its mean over the surroundings.

    The next map does not depend on the last one then: what that leaves would not show its noise, since the same frames
    did."""
    squares: Float32
    """Σ r²."""
    fine_squares: Float32
    """Σ r′²."""
    lineless: Float32
    """Σ r″: as r′, but less its means over rows and columns first."""
    lineless_squares: Float32
    """Σ r″²."""
    close_squares: Float32
    """Σ (sum of r over the closest surroundings)²."""
    signal: Float32
    """Σ m: what the reference predicts."""
    signal_squares: Float32
    """Σ m²."""
    products: Float32
    """Σ r m."""
    noise: Float32
    """Σ of the residual's variance, as far as counts and reference explain it."""
    of_reference: Float32
    """Σ of the part of that variance that is the reference's."""
    of_offset: Float32
    """Σ 1/F: what an offset by one count adds to Σ r, for pixels of the response F."""
    of_offset_squares: Float32
    """Σ 1/F²."""
    lines: Image = field(default_factory=lambda: np.zeros((2, 0)))
    """Sum and sum of squares of the means, over rows and then columns, of the residual without a map, (2, y + x)."""
    frames: int = 0

    @classmethod
    def empty(cls, shape: tuple[int, int]) -> "DetectorSums":
        """Return sums over no frame."""
        sums = cls(*np.zeros((14, *shape), np.float32))
        sums.lines = np.zeros((2, sum(shape)))
        return sums

    def add(
        self,
        residual: Image,
        signal: Image,
        variance: Image,
        of_reference: float,
        kept: Mask,
        removed: Image | float = 0.0,
        response: Pixels | float = 1.0,
    ) -> None:
        """Add the images (y, x) of one frame. Pixels that are not kept are left out.

        ``of_reference`` is the fraction of the variance that is the reference's, and ``removed`` what a map took from
        the frame. Frames were divided by the ``response`` of the pixels, as given: offsets are in counts before that.
        """
        counted, predicted = np.where(kept, residual, 0), np.where(kept, signal, 0)
        without_map = np.where(kept, residual + removed, 0)
        fine = high_pass(without_map, kept)
        rows, columns = line_means(without_map * response, kept)
        lineless = high_pass(without_map - (rows + columns) / response, kept)
        lines, unit = np.concatenate([rows[:, 0], columns[0]]), kept / np.float32(response)
        self.residual += counted
        self.fine += fine
        self.squares += counted**2
        self.fine_squares += fine**2
        self.lineless += lineless
        self.lineless_squares += lineless**2
        self.close_squares += sum_around(counted, CLOSE) ** 2
        self.signal += predicted
        self.signal_squares += predicted**2
        self.products += counted * predicted
        of_noise = np.where(kept, variance, 0)
        self.noise += of_noise
        self.of_reference += of_reference * of_noise
        self.of_offset += unit
        self.of_offset_squares += unit**2
        self.lines += [lines, lines**2]
        self.frames += 1


def line_means(image: Image, kept: Mask) -> tuple[Image, Image]:
    """Return the means over rows (y, 1) and columns (1, x), less the mean of all; 0 for lines without a kept pixel."""
    rest, lines = np.where(kept, image - image.sum() / max(np.count_nonzero(kept), 1), 0), [np.zeros((1, 1))] * 2
    for axis in (1, 0, 1, 0):  # where a block hides parts of lines, rows and columns share something
        step = rest.sum(axis=axis, keepdims=True) / np.maximum(kept.sum(axis=axis, keepdims=True), 1)
        lines[1 - axis] = lines[1 - axis] + step
        rest = np.where(kept, rest - step, 0)
    return lines[0], lines[1]


def high_pass(image: Image, mask: Mask) -> Image:
    """Return an image less its mean over the surroundings in which pixels are judged; 0 where invalid."""
    kept = np.where(mask, image, 0)
    return np.where(mask, kept - sum_around(kept, _AROUND) / np.maximum(sum_around(mask, _AROUND), 1), 0)


def sum_around(image: Pixels, side: int) -> Image:
    """Return the sum over a square around each pixel."""
    mean = scipy.ndimage.uniform_filter(image, side, mode="constant", output=np.float64)
    return np.asarray(mean * side**2)
