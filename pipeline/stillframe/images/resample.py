"""Moving of frames by fractions of a pixel, such that no invalid pixel contributes to a valid one.

Every interpolation is a separable filter of a few taps (47). An output pixel is valid only if all pixels that
contribute to it are. At whole shifts one tap of weight 1 remains, which copies. Lanczos displaces smooth images by up
to 0.015 px, since its weights are scaled to sum to 1; the other filters displace nothing.
"""

import zlib
from typing import Any, get_args

import numba
import numpy as np
import numpy.typing as npt

from stillframe.images.arrays import Image, Mask, Pixels, native, native_dtype, real
from stillframe.images.run_lengths import RowRuns
from stillframe.options import Interpolation

Weights = npt.NDArray[np.float64]

_LANCZOS_REACH = 4
STEPS_PER_COUNT = 16
"""Frames of integers that are moved by fractions are rounded to steps of 1/16 of a count (48). Files then take a third
of the space and of the time to write. Values are rounded up or down at random, so that sums are kept however few counts
there are; this adds at most 1/1024 of a count squared to a pixel's variance. The random numbers are a hash of place and
shift, and therefore reproducible.
"""


def check_interpolation(interpolation: str) -> None:
    """Raise ``ValueError`` for a name that is not an interpolation."""
    names = get_args(Interpolation)
    if interpolation not in names:
        raise ValueError(
            f"interpolation is {interpolation!r}, which is no interpolation. Choose one of {', '.join(names)}."
        )


def output_dtype(dtype: np.dtype[Any], interpolation: Interpolation) -> np.dtype[Any]:
    """Return the dtype of moved frames: that of the frames for "nearest", else a floating one.

    Examples
    --------
    >>> output_dtype(np.dtype("uint16"), "cubic"), output_dtype(np.dtype(">i4"), "nearest")
    (dtype('float32'), dtype('int32'))
    """
    native = native_dtype(dtype)
    if interpolation == "nearest" and native.kind in "iu":
        return native
    return np.result_type(native, np.float32)


def check_fill(fill: float | None, dtype: np.dtype[Any]) -> float:
    """Return the value of unobserved pixels, by default NaN or for integers 0; ``ValueError`` if the dtype lacks it."""
    if fill is None:
        return 0.0 if dtype.kind in "iu" else np.nan
    if dtype.kind in "iu" and not (float(fill).is_integer() and np.iinfo(dtype).min <= fill <= np.iinfo(dtype).max):
        raise ValueError(f"fill is {fill}, which {dtype} cannot hold. Give a whole number in its range.")
    return float(fill)


def taps(fraction: float, interpolation: Interpolation) -> tuple[int, Weights]:
    """Return the first offset and the weights of a 1-D filter that reads a row at ``x + fraction``, 0 ≤ fraction < 1.

    ``out(x) = Σ_k weights[k] · row(x + first + k)``; no outer weight is zero and they sum to 1.

    Examples
    --------
    >>> taps(0.25, "linear")
    (0, array([0.75, 0.25]))
    """
    if fraction == 0:
        return 0, np.ones(1)
    reach = {"linear": 1, "cubic": 2, "lanczos": _LANCZOS_REACH}[interpolation]
    offsets = np.arange(1 - reach, reach + 1)
    weights = _weight(np.abs(offsets - fraction), interpolation)
    return int(offsets[0]), weights / weights.sum()


def _weight(distance: Weights, interpolation: Interpolation) -> Weights:
    """Return the weight of a sample at this distance, pixels."""
    if interpolation == "linear":
        return 1 - distance
    if interpolation == "lanczos":
        return np.asarray(np.sinc(distance) * np.sinc(distance / _LANCZOS_REACH))
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
) -> Pixels:
    """Return the frames (frame, y, x), each moved by its shift (y, x), pixels: ``out(p) = frame(p − shift)``.

    A frame whose shift is NaN has no observed pixel. "nearest" rounds the shift to whole pixels and keeps the dtype and
    the counts. The dtype is that of :func:`output_dtype`; integers that become floats are multiples of 1/16 of a count.
    ``mask`` (y, x) is fixed to the detector. ``fill`` is the value of unobserved pixels, as for :func:`check_fill`.

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
    frame: Pixels, move: Image, mask: Mask, holes: RowRuns, interpolation: Interpolation, fill: Any, out: Pixels
) -> None:
    """Write the moved frame, with the fill value in unobserved pixels."""
    if interpolation == "nearest":
        move = np.rint(move)
    whole = np.floor(-move).astype(np.int64)
    fractions = -move - whole
    whole, fractions = whole + (fractions == 1), np.where(fractions == 1, 0, fractions)
    if not fractions.any():
        _move(frame, holes, (int(whole[0]), int(whole[1])), fill, out)
        return
    (first_y, weights_y), (first_x, weights_x) = (taps(float(fraction), interpolation) for fraction in fractions)
    start = (int(whole[0]) + first_y, int(whole[1]) + first_x)
    steps = out.dtype.type(STEPS_PER_COUNT if frame.dtype.kind in "iu" else 0)
    salt = np.uint32(zlib.crc32(move.tobytes()))
    _filter(frame, mask, start, weights_y.astype(out.dtype), weights_x.astype(out.dtype), steps, salt, fill, out)


@numba.njit(nogil=True, cache=True)
def _choose(values: Pixels, valid: npt.NDArray[np.bool_], fill: Any, out: Pixels) -> None:
    for x in range(len(out)):
        out[x] = values[x] if valid[x] else fill


@numba.njit(nogil=True, cache=True)
def _copy(values: Pixels, out: Pixels) -> None:
    for x in range(len(out)):
        out[x] = values[x]


@numba.njit(nogil=True, cache=True)
def _move(frame: Pixels, holes: RowRuns, start: tuple[int, int], fill: Any, out: Pixels) -> None:
    """Write ``frame(p + start)`` where this pixel is inside and valid."""
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
def _load(values: Pixels, valid: npt.NDArray[np.bool_], blank: Any, line: Pixels) -> None:
    """Copy a row, with a blank in invalid pixels."""
    for x in range(len(line)):
        line[x] = values[x]
    for x in range(len(line)):
        line[x] = line[x] if valid[x] else blank


@numba.njit(nogil=True, cache=True)
def _add_scaled(line: Pixels, weight: float, out: Pixels) -> None:
    for x in range(len(out)):
        out[x] += weight * line[x]


@numba.njit(nogil=True, cache=True)
def _round(values: Pixels, steps: float, randoms: Pixels) -> None:
    """Round to multiples of 1/steps, up or down according to random numbers 0…1."""
    for x in range(len(values)):
        values[x] = np.floor(values[x] * steps + randoms[x]) / steps


@numba.njit(nogil=True, cache=True)
def _draw(row: int, salt: np.uint32, randoms: Pixels) -> None:
    """Write random numbers 0…1 for a row: a hash of each place (finalizer of MurmurHash3, A. Appleby)."""
    for x in range(len(randoms)):
        bits = np.uint32(np.uint32(x) * np.uint32(0x9E3779B1)) ^ np.uint32(np.uint32(row) * np.uint32(0x85EBCA6B))
        bits = np.uint32(bits ^ salt)
        bits = np.uint32((bits ^ (bits >> np.uint32(16))) * np.uint32(0x85EBCA6B))
        bits = np.uint32((bits ^ (bits >> np.uint32(13))) * np.uint32(0xC2B2AE35))
        randoms[x] = np.float32(np.uint32(bits ^ (bits >> np.uint32(16))) >> np.uint32(8)) * np.float32(2.0**-24)


@numba.njit(nogil=True, cache=True)
def _filter(
    frame: Pixels,
    mask: Mask,
    start: tuple[int, int],
    weights_y: Pixels,
    weights_x: Pixels,
    steps: float,
    salt: np.uint32,
    fill: Any,
    out: Pixels,
) -> None:
    """Write ``Σ w_y w_x frame(p + start + k)`` where all these pixels are inside and valid, in the output's precision.

    Rows are kept while they are needed, so that each is loaded once. ``steps`` is 0 for no rounding.
    """
    height, width = frame.shape
    count, blank = len(weights_y), np.float32(np.nan)
    lines, loaded = np.empty((count, width), out.dtype), np.full(count, -1)
    rows, sums, observed = np.empty(width, out.dtype), np.empty(width, out.dtype), np.empty(width, np.bool_)
    randoms = np.empty(width, np.float32)
    first, last = max(0, -start[1]), min(width, width - start[1] - len(weights_x) + 1)
    for y in range(height):
        top = y + start[0]
        if top < 0 or top + count > height or first >= last:
            out[y] = fill
            continue
        rows[:], sums[:] = 0, 0
        for k in range(count):
            place = (top + k) % count
            if loaded[place] != top + k:
                _load(frame[top + k], mask[top + k], blank, lines[place])
                loaded[place] = top + k
            _add_scaled(lines[place], weights_y[k], rows)
        for k in range(len(weights_x)):
            begin = first + start[1] + k
            _add_scaled(rows[begin : begin + last - first], weights_x[k], sums[: last - first])
        if steps:
            _draw(y, salt, randoms)
            _round(sums, steps, randoms)
        for x in range(last - first):
            observed[x] = sums[x] == sums[x]
        out[y, :first], out[y, last:] = fill, fill
        _choose(sums, observed, fill, out[y, first:last])
