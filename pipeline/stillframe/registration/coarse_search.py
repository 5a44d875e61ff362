"""Search of the best shift in binned images, at a tenth of the cost of a search pixel by pixel.

Bins add up counts, so that shifts which differ by more than a few pixels remain as distinguishable as in single pixels.
Whether the highest peak is decisive follows from its score and its lead (:func:`~.acceptance.decisive`).
"""

import itertools
import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from stillframe.images.arrays import Float32, Image, Mask, Pixels
from stillframe.images.binning import bin_means, bin_sums
from stillframe.images.run_lengths import RowRuns
from stillframe.images.statistics import Survey, statistics
from stillframe.registration.acceptance import decisive
from stillframe.registration.exact_search import ExactSearch
from stillframe.registration.peak import Peak, find_peak

_LEAST_BINS = 128
"""Smallest number of bins along the shorter axis; smaller images are searched pixel by pixel."""
_SIDES = (8, 4, 2)
"""Sides of bins, pixels."""
_TRIES = 2
"""Number of sides that are tried before the search pixel by pixel."""
_LEAST_VALID = 0.5
"""A bin with a smaller fraction of valid pixels is invalid."""
_SLACK = 0.25
"""Largest error of the vertex of a parabola, as a fraction of a bin."""
_LEAST_LEAD = 0.02
"""Bins resolve a pattern if its peak leads by this fraction wherever it lies between them."""
_LEAST_SMOOTHING = 0.5
"""A narrower Gaussian, bins, does not change a surface."""


def bin_sides(shape: tuple[int, int], max_shift: int) -> list[int]:
    """Return the sides of bins to try in turn, pixels; none where binning saves nothing."""
    fitting = [side for side in _SIDES if min(shape) >= _LEAST_BINS * side and max_shift >= side]
    return fitting[:_TRIES]


@dataclass(frozen=True, eq=False)
class CoarseSearch:
    """A reference in bins of one side, prepared for comparison with frames in such bins."""

    image: Pixels
    """The reference (y, x)."""
    mask: Mask
    """Its trusted pixels."""
    frame_mask: Mask
    """Valid pixels of frames."""
    max_shift: int
    """Pixels."""
    overlap_ratio: float
    side: int
    """Side of a bin, pixels."""
    pixel_smoothing: float
    """Standard deviation, pixels, of the Gaussian that smooths the scores."""
    content: Float32
    """The smoothed reference less its level (y, x)."""
    farthest: int
    """Largest shift that is searched, pixels: beyond ``max_shift`` where the reference resembles itself."""

    @property
    def _smoothing(self) -> float:
        """Standard deviation of that Gaussian, bins."""
        width = self.pixel_smoothing / self.side
        return width if width > _LEAST_SMOOTHING else 0.0

    @property
    def _reach(self) -> int:
        """Half width of the window, bins."""
        return math.ceil(self.farthest / self.side) + 1

    @property
    def _margin(self) -> int:
        """Bins beyond the window that smoothed scores need."""
        return round(2 * self._smoothing)

    @cached_property
    def _search(self) -> ExactSearch:
        """Search of the binned reference."""
        per_pixel = self._inverse_pixels(self.mask)
        centred = np.where(self.mask, self.image - self.image.mean(where=self.mask, dtype=np.float64), 0)
        centred /= np.abs(centred).max() or 1.0
        bins = (bin_means(centred, self.side) * self.side**2 * per_pixel).astype(np.float32)
        return ExactSearch(bins, per_pixel > 0, self._per_pixel > 0, self._reach + self._margin, self.overlap_ratio)

    @cached_property
    def _per_pixel(self) -> Float32:
        """Factor from the sum of a frame's bin to its mean."""
        return self._inverse_pixels(self.frame_mask)

    @cached_property
    def _valid(self) -> RowRuns:
        """Valid bins of frames."""
        return RowRuns.of(self._per_pixel > 0)

    def _inverse_pixels(self, mask: Mask) -> Float32:
        """Return one over the number of valid pixels of each bin; 0 for invalid bins."""
        pixels = np.rint(bin_means(mask, self.side) * self.side**2).astype(np.float32)
        return np.divide(1, pixels, out=np.zeros_like(pixels), where=pixels >= _LEAST_VALID * self.side**2)

    def prepare(self) -> None:
        """Compute now what every frame needs."""
        self._search.prepare()

    def find(self, frame: Survey) -> Peak | None:
        """Return the highest peak in bins, its shift in pixels; None if it is not decisive or lies near the edge."""
        ncc, overlap = self._surface(self.sums(frame) * self._per_pixel)
        peak = find_peak(ncc, overlap, self._margin, self._smoothing)
        if peak is None or not decisive(peak):
            return None
        middle = self._reach + self._margin
        row, column = peak.shift[0] + middle, peak.shift[1] + middle
        fractions = _vertex(ncc[row - 1 : row + 2, column]), _vertex(ncc[row, column - 1 : column + 2])
        y, x = (round(self.side * (place + fraction)) for place, fraction in zip(peak.shift, fractions, strict=True))
        slack = max(1.0, _SLACK * self.side)
        if max(abs(y), abs(x)) >= self.max_shift - slack:
            return None
        return peak._replace(shift=(y, x), reach=self.max_shift, slack=slack)

    def _surface(self, bins: Float32) -> tuple[Image, Image]:
        return self._search.surface(bins, statistics(bins.astype(np.float64), self._valid, np.inf))

    @cached_property
    def resolves_pattern(self) -> bool:
        """Return whether the true peak stays the highest, wherever its maximum lies between the centres of bins.

        The reference without noise is moved by fractions of a bin, in both directions, under the mask of the frames.
        """
        valid, steps = RowRuns.of(self.frame_mask), range(0, self.side, max(1, self.side // 4))
        for shift in itertools.product(steps, steps):
            moved = np.roll(self.content, shift, (0, 1))
            ncc, overlap = self._surface(bin_sums(moved, valid, 0.0, self.side) * self._per_pixel)
            peak = find_peak(ncc, overlap, self._margin, self._smoothing)
            if peak is None or max(map(abs, peak.shift)) > 1 or peak.lead < _LEAST_LEAD * peak.score:
                return False
        return True

    def sums(self, frame: Survey) -> Float32:
        """Return the sums of a frame over the bins of this search."""
        if frame.side == self.side:
            return frame.bins
        return bin_sums(frame.single.values, frame.valid, frame.single.base, self.side)


def _vertex(values: Image) -> float:
    """Return the place of the vertex of the parabola through three values (8), −½…½; 0 where it opens upward."""
    if len(values) < 3 or not np.isfinite(values).all():
        return 0.0
    low, middle, high = (float(value) for value in values)
    bend = low - 2 * middle + high
    return float(np.clip(0.5 * (low - high) / bend, -0.5, 0.5)) if bend < 0 else 0.0
