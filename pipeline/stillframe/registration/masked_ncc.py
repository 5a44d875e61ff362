"""Masked normalized cross-correlation (NCC) of two images, exact, in double precision (1–4).

Source: D. Padfield, "Masked object registration in the Fourier domain", IEEE Trans. Image Process.
21(5), 2706–2718 (2012), doi 10.1109/TIP.2011.2181402, equations 10 and 19–23.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import scipy.fft

from stillframe.images.arrays import Image, Indices, Mask, Pixels, as_mask, native


class MaskedNCC(NamedTuple):
    """Scores at all searched shifts, and these shifts."""

    ncc: Image
    """Scores (lags_y, lags_x), −1…1; NaN where too few pixels overlap."""
    lags_y: Indices
    """Shifts along y applied to the moving image, pixels."""
    lags_x: Indices
    """Shifts along x applied to the moving image, pixels."""


class Lags(NamedTuple):
    """The shifts along one axis for which a correlation is wanted, both ends included."""

    first: int
    last: int

    @classmethod
    def between(cls, reference: int, moving: int, limit: int | None) -> "Lags":
        """Return all shifts at which two rows of these lengths overlap, within ±limit."""
        bound = max(reference, moving) if limit is None else limit
        return cls(max(1 - moving, -bound), min(reference - 1, bound))

    def fft_length(self, reference: int, moving: int) -> int:
        """Return the shortest fast circular length at which none of these lags is aliased (4)."""
        needed = max(reference - self.first, moving + self.last)
        return int(scipy.fft.next_fast_len(needed, real=True))


def masked_ncc(
    reference: npt.ArrayLike,
    moving: npt.ArrayLike,
    reference_mask: npt.ArrayLike | None = None,
    moving_mask: npt.ArrayLike | None = None,
    *,
    max_shift: int | None = None,
    overlap_ratio: float = 0.3,
) -> MaskedNCC:
    """Return the masked NCC of two images at every shift, from the pixels valid in both.

    Parameters
    ----------
    reference, moving : array_like, shape (y, x)
        Real images of any two shapes. Invalid pixels are never used and may be NaN.
    reference_mask, moving_mask : array_like of bool, shape of their image, optional
        True = valid. Without a mask every pixel is valid.
    max_shift : int, optional
        Only shifts within ±max_shift pixels, along either axis; all of them by default.
    overlap_ratio : float
        Scores with fewer jointly valid pixels than this fraction of the largest overlap are NaN:
        a few pixels correlate well by chance.

    Returns
    -------
    MaskedNCC
        ``ncc[i, j]``, float64, is the score at the shift ``(lags_y[i], lags_x[j])``, pixels from
        corner to corner, applied to ``moving`` to lay it on ``reference``. It is 0 where either
        image has no contrast.

    Raises
    ------
    TypeError
        Complex, object or other unordered pixels.
    ValueError
        Wrong dimensions, a mask of another shape, without a valid pixel or not boolean-like,
        a valid pixel that is not finite, or options out of range.

    Examples
    --------
    >>> import numpy as np
    >>> picture = np.random.default_rng(0).normal(size=(40, 50))
    >>> ncc, lags_y, lags_x = masked_ncc(picture[5:35, 5:45], picture[7:37, 2:42])
    >>> i, j = np.unravel_index(np.nanargmax(ncc), ncc.shape)
    >>> int(lags_y[i]), int(lags_x[j]), round(float(ncc[i, j]), 6)
    (2, -3, 1.0)
    """
    fixed, fixed_mask = _prepare(reference, reference_mask, "the reference")
    other, other_mask = _prepare(moving, moving_mask, "the moving image")
    check_options(max_shift, overlap_ratio)
    lags = [Lags.between(n, k, max_shift) for n, k in zip(fixed.shape, other.shape, strict=True)]
    correlate = Correlator(fixed.shape, other.shape, lags)
    ncc = _score(correlate, (fixed, fixed_mask), (other, other_mask), overlap_ratio)
    return MaskedNCC(ncc, *(np.arange(axis.first, axis.last + 1) for axis in lags))


def check_options(max_shift: int | None, overlap_ratio: float) -> None:
    """Raise ``ValueError`` for options outside their range."""
    if max_shift is not None and max_shift < 0:
        raise ValueError(f"max_shift is {max_shift}, but a distance cannot be negative. Give pixels ≥ 0.")
    if not 0 <= overlap_ratio <= 1:
        raise ValueError(f"overlap_ratio is {overlap_ratio}, but it is a fraction. Give 0…1, for example 0.3.")


def _prepare(image: npt.ArrayLike, mask: npt.ArrayLike | None, what: str) -> tuple[Image, Mask]:
    pixels = native(image, what, 2)
    valid = as_mask(mask, (pixels.shape[0], pixels.shape[1]), f"the mask of {what}")
    values = np.where(valid, pixels, 0).astype(np.float64)
    bad = int(np.count_nonzero(~np.isfinite(values)))
    if bad:
        raise ValueError(f"{what} has {bad} valid pixels that are NaN or infinite. Mark them False in its mask.")
    # Subtracting a constant does not change the score, but reduces round-off in the window sums.
    return np.where(valid, values - values.mean(where=valid), 0), valid


class Correlator:
    """Cross-correlations Σ a(x) b(x − lag) of images of two fixed shapes at bounded lags."""

    def __init__(self, fixed: tuple[int, ...], other: tuple[int, ...], lags: list[Lags]) -> None:
        self.shape = [axis.fft_length(n, k) for axis, n, k in zip(lags, fixed, other, strict=True)]
        self.index = np.ix_(*(np.arange(axis.first, axis.last + 1) for axis in lags))

    def spectrum(self, image: Pixels) -> npt.NDArray[np.complex128]:
        """Return the half spectrum at the common circular length."""
        spectrum: npt.NDArray[np.complex128] = scipy.fft.rfft2(image.astype(np.float64), s=self.shape)
        return spectrum

    def __call__(self, fixed: npt.NDArray[np.complex128], other: npt.NDArray[np.complex128]) -> Image:
        """Return the correlation of two spectra at the lags (3); negative lags wrap around."""
        full = scipy.fft.irfft2(fixed * other.conj(), s=self.shape)
        return np.asarray(full[self.index])


def _score(correlate: Correlator, fixed: tuple[Image, Mask], other: tuple[Image, Mask], overlap_ratio: float) -> Image:
    """Return Padfield's equation 10 from six correlations, in his notation: 1 fixed, 2 moving."""
    f1, m1, f1f1 = (correlate.spectrum(a) for a in (fixed[0], fixed[1], fixed[0] ** 2))
    f2, m2, f2f2 = (correlate.spectrum(a) for a in (other[0], other[1], other[0] ** 2))
    overlap = np.rint(correlate(m1, m2))
    sums = WindowSums(overlap, correlate(f1, m2), correlate(f1f1, m2))
    other_sums = WindowSums(overlap, correlate(m1, f2), correlate(m1, f2f2))
    return normalize(correlate(f1, f2), sums, other_sums, overlap_ratio)


class WindowSums(NamedTuple):
    """Sums over the jointly valid pixels at each lag: their number, the sum of one image and of its square."""

    overlap: Image
    total: Image
    squares: Image

    def variation(self) -> Image:
        """Return the sum of squared deviations from the window's mean; round-off is set to exactly 0."""
        spread = self.squares - self.total**2 / np.maximum(self.overlap, 1)
        noise = 1e3 * np.finfo(np.float64).eps * np.max(np.abs(self.squares), initial=0)
        return np.where(spread > noise, spread, 0)


def normalize(product: Image, fixed: WindowSums, other: WindowSums, overlap_ratio: float) -> Image:
    """Return scores (2) from sums over windows: 0 without contrast, NaN without enough overlap."""
    overlap = fixed.overlap
    numerator = product - fixed.total * other.total / np.maximum(overlap, 1)
    denominator = np.sqrt(fixed.variation() * other.variation())
    score = np.divide(numerator, denominator, out=np.zeros_like(numerator), where=denominator > 0)
    enough = (overlap > 0) & (overlap >= overlap_ratio * np.max(overlap, initial=0))
    return np.where(enough, np.clip(score, -1, 1), np.nan)
