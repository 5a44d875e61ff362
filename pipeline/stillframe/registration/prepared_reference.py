"""A reference prepared for registration: all that a comparison needs and no frame changes, made in one written order.

Only what a doubtful frame needs (the search pixel by pixel, the wider window, the self-similarity) is made when the
first such frame comes.
"""

import threading
import weakref
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import scipy.ndimage

from stillframe.images.arrays import Float32, Image, Mask, Pixels, saturation_limit
from stillframe.images.binning import bin_sums, whole_bins
from stillframe.images.corrections import Corrections
from stillframe.images.hot_pixels import isolated_pixels, with_small_holes_filled
from stillframe.images.lost_lines import equal_lines, line_variances, pixels_that_should_differ
from stillframe.images.noise import Noise, measure_noise, smooth
from stillframe.images.run_lengths import RowRuns, ValidPixels
from stillframe.images.statistics import Statistics, Survey, statistics, survey, survey_corrected
from stillframe.options import SearchOptions
from stillframe.registration import acceptance
from stillframe.registration.bin_pass import HiddenBins
from stillframe.registration.coarse_search import CoarseSearch, bin_sides
from stillframe.registration.exact_search import ExactSearch
from stillframe.registration.ncc_at_shift import ScoreAtShift
from stillframe.registration.peak import Peak, find_peak, find_peaks
from stillframe.registration.reference import Reference
from stillframe.registration.rivals import PixelModel, pixel_model
from stillframe.registration.templates import Template, prepare_template

_WIDEST_SEARCH_SMOOTHING, _NARROWEST_SEARCH_SMOOTHING = 4.0, 1.0
"""Scores are smoothed as the templates are, but by at most 4 pixels; a Gaussian of up to 1 pixel is left out."""
_SURVEY_SIDE = 8
"""Side of the bins of the first pass over a frame where nothing is searched in bins, pixels."""
_FINE = 0.01
"""Steps of this many standard deviations change a score by less than its rounding."""
_LOST_PIXELS = 40.0
"""Lines of one value are lost if so many of their pixels should have another one."""
_QUANTILES = (0.5, 0.97, 1.0)
_CANDIDATES = 12
"""Number of peaks that are refined and compared in doubt."""
_LEAST_STRUCTURE = 0.05
"""Smallest fraction of the reference's variance that is taken for structure rather than noise."""

_PREPARED: "weakref.WeakKeyDictionary[Reference, PreparedReference]" = weakref.WeakKeyDictionary()
_LOCK = threading.Lock()


class Levels(NamedTuple):
    """Quantiles of the trusted pixels."""

    median: float
    upper: float
    """Quantile 0.97."""
    brightest: float


@dataclass(frozen=True, eq=False)
class PreparedReference:
    """All that registration needs of a reference and no frame changes."""

    options: SearchOptions
    image: Pixels
    """The reference (y, x), 0 where invalid."""
    trusted: ValidPixels
    """Its valid pixels that are neither saturated nor isolated outliers."""
    frame_pixels: ValidPixels
    """Valid pixels of frames without a mask of their own."""
    noise: Noise
    """Noise of the image: stated, or measured on the trusted pixels."""
    pixels: Statistics
    """Statistics of the trusted pixels."""
    levels: Levels
    template: Template | None
    """What the refinement needs; None where the image holds too little structure."""
    search_smoothing: float
    """Standard deviation of the Gaussian that smooths scores before their peak is sought, pixels."""
    coarse_searches: list[CoarseSearch]
    """Searches in bins, the largest first; none for small images or without a template."""
    score_image: Pixels
    """Image (y, x) that scores at single shifts are computed with."""
    score: ScoreAtShift
    self_similarity: float
    """Highest score of the reference with itself at another shift, corrected for its noise (42)."""
    corrections: Corrections | None
    """What is done to every recorded frame first."""
    takes_nearest: bool = False
    """Whether the nearest of several peaks is taken where none is certainly the true one."""
    hidden_bins: HiddenBins = field(default_factory=dict)
    """Sums over the bins that the static mask hides, by shift; filled by the refinement."""
    _whole: dict[int, Mask] = field(default_factory=dict)
    _line_shares: dict[int, tuple[Image, Image]] = field(default_factory=dict)

    @property
    def contrast(self) -> float:
        """Standard deviation of the trusted pixels."""
        return self.pixels.deviation

    @cached_property
    def as_guide(self) -> "PreparedReference":
        """The same for making a reference: elongation is not judged, and of a lattice's peaks the nearest is taken."""
        template = self.template and replace(self.template, elongation=None)
        return replace(self, template=template, takes_nearest=acceptance.periodic(self.self_similarity))

    def survey(self, frame: Pixels, valid: ValidPixels | None = None, limit: float = np.inf) -> Survey:
        """Return statistics and bins of a frame, as :meth:`find_peak` needs them."""
        return survey(frame, (valid or self.frame_pixels).valid, limit, self._survey_side)

    def correct(self, recorded: Pixels, valid: ValidPixels, limit: float) -> tuple[Pixels, Survey]:
        """Return a recorded frame in corrected counts, and its survey; saturation is judged on recorded counts."""
        if self.corrections is None:
            return recorded, self.survey(recorded, valid, limit)
        return survey_corrected(recorded, self.corrections, valid.valid, limit, self._survey_side)

    @property
    def _survey_side(self) -> int:
        return self.coarse_searches[0].side if self.coarse_searches else _SURVEY_SIDE

    def find_peak(self, frame: Pixels, surveyed: Survey, own_mask: Mask | None = None) -> Peak | None:
        """Return the highest masked NCC of a frame in the window; None where it is nowhere defined.

        Shifts that will be refined are searched in bins; where the peak is not decisive, in smaller bins, then pixel by
        pixel. Frames with a mask of their own are searched pixel by pixel.
        """
        searches = self.coarse_searches if own_mask is None else ()
        peak = next(filter(None, (search.find(surveyed) for search in searches)), None)
        return peak or self._peak(self.exact_search, frame, surveyed.statistics, self.options.max_shift, own_mask)

    def has_lost_lines(self, frame: Pixels, surveyed: Survey, limit: float) -> bool:
        """Return whether rows or columns of a frame with the static mask hold one value where the reference has signal.

        Lines at the detector's limit are saturated and not lost.
        """
        bins = surveyed.bins
        if self.corrections is not None:  # lines that were lost differ once a dark is subtracted
            bins = bin_sums(frame, self.frame_pixels.valid, 0.0, surveyed.side)
        lost = equal_lines(bins, self._whole_bins(surveyed.side))
        if not lost:
            return False
        mask = self.frame_pixels.mask
        shares, side = self._shares(surveyed.side), surveyed.side
        return pixels_that_should_differ(frame, mask, lost, shares, limit, side) > _LOST_PIXELS

    def _whole_bins(self, side: int) -> Mask:
        if side not in self._whole:
            self._whole[side] = whole_bins(self.frame_pixels.mask, side)
        return self._whole[side]

    def _shares(self, side: int) -> tuple[Image, Image]:
        """Return the least relative variance that rows and columns of bins have within the window of the search."""
        if side not in self._line_shares:
            variances = line_variances(self.image.astype(np.float64), self.trusted.mask, side)
            reach = 2 * (-(-self.options.max_shift // side)) + 1
            rows, columns = (scipy.ndimage.minimum_filter1d(one, reach, mode="nearest") for one in variances)
            self._line_shares[side] = rows / self.pixels.deviation**2, columns / self.pixels.deviation**2
        return self._line_shares[side]

    @cached_property
    def exact_search(self) -> ExactSearch:
        """Search pixel by pixel."""
        return self._search_within(self.options.max_shift)

    @cached_property
    def wider_search(self) -> ExactSearch | None:
        """Search pixel by pixel in a window of twice the width; None where the image is too small."""
        reach = self._wider_reach
        return self._search_within(reach) if reach > self.options.max_shift > 0 else None

    @property
    def _wider_reach(self) -> int:
        return min(2 * self.options.max_shift, self._largest_shift)

    @property
    def _largest_shift(self) -> int:
        return int(min(self.image.shape)) - 1

    def _search_within(self, reach: int) -> ExactSearch:
        radius = reach + self._margin(reach)
        return ExactSearch(self.image, self.trusted.mask, self.frame_pixels.mask, radius, self.options.overlap_ratio)

    def _margin(self, reach: int) -> int:
        """Return the number of lags beyond the window that smoothed scores need."""
        return min(round(2 * self.search_smoothing), self._largest_shift - reach)

    def _peak(
        self, search: ExactSearch, frame: Pixels, pixels: Statistics, reach: int, own_mask: Mask | None = None
    ) -> Peak | None:
        ncc, overlap = search.surface(frame, pixels, own_mask)
        return find_peak(ncc, overlap, self._margin(reach), self.search_smoothing)

    def candidates(self, frame: Pixels, pixels: Statistics, own_mask: Mask | None = None) -> list[Peak]:
        """Return the peaks of the masked NCC of a frame in the wider window that may be the true one."""
        search = self.wider_search or self.exact_search
        reach = self._wider_reach if self.wider_search else self.options.max_shift
        ncc, overlap = search.surface(frame, pixels, own_mask)
        peaks = find_peaks(ncc, overlap, self._margin(reach), self.search_smoothing, _CANDIDATES)
        return [peak for peak in peaks if acceptance.may_be_highest(peak, peaks[0])]

    @cached_property
    def pixel_model(self) -> PixelModel:
        """What the comparison of two fits needs."""
        assert self.template is not None
        return pixel_model(self.image, self.trusted.mask, self.noise, self.template)


def prepare(reference: Reference) -> PreparedReference:
    """Return the prepared form of a reference, made once per reference object; safe to call from several threads."""
    with _LOCK:
        prepared = _PREPARED.get(reference)
        if prepared is None:
            prepared = _PREPARED[reference] = _prepare(reference)
        return prepared


def contrast_of(reference: Reference) -> float:
    """Return the standard deviation of the trusted pixels, without the rest of the preparation."""
    return _trusted_statistics(reference, _trusted_pixels(reference)[0]).deviation


def _trusted_statistics(reference: Reference, trusted: Mask) -> Statistics:
    return statistics(reference.image.astype(np.float64), RowRuns.of(trusted), np.inf)


def _prepare(reference: Reference) -> PreparedReference:
    """Prepare a reference, step by step."""
    options, window = reference.options, (reference.options.max_shift, reference.options.overlap_ratio)
    mask, noise = _trusted_pixels(reference)
    pixels = _trusted_statistics(reference, mask)
    template = _template(reference, mask, pixels, noise)
    smoothing = _search_smoothing(template, options.max_shift)
    similarity = _self_similarity(reference, mask, pixels, noise, smoothing)
    self_similar = acceptance.self_similar(similarity)
    sides = bin_sides(reference.shape, options.max_shift) if template else []
    farthest = min((1 + self_similar) * options.max_shift, min(reference.shape) - 1)
    content = _content(reference, mask, template)
    coarse = [
        CoarseSearch(reference.image, mask, reference.frame_mask, *window, side, smoothing, content, farthest)
        for side in sides
    ]
    coarse = [search for search in coarse if search.resolves_pattern]
    trusted, frame_pixels = ValidPixels.of(mask), ValidPixels.of(reference.frame_mask)
    score_image = _score_image(reference, mask, pixels)
    levels = np.quantile(reference.image[mask].astype(np.float64), _QUANTILES)
    prepared = PreparedReference(
        options=options,
        image=reference.image,
        trusted=trusted,
        frame_pixels=frame_pixels,
        noise=noise,
        pixels=pixels,
        levels=Levels(*map(float, levels)),
        template=template,
        search_smoothing=smoothing,
        coarse_searches=coarse,
        score_image=score_image,
        score=ScoreAtShift.of(score_image, trusted, frame_pixels),
        self_similarity=similarity,
        corrections=reference.corrections,
    )
    (coarse[0] if coarse else prepared.exact_search).prepare()
    return prepared


def _trusted_pixels(reference: Reference) -> tuple[Mask, Noise]:
    """Return True for valid pixels that are neither saturated nor isolated outliers, and the noise.

    Noise that was not stated is measured on all valid pixels, and again on the trusted ones if some are not trusted.
    Where the trusted pixels have no contrast, all valid ones are trusted.
    """
    image, mask = reference.image.astype(np.float64), reference.mask
    noise = reference.noise or measure_noise(image, mask)
    limit: float | Pixels = saturation_limit(reference.image.dtype, reference.options.saturation)
    if reference.corrections is not None and np.isfinite(limit):
        limit = reference.corrections.corrected(np.full(reference.shape, limit))
    unsaturated = mask & ~(image >= limit)
    trusted = unsaturated & ~isolated_pixels(image, unsaturated, noise)
    pixels = statistics(image, RowRuns.of(trusted), np.inf)
    if not pixels.smallest < pixels.largest or np.array_equal(trusted, mask):
        return mask, noise
    return trusted, reference.noise or measure_noise(image, trusted)


def _template(reference: Reference, mask: Mask, pixels: Statistics, noise: Noise) -> Template | None:
    """Return the templates of the trusted pixels less their mean; small holes hold what is around them.

    Otherwise no template could use the pixels around a hole, whose shifted neighbours must be known.
    """
    filled, known = with_small_holes_filled(np.where(mask, reference.image.astype(np.float64) - pixels.mean, 0), mask)
    relative = noise.relative_to(pixels.mean)
    return prepare_template(
        filled,
        known,
        relative,
        reference.smoothing,
        level=pixels.mean,
        frame_mask=reference.frame_mask,
        against_scatter=reference.against_scatter,
    )


def _self_similarity(reference: Reference, mask: Mask, pixels: Statistics, noise: Noise, smoothing: float) -> float:
    """Return the highest score of the reference with itself at another shift, corrected for its noise (42).

    Two shifts within the wider window, ±2 max_shift, differ by up to four times max_shift; so far is searched.
    """
    largest, reach = int(min(reference.shape)) - 1, reference.options.max_shift
    farthest = min(4 * reach, largest)
    margin = min(round(2 * smoothing), largest - farthest)
    image = np.where(mask, reference.image, 0).astype(np.float64)
    search = ExactSearch(image, mask, mask, farthest + margin, reference.options.overlap_ratio)
    ncc, overlap = search.surface(image, pixels)
    peak = find_peak(ncc, overlap, margin, smoothing)
    structure = max(1 - noise.mean_variance(pixels.mean) / pixels.deviation**2, _LEAST_STRUCTURE)
    return float(np.nan_to_num(peak.second_score)) / structure if peak else 0.0


def _content(reference: Reference, mask: Mask, template: Template | None) -> Float32:
    """Return the smoothed reference less its level, 0 far from valid pixels."""
    if template is None:
        return np.zeros(reference.shape, np.float32)
    image = np.where(mask, reference.image.astype(np.float64) - template.level, 0)
    return smooth(image, mask, template.smoothing).astype(np.float32)


def _search_smoothing(template: Template | None, max_shift: int) -> float:
    """Return the standard deviation of the Gaussian for scores, pixels: that of the templates within bounds."""
    width = template.smoothing if template and max_shift else 0.0
    return min(width, _WIDEST_SEARCH_SMOOTHING) if width > _NARROWEST_SEARCH_SMOOTHING else 0.0


def _score_image(reference: Reference, mask: Mask, pixels: Statistics) -> Pixels:
    """Return the trusted pixels less their mean, 0 elsewhere, as short integers, which take half the memory.

    Scores do not depend on the unit. Where the brightest pixel would make the steps too coarse, floats are kept.
    """
    image = reference.image.astype(np.float64)
    centred = np.where(mask, (image - pixels.mean) / (pixels.deviation or 1.0), 0)
    step = np.abs(centred).max() / np.iinfo(np.int16).max
    return np.rint(centred / step).astype(np.int16) if 0 < step < _FINE else centred.astype(np.float32)
