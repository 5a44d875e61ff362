"""Move frames by fractions of a pixel without letting an invalid pixel touch a valid one.

Every interpolation here is a separable filter of a few taps, so what a pixel is made of is known: an output
pixel is valid only if all that contribute to it are. At whole shifts one tap of weight 1 remains, which copies.
Sources: cubic, R. Keys, IEEE Trans. ASSP 29(6), 1153 (1981), doi 10.1109/TASSP.1981.1163711, a = −1/2;
Lanczos, C. Duchon, J. Appl. Meteorology 18, 1016 (1979), a = 4, weights scaled to sum to 1, which displaces what
is smooth by up to 0.015 px; the others displace nothing.
"""

import zlib
from typing import Any, Literal, get_args

import numba
import numpy as np
import numpy.typing as npt

from stillframe.checks import native, native_dtype, real
from stillframe.ncc import Mask
from stillframe.runs import RowRuns

Interpolation = Literal["nearest", "linear", "cubic", "lanczos"]
Weights = npt.NDArray[np.float64]

_LANCZOS = 4
PARTS = 16
"""Frames of integers are moved by fractions to this part of a count, which takes a third of the space and of the time
to write. A value is rounded up or down by chance, so that sums are kept however few counts there are; what that adds to
a pixel's variance is 1/1024 of a count squared at most. Chance is a hash of place and shift: always the same.
"""


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
        See :func:`output_dtype`. Where integers become floats, these are multiples of 1/16 of a count.

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
    out, value = np.empty(frames.shape, dtype), dtype.type(check_fill(fill, dtype))
    holes = RowRuns.of(~np.asarray(mask, np.bool_))
    for frame, move, target in zip(frames, moves, out, strict=True):
        if np.isfinite(move).all() and np.max(np.abs(move)) < max(frame.shape):
            _resample(native(frame, "a frame", 2), move, mask, holes, interpolation, value, target)
        else:
            target[:] = value
    return out


def _resample(
    frame: npt.NDArray[Any],
    move: npt.NDArray[np.float64],
    mask: Mask,
    holes: RowRuns,
    interpolation: Interpolation,
    fill: Any,
    out: npt.NDArray[Any],
) -> None:
    """Write the moved frame, and the fill value wherever nothing was observed."""
    if interpolation == "nearest":
        move = np.rint(move)
    whole = np.floor(-move).astype(np.int64)
    fractions = -move - whole
    whole, fractions = whole + (fractions == 1), np.where(fractions == 1, 0, fractions)
    if not fractions.any():
        _move(frame, holes, (int(whole[0]), int(whole[1])), fill, out)
        return
    (first_y, weights_y), (first_x, weights_x) = (taps(float(part), interpolation) for part in fractions)
    start = (int(whole[0]) + first_y, int(whole[1]) + first_x)
    parts = out.dtype.type(PARTS if frame.dtype.kind in "iu" else 0)
    salt = np.uint32(zlib.crc32(move.tobytes()))
    _filter(frame, mask, start, weights_y.astype(out.dtype), weights_x.astype(out.dtype), parts, salt, fill, out)


@numba.njit(nogil=True, cache=True)
def _choose(values: npt.NDArray[Any], valid: npt.NDArray[np.bool_], fill: Any, out: npt.NDArray[Any]) -> None:
    for x in range(len(out)):
        out[x] = values[x] if valid[x] else fill


@numba.njit(nogil=True, cache=True)
def _copy(values: npt.NDArray[Any], out: npt.NDArray[Any]) -> None:
    for x in range(len(out)):
        out[x] = values[x]


@numba.njit(nogil=True, cache=True)
def _move(frame: npt.NDArray[Any], holes: RowRuns, start: tuple[int, int], fill: Any, out: npt.NDArray[Any]) -> None:
    """``out(p) = frame(p + start)`` where that is inside and valid."""
    runs, firsts = holes
    height, width = frame.shape
    first, last = max(0, -start[1]), min(width, width - start[1])
    for y in range(height):
        row = y + start[0]
        if row < 0 or row >= height or first >= last:
            out[y] = fill
            continue
        _copy(frame[row, first + start[1] : last + start[1]], out[y, first:last])
        out[y, :first], out[y, last:] = fill, fill
        for k in range(firsts[row], firsts[row + 1]):
            out[y, max(first, runs[k, 1] - start[1]) : max(first, runs[k, 2] - start[1])] = fill


@numba.njit(nogil=True, cache=True)
def _load(values: npt.NDArray[Any], valid: npt.NDArray[np.bool_], blank: Any, line: npt.NDArray[Any]) -> None:
    """Copy a row, with a blank where it is invalid."""
    for x in range(len(line)):
        line[x] = values[x]
    for x in range(len(line)):
        line[x] = line[x] if valid[x] else blank


@numba.njit(nogil=True, cache=True)
def _add_scaled(line: npt.NDArray[Any], weight: float, out: npt.NDArray[Any]) -> None:
    for x in range(len(out)):
        out[x] += weight * line[x]


@numba.njit(nogil=True, cache=True)
def _round(values: npt.NDArray[Any], parts: float, chances: npt.NDArray[Any]) -> None:
    """Round to so many parts of 1, up or down by chance."""
    for x in range(len(values)):
        values[x] = np.floor(values[x] * parts + chances[x]) / parts


@numba.njit(nogil=True, cache=True)
def _draw(row: int, salt: np.uint32, chances: npt.NDArray[Any]) -> None:
    """Draw numbers 0…1 for a row: a hash of each place (finalizer of MurmurHash3, A. Appleby, public domain)."""
    for x in range(len(chances)):
        bits = np.uint32(np.uint32(x) * np.uint32(0x9E3779B1)) ^ np.uint32(np.uint32(row) * np.uint32(0x85EBCA6B))
        bits = np.uint32(bits ^ salt)
        bits = np.uint32((bits ^ (bits >> np.uint32(16))) * np.uint32(0x85EBCA6B))
        bits = np.uint32((bits ^ (bits >> np.uint32(13))) * np.uint32(0xC2B2AE35))
        chances[x] = np.float32(np.uint32(bits ^ (bits >> np.uint32(16))) >> np.uint32(8)) * np.float32(2.0**-24)


@numba.njit(nogil=True, cache=True)
def _filter(
    frame: npt.NDArray[Any],
    mask: Mask,
    start: tuple[int, int],
    weights_y: npt.NDArray[Any],
    weights_x: npt.NDArray[Any],
    parts: float,
    salt: np.uint32,
    fill: Any,
    out: npt.NDArray[Any],
) -> None:
    """``out(p) = Σ w_y w_x frame(p + start + k)`` where all of them are inside and valid; all in the output's dtype."""
    height, width = frame.shape
    many, blank = len(weights_y), np.float32(np.nan)
    lines, held = np.empty((many, width), out.dtype), np.full(many, -1)
    rows, sums, seen = np.empty(width, out.dtype), np.empty(width, out.dtype), np.empty(width, np.bool_)
    chances = np.empty(width, np.float32)
    first, last = max(0, -start[1]), min(width, width - start[1] - len(weights_x) + 1)
    for y in range(height):
        top = y + start[0]
        if top < 0 or top + many > height or first >= last:
            out[y] = fill
            continue
        rows[:], sums[:] = 0, 0
        for k in range(many):
            place = (top + k) % many
            if held[place] != top + k:
                _load(frame[top + k], mask[top + k], blank, lines[place])
                held[place] = top + k
            _add_scaled(lines[place], weights_y[k], rows)
        for k in range(len(weights_x)):
            begin = first + start[1] + k
            _add_scaled(rows[begin : begin + last - first], weights_x[k], sums[: last - first])
        if parts:
            _draw(y, salt, chances)
            _round(sums, parts, chances)
        for x in range(last - first):
            seen[x] = sums[x] == sums[x]
        out[y, :first], out[y, last:] = fill, fill
        _choose(sums, seen, fill, out[y, first:last])
