"""The reference: the image that frames are registered with, its masks, its noise and the options of the search."""

import hashlib
import operator
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from stillframe.images.arrays import Float32, Mask, Pixels, as_mask, native, native_dtype, real
from stillframe.images.corrections import Corrections
from stillframe.images.noise import Noise
from stillframe.images.run_lengths import RowRuns
from stillframe.images.statistics import statistics
from stillframe.options import SearchOptions
from stillframe.registration.masked_ncc import check_options

_SMALLEST_DEVIATION, _LARGEST_DEVIATION = 1e-8, 1e8
"""Single precision holds the sums of the refinement, up to fourth powers, for standard deviations between these."""


@dataclass(frozen=True, eq=False, init=False)
class Reference:
    """Image that frames are registered with, its masks and the options of the search.

    The constructor checks its arguments, leaves out pixels that dark and flat spoil, and makes the arrays read-only.
    What registration needs besides (spectra, templates) is made by
    :func:`~stillframe.registration.prepared_reference.prepare` when the
    reference is first used. A reference pickles as its fields.

    Parameters
    ----------
    image : array_like, shape (y, x)
        Real pixels; in corrected counts where ``dark`` or ``flat`` is given (see :meth:`correct`). Pixels under the
        mask are set to 0 and never used.
    mask : array_like of bool, shape (y, x), optional
        True = valid pixels of the image. Default: all valid.
    max_shift : int
        Largest shift searched along either axis, pixels. The cost grows slowly with it.
    overlap_ratio : float
        Shifts with a smaller overlap than this fraction of the largest one are not considered.
    saturation : float, optional
        Recorded pixel value, before any correction, from which the detector is saturated. Default: the largest value
        of an integer dtype, none for floats.
    subpixel : bool
        Whether shifts are refined to fractions of a pixel, with their errors.
    frame_mask : array_like of bool, shape (y, x), optional
        True = valid pixels of the frames, fixed to the detector. Default: ``mask``. The two differ where the image is a
        mean of aligned frames, whose holes lie elsewhere.
    noise : (float, float), optional
        Variance of the image's pixels as (gain, pedestal): ``gain · (intensity − pedestal)``; with the gain 0 the
        variance is ``−pedestal`` everywhere, which gives all pixels the same weight. Default: measured from the image,
        whose noise must then be independent from pixel to pixel.
    smoothing : float, optional
        Standard deviation, pixels, of the Gaussian that smooths the templates of the refinement. Default: the width
        with the smallest expected errors.
    against_scatter : bool
        Whether smooth scatter that stays on the detector is kept from drawing shifts by however much that enlarges
        their errors, in images from 96 px on whose features stand out from noise. By default it is only where that
        enlarges them by less than a factor of 1.4, from 128 px on.
    dark : array_like, shape (y, x), optional
        Image of the detector without beam, which is subtracted from every frame. Pixels at which it is not finite or
        saturated are invalid.
    flat : array_like, shape (y, x), optional
        Response of the pixels to equal illumination, less its dark, in any unit; every frame is divided by it. Pixels
        at which it is not finite or below a tenth of its mean are invalid.
    history : str
        How the image was made; for people, no shift depends on it.

    Raises
    ------
    TypeError
        Complex, object or other unordered pixels.
    ValueError
        Wrong dimensions; a mask of another shape, without a valid pixel or not boolean-like; a valid pixel that
        is not finite; no contrast, or one that single precision cannot hold; ``max_shift`` negative or not smaller than
        the image; a dark or flat of another shape, or without use for more than half of the valid pixels.

    Examples
    --------
    >>> import numpy as np
    >>> reference = Reference(np.eye(64), max_shift=8)
    >>> reference.shape, reference.max_shift
    ((64, 64), 8)

    The image is taken as already corrected; recorded frames are corrected when they are registered:

    >>> dark, recorded = np.full((64, 64), 10), np.eye(64) + 10
    >>> reference = Reference(recorded - dark, dark=dark, max_shift=8)
    >>> bool((reference.correct(recorded) == reference.image).all())
    True
    """

    image: Pixels
    """Pixels (y, x), native byte order, 0 where invalid, read-only."""
    mask: Mask
    """True = valid pixels of the image (y, x), read-only."""
    frame_mask: Mask
    """True = valid pixels of the frames (y, x), read-only."""
    options: SearchOptions
    """How far and how finely shifts are searched."""
    noise: Noise | None
    """Variance of the image's pixels; None: to be measured."""
    smoothing: float | None
    """Standard deviation of the templates' Gaussian, pixels; None: to be chosen."""
    against_scatter: bool
    """Whether smooth scatter must not draw shifts, at any price."""
    dark: Pixels | None
    """Subtracted from every frame (y, x), read-only; None: nothing is subtracted."""
    flat: Pixels | None
    """Divides every frame (y, x), read-only; None: nothing is divided."""
    history: str
    """How the image was made."""

    def __init__(
        self,
        image: npt.ArrayLike,
        mask: npt.ArrayLike | None = None,
        *,
        max_shift: int = 32,
        overlap_ratio: float = 0.3,
        saturation: float | None = None,
        subpixel: bool = True,
        frame_mask: npt.ArrayLike | None = None,
        noise: tuple[float, float] | None = None,
        smoothing: float | None = None,
        against_scatter: bool = False,
        dark: npt.ArrayLike | None = None,
        flat: npt.ArrayLike | None = None,
        history: str = "",
    ) -> None:
        """Check every argument and freeze the arrays."""
        pixels = native(image, "the reference", 2)
        valid = as_mask(mask, pixels.shape).copy()
        reach = operator.index(max_shift)
        check_options(reach, overlap_ratio)
        on_detector = valid if frame_mask is None else as_mask(frame_mask, valid.shape, "the mask of the frames").copy()
        images = correction_image(dark, "the dark image"), correction_image(flat, "the flat image")
        corrections = corrections_of(*images, on_detector, saturation)
        if corrections is not None:
            on_detector &= corrections.usable  # which is the mask of the image, too, unless the frames have their own
        _check_search(pixels, valid, reach)
        clean = np.where(valid, pixels, np.zeros((), pixels.dtype))
        for array in (clean, valid, on_detector):
            array.flags.writeable = False
        self.__dict__.update(
            image=clean,
            mask=valid,
            frame_mask=on_detector,
            options=SearchOptions(
                max_shift=reach, overlap_ratio=overlap_ratio, saturation=saturation, subpixel=subpixel
            ),
            noise=None if noise is None else Noise(*map(float, noise)),
            smoothing=smoothing,
            against_scatter=bool(against_scatter),
            dark=images[0],
            flat=images[1],
            history=history,
            corrections=corrections,
        )

    def replace(self, **changes: Any) -> "Reference":
        """Return a reference with some of the constructor's arguments changed.

        Examples
        --------
        >>> Reference(np.eye(64), max_shift=8).replace(subpixel=False).options.subpixel
        False
        """
        arguments = {field.name: getattr(self, field.name) for field in fields(self)}
        options = arguments.pop("options").model_dump()
        return Reference(**(arguments | options | changes))

    def correct(self, frames: npt.ArrayLike) -> Float32:
        """Return recorded frames, (y, x) or (frame, y, x), less the dark and over the flat, as float32.

        Without a dark and a flat the values do not change. Pixels that cannot be corrected, or are not in
        ``frame_mask``, have no meaning.
        """
        recorded = np.asarray(frames)
        stack = real(recorded[None] if recorded.ndim == 2 else recorded, "the stack of frames", 3)
        if stack.shape[1:] != self.shape:
            raise ValueError(
                f"the frames have shape {stack.shape[1:]} but the reference has {self.shape}: dark and flat belong to "
                "one detector, pixel by pixel. Crop or bin all alike."
            )
        corrected = np.empty(stack.shape, np.float32)
        for index, frame in enumerate(stack):
            pixels = native(frame, "a frame", 2)
            corrected[index] = pixels if self.corrections is None else self.corrections.corrected(pixels)
        return corrected.reshape(recorded.shape)

    def uncorrected(self) -> "Reference":
        """Return this reference for frames that are already corrected: without dark and flat, with the same masks."""
        return self if self.corrections is None else self.replace(dark=None, flat=None)

    def __getstate__(self) -> dict[str, Any]:
        """Return the fields alone; the hash is computed again."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def __dask_tokenize__(self) -> str:
        """Return the hash, so that dask gives equal names to results that depend on equal references."""
        return self.digest

    @cached_property
    def corrections(self) -> Corrections | None:
        """What is done to every frame first; None without a dark and a flat."""
        return corrections_of(self.dark, self.flat, self.frame_mask, self.options.saturation)

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (y, x) that frames must have."""
        return self.image.shape[0], self.image.shape[1]

    @property
    def max_shift(self) -> int:
        """Half width of the searched window, pixels."""
        return self.options.max_shift

    @cached_property
    def digest(self) -> str:
        """Hexadecimal SHA-256 of all fields but the history: everything here that a match depends on."""
        noise = None if self.noise is None else tuple(self.noise)
        values = (self.image.dtype.str, self.shape, self.options.model_dump(), noise, self.smoothing)
        masks = (np.packbits(mask).tobytes() for mask in (self.mask, self.frame_mask))
        parts = [repr(values).encode(), self.image.tobytes(), *masks]
        if self.against_scatter:
            parts.append(b"against scatter")
        for name, image in (("dark", self.dark), ("flat", self.flat)):
            if image is not None:
                parts += [f"{name} {image.dtype.str}".encode(), image.tobytes()]
        return hashlib.sha256(b"".join(parts)).hexdigest()


def correction_image(image: npt.ArrayLike | None, what: str) -> Pixels | None:
    """Return a dark or flat as a read-only copy: integers as they are, floats in single precision."""
    if image is None:
        return None
    pixels = real(image, what, 2)
    dtype = np.dtype(np.float32) if pixels.dtype.kind == "f" else native_dtype(pixels.dtype)
    copy = np.array(pixels, dtype, order="C")
    copy.flags.writeable = False
    return copy


def corrections_of(
    dark: Pixels | None, flat: Pixels | None, mask: Mask, saturation: float | None
) -> Corrections | None:
    """Return the corrections that dark and flat give; None without both."""
    return None if dark is None and flat is None else Corrections.of(dark, flat, mask, saturation=saturation)


def _check_search(image: Pixels, mask: Mask, max_shift: int) -> None:
    """Raise ``ValueError`` for a window larger than the image, or for pixels without a usable contrast."""
    if max_shift >= min(image.shape):
        raise ValueError(
            f"max_shift is {max_shift} but the frames have shape {image.shape}: a frame moved by its own length "
            f"no longer meets the reference. Give at most {min(image.shape) - 1}."
        )
    pixels = statistics(image.astype(np.float64), RowRuns.of(mask), np.inf)
    if pixels.not_finite:
        raise ValueError(
            f"the reference has {pixels.not_finite} valid pixels that are NaN or infinite. Mark them False in the mask."
        )
    if pixels.smallest == pixels.largest:
        raise ValueError(
            f"the reference has no contrast: every valid pixel is {pixels.smallest:g}, so every shift fits equally. "
            "Choose frames with signal, or check that the mask is True where pixels are valid."
        )
    if not _SMALLEST_DEVIATION < pixels.deviation < _LARGEST_DEVIATION:
        raise ValueError(
            f"the valid pixels of the reference have the standard deviation {pixels.deviation:g}, too small or "
            "too large for sums in single precision. Multiply reference and frames by one constant, for example "
            f"{1 / pixels.deviation:.0e}."
        )
