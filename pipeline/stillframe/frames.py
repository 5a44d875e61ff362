"""Open stacks of frames, masks and images as they lie on disk; nothing here changes a file.

Frames are a Zarr array (v2 or v3) of a local or shared file system. Reading names what is missing or damaged,
since Zarr itself takes a missing chunk for its fill value.
"""

import errno
import json
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt
import xarray as xr
import zarr
import zarr.errors

from stillframe.checks import boolean, require_real
from stillframe.durable import Seal
from stillframe.errors import GONE, InputLost
from stillframe.units import Layout, Unit, first_few, frame_range

MissingChunks = Literal["report", "fill"]
_NO_MEANING = {"attributes", "consolidated_metadata", "shape"}
_OWN = {"axis", "applied", "covariance", "drift", "flag", "frames", "intensity", "mask", "overlap", "reference"} | {
    "score",
    "second_score",
    "shift",
    "sigma",
    "x",
    "y",
}
"""Names of this package's variables, which stored coordinates of another meaning must not take."""


class Reading(NamedTuple):
    """Frames as far as they could be read."""

    frames: npt.NDArray[Any]
    """(frame, y, x); zeros where damaged."""
    damaged: npt.NDArray[np.bool_]
    """(frame,) True where a chunk is missing or cannot be decoded."""
    problems: list[str]
    """What is wrong, in words, one line a chunk row."""


@dataclass(frozen=True)
class FrameSource:
    """A stack of frames in a Zarr array; pickles as its path and opens where it is used."""

    path: Path
    """Folder of the array itself."""
    missing_chunks: MissingChunks = "report"
    """What a chunk without a file means."""
    limit: int | None = None
    """Frames that count, where not all are written yet."""

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the open array."""
        return {"path": self.path, "missing_chunks": self.missing_chunks, "limit": self.limit}

    @cached_property
    def array(self) -> zarr.Array[Any]:
        """The open Zarr array."""
        return zarr.open_array(self.path, mode="r")

    @property
    def shape(self) -> tuple[int, ...]:
        """(frame, y, x)."""
        stored: tuple[int, ...] = tuple(self.array.shape)
        return stored if self.limit is None else (min(self.limit, stored[0]), *stored[1:])

    @property
    def finished(self) -> bool:
        """Whether its writer marked it complete, by the attribute ``complete`` of the array or of its group."""
        if self.array.attrs.get("complete") is True:
            return True
        try:
            return zarr.open_group(self.path.parent, mode="r").attrs.get("complete") is True
        except Exception:  # not in a group
            return False

    @property
    def dtype(self) -> np.dtype[Any]:
        """Dtype of the pixels as stored."""
        return np.dtype(self.array.dtype)

    @property
    def stored_frames(self) -> int:
        """Frames that share a file."""
        return int((self.array.shards or self.array.chunks)[0])

    @property
    def ndim(self) -> int:
        """Always 3."""
        return 3

    @property
    def layout(self) -> Layout:
        """What of the stack decides the size of a unit."""
        frames, height, width = self.shape
        chunk = math.prod(self.array.chunks) * self.dtype.itemsize
        return Layout(frames, (height, width), self.dtype.itemsize, min(self.array.chunks[0], max(frames, 1)), chunk)

    @property
    def split(self) -> bool:
        """Whether a frame is spread over several chunks."""
        return tuple(self.array.chunks[1:]) != self.shape[1:] and any(
            chunk < size for chunk, size in zip(self.array.chunks[1:], self.shape[1:], strict=True)
        )

    def files(self, start: int, stop: int) -> Iterator[Path]:
        """Yield the files that hold these frames, existing or not."""
        return _files(self.path, self.array, (range(start, stop), *map(range, self.shape[1:])))

    def identity(self, start: int, stop: int, *, contents: bool = False) -> list[tuple[str, int, int | str]]:
        """Name, size and time of change of every file that holds these frames; −1 where it is missing.

        With ``contents``, the checksum in place of the time.
        """
        look = _look_inside if contents else _look
        return [(str(file.relative_to(self.path)), *look(file)) for file in self.files(start, stop)]

    def description(self) -> str:
        """Return the array's metadata as stored."""
        names = ("zarr.json", ".zarray")
        return "".join((self.path / name).read_text() for name in names if (self.path / name).exists())

    def meaning(self) -> str:
        """Return what of the metadata decides what a chunk means: not its attributes, nor how many frames there are."""
        metadata = json.loads(self.description())
        kept = {name: value for name, value in metadata.items() if name not in _NO_MEANING}
        return json.dumps(kept | {"shape": metadata["shape"][1:]}, sort_keys=True)

    def check_there(self) -> None:
        """Raise ``InputLost`` if the whole array cannot be reached any more."""
        try:
            if not self.description():
                raise FileNotFoundError(errno.ENOENT, "No such file or directory")
        except OSError as error:
            raise InputLost(error.errno, "the frames cannot be reached any more", str(self.path)) from error

    def __getitem__(self, key: tuple[Any, ...]) -> npt.NDArray[Any]:
        """Read frames, or raise ``OSError`` naming what cannot be read."""
        chosen = range(self.shape[0])[key[0]]
        start, stop = (
            (chosen, chosen + 1) if isinstance(chosen, int) else (min(chosen, default=0), max(chosen, default=-1) + 1)
        )
        missing = self._missing(start, stop)
        if missing:
            raise FileNotFoundError(
                f"{frame_range(start, stop)} of {self.path}: {missing}. Restore the file; or, if its writer leaves out "
                "empty chunks, open with missing_chunks='fill'."
            )
        try:
            return np.asarray(self.array[key])
        except Exception as error:
            raise OSError(
                f"{frame_range(start, stop)} of {self.path} cannot be read ({_short(error)}): a chunk is damaged. "
                "Restore it, or leave these frames out."
            ) from error

    def read(self, unit: Unit) -> Reading:
        """Read a unit as far as possible and say what was not.

        Frames of a chunk row that is missing or cannot be decoded come back as zeros, marked damaged.

        Raises
        ------
        InputLost
            Not these frames are damaged: nothing of the array can be reached any more.
        PermissionError
            A file may not be read.
        """
        whole = self._try(unit.start, unit.stop)
        if not isinstance(whole, str):
            return Reading(whole, np.zeros(len(whole), np.bool_), [])
        reading = self._read_rows(unit)
        self.check_there()
        return reading

    def _read_rows(self, unit: Unit) -> Reading:
        frames = np.zeros((unit.stop - unit.start, *self.shape[1:]), self.dtype)
        damaged = np.zeros(len(frames), np.bool_)
        problems = []
        step = self.array.chunks[0]
        for low in range(unit.start - unit.start % step, unit.stop, step):
            start, stop = max(low, unit.start), min(low + step, unit.stop)
            part = self._try(start, stop)
            here = slice(start - unit.start, stop - unit.start)
            if isinstance(part, str):
                damaged[here] = True
                problems.append(f"{frame_range(start, stop)}: {part}")
            else:
                frames[here] = part
        return Reading(frames, damaged, problems)

    def _try(self, start: int, stop: int) -> npt.NDArray[Any] | str:
        """Return the frames, or what is wrong with them."""
        missing = self._missing(start, stop)
        if missing:
            return missing
        try:
            frames = np.asarray(self.array[start:stop])
        except MemoryError:
            raise
        except Exception as error:  # codecs raise whatever they like on damaged bytes
            self._raise_if_gone(error)
            return f"cannot be decoded ({_short(error)})"
        # A file that vanished only now was read as the fill value.
        return self._missing(start, stop) or frames

    def _raise_if_gone(self, error: Exception) -> None:
        if isinstance(error, PermissionError):
            raise error
        if isinstance(error, OSError) and error.errno in GONE:
            raise InputLost(error.errno, error.strerror or "gone", str(self.path)) from error

    def _missing(self, start: int, stop: int) -> str:
        """Name the missing files that matter; empty when there are none."""
        if self.missing_chunks == "fill":
            return ""
        names = [str(file.relative_to(self.path)) for file in self.files(start, stop) if _look(file)[0] < 0]
        return f"chunk {first_few(names)} is missing" if names else ""


def _look(file: Path) -> tuple[int, int]:
    try:
        seen = file.stat()
    except (FileNotFoundError, NotADirectoryError):
        return -1, -1
    return seen.st_size, seen.st_mtime_ns


def _look_inside(file: Path) -> tuple[int, str]:
    try:
        seal = Seal.of(file)
    except (FileNotFoundError, NotADirectoryError):
        return -1, ""
    return seal.size, seal.sha256


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}"


def open_source(path: str | Path, *, missing_chunks: MissingChunks = "report", empty: bool = False) -> FrameSource:
    """Find the stack of frames at a path: a Zarr array, or a group with one three-dimensional array.

    With ``empty``, there need not be a frame in it yet.

    Raises
    ------
    FileNotFoundError
        Nothing is there.
    ValueError
        Not Zarr, no stack (frame, y, x) in it or several, or no frame.
    TypeError
        Complex or object pixels.
    """
    folder = Path(path).expanduser().absolute()
    node = _open_node(folder)
    array = node if isinstance(node, zarr.Array) else _only_stack(node, folder)
    where = folder if isinstance(node, zarr.Array) else folder / array.basename
    if array.ndim != 3:
        raise ValueError(
            f"{where} has shape {array.shape}, but frames are (frame, y, x). Store one stack of images in one array."
        )
    if 0 in array.shape[empty:]:
        raise ValueError(f"{where} has shape {array.shape}: there is nothing to register. Check how it was written.")
    require_real(np.dtype(array.dtype), f"{where}")
    _check_order(_dimension_names(array), where)
    if missing_chunks not in get_args(MissingChunks):
        raise ValueError(f"missing_chunks is {missing_chunks!r}, which is not known. Choose report or fill.")
    return FrameSource(where, missing_chunks)


def _dimension_names(array: Any) -> tuple[str | None, ...]:
    """Return the names stored with an array's axes, by Zarr v3 or by xarray; None where there are none."""
    stored = getattr(array.metadata, "dimension_names", None) or array.attrs.get("_ARRAY_DIMENSIONS")
    return tuple(stored) if stored else (None,) * array.ndim


def _check_order(names: tuple[str | None, ...], where: Path) -> None:
    """Refuse a stack whose own names say that it is not (frame, y, x)."""
    if names[0] in ("y", "x") or names[1] in ("frame", "x") or names[2] in ("frame", "y"):
        raise ValueError(
            f"{where} is stored as ({', '.join(map(str, names))}), but frames are (frame, y, x). "
            "Transpose it once and store it again."
        )


def _open_node(folder: Path) -> Any:
    if not folder.exists():
        raise FileNotFoundError(f"{folder} does not exist. Check the path of the frames.")
    try:
        return zarr.open(folder, mode="r")
    except Exception as error:
        raise ValueError(
            f"{folder} is not a Zarr array or group ({_short(error)}). Convert the frames to Zarr first, for example "
            "with xarray's to_zarr."
        ) from error


def _only_stack(group: Any, folder: Path) -> Any:
    """Return the array called "frames", or else the only one with three dimensions."""
    members = dict(group.arrays())
    if "frames" in members:
        return members["frames"]
    stacks = [name for name, array in members.items() if array.ndim == 3]
    if len(stacks) != 1:
        found = ", ".join(f"{name} {array.shape}" for name, array in members.items()) or "no arrays"
        raise ValueError(
            f"{folder} holds {found}: it is not clear which one is the stack (frame, y, x). "
            f"Give the path of the array itself, for example {folder}/{stacks[0] if stacks else 'frames'}."
        )
    return members[stacks[0]]


def frame_coordinates(source: FrameSource) -> xr.Dataset:
    """Return what is stored beside the frames for each of them: time, scan, delay, kind….

    Every one-dimensional array of the same group along the axis of frames becomes a coordinate; times are decoded
    and the values of a CF enumeration become words. One that cannot be read is left out, with a warning.
    """
    parent = source.path.parent
    try:
        group = zarr.open_group(parent, mode="r")
    except Exception:  # not in a group: a bare array has no coordinates
        return xr.Dataset()
    axis = _dimension_names(source.array)[0]
    along = {
        name: array
        for name, array in sorted(group.arrays())
        if _is_along(array, source) and _dimension_names(array)[0] in (axis, None)
    }
    found = {
        name: variable[: source.shape[0]]
        for name, array in along.items()
        if (variable := _coordinate(array, parent / name)) is not None
    }
    return xr.Dataset(coords=found).rename({name: f"stored_{name}" for name in _OWN & set(found)})


def _is_along(array: Any, source: FrameSource) -> bool:
    """Tell whether an array has a value for each frame, or for more of them where not all frames count yet."""
    if array.shape == source.array.shape[:1]:
        return True
    return source.limit is not None and array.ndim == 1 and bool(array.shape[0] >= source.limit)


def _coordinate(array: Any, path: Path) -> xr.Variable | None:
    """Read and decode one coordinate whole, or warn and return None."""
    attributes = {name: value for name, value in array.attrs.items() if not name.startswith("_")}
    try:
        return _decoded(xr.Variable("frame", array[:], attributes))
    except Exception as error:
        warnings.warn(f"the coordinate {path} is left out: it cannot be read ({_short(error)})", stacklevel=2)
        return None


def _files(path: Path, array: Any, region: tuple[range, ...]) -> Iterator[Path]:
    """Yield the files that hold a region of an array, existing or not."""
    stored = array.shards or array.chunks
    grid = [range(part.start // size, -(-part.stop // size)) for part, size in zip(region, stored, strict=True)]
    return (path / array.metadata.encode_chunk_key(place) for place in product(*grid))


def _decoded(stored: xr.Variable) -> xr.Variable:
    """Decode times, enumerations and bytes."""
    decoded = xr.decode_cf(xr.Dataset(coords={"it": stored}), decode_timedelta=False)["it"].variable
    if _is_enumeration(decoded):
        return xr.Variable(*_words(decoded))
    if decoded.dtype.kind == "S" or {type(value) for value in decoded.values.flat} == {bytes}:
        return xr.Variable("frame", np.array([value.decode() for value in decoded.values.tolist()], dtype=object))
    return decoded


def _is_enumeration(variable: xr.Variable) -> bool:
    meanings = str(variable.attrs.get("flag_meanings", "")).split()
    return 0 < len(meanings) == np.size(variable.attrs.get("flag_values", ()))


def _words(variable: xr.Variable) -> tuple[str, npt.NDArray[np.object_]]:
    """Spell out an enumeration of CF conventions 1.11, section 3.5."""
    meaning = variable.attrs["flag_meanings"].split()
    table = dict(zip(np.ravel(variable.attrs["flag_values"]).tolist(), meaning, strict=True))
    return "frame", np.array([table.get(value, "unknown") for value in variable.values.tolist()], dtype=object)


def load_image(path: str | Path, names: tuple[str, ...] = ("image", "reference")) -> npt.NDArray[Any]:
    """Read one picture (y, x): npy, tif, any image file, a Zarr array, or the first of these names in a group.

    Raises
    ------
    FileNotFoundError
        Nothing is there.
    ValueError
        It cannot be read as a picture, or has more than two axes.
    """
    file = Path(path).expanduser()
    if not file.exists():
        raise FileNotFoundError(f"{file} does not exist. Check the path.")
    try:
        image = np.asarray(_read_image(file, names))
    except Exception as error:
        raise ValueError(
            f"{file} cannot be read as an image ({_short(error)}). Give npy, tif, png or a Zarr array (y, x)."
        ) from error
    if image.ndim != 2:
        raise ValueError(f"{file} has shape {image.shape}, but one picture (y, x) is needed. Save a single channel.")
    return image


def _read_image(file: Path, names: tuple[str, ...]) -> Any:
    if file.is_dir():
        node: Any = zarr.open(file, mode="r")
        return node[:] if isinstance(node, zarr.Array) else next(node[name] for name in names if name in node)[:]
    if file.suffix.lower() == ".npy":
        return np.load(file, allow_pickle=False)
    if file.suffix.lower() in (".tif", ".tiff"):
        import tifffile

        return tifffile.imread(file)
    from PIL import Image

    with Image.open(file) as picture:
        # The pixels of a palette are indices, whose order means nothing.
        return np.asarray(picture.convert("L") if picture.mode == "P" else picture)


def load_mask(path: str | Path) -> npt.NDArray[np.bool_]:
    """Read a mask (y, x), True = valid, from npy, tif, png or Zarr.

    Parameters
    ----------
    path : str or Path
        A picture of booleans, 0/1 or 0/255; or a Zarr group with an array "mask".

    Returns
    -------
    ndarray of bool, shape (y, x)
        True where the stored value is not 0. Invert it with ``~`` if your file marks the invalid pixels.

    Raises
    ------
    FileNotFoundError
        Nothing is there.
    ValueError
        Not a picture, not two-dimensional, more than two values in it, or False everywhere.

    Examples
    --------
    >>> import numpy as np, tempfile, pathlib
    >>> file = pathlib.Path(tempfile.mkdtemp()) / "mask.npy"
    >>> np.save(file, np.array([[0, 255], [255, 255]], dtype=np.uint8))
    >>> load_mask(file)
    array([[False,  True],
           [ True,  True]])
    """
    mask = boolean(load_image(path, ("mask",)), f"{path}")
    if not mask.any():
        raise ValueError(f"{path} is False everywhere: no pixel is left to compare. True means valid; invert it?")
    return mask
