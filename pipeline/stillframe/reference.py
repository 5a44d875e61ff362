"""The image every frame is laid on, with its mask and the settings of the search."""

import hashlib
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, get_args

import numpy as np
import numpy.typing as npt

from stillframe.bins import Single, moved_bins
from stillframe.checks import as_mask, native
from stillframe.coarse import CoarseSearch, bin_factors
from stillframe.hits import find_hits
from stillframe.ncc import Image, Mask, check_options
from stillframe.noise import Noise, measure_noise
from stillframe.peak import Peak, find_peak
from stillframe.refine import HiddenBins
from stillframe.runs import RowRuns
from stillframe.score import Moments, Picture, holes_of, masked_score, meeting
from stillframe.search import Search
from stillframe.survey import Statistics, Survey, statistics, survey
from stillframe.template import Template, Weights, prepare_template

_MOST_SMOOTHING = 4.0
_ROWS = 8
"""Rows of pixels that are gone through at a time for a score alone."""
_USUAL_EXPONENT = 20
"""Squares of numbers up to 2 to this power, and of their reciprocals, are far within single precision."""
_FINE = 0.01
"""Steps of so many standard deviations change a score by less than its rounding."""
_LEAST_SMOOTHING = 0.5
"""Less does nothing to a surface."""


@dataclass(frozen=True, eq=False)
class Reference:
    """What frames are compared with: an image, its mask and how far to search.

    What a comparison needs and no frame changes (spectra, window sums) is computed at its first use and kept.
    A reference pickles as its fields alone.

    Parameters
    ----------
    image : array_like, shape (y, x)
        Real pixels; whatever lies under the mask is set to 0 and never looked at.
    mask : array_like of bool, shape (y, x), optional
        True = valid pixels of the image. Default: all valid.
    max_shift : int
        Largest shift looked for along either axis, pixels. The cost grows slowly with it.
    overlap_ratio : float
        Shifts with less than this part of the largest overlap are not considered.
    saturation : float, optional
        Pixel value at which the detector saturates. Default: the largest value of an integer dtype,
        none for floats.
    frame_mask : array_like of bool, shape (y, x), optional
        True = valid pixels of the frames, fixed to the detector. Default: ``mask``. They differ where the image is a
        mean of frames laid on one another, whose holes lie elsewhere.
    weights : {"counts", "uniform"}
        What pixels weigh in the refinement: the inverse of the variance of counts, or the same everywhere.
    noise : (float, float), optional
        Variance of the image's pixels as (gain, pedestal): ``gain · (intensity − pedestal)``. Default: measured
        from the image, whose noise must then be independent from pixel to pixel.
    smoothing : float, optional
        Standard deviation, pixels, of the Gaussian that smooths the templates of the refinement. Default: the one
        that promises the smallest errors.
    subpixel : bool
        Whether shifts are refined to fractions of a pixel, with their errors.
    history : str
        How the image was made; for people, it changes no shift.

    Raises
    ------
    TypeError
        Complex, object or other unordered pixels.
    ValueError
        Wrong dimensions; a mask of another shape, without a valid pixel or not boolean-like; a valid pixel that
        is not finite; no contrast; ``max_shift`` negative or not smaller than the image.

    Examples
    --------
    >>> import numpy as np
    >>> reference = Reference(np.eye(64), max_shift=8)
    >>> reference.shape, reference.max_shift
    ((64, 64), 8)
    """

    image: npt.NDArray[Any]
    """Pixels (y, x), native byte order, 0 where invalid, read-only."""
    mask: Mask = None  # type: ignore[assignment]  # __post_init__ makes it an array
    """True = valid (y, x), read-only."""
    max_shift: int = 32
    """Half width of the searched window, pixels."""
    overlap_ratio: float = 0.3
    """Least overlap, as a part of the largest."""
    saturation: float | None = None
    """Pixel value at which the detector saturates; None: the limit of an integer dtype."""
    frame_mask: Mask = None  # type: ignore[assignment]  # __post_init__ makes it an array
    """True = valid pixels of the frames (y, x), read-only."""
    weights: Weights = "counts"
    """Inverse variance of counts, or uniform."""
    noise: Noise | None = None
    """Variance of the image's pixels; None: measured from it."""
    smoothing: float | None = None
    """Standard deviation of the templates' Gaussian, pixels; None: the one that promises the smallest errors."""
    subpixel: bool = True
    """Whether shifts are refined to fractions of a pixel, with their errors."""
    history: str = ""
    """How the image was made."""

    def __post_init__(self) -> None:
        """Check every field and freeze the arrays."""
        image = native(self.image, "the reference", 2)
        mask = as_mask(self.mask, (image.shape[0], image.shape[1])).copy()
        object.__setattr__(self, "max_shift", operator.index(self.max_shift))
        check_options(self.max_shift, self.overlap_ratio)
        if self.weights not in get_args(Weights):
            raise ValueError(f"weights is {self.weights!r}, which is not known. Choose counts or uniform.")
        if self.noise is not None:
            object.__setattr__(self, "noise", Noise(*map(float, self.noise)))
        _check_search(image, mask, self.max_shift)
        own = mask if self.frame_mask is None else as_mask(self.frame_mask, mask.shape, "the mask of the frames")
        frame_mask = own.copy()
        clean = np.where(mask, image, np.zeros((), image.dtype))
        clean.flags.writeable = mask.flags.writeable = frame_mask.flags.writeable = False
        object.__setattr__(self, "image", clean)
        object.__setattr__(self, "mask", mask)
        object.__setattr__(self, "frame_mask", frame_mask)

    def __getstate__(self) -> Mapping[str, Any]:
        """Leave out what can be computed again."""
        return {name: self.__dict__[name] for name in self.__dataclass_fields__}

    def __dask_tokenize__(self) -> str:
        """Let lazy results that depend on equal references have equal names."""
        return self.digest

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (y, x) that frames must have."""
        return self.image.shape[0], self.image.shape[1]

    @cached_property
    def search(self) -> Search:
        """The prepared exact search for whole-pixel shifts, wide enough to be smoothed."""
        return self._search_within(self.max_shift)

    @cached_property
    def wider_search(self) -> Search | None:
        """The same of twice the reach, for frames found at its edge; None where the frame ends."""
        reach = min(2 * self.max_shift, min(self.shape) - 1)
        return self._search_within(reach) if reach > self.max_shift > 0 else None

    def _search_within(self, reach: int) -> Search:
        return Search(self.image, self.trusted, self.frame_mask, reach + self._margin(reach), self.overlap_ratio)

    def _margin(self, reach: int) -> int:
        """Lags beyond the reach that smoothed scores need."""
        return min(round(2 * self.search_smoothing), min(self.shape) - 1 - reach)

    @cached_property
    def search_smoothing(self) -> float:
        """Standard deviation, pixels, of the Gaussian that takes noise off the scores before their peak is sought."""
        width = self.template.smoothing if self.template and self.max_shift else 0.0
        return min(width, _MOST_SMOOTHING) if width > 1 else 0.0

    def survey(self, frame: npt.NDArray[Any], frame_mask: Mask | None = None, limit: float = np.inf) -> Survey:
        """Go through a frame once, for all that ``find_peak`` needs to know."""
        mask, valid = (self.frame_mask, self.valid) if frame_mask is None else (frame_mask, RowRuns.of(frame_mask))
        return survey(frame, mask, valid, limit, self.coarse[0].factor if self.coarse else _ROWS)

    @cached_property
    def valid(self) -> RowRuns:
        """Valid pixels of frames."""
        return RowRuns.of(self.frame_mask)

    def find_peak(self, frame: npt.NDArray[Any], known: Survey, frame_mask: Mask | None = None) -> Peak | None:
        """Return the highest masked NCC of a frame within the search; None where it is nowhere defined.

        What is refined later is looked for in bins first; where these leave a doubt, in smaller ones and pixel by
        pixel. The scores are those of what was searched.
        """
        near = next(filter(None, (one.find(known) for one in self.coarse if frame_mask is None)), None)
        return near or self._peak(self.search.surface(frame, known.seen, frame_mask), self.max_shift)

    def score(
        self, shift: tuple[int, int], frame: Single, seen: Statistics, mask: Mask, product: float | None = None
    ) -> tuple[float, int]:
        """Return the masked NCC at one whole-pixel shift, and the pixels valid in both.

        ``product`` is that of ``steps`` with the frame there, if it is known.
        """
        static = mask is self.frame_mask
        holes, pixels = (self._holes, self.frame_pixels) if static else (holes_of(mask), int(np.count_nonzero(mask)))
        if product is None:
            rows = np.arange(-(-self.shape[0] // _ROWS))
            valid = self.valid if static else RowRuns.of(mask)
            *_, product = moved_bins(frame.values, valid, frame.base, self.steps, shift, _ROWS, rows)
        moved = meeting(Picture.of(frame, mask, seen, pixels, holes), self._picture.holes, shift)
        fixed = self._fixed_at(shift) if static else meeting(self._picture, holes, (-shift[0], -shift[1]))
        return masked_score(product, moved, fixed), moved.pixels

    def _fixed_at(self, shift: tuple[int, int]) -> Moments:
        """Sums of the reference where frames meet it; drifts are slow, so that few shifts come again and again."""
        if shift not in self._fixed:
            self._fixed[shift] = meeting(self._picture, self._holes, (-shift[0], -shift[1]))
        return self._fixed[shift]

    @cached_property
    def hidden(self) -> HiddenBins:
        """What the frames' static mask hides at each shift, filled by the refinement."""
        return {}

    @cached_property
    def _fixed(self) -> dict[tuple[int, int], Moments]:
        return {}

    @cached_property
    def steps(self) -> npt.NDArray[Any]:
        """The trusted pixels less their mean, 0 elsewhere, in short integers: half the memory to go through.

        Scores do not know the unit. Only where the brightest pixel would make the steps too coarse these are floats.
        """
        seen = self._seen
        centred = np.where(self.trusted, (self.image.astype(np.float64) - seen.mean) / (seen.deviation or 1.0), 0)
        step = np.abs(centred).max() / np.iinfo(np.int16).max
        return np.rint(centred / step).astype(np.int16) if 0 < step < _FINE else centred.astype(np.float32)

    @cached_property
    def _picture(self) -> Picture:
        known = self.steps[self.trusted].astype(np.float64)
        moments = Moments(known.size, float(known.sum()), float(known @ known))
        return Picture(self.steps, self.trusted, 0.0, moments, holes_of(self.trusted))

    @cached_property
    def _holes(self) -> RowRuns:
        return holes_of(self.frame_mask)

    @cached_property
    def frame_pixels(self) -> int:
        """How many pixels of frames are valid."""
        return int(np.count_nonzero(self.frame_mask))

    @property
    def trusted_pixels(self) -> int:
        """How many of the image are trusted."""
        return self._picture.moments.pixels

    @cached_property
    def coarse(self) -> list[CoarseSearch]:
        """The same search in bins, the largest first; none where pictures are small, or whole pixels are wanted."""
        if self.template is None:
            return []
        return [self._coarse_in(factor) for factor in bin_factors(self.shape, self.max_shift)]

    def _coarse_in(self, factor: int) -> CoarseSearch:
        smoothing = self.search_smoothing / factor
        return CoarseSearch(
            self.image,
            self.trusted,
            self.frame_mask,
            self.max_shift,
            self.overlap_ratio,
            factor,
            smoothing if smoothing > _LEAST_SMOOTHING else 0.0,
        )

    def find_farther_peak(
        self, frame: npt.NDArray[Any], seen: Statistics, frame_mask: Mask | None = None
    ) -> Peak | None:
        """Return the same of the wider search; None also where there is no wider one."""
        if self.wider_search is None:
            return None
        reach = min(2 * self.max_shift, min(self.shape) - 1)
        return self._peak(self.wider_search.surface(frame, seen, frame_mask), reach)

    def _peak(self, surface: tuple[Image, Image], reach: int) -> Peak | None:
        return find_peak(*surface, self._margin(reach), self.search_smoothing)

    @cached_property
    def self_similarity(self) -> float:
        """The highest score of the reference with itself at another shift, its noise discounted.

        Two shifts that are searched may differ by twice the reach, and so far is looked.
        """
        return self._resemblance(2 * self.max_shift)

    @cached_property
    def wider_self_similarity(self) -> float:
        """The same for the wider search."""
        return self._resemblance(4 * self.max_shift)

    def _resemblance(self, wish: int) -> float:
        reach = min(wish, min(self.shape) - 1)
        image = np.where(self.trusted, self.image, 0).astype(np.float64)
        seen = statistics(image, self.trusted, np.inf)
        search = Search(image, self.trusted, self.trusted, reach + self._margin(reach), self.overlap_ratio)
        peak = self._peak(search.surface(image, seen), reach)
        gain, pedestal = self.known_noise
        noise = gain * (seen.mean - pedestal) if gain > 0 else -pedestal
        structure = max(1 - noise / seen.deviation**2, 0.05)
        return float(np.nan_to_num(peak.second_score) / structure) if peak else 0.0

    @cached_property
    def trusted(self) -> Mask:
        """Valid pixels of the image that are neither saturated nor hit by something that is no pattern."""
        below = self.mask & ~(self.image >= saturation_limit(self.image.dtype, self.saturation))
        good = below & ~find_hits(self.image.astype(np.float64), below, self._noise_with_hits)
        seen = statistics(self.image.astype(np.float64), good, np.inf)
        return good if seen.smallest < seen.largest else self.mask.copy()

    @cached_property
    def _seen(self) -> Statistics:
        """Of the trusted pixels."""
        return statistics(self.image.astype(np.float64), self.trusted, np.inf)

    @cached_property
    def template(self) -> Template | None:
        """What refinement to fractions of a pixel needs; None without it, or where the image holds too little."""
        if not self.subpixel:
            return None
        gain, pedestal = self.known_noise
        seen = self._seen
        scale = _power_of_two(seen.deviation)
        centred = np.where(self.trusted, (self.image.astype(np.float64) - seen.mean) / scale, 0)
        above = Noise(gain / scale, (pedestal - seen.mean) / scale) if gain > 0 else Noise(gain, pedestal / scale**2)
        return prepare_template(
            centred, self.trusted, above, self.weights, self.smoothing, level=seen.mean, scale=scale
        )

    @cached_property
    def known_noise(self) -> Noise:
        """The noise that was stated, or else measured."""
        if self.noise or np.count_nonzero(self.trusted) == np.count_nonzero(self.mask):
            return self._noise_with_hits
        return measure_noise(self.image.astype(np.float64), self.trusted)

    @cached_property
    def _noise_with_hits(self) -> Noise:
        """The same while hits are not known yet."""
        return self.noise or measure_noise(self.image.astype(np.float64), self.mask)

    def prepare(self) -> None:
        """Compute now what every frame needs, so that threads find it ready."""
        first = self.coarse[0] if self.coarse else self.search
        first.prepare()
        _ = self.template, self.contrast, self._levels, self._picture, self._holes, self.frame_pixels
        _ = self.valid, self.hidden, self._fixed

    @cached_property
    def contrast(self) -> float:
        """Standard deviation of the trusted pixels, in the image's unit."""
        return self._seen.deviation

    @cached_property
    def _levels(self) -> tuple[float, float, float]:
        low, high, top = np.quantile(self.image[self.trusted].astype(np.float64), (0.5, 0.97, 1.0))
        return float(low), float(high), float(top)

    @property
    def usual(self) -> float:
        """Median of the trusted pixels."""
        return self._levels[0]

    @property
    def upper(self) -> float:
        """What three of a hundred trusted pixels exceed."""
        return self._levels[1]

    @property
    def brightest(self) -> float:
        """The brightest trusted pixel."""
        return self._levels[2]

    @cached_property
    def digest(self) -> str:
        """Hash of everything a match depends on here, as hexadecimal SHA-256."""
        numbers = (
            self.max_shift,
            self.overlap_ratio,
            self.saturation,
            self.weights,
            self.noise and tuple(self.noise),
            self.smoothing,
            self.subpixel,
        )
        settings = (self.image.dtype.str, self.shape, *numbers)
        masks = (np.packbits(mask).tobytes() for mask in (self.mask, self.frame_mask))
        parts = (repr(settings).encode(), self.image.tobytes(), *masks)
        return hashlib.sha256(b"".join(parts)).hexdigest()


def saturation_limit(dtype: np.dtype[Any], stated: float | None) -> float:
    """Pixel value from which a frame of this dtype counts as saturated."""
    if stated is not None:
        return stated
    return float(np.iinfo(dtype).max) if dtype.kind in "iu" else np.inf


def _power_of_two(deviation: float) -> float:
    """Return 1 for pictures of usual intensity, else about their deviation."""
    exponent = np.floor(np.log2(deviation)) if deviation > 0 else 0.0
    return float(2.0**exponent) if abs(exponent) > _USUAL_EXPONENT else 1.0


def _check_search(image: npt.NDArray[Any], mask: Mask, max_shift: int) -> None:
    if max_shift >= min(image.shape):
        raise ValueError(
            f"max_shift is {max_shift} but the frames have shape {image.shape}: a frame moved by its own length "
            f"no longer meets the reference. Give at most {min(image.shape) - 1}."
        )
    seen = statistics(image.astype(np.float64), mask, np.inf)
    if seen.not_finite:
        raise ValueError(
            f"the reference has {seen.not_finite} valid pixels that are NaN or infinite. Mark them False in the mask."
        )
    if seen.smallest == seen.largest:
        raise ValueError(
            f"the reference has no contrast: every valid pixel is {seen.smallest:g}, so every shift fits equally. "
            "Choose frames with signal, or check that the mask is True where pixels are valid."
        )
