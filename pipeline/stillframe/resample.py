"""Move frames by fractions of a pixel without letting an invalid pixel touch a valid one.

Every interpolation here is a separable filter of a few taps, so what a pixel is made of is known: an output
pixel is valid only if all that contribute to it are. At whole shifts one tap of weight 1 remains, which copies.
Sources: cubic, R. Keys, IEEE Trans. ASSP 29(6), 1153 (1981), doi 10.1109/TASSP.1981.1163711, a = −1/2;
Lanczos, C. Duchon, J. Appl. Meteorology 18, 1016 (1979), a = 4, weights scaled to sum to 1, which displaces what
is smooth by up to 0.015 px; the others displace nothing.
"""

from typing import Any, Literal, get_args

import numba
import numpy as np
import numpy.typing as npt

from stillframe.checks import native, native_dtype, real
from stillframe.ncc import Mask

Interpolation = Literal["nearest", "linear", "cubic", "lanczos"]
Weights = npt.NDArray[np.float64]

_LANCZOS = 4


def check_interpolation(interpolation: str) -> None:
    """Raise ``ValueError`` for a name that is not an interpolation."""
    known = get_args(Interpolation)
    if interpolation not in known:
        raise ValueError(f"interpolation is {interpolation!r}, which is not known. Choose one of {', '.join(known)}.")


def output_dtype(dtype: np.dtype[Any], interpolation: Interpolation) -> np.dtype[Any]:
    """Return the dtype of resampled frames: that of the frames for "nearest", else one that holds fractions.

    Examples
    --------
    >>> output_dtype(np.dtype("uint16"), "cubic"), output_dtype(np.dtype(">i4"), "nearest")
    (dtype('float32'), dtype('int32'))
    """
    here = native_dtype(dtype)
    if interpolation == "nearest" and here.kind in "iu":
        return here
    return np.result_type(here, np.float32)


def check_fill(fill: float | None, dtype: np.dtype[Any]) -> float:
    """Return the value of unobserved pixels: NaN for floats and 0 for integers unless another is given.

    Raises
    ------
    ValueError
        The value cannot be stored in this dtype.
    """
    if fill is None:
        return 0.0 if dtype.kind in "iu" else np.nan
    if dtype.kind in "iu" and not (float(fill).is_integer() and np.iinfo(dtype).min <= fill <= np.iinfo(dtype).max):
        raise ValueError(f"fill is {fill}, which {dtype} cannot hold. Give a whole number in its range.")
    return float(fill)


def taps(fraction: float, interpolation: Interpolation) -> tuple[int, Weights]:
    """Return the first offset and the weights of a 1-D filter that reads a row at ``x + fraction``.

    Parameters
    ----------
    fraction : float
        0 ≤ fraction < 1, pixels.
    interpolation : str
        "linear", "cubic" or "lanczos".

    Returns
    -------
    int, ndarray
        ``out(x) = Σ_k weights[k] · row(x + first + k)``; no outer weight is zero and they sum to 1.

    Examples
    --------
    >>> taps(0.25, "linear")
    (0, array([0.75, 0.25]))
    """
    if fraction == 0:
        return 0, np.ones(1)
    reach = {"linear": 1, "cubic": 2, "lanczos": _LANCZOS}[interpolation]
    offsets = np.arange(1 - reach, reach + 1)
    weights = _weight(np.abs(offsets - fraction), interpolation)
    return int(offsets[0]), weights / weights.sum()


def _weight(distance: Weights, interpolation: Interpolation) -> Weights:
    """Weight of a sample at this distance, pixels."""
    if interpolation == "linear":
        return 1 - distance
    if interpolation == "lanczos":
        return np.asarray(np.sinc(distance) * np.sinc(distance / _LANCZOS))
    near = 1.5 * distance**3 - 2.5 * distance**2 + 1
    far = -0.5 * distance**3 + 2.5 * distance**2 - 4 * distance + 2
    return np.where(distance <= 1, near, far)


def resample_frames(
    array: npt.ArrayLike,
    shifts: npt.ArrayLike,
    mask: Mask,
    *,
    interpolation: Interpolation = "linear",
    fill: float | None = None,
) -> npt.NDArray[Any]:
    """Apply a shift to every frame.

    Parameters
    ----------
    array : array_like, shape (frame, y, x)
        Frames; never written to.
    shifts : array_like, shape (frame, 2)
        (y, x) shift to apply, pixels: ``out(p) = frame(p − shift)``. NaN: the frame is not observed at all.
    mask : ndarray of bool, shape (y, x)
        True = valid, fixed to the detector.
    interpolation : {"nearest", "linear", "cubic", "lanczos"}
        "nearest" rounds the shift to whole pixels and keeps the dtype and the counts.
    fill : float, optional
        Value of pixels nothing was observed for; NaN for floats and 0 for integers by default.

    Returns
    -------
    ndarray, shape (frame, y, x)
        See :func:`output_dtype`.

    Examples
    --------
    >>> frames = np.arange(4.0).reshape(1, 1, 4)
    >>> resample_frames(frames, [(0, 1.5)], np.ones((1, 4), bool), interpolation="linear")
    array([[[nan, nan, 0.5, 1.5]]])
    """
    check_interpolation(interpolation)
    frames = real(array, "the stack of frames", 3)
    moves = np.asarray(shifts, dtype=np.float64)
    if moves.shape != (len(frames), 2):
        raise ValueError(f"the shifts have shape {moves.shape} but there are {len(frames)} frames: give (frame, 2).")
    dtype = output_dtype(frames.dtype, interpolation)
    out = np.full(frames.shape, check_fill(fill, dtype), dtype)
    for frame, move, target in zip(frames, moves, out, strict=True):
        if np.isfinite(move).all():
            _resample(native(frame, "a frame", 2), move, mask, interpolation, target)
    return out


def _resample(
    frame: npt.NDArray[Any],
    move: npt.NDArray[np.float64],
    mask: Mask,
    interpolation: Interpolation,
    out: npt.NDArray[Any],
) -> None:
    """Write the moved frame over ``out`` wherever it is observed."""
    if interpolation == "nearest":
        move = np.rint(move)
    if np.max(np.abs(move)) >= max(frame.shape):
        return
    whole = np.floor(-move).astype(np.int64)
    fractions = -move - whole
    if not fractions.any():
        _copy(frame, mask, (int(whole[0]), int(whole[1])), out)
        return
    (first_y, weights_y), (first_x, weights_x) = (taps(float(part), interpolation) for part in fractions)
    start = (int(whole[0]) + first_y, int(whole[1]) + first_x)
    _filter(np.where(mask, frame, np.nan).astype(out.dtype), start, weights_y, weights_x, out)


def _copy(frame: npt.NDArray[Any], mask: Mask, start: tuple[int, int], out: npt.NDArray[Any]) -> None:
    """``out(p) = frame(p + start)`` where that is inside and valid."""
    target = tuple(slice(max(0, -s), max(0, min(n, n - s))) for s, n in zip(start, frame.shape, strict=True))
    source = tuple(slice(max(0, s), max(0, min(n, n + s))) for s, n in zip(start, frame.shape, strict=True))
    np.copyto(out[target], frame[source], where=mask[source], casting="same_kind")


@numba.njit(nogil=True, cache=True)
def _filter(
    values: npt.NDArray[Any],
    start: tuple[int, int],
    weights_y: Weights,
    weights_x: Weights,
    out: npt.NDArray[Any],
) -> None:
    """``out(p) = Σ w_y w_x values(p + start + k)`` where all of them are inside and not NaN."""
    height, width = values.shape
    first = max(0, -start[1])
    last = min(width, width - start[1] - len(weights_x) + 1)
    row = np.empty(width, np.float64)
    for y in range(max(0, -start[0]), min(height, height - start[0] - len(weights_y) + 1)):
        row[:] = 0.0
        for k in range(len(weights_y)):
            row += weights_y[k] * values[y + start[0] + k]
        for x in range(first, last):
            value = 0.0
            for k in range(len(weights_x)):
                value += weights_x[k] * row[x + start[1] + k]
            if not np.isnan(value):
                out[y, x] = value
