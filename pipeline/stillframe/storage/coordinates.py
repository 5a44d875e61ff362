"""Coordinates stored beside the frames: time, scan, delay, kind."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from stillframe.storage.frames import FrameSource, arrays_in, dimension_names
from stillframe.storage.shifts_store import VARIABLE_ATTRIBUTES
from stillframe.wording import first_line

_RESERVED = {*VARIABLE_ATTRIBUTES, "applied", "axis", "drift", "flag", "frames", "mask", "reference", "x", "y"}
"""Names of this package's variables; stored coordinates with these names are renamed."""


def frame_coordinates(source: FrameSource) -> xr.Dataset:
    """Return the coordinates stored in the group of the frames: time, scan, delay, kind….

    Every one-dimensional array of that group along the axis of frames becomes a coordinate; times are decoded
    and the values of a CF enumeration become words. Coordinates that cannot be read are left out, with a warning.
    """
    group = source.group
    if group is None:
        return xr.Dataset()
    axis = dimension_names(source.array)[0]
    arrays, damaged = arrays_in(group, source.path.parent)
    for name, reason in damaged.items():
        _warn_of_left_out(f"{source.path.parent / name}", f"opened ({reason})")
    coordinates = {
        name: variable[: source.shape[0]]
        for name, array in sorted(arrays.items())
        if _has_value_per_frame(array, source)
        and dimension_names(array)[0] in (axis, None)
        and (variable := _coordinate(array, source.path.parent / name)) is not None
    }
    return xr.Dataset(coords=coordinates).rename({name: f"stored_{name}" for name in _RESERVED & set(coordinates)})


def _has_value_per_frame(array: Any, source: FrameSource) -> bool:
    """Return True if an array has one value per frame, or more values while the stack is still being written."""
    if array.shape == source.array.shape[:1]:
        return True
    return source.limit is not None and array.ndim == 1 and bool(array.shape[0] >= source.limit)


def _coordinate(array: Any, path: Path) -> xr.Variable | None:
    """Return one decoded coordinate; warn and return None if it cannot be read."""
    try:
        attributes = {name: value for name, value in array.attrs.items() if not name.startswith("_")}
        return _decoded(xr.Variable("frame", array[:], attributes))
    except Exception as error:
        _warn_of_left_out(f"the coordinate {path}", f"read ({first_line(error)})")
        return None


def _warn_of_left_out(what: str, reason: str) -> None:
    warnings.warn(f"{what} is left out: it cannot be {reason}", stacklevel=2)


def _decoded(stored: xr.Variable) -> xr.Variable:
    """Return a variable with times, enumerations and bytes decoded."""
    decoded = xr.decode_cf(xr.Dataset(coords={"it": stored}), decode_timedelta=False)["it"].variable
    meanings = str(decoded.attrs.get("flag_meanings", "")).split()
    values = np.ravel(decoded.attrs.get("flag_values", ())).tolist()
    if 0 < len(meanings) == len(values):  # an enumeration of CF conventions 1.11, section 3.5
        words = dict(zip(values, meanings, strict=True))
        spelled = [words.get(value, "unknown") for value in decoded.values.tolist()]
        return xr.Variable("frame", np.array(spelled, dtype=object))
    if decoded.dtype.kind == "S" or {type(value) for value in decoded.values.flat} == {bytes}:
        return xr.Variable("frame", np.array([value.decode() for value in decoded.values.tolist()], dtype=object))
    return decoded
