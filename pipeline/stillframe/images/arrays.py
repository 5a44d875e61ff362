"""Checks of arrays and masks before any number is computed from them, with errors that say what to do."""

from typing import Any

import numpy as np
import numpy.typing as npt

Pixels = npt.NDArray[Any]
"""Pixels of any real dtype."""
Indices = npt.NDArray[np.int64]
Image = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]
"""True = valid."""
Float32 = npt.NDArray[np.float32]
Shift = tuple[int, int]
"""Whole-pixel shift (y, x), to be applied to a frame."""

_UNORDERED = "cannot be registered: only integer, boolean and real floating pixels can be compared"


def require_real(dtype: np.dtype[Any], what: str) -> None:
    """Raise ``TypeError`` unless pixels of this dtype can be correlated."""
    if dtype.kind not in "biuf":
        raise TypeError(f"{what} has dtype {dtype}, which {_UNORDERED}. Store counts or real intensities instead.")


def native(array: npt.ArrayLike, what: str, ndim: int) -> npt.NDArray[Any]:
    """Return the array C-contiguous in the machine's byte order, checked as by :func:`real`."""
    values = real(array, what, ndim)
    return np.ascontiguousarray(values, dtype=native_dtype(values.dtype))


def real(array: npt.ArrayLike, what: str, ndim: int) -> npt.NDArray[Any]:
    """Return an image (y, x) or a stack (frame, y, x) unchanged, checked for dtype and dimensions.

    ``what`` is its name in errors: ``TypeError`` for a dtype without an order, ``ValueError`` for dimensions.
    """
    values = np.asarray(array)
    require_real(values.dtype, what)
    axes = {2: "(y, x)", 3: "(frame, y, x)"}[ndim]
    if values.ndim != ndim:
        raise ValueError(f"{what} has shape {values.shape}, but {axes} is needed. Select or add an axis.")
    if 0 in values.shape[-2:]:
        raise ValueError(f"{what} has shape {values.shape}: there is no pixel in it. Give frames of {axes}.")
    return values


def native_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return the dtype that pixels are converted to for computing: native byte order, and a dtype numba supports.

    Examples
    --------
    >>> native_dtype(np.dtype(">u2")), native_dtype(np.dtype("bool")), native_dtype(np.dtype("float16"))
    (dtype('uint16'), dtype('uint8'), dtype('float32'))
    """
    if dtype.kind == "b":
        return np.dtype(np.uint8)
    if dtype.kind == "f" and dtype.itemsize not in (4, 8):
        return np.dtype(np.float32 if dtype.itemsize < 4 else np.float64)
    return dtype.newbyteorder("=")


def as_mask(mask: npt.ArrayLike | None, shape: tuple[int, ...], what: str = "the mask") -> npt.NDArray[np.bool_]:
    """Return a boolean mask (y, x), True = valid, checked against the shape of its image; all True for None.

    Numbers are taken if exactly two values occur, one of them 0. ``what`` is the name of the mask in errors.
    """
    if mask is None:
        return np.ones(shape, dtype=np.bool_)
    valid = boolean(np.asarray(mask), what)
    if valid.shape != tuple(shape):
        raise ValueError(
            f"{what} has shape {valid.shape} but the frames have {tuple(shape)}: a mask belongs to one detector, "
            "pixel by pixel. Crop, bin or transpose it as the frames were."
        )
    if not valid.any():
        raise ValueError(f"{what} is False everywhere: no pixel is left to compare. True means valid; invert it?")
    return valid


def boolean(values: npt.NDArray[Any], what: str) -> npt.NDArray[np.bool_]:
    """Return booleans, 0/1 or 0/255 as booleans; raise ``ValueError`` for other values, such as an image."""
    if values.dtype.kind == "b":
        return np.ascontiguousarray(values)
    if values.dtype.kind not in "uif":
        raise ValueError(f"{what} has dtype {values.dtype}, not booleans. Save it as bool, 0/1 or 0/255.")
    levels = np.unique(values[values != 0])
    if levels.size > 1 or not np.isfinite(levels).all():
        shown = ", ".join(f"{level:g}" for level in levels[:4])
        raise ValueError(
            f"{what} holds {levels.size} different values besides 0 ({shown}…), so it is not a mask. "
            "Save it as bool, 0/1 or 0/255, True or non-zero meaning valid."
        )
    return np.ascontiguousarray(values != 0)


def saturation_limit(dtype: np.dtype[Any], stated: float | None) -> float:
    """Return the pixel value from which a frame is saturated: the stated one, else the largest of an integer dtype."""
    if stated is not None:
        return stated
    return float(np.iinfo(dtype).max) if dtype.kind in "iu" else np.inf
