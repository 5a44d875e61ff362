"""The image every frame is laid on, with its mask and the settings of the search."""

import hashlib
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from stillframe.checks import as_mask, native
from stillframe.ncc import Mask, check_options
from stillframe.search import Search, statistics


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
        True = valid, fixed to the detector: the frames are valid at the same pixels. Default: all valid.
    max_shift : int
        Largest shift looked for along either axis, pixels. The cost grows slowly with it.
    overlap_ratio : float
        Shifts with less than this part of the largest overlap are not considered.
    saturation : float, optional
        Pixel value at which the detector saturates. Default: the largest value of an integer dtype,
        none for floats.

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

    def __post_init__(self) -> None:
        """Check every field and freeze the arrays."""
        image = native(self.image, "the reference", 2)
        mask = as_mask(self.mask, (image.shape[0], image.shape[1])).copy()
        object.__setattr__(self, "max_shift", operator.index(self.max_shift))
        check_options(self.max_shift, self.overlap_ratio)
        _check_search(image, mask, self.max_shift)
        clean = np.where(mask, image, np.zeros((), image.dtype))
        clean.flags.writeable = mask.flags.writeable = False
        object.__setattr__(self, "image", clean)
        object.__setattr__(self, "mask", mask)

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
        """The prepared exact search for whole-pixel shifts."""
        return Search(self.image, self.mask, self.max_shift, self.overlap_ratio)

    @cached_property
    def contrast(self) -> float:
        """Standard deviation of the valid pixels, in the image's unit."""
        return statistics(self.image, self.mask, np.inf).deviation

    @cached_property
    def digest(self) -> str:
        """Hash of everything a match depends on here, as hexadecimal SHA-256."""
        settings = (self.image.dtype.str, self.shape, self.max_shift, self.overlap_ratio, self.saturation)
        parts = (repr(settings).encode(), self.image.tobytes(), np.packbits(self.mask).tobytes())
        return hashlib.sha256(b"".join(parts)).hexdigest()


def saturation_limit(dtype: np.dtype[Any], stated: float | None) -> float:
    """Pixel value from which a frame of this dtype counts as saturated."""
    if stated is not None:
        return stated
    return float(np.iinfo(dtype).max) if dtype.kind in "iu" else np.inf


def _check_search(image: npt.NDArray[Any], mask: Mask, max_shift: int) -> None:
    if max_shift >= min(image.shape):
        raise ValueError(
            f"max_shift is {max_shift} but the frames have shape {image.shape}: a frame moved by its own length "
            f"no longer meets the reference. Give at most {min(image.shape) - 1}."
        )
    seen = statistics(image, mask, np.inf)
    if seen.not_finite:
        raise ValueError(
            f"the reference has {seen.not_finite} valid pixels that are NaN or infinite. Mark them False in the mask."
        )
    if seen.smallest == seen.largest:
        raise ValueError(
            f"the reference has no contrast: every valid pixel is {seen.smallest:g}, so every shift fits equally. "
            "Choose frames with signal, or check that the mask is True where pixels are valid."
        )
