"""Open and read stacks of frames; nothing here changes a file.

Frames are a Zarr array (v2 or v3) of a local or shared file system. Zarr reads a missing chunk as the fill value, so
missing files are looked for here, and problems are reported by frame and file name.
"""

import errno
import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import numpy.typing as npt
import zarr
import zarr.errors

from stillframe.errors import GONE, InputLost
from stillframe.images.arrays import require_real
from stillframe.options import MissingChunks
from stillframe.partition import Layout, Unit
from stillframe.storage.checksums import Checksum
from stillframe.storage.zarr_files import decoding_metadata, refuse_encoded
from stillframe.wording import first_few, first_line, frame_range


class Reading(NamedTuple):
    """The frames of a unit as far as they could be read."""

    frames: npt.NDArray[Any]
    """(frame, y, x); zeros where damaged."""
    damaged: npt.NDArray[np.bool_]
    """(frame,) True where a chunk is missing or cannot be decoded."""
    problems: list[str]
    """What is wrong, in words, one line for each row of chunks."""


_NODE_FILES = ("zarr.json", ".zarray", ".zgroup")
"""Files that make a folder a node of Zarr."""


@dataclass(frozen=True)
class FrameSource:
    """A stack of frames in a Zarr array; pickles as its path and opens in the process that uses it."""

    path: Path
    """Folder of the array itself."""
    missing_chunks: MissingChunks = "report"
    """Meaning of a chunk without a file."""
    limit: int | None = None
    """Number of frames that may be read, while the stack is still being written."""

    def __getstate__(self) -> dict[str, Any]:
        """Return the fields without the open array."""
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
    def group(self) -> zarr.Group | None:
        """The Zarr group around the array, opened anew each time; None if there is none."""
        try:
            return zarr.open_group(self.path.parent, mode="r")
        except Exception:  # Zarr raises various errors for a folder that is no group
            return None

    @property
    def finished(self) -> bool:
        """Whether its writer marked it complete, by the attribute ``complete`` of the array or of its group."""
        return any(node is not None and node.attrs.get("complete") is True for node in (self.array, self.group))

    @property
    def dtype(self) -> np.dtype[Any]:
        """Dtype of the stored pixels."""
        return np.dtype(self.array.dtype)

    @cached_property
    def _file_shape(self) -> tuple[int, ...]:
        """Pixels that share a file: (frame, y, x)."""
        return tuple(self.array.shards or self.array.chunks)

    @property
    def stored_frames(self) -> int:
        """Frames that share a file."""
        return self._file_shape[0]

    @property
    def ndim(self) -> int:
        """Number of axes, always 3."""
        return 3

    @property
    def layout(self) -> Layout:
        """Size and chunks of the stack, which decide the frames of a unit."""
        frames, height, width = self.shape
        chunk = math.prod(self.array.chunks) * self.dtype.itemsize
        return Layout(frames, (height, width), self.dtype.itemsize, min(self.array.chunks[0], max(frames, 1)), chunk)

    @property
    def frames_split(self) -> bool:
        """Whether a frame is spread over several chunks."""
        return any(chunk < size for chunk, size in zip(self.array.chunks[1:], self.shape[1:], strict=True))

    def _file_names(self, start: int, stop: int) -> Iterator[str]:
        """Yield the files that hold these frames, existing or not, as paths relative to the array."""
        region = (range(start, stop), *map(range, self.array.shape[1:]))
        sides = zip(region, self._file_shape, strict=True)
        return map(
            self.array.metadata.encode_chunk_key,
            product(*(range(pixels.start // size, -(-pixels.stop // size)) for pixels, size in sides)),
        )

    def identity(self, start: int, stop: int, *, contents: bool = False) -> list[tuple[str, int, int | str]]:
        """Return name, size (bytes) and modification time (ns) of every file that holds frames start … stop − 1.

        Size and time are −1 where the file is missing. With ``contents``, the SHA-256 takes the place of the time; of a
        missing file it is empty.
        """
        folder = str(self.path)  # strings, not Path objects: a run asks for hundreds of thousands of files
        return [(name, *_size_and_state(f"{folder}/{name}", contents)) for name in self._file_names(start, stop)]

    def stored_metadata(self) -> str:
        """Return the array's metadata as stored; empty where there are none."""
        files = (self.path / "zarr.json", self.path / ".zarray")
        return "".join(file.read_text() for file in files if file.exists())

    def decoding_metadata(self) -> str:
        """Return the metadata that decide how chunks are decoded, as JSON."""
        return json.dumps(decoding_metadata(self.stored_metadata()), sort_keys=True)

    def __getitem__(self, key: tuple[Any, ...]) -> npt.NDArray[Any]:
        """Return the pixels of an index (frame, y, x); raise ``OSError`` if a chunk is missing or damaged."""
        chosen = range(self.shape[0])[key[0]]
        rows = range(chosen, chosen + 1) if isinstance(chosen, int) else chosen
        start, stop = min(rows, default=0), max(rows, default=-1) + 1
        pixels = self._pixels_or_problem(start, stop, key)
        if isinstance(pixels, str):
            raise OSError(
                f"{frame_range(start, stop)} of {self.path}: {pixels}. Restore the file, or leave these frames out; if "
                "its writer leaves out empty chunks, open with missing_chunks='fill'."
            )
        return pixels

    def read(self, unit: Unit) -> Reading:
        """Read a unit as far as possible, and describe the damage.

        Frames in a row of chunks of which one is missing or cannot be decoded come back as zeros, marked damaged.
        ``InputLost`` means that the array as a whole cannot be reached any more.
        """
        whole = self._pixels_or_problem(unit.start, unit.stop)
        if not isinstance(whole, str):
            return Reading(whole, np.zeros(len(whole), np.bool_), [])
        reading = self._read_rows(unit)
        try:
            if not self.stored_metadata():
                raise FileNotFoundError(errno.ENOENT, "No such file or directory")
        except OSError as error:
            raise InputLost(error.errno, "the frames cannot be reached any more", str(self.path)) from error
        return reading

    def _read_rows(self, unit: Unit) -> Reading:
        """Read a unit by rows of chunks, so that damage of one row does not cost the others."""
        count = unit.stop - unit.start
        reading = Reading(np.zeros((count, *self.shape[1:]), self.dtype), np.zeros(count, np.bool_), [])
        step = self.array.chunks[0]
        for low in range(unit.start - unit.start % step, unit.stop, step):
            start, stop = max(low, unit.start), min(low + step, unit.stop)
            rows = slice(start - unit.start, stop - unit.start)
            frames = self._pixels_or_problem(start, stop)
            if isinstance(frames, str):
                reading.damaged[rows] = True
                reading.problems.append(f"{frame_range(start, stop)}: {frames}")
            else:
                reading.frames[rows] = frames
        return reading

    def _pixels_or_problem(self, start: int, stop: int, key: Any = None) -> npt.NDArray[Any] | str:
        """Return frames start … stop − 1, or their pixels at ``key``; a message instead if they cannot be read."""
        if missing := self._missing(start, stop):
            return missing
        try:
            pixels = np.asarray(self.array[key or slice(start, stop)])
        except (MemoryError, PermissionError):
            raise
        except Exception as error:  # codecs raise exceptions of any type on damaged bytes
            if isinstance(error, OSError) and error.errno in GONE:
                raise InputLost(error.errno, error.strerror or "gone", str(self.path)) from error
            return f"cannot be decoded ({first_line(error)})"
        # A file may have vanished since the first check; Zarr then reads the fill value.
        return self._missing(start, stop) or pixels

    def _missing(self, start: int, stop: int) -> str:
        """Return a phrase that names the missing files; empty if there are none, or if they mean the fill value."""
        if self.missing_chunks == "fill":
            return ""
        names = [name for name, size, _ in self.identity(start, stop) if size < 0]
        return f"chunk {first_few(names)} is missing" if names else ""


def _size_and_state(file: str, contents: bool) -> tuple[int, int | str]:
    """Return the size of a file with its SHA-256 or its modification time, see :meth:`FrameSource.identity`."""
    try:
        if contents:
            checksum = Checksum.of(Path(file))
            return checksum.size, checksum.sha256
        status = os.stat(file)
    except (FileNotFoundError, NotADirectoryError):
        return -1, "" if contents else -1
    return status.st_size, status.st_mtime_ns


def open_source(path: str | Path, *, missing_chunks: MissingChunks = "report", empty: bool = False) -> FrameSource:
    """Open the stack of frames at a path: a Zarr array, or a group with one three-dimensional array.

    With ``empty``, a stack without a frame is accepted: its frames are still to be written.
    """
    folder = Path(path).expanduser().absolute()
    node = _open_node(folder)
    array = node if isinstance(node, zarr.Array) else _only_stack(node, folder)
    where = folder if isinstance(node, zarr.Array) else folder / array.basename
    for one, name in ((node, folder), (array, where)):
        if not isinstance(one.metadata.attributes, dict):
            raise ValueError(f"{name} has attributes without names: its metadata are damaged. Restore them.")
    if array.ndim != 3:
        raise ValueError(
            f"{where} has shape {array.shape}, but frames are (frame, y, x). Store one stack of images in one array."
        )
    if 0 in array.shape[empty:]:
        raise ValueError(f"{where} has shape {array.shape}: there is nothing to register. Check how it was written.")
    if 0 in (*array.chunks, *(array.shards or ())):
        raise ValueError(f"{where} has chunks of {array.chunks} pixels: its metadata are damaged. Restore them.")
    require_real(np.dtype(array.dtype), f"{where}")
    refuse_encoded(array, where)
    names = dimension_names(array)
    if names[0] in ("y", "x") or names[1] in ("frame", "x") or names[2] in ("frame", "y"):
        raise ValueError(
            f"{where} is stored as ({', '.join(map(str, names))}), but frames are (frame, y, x). "
            "Transpose it once and store it again."
        )
    if missing_chunks not in get_args(MissingChunks):
        raise ValueError(f"missing_chunks is {missing_chunks!r}, which does not exist. Choose report or fill.")
    return FrameSource(where, missing_chunks)


def dimension_names(array: Any) -> tuple[str | None, ...]:
    """Return the names stored with an array's axes, by Zarr v3 or by xarray; None for axes without a name."""
    attributes = array.metadata.attributes
    of_xarray = attributes.get("_ARRAY_DIMENSIONS") if isinstance(attributes, dict) else None
    stored = getattr(array.metadata, "dimension_names", None) or of_xarray
    return tuple(stored) if stored else (None,) * array.ndim


def _open_node(folder: Path) -> Any:
    """Return the Zarr array or group in a folder."""
    if not folder.exists():
        raise FileNotFoundError(f"{folder} does not exist. Check the path of the frames.")
    try:
        return zarr.open(folder, mode="r")
    except Exception as error:
        raise ValueError(
            f"{folder} is not a Zarr array or group ({first_line(error)}). Convert the frames to Zarr first, for "
            "example with xarray's to_zarr."
        ) from error


def arrays_in(group: Any, folder: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the arrays of a group by name, and those that cannot be opened with the reasons."""
    opened, damaged = {}, {}
    # One by one: zarr's list of them ends at the first that is damaged, or leaves it out.
    nodes = (path for path in folder.iterdir() if any((path / name).exists() for name in _NODE_FILES))
    for name in sorted(path.name for path in nodes):
        try:
            opened[name] = group[name]
        except (MemoryError, PermissionError):
            raise
        except Exception as error:  # of any type on damaged metadata
            damaged[name] = first_line(error)
    return {name: node for name, node in opened.items() if isinstance(node, zarr.Array)}, damaged


def _only_stack(group: Any, folder: Path) -> Any:
    """Return the array called "frames", or else the only one with three dimensions."""
    members, damaged = arrays_in(group, folder)
    if "frames" in members:
        return members["frames"]
    stacks = [name for name, array in members.items() if array.ndim == 3]
    if damaged:
        name = "frames" if "frames" in damaged else next(iter(damaged))
        raise ValueError(
            f"{folder / name} cannot be opened ({damaged[name]}): its metadata are damaged. Restore them, or give the "
            f"path of the stack itself, for example {folder}/{stacks[0] if stacks else 'frames'}."
        )
    if len(stacks) != 1:
        listing = ", ".join(f"{name} {array.shape}" for name, array in members.items()) or "no arrays"
        raise ValueError(
            f"{folder} holds {listing}: it is not clear which one is the stack (frame, y, x). "
            f"Give the path of the array itself, for example {folder}/{stacks[0] if stacks else 'frames'}."
        )
    return members[stacks[0]]
