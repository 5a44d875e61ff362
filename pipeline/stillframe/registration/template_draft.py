"""The templates of a reference before anything is summed: how smooth they are, in which bins, and where.

The smoothing and the side are those with the smallest expected errors (25). The support, the bins that are used, is
where the pattern stands out from its noise (51), or else where most of the information is (21).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import scipy.ndimage

from stillframe.images.arrays import Image, Indices, Mask, Shift
from stillframe.images.binning import at_bins, bin_means, box_means, whole_bins
from stillframe.images.noise import Noise, smooth, variance_of

REACH = 3
"""Largest lag, on either side, at which the model is computed."""
SIZE = 2 * REACH + 1
LEAST_BINS = 64
"""Fewer bins give no shift."""
_SIDES = (4, 2)
"""Sides of bins that are tried, pixels."""
_VARIANCE_LOSS = 0.03
"""Bins may enlarge the variance of shifts by this fraction."""
_LEAST_USEFUL_BINS = 16_384
"""With fewer bins in the support the time does not matter, and smaller bins lose less to a hit."""
SMOOTHINGS = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
"""Standard deviations, pixels, of the Gaussians that are tried for the templates."""
_KEPT_INFORMATION = 0.995
"""Fraction of the Fisher information in the support."""
_INFORMATION_SMOOTHING = 4.0
"""Standard deviation, pixels, of the Gaussian that smooths the information; the support does not follow noise then."""
_CERTAIN_STRUCTURE = 5.0
"""Standard deviations by which the information of a bin exceeds that of noise where there is structure."""
_STRUCTURED_FRACTION = 0.98
"""Bins with certain structure are enough if they hold this fraction of the information."""
_SHARED_NOISE_LOSS = 0.02
"""Bins are left out only if their noise shared by templates and reference is a smaller fraction of the curvature."""
_PULL_SEEN = 3.0
"""The measured pull of a texture over the one that (24) gives for the texture of (59)."""
_LARGEST_LACK_OF_COUNTS = 0.5
"""Templates of single counts, less than two of them under the Gaussian where the information is, show no pattern."""
_LARGEST_CONDITION = 1e8
"""Above this condition number the image changes along one direction only and does not determine the other shift."""
_MEMBER_FRACTION, _LEAST_MEMBERS = 0.05, 8
"""Up to this fraction of the frames may be part of the reference, which is then the mean of at least eight."""
_LARGEST_WEIGHT = 1e30
"""Single precision holds larger weights not; such an image has no noise where its intensity is."""


class Texture(NamedTuple):
    """Gains of pixels, which lie at the same places in the frames and in their mean, as the frames hardly moved."""

    deviation: float
    """Standard deviation of the gains."""
    frames: int
    """Number of frames in the mean."""


def best_smoothed(image: Image, mask: Mask, noise: Noise, texture: Texture | None = None) -> "Draft | None":
    """Return templates of single pixels whose smoothing has the smallest expected errors; None with too much noise."""
    best, least = None, np.inf
    for width in SMOOTHINGS:
        draft = Draft.of(Smoothed.of(image, mask, noise, width), 1)
        variance = draft.expected_variance()
        if texture and np.isfinite(variance):
            variance += draft.variance_by(texture)
        if least < variance < np.inf:  # where noise prevails at one width, a wider one may be better by far
            break
        if variance < least:
            best, least = draft, variance
    return best


def best_binned(finest: "Draft", frame_mask: Mask) -> "Draft":
    """Return templates of the largest side of bins whose expected errors are hardly larger than those of the finest.

    An invalid pixel of the frames costs all of its bin.
    """
    limit = finest.expected_variance() * (1 + _VARIANCE_LOSS) / _kept_by(frame_mask, finest.side)
    for side in (side for side in _SIDES if side > finest.side):
        draft = Draft.of(finest.smoothed, side)
        enough = np.count_nonzero(draft.support) >= _LEAST_USEFUL_BINS
        if enough and draft.expected_variance() <= limit * _kept_by(frame_mask, side) < np.inf:
            return draft
    return finest


def _kept_by(frame_mask: Mask, side: int) -> float:
    """Return the fraction of the valid pixels that lie in whole bins; not 0."""
    whole = side**2 * int(np.count_nonzero(whole_bins(frame_mask, side)))
    return max(whole, 1) / max(int(np.count_nonzero(frame_mask)), 1)


@dataclass(frozen=True, eq=False)
class Smoothed:
    """A smoothed reference, pixel by pixel; templates are made of it."""

    image: Image
    mask: Mask
    soft: Image
    """The smoothed image."""
    variance: Image
    """Variance of the image's pixels, with a floor; 0 where invalid."""
    noise: Image
    """The same without the floor, which an empty background does not reach."""
    growth: Image
    """Derivative of the variance by the smoothed image; 0 at the floor."""
    inner: Mask
    """True where all pixels within the largest lag are valid."""
    width: float
    measured: Noise

    @classmethod
    def of(cls, image: Image, mask: Mask, noise: Noise, width: float) -> "Smoothed":
        """Smooth an image by a Gaussian of this standard deviation, pixels."""
        soft = smooth(image, mask, width)
        variance = np.where(mask, variance_of(soft, mask, noise), 0)
        own = np.where(mask, np.maximum(noise.gain * (soft - noise.pedestal), 0), 0) if noise.gain > 0 else variance
        growth = np.where(mask & (own >= variance), max(noise.gain, 0.0), 0)
        inner = scipy.ndimage.minimum_filter(mask, SIZE, mode="constant", cval=False)
        return cls(image, mask, soft, variance, own, growth, inner, width, noise)


@dataclass(frozen=True, eq=False)
class Draft:
    """Templates of one smoothing and one side of bins, before the sums over them; (y, x) are bins."""

    smoothed: Smoothed
    side: int
    boxes: Image
    """Mean of the reference over the bin that begins at each pixel."""
    soft: Image
    slopes: Image
    """Slopes of the smoothed reference along y and x, (2, y, x)."""
    variance: Image
    """Variance of the bins' means."""
    weight: Image
    """One over that variance; 0 where invalid."""
    noise: Image
    """Variance of the bins' means without the floor."""
    growth: Image
    """Derivative of the bins' variance by the smoothed reference; 0 at the floor."""
    support: Mask

    @classmethod
    def of(cls, smoothed: Smoothed, side: int) -> "Draft":
        """Take means over bins, weigh them and choose the support."""
        slopes = np.stack([bin_means(_slope(smoothed.soft, axis), side) for axis in (0, 1)])
        variance = bin_means(smoothed.variance, side) / side**2
        inner, valid = (whole_bins(mask, side) for mask in (smoothed.inner, smoothed.mask))
        weight = np.divide(1, variance, out=np.zeros_like(variance), where=valid)
        noise, growth = (bin_means(image, side) / side**2 for image in (smoothed.noise, smoothed.growth))
        boxes, soft = box_means(smoothed.image, side), bin_means(smoothed.soft, side)
        information = np.where(inner, weight * (slopes**2).sum(axis=0), 0)
        of_noise = np.where(inner, weight * noise, 0) * _noise_information(smoothed.width, side)
        draft = cls(smoothed, side, boxes, soft, slopes, variance, weight, noise, growth, inner)
        structured = _structured_bins(inner, information, of_noise, smoothed.width, side)
        if structured is not None:
            return replace(draft, support=structured)
        chosen = replace(draft, support=_informative_bins(inner, information, side))
        return draft if chosen.follows_noise(inner) else chosen

    def smoothed_by(self, width: float) -> "Draft":
        """Return templates smoothed by a Gaussian of this standard deviation, pixels; support and weights stay."""
        if width == self.smoothed.width:
            return self
        soft = smooth(self.smoothed.image, self.smoothed.mask, width)
        slopes = np.stack([bin_means(_slope(soft, axis), self.side) for axis in (0, 1)])
        smoothed = replace(self.smoothed, soft=soft, width=width)
        return replace(self, smoothed=smoothed, soft=bin_means(soft, self.side), slopes=slopes)

    def follows_noise(self, inner: Mask) -> bool:
        """Return whether noise may have decided which bins are in the support.

        A bin may be missing only because its noise happens to be flat.

        Templates and reference then share more noise in the remaining bins than is expected.
        """
        jacobian, shared = self._curvatures
        noisy = self.weight * self.noise  # an empty background has no noise
        left_out = float(noisy[inner].sum()) / max(float(noisy[self.support].sum()), 1e-300) - 1
        return bool((np.abs(np.diag(shared)) * left_out > _SHARED_NOISE_LOSS * np.abs(np.diag(jacobian))).any())

    @cached_property
    def plain_noise(self) -> Image:
        """Variance of the bins' means from the image itself, which smoothing would spread from spots to their wings."""
        noise = self.smoothed.measured
        if noise.gain <= 0:
            return self.variance
        return np.asarray(noise.gain * (self.at(0, 0) - noise.pedestal) / self.side**2)

    @cached_property
    def _shift_templates(self) -> Image:
        """The templates for the shift along y and x over the support, (2, bin)."""
        return np.stack([(self.weight * slope)[self.support] for slope in self.slopes])

    @cached_property
    def _curvatures(self) -> tuple[Image, Image]:
        """Derivative of the first two equations by the shift, (2, 2), and what shared noise adds to it."""
        slopes = [slope[self.support] for slope in self.mean_slopes]
        shared = self._shared_curvature(self.smoothed.noise)
        return self._shift_templates @ np.stack(slopes).T - shared, shared

    def _shared_curvature(self, noise: Image) -> Image:
        """Return the part of the curvatures (2, 2) that comes from such noise in templates and reference."""
        shared, beside = np.zeros((4, SIZE, SIZE)), [(1, 0), (-1, 0), (0, 1), (0, -1)]
        shared[:, *np.transpose(beside) + REACH] = self.shared_noise(self.support, beside, noise)
        return curvature(shared)

    @cached_property
    def mean_slopes(self) -> list[Image]:
        """Slopes of the reference's bins along y and x."""
        return [(self.at(y, x) - self.at(-y, -x)) / 2 for y, x in ((1, 0), (0, 1))]

    def at(self, y: int, x: int) -> Image:
        """Return the reference's bins, moved by whole pixels (y, x)."""
        return at_bins(self.boxes, self.side, (y, x))

    def expected_variance(self) -> float:
        """Return the variance of shifts, px², of frames with the reference's noise (25); infinite where noise prevails.

        If a frame is part of the reference, its own noise in the slopes draws it towards whole pixels; a bound of that
        error is added, and the error of the shared noise where counts are few. The noise of a frame is that of the
        reference times the root of the number of its frames.
        """
        if np.count_nonzero(self.support) < LEAST_BINS or self.weight.max() > _LARGEST_WEIGHT:
            return np.inf
        jacobian, shared = self._curvatures
        if self._lack_where_informative > _LARGEST_LACK_OF_COUNTS:
            return np.inf
        if not (np.diag(jacobian) > np.abs(np.diag(shared))).all() or is_singular(jacobian):
            return np.inf
        variance = (self._shift_templates * self.variance[self.support]) @ self._shift_templates.T
        inverse = np.linalg.inv(jacobian)
        attraction = np.abs(np.diag(shared)) / np.diag(jacobian)
        of_members = _MEMBER_FRACTION / _LEAST_MEMBERS * np.sum(attraction**2) / 12
        of_few_counts = self._lack_of_counts**2 * np.sum(attraction**2) / 12
        return float(np.trace(inverse @ variance @ inverse.T) + of_members + of_few_counts)

    def variance_by(self, texture: Texture) -> float:
        """Return what a texture adds to (25), px²: it draws shifts towards 0 by a fraction of them (60)."""
        jacobian, _ = self._curvatures
        signal = np.maximum(self.smoothed.soft - self.smoothed.measured.pedestal, 0) * self.smoothed.mask
        shared = self._shared_curvature((texture.deviation * signal) ** 2)
        pull = _PULL_SEEN * np.diag(shared) / np.diag(jacobian)
        return float(np.sum(pull**2) / 12 / texture.frames)

    @cached_property
    def _lack_of_counts(self) -> float:
        """Mean over the bins of one over the number of counts under the Gaussian: relative error of (24)."""
        return float(np.mean(self._inverse_counts))

    @cached_property
    def _lack_where_informative(self) -> float:
        """The same mean, weighted by the information of the bins."""
        information = (self.weight * (self.slopes**2).sum(axis=0))[self.support]
        total = float(information.sum())
        return float(information @ self._inverse_counts) / total if total > 0 else 0.0

    @cached_property
    def _inverse_counts(self) -> Image:
        """One over the number of counts under the Gaussian, 1 at most, over the bins of the support."""
        gain, noise = self.smoothed.measured.gain, self.noise[self.support]
        if gain <= 0:
            return np.zeros_like(noise)
        return np.asarray(1 / np.maximum(4 * np.pi * self.smoothed.width**2 * noise * self.side**2 / gain**2, 1))

    def shared_noise(self, bins: Mask, lags: Sequence[Shift], variance: Image | None = None) -> Image:
        """Return the expectation of Σ T_k(p) η(p + lag) over some bins, for the noise η (24), (4, lag).

        It is not 0, since T_k contains the smoothed noise of the same image, in the slopes and in the weights 1/v.
        ``variance`` is that of pixels, by default as the image has it.
        """
        middle, kernels = self._kernels
        weight = self.weight[bins]
        fields = np.stack([*(slope[bins] for slope in self.slopes), self.soft[bins], np.ones(len(weight))])
        by_weights = fields * (weight * self.growth[bins])
        noise = box_means(self.smoothed.noise if variance is None else variance, self.side) / self.side**2
        rows, columns = (self.side * places for places in np.nonzero(bins))
        shared = np.empty((4, len(lags)))
        for place, (y, x) in enumerate(lags):
            there = weight * noise[_within(rows + y, noise.shape[0]), _within(columns + x, noise.shape[1])]
            of_slopes, own = kernels[:, middle - y, middle - x], kernels[2, middle - y, middle - x]
            shared[:, place] = float(there.sum()) * of_slopes - (by_weights @ there) * own
        return shared

    @cached_property
    def kernel(self) -> tuple[int, Image]:
        """Covariance of the smoothed field at one bin with the mean of another bin, over the variance of that mean.

        It is given for all distances, with the index of the distance 0.
        """
        reach = int(4 * self.smoothed.width + 0.5) + 8
        impulse = np.zeros((2 * reach + 1, 2 * reach + 1))
        impulse[reach, reach] = 1
        kernel = scipy.ndimage.gaussian_filter(impulse, self.smoothed.width, mode="constant")
        # Number of pairs of pixels of a bin, by their distance.
        pairs = 1 - np.abs(np.arange(1 - self.side, self.side)) / self.side
        for axis in (0, 1):
            kernel = scipy.ndimage.correlate1d(kernel, pairs, axis=axis, mode="constant")
        return reach, kernel

    @cached_property
    def _kernels(self) -> tuple[int, Image]:
        """The kernel for the fields of all templates."""
        middle, kernel = self.kernel
        return middle, np.stack([_slope(kernel, 0), _slope(kernel, 1), kernel, np.zeros_like(kernel)])


def _within(places: Indices, length: int) -> Indices:
    """Return the nearest places that exist along an axis."""
    return np.clip(places, 0, length - 1)


def _slope(image: Image, axis: int) -> Image:
    return np.asarray(scipy.ndimage.correlate1d(image, [-0.5, 0, 0.5], axis=axis))


def _noise_information(width: float, side: int) -> float:
    """Return the information that pure noise seems to hold in one bin: ν of (51)."""
    reach = int(4 * width + 0.5) + side + 2
    impulse = np.zeros((2 * reach + 1, 2 * reach + 1))
    impulse[reach, reach] = 1
    kernel = scipy.ndimage.gaussian_filter(impulse, width, mode="constant")
    slope = scipy.ndimage.uniform_filter(_slope(kernel, 0), side, mode="constant")
    return float(2 * side**2 * (slope**2).sum())


def _smooth_information(information: Image, side: int) -> Image:
    return np.asarray(scipy.ndimage.gaussian_filter(information, _INFORMATION_SMOOTHING / side, mode="constant"))


def _structured_bins(inner: Mask, information: Image, of_noise: Image, width: float, side: int) -> Mask | None:
    """Return the bins whose information certainly exceeds that of noise (51); None if much lies in other bins."""
    excess = _smooth_information(information - of_noise, side)
    scatter = _smooth_information(of_noise, side) * width / np.hypot(width, _INFORMATION_SMOOTHING)
    certain = inner & (excess > _CERTAIN_STRUCTURE * scatter)
    total = float(excess[inner].sum())
    return certain if total > 0 and excess[certain].sum() >= _STRUCTURED_FRACTION * total else None


def _informative_bins(inner: Mask, information: Image, side: int) -> Mask:
    """Return the bins that carry all but 0.5 % of the information (21) and whose surroundings are valid."""
    density = _smooth_information(information, side)
    ordered = np.sort(density[inner])[::-1]
    if not ordered.size or ordered[0] <= 0:
        return np.zeros_like(inner)
    cumulated = np.cumsum(ordered)
    least = ordered[min(np.searchsorted(cumulated, _KEPT_INFORMATION * cumulated[-1]), len(ordered) - 1)]
    return np.asarray(inner & (density >= least))


def curvature(model: Image) -> Image:
    """Return how the models of the two shift equations change with the shift, at the shift 0; (2, 2)."""
    middle, after, before = REACH, REACH + 1, REACH - 1
    along_y = (model[:2, after, middle] - model[:2, before, middle]) / 2
    along_x = (model[:2, middle, after] - model[:2, middle, before]) / 2
    return np.stack([along_y, along_x], axis=1)


def is_singular(jacobian: Image) -> bool:
    """Return whether the shift along some direction is not determined."""
    return not np.isfinite(jacobian).all() or bool(np.linalg.cond(jacobian) > _LARGEST_CONDITION)
