"""Correction of frames for the detector: a background that is subtracted and a gain that is divided by.

Saturation and missing values are judged on recorded counts, before the correction.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numba
import numpy as np
import numpy.typing as npt

from stillframe.images.arrays import Float32, Mask, Pixels, as_mask, native, saturation_limit
from stillframe.images.binning import SHORT_INTEGERS

_LEAST_RESPONSE = 0.1
"""A pixel that responds with less than this fraction of the mean is shadowed or dead."""
_LARGEST_LOSS = 0.5
"""Dark and flat that spoil more than this fraction of the valid pixels belong to another detector or mask."""


class Corrected(NamedTuple):
    """A frame in corrected counts."""

    counts: Float32
    """Pixels (y, x)."""
    largest: Any
    """Largest recorded pixel, valid or not; undefined where pixels are NaN."""


@dataclass(frozen=True, eq=False)
class Corrections:
    """Background and gain of a detector's pixels: corrected counts are (frame − background) / gain (49).

    Examples
    --------
    >>> Corrections.of(np.full((2, 2), 10), None).corrected(np.full((2, 2), 13, np.uint16))
    array([[3., 3.],
           [3., 3.]], dtype=float32)
    """

    background: Float32 | None
    """Subtracted from frames (y, x), 0 where not usable; None: nothing is subtracted."""
    gain: Float32 | None
    """Divides frames (y, x), mean 1 over the usable pixels, 1 where not usable; None: nothing is divided."""
    usable: Mask
    """True = valid pixels that can be corrected (y, x)."""

    @classmethod
    def of(
        cls,
        dark: npt.ArrayLike | None,
        flat: npt.ArrayLike | None,
        mask: npt.ArrayLike | None = None,
        *,
        saturation: float | None = None,
    ) -> "Corrections":
        """Return the corrections that a dark and a flat image give.

        Pixels are not usable where either image is not finite, where the dark is at the saturation limit, or where the
        flat is below a tenth of its mean.

        Parameters
        ----------
        dark, flat : array_like, shape (y, x), or None
            Image without beam, and response to equal illumination (less its dark) in any unit. At least one is given.
        mask : array_like of bool, shape (y, x), optional
            True = valid pixels; over them the flat is scaled to the mean 1.
        saturation : float, optional
            Recorded counts at which the detector saturates; by default the largest value of an integer dtype.

        Raises
        ------
        TypeError, ValueError
            The images are not real, have other shapes, or spoil more than half of the valid pixels.
        """
        images = {name: one for name, one in (("dark", dark), ("flat", flat)) if one is not None}
        pixels = {name: native(image, f"the {name} image", 2) for name, image in images.items()}
        shape = next(iter(pixels.values())).shape if mask is None else np.shape(mask)
        for name, image in pixels.items():
            _check_shape(image, shape, name)
        valid = as_mask(mask, shape)
        usable = valid.copy()
        if dark is not None:
            limit = saturation_limit(pixels["dark"].dtype, saturation)
            usable &= np.isfinite(pixels["dark"]) & (pixels["dark"] < limit)
        scale = 1.0
        if flat is not None:
            usable, scale = _responding(pixels["flat"], usable)
        _check_loss(usable, valid, " and ".join(pixels))
        return cls(
            background=None if dark is None else _frozen(np.where(usable, pixels["dark"], 0)),
            gain=None if flat is None else _frozen(np.where(usable, pixels["flat"] / scale, 1)),
            usable=usable,
        )

    def corrected(self, frame: Pixels) -> Float32:
        """Return a frame (y, x), of native byte order and any real dtype, in corrected counts."""
        return self.correct(frame).counts

    def correct(self, frame: Pixels) -> Corrected:
        """Return a frame in corrected counts together with its largest recorded pixel."""
        background, inverse_gain = self._factors
        counts = np.empty(frame.shape, np.float32)
        # Single precision holds short integers exactly; wide ones may have a pedestal that it would round.
        precision = np.float32 if frame.dtype.str[1:] in SHORT_INTEGERS else np.float64
        return Corrected(counts, _correct(frame, background, inverse_gain, precision, counts))

    @cached_property
    def _factors(self) -> tuple[Float32, Float32]:
        """Background and one over the gain of every pixel."""
        shape = self.usable.shape
        background = np.zeros(shape, np.float32) if self.background is None else self.background
        inverse = np.ones(shape, np.float32) if self.gain is None else 1 / self.gain
        return _frozen(background), _frozen(inverse)


def _frozen(image: Pixels) -> Float32:
    out = np.ascontiguousarray(image, dtype=np.float32)
    out.flags.writeable = False
    return out


def _check_shape(image: Pixels, shape: tuple[int, ...], name: str) -> None:
    if image.shape != tuple(shape):
        raise ValueError(
            f"the {name} image has shape {image.shape} but the frames have {tuple(shape)}: it belongs to one detector, "
            "pixel by pixel. Crop, bin or transpose it as the frames were."
        )


def _responding(flat: Pixels, usable: Mask) -> tuple[Mask, float]:
    """Return the usable pixels whose response is not far below the mean response of all that remain, and that mean.

    The choice is repeated until nothing changes, so that the remaining pixels would all be chosen again.
    """
    with np.errstate(invalid="ignore"):
        kept = usable & np.isfinite(flat) & (flat > 0)
        while kept.any():
            mean = float(flat.mean(where=kept, dtype=np.float64))
            fewer = kept & (flat >= _LEAST_RESPONSE * mean)
            if np.array_equal(fewer, kept):
                return kept, mean
            kept = fewer
    return kept, 1.0


def _check_loss(usable: Mask, valid: Mask, what: str) -> None:
    lost, count = np.count_nonzero(valid & ~usable), np.count_nonzero(valid)
    if lost > _LARGEST_LOSS * count:
        raise ValueError(
            f"the {what} given for the correction can be used at {count - lost} of {count} valid pixels only: the "
            "others are NaN, saturated in the dark, or below a tenth of the mean in the flat. Check that each file is "
            "what its name says, and that the flat was not subtracted to below 0."
        )


@numba.njit(nogil=True, cache=True)
def _correct(frame: Pixels, background: Float32, inverse_gain: Float32, precision: Any, out: Float32) -> Any:
    """Write (frame − background) / gain, computed in this precision, and return the largest recorded pixel."""
    largest = frame[0, 0]
    for y in range(frame.shape[0]):
        for x in range(frame.shape[1]):
            out[y, x] = (precision(frame[y, x]) - background[y, x]) * inverse_gain[y, x]
            largest = max(largest, frame[y, x])
    return largest
