"""Find the neighbourhood of the best shift on binned pictures, where the search costs a tenth.

Bins add up counts, so little of what tells shifts apart by more than a few pixels is lost. Whether the answer is
beyond doubt is seen from the scores: their noise is known, and so is by how much the second peak is lower.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from stillframe.bins import Float32, bin_means, bin_sums
from stillframe.ncc import Mask
from stillframe.peak import DECISIVE, Peak, find_peak
from stillframe.search import Search
from stillframe.survey import Survey, statistics

_FEWEST_BINS = 128
"""Along the shorter axis; smaller pictures are searched as they are."""
_FACTORS = (8, 4, 2)
"""Pixels of a bin along either axis."""
_TRIES = 2
"""Sizes of bins that are tried before single pixels."""
_FULL = 0.5
"""A bin with less than this part of its pixels is not looked at."""
_SLACK = 0.25
"""The vertex of a parabola may be wrong by this part of a bin."""


def bin_factors(shape: tuple[int, int], max_shift: int) -> list[int]:
    """Return the bins' sides to try in turn, pixels; none where binning does not pay."""
    fit = [factor for factor in _FACTORS if min(shape) >= _FEWEST_BINS * factor and max_shift >= factor]
    return fit[:_TRIES]


@dataclass(frozen=True, eq=False)
class CoarseSearch:
    """A reference in bins, prepared to be compared with frames in bins."""

    image: npt.NDArray[Any]
    mask: Mask
    frame_mask: Mask
    max_shift: int
    overlap_ratio: float
    factor: int
    smoothing: float
    """Standard deviation of the Gaussian that takes noise off the scores, bins."""

    @property
    def _reach(self) -> int:
        return math.ceil(self.max_shift / self.factor) + 1

    @property
    def _margin(self) -> int:
        return round(2 * self.smoothing)

    @cached_property
    def _search(self) -> Search:
        part = self._part(self.mask)
        centred = np.where(self.mask, self.image - self.image.mean(where=self.mask, dtype=np.float64), 0)
        centred /= np.abs(centred).max() or 1.0
        bins = (bin_means(centred, self.factor) * self.factor**2 * part).astype(np.float32)
        return Search(bins, part > 0, self._frame_part > 0, self._reach + self._margin, self.overlap_ratio)

    @cached_property
    def _frame_part(self) -> Float32:
        return self._part(self.frame_mask)

    def _part(self, mask: Mask) -> Float32:
        """Return what each bin's sum is to be multiplied by; 0 where too few of its pixels are valid."""
        pixels = np.rint(bin_means(mask, self.factor) * self.factor**2).astype(np.float32)
        return np.divide(1, pixels, out=np.zeros_like(pixels), where=pixels >= _FULL * self.factor**2)

    def prepare(self) -> None:
        """Compute now what every frame needs."""
        self._search.prepare()

    def find(self, frame: Survey) -> Peak | None:
        """Return the highest peak in bins, its shift in pixels; None where it is not beyond doubt."""
        bins = self._sums(frame) * self._frame_part
        ncc, overlap = self._search.surface(bins, statistics(bins.astype(np.float64), self._search.frame_mask, np.inf))
        peak = find_peak(ncc, overlap, self._margin, self.smoothing)
        if peak is None or not self._decisive(peak):
            return None
        middle = self._reach + self._margin
        row, column = peak.shift[0] + middle, peak.shift[1] + middle
        fractions = _vertex(ncc[row - 1 : row + 2, column]), _vertex(ncc[row, column - 1 : column + 2])
        place = [round(self.factor * (place + part)) for place, part in zip(peak.shift, fractions, strict=True)]
        slack = max(1.0, _SLACK * self.factor)
        if max(map(abs, place)) >= self.max_shift - slack:
            return None
        return peak._replace(shift=(place[0], place[1]), reach=self.max_shift, slack=slack)

    def _sums(self, frame: Survey) -> Float32:
        if frame.side == self.factor:
            return frame.bins
        return bin_sums(frame.single.values, frame.valid, frame.single.base, self.factor)

    def _decisive(self, peak: Peak) -> bool:
        """Tell whether neither noise nor another peak can have made this the highest."""
        scatter = (1 - peak.score**2) / np.sqrt(max(peak.pixels, 1))
        null = 1 / np.sqrt(max(peak.pixels - 2, 1))
        return bool(peak.lead > DECISIVE * np.sqrt(2) * scatter and peak.score > 2 * DECISIVE * null)


def _vertex(values: npt.NDArray[np.float64]) -> float:
    """Place of the top of the parabola through three values, −½…½."""
    if len(values) < 3 or not np.isfinite(values).all():
        return 0.0
    low, middle, high = (float(value) for value in values)
    bend = low - 2 * middle + high
    return float(np.clip(0.5 * (low - high) / bend, -0.5, 0.5)) if bend < 0 else 0.0
