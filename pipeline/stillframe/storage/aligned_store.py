"""The store of aligned frames: ``frames`` (frame, y, x), one frame a chunk and one unit a shard, and ``applied``.

The driver writes metadata and coordinates before any worker starts; workers write whole shards, one each.
"""

import shutil
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xarray as xr
import zarr
from zarr.buffer.cpu import Buffer
from zarr.storage import MemoryStore

from stillframe.images.resample import check_fill, output_dtype
from stillframe.options import Interpolation
from stillframe.partition import Unit
from stillframe.storage.checksums import Checksum
from stillframe.storage.durable import sync_folder, sync_tree, write_draft
from stillframe.storage.zarr_files import codec, decoding_metadata, replace_files, set_attributes, write_partial


@dataclass(frozen=True)
class AlignedLayout:
    """How aligned frames are made and stored."""

    shape: tuple[int, ...]
    """(frame, y, x)."""
    dtype: np.dtype[Any]
    """Of the stored pixels."""
    unit_frames: int
    """Frames of a shard; a chunk holds one frame."""
    interpolation: Interpolation
    """How frames were moved."""
    fill: float
    """Value of pixels for which nothing was observed."""

    @classmethod
    def of(
        cls,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        unit_frames: int,
        interpolation: Interpolation,
        fill: float | None,
    ) -> "AlignedLayout":
        """Return the layout for frames of a dtype; without a fill value, the default one of the output's dtype."""
        stored = output_dtype(dtype, interpolation)
        return cls(shape, stored, min(unit_frames, shape[0]), interpolation, check_fill(fill, stored))

    @property
    def attributes(self) -> dict[str, Any]:
        """Attributes of the array, for any reader."""
        fill = "NaN" if np.isnan(self.fill) else self.fill
        return {"long_name": "frames aligned with the reference", "interpolation": self.interpolation, "fill": fill}

    @property
    def encoding(self) -> dict[str, Any]:
        """Layout of the array, as Zarr's arguments and as xarray's encoding."""
        return {
            "chunks": (1, *self.shape[1:]),
            "shards": (self.unit_frames, *self.shape[1:]),
            "compressors": (codec(),),
            "fill_value": self.dtype.type(self.fill),
        }

    def create(self, store: Path, coordinates: Sequence[str]) -> None:
        """Create the array in an existing group, without any chunk."""
        zarr.create_array(
            store / "frames",
            shape=self.shape,
            dtype=self.dtype,
            dimension_names=("frame", "y", "x"),
            attributes=self.attributes | ({"coordinates": " ".join(sorted(coordinates))} if coordinates else {}),
            **self.encoding,
        )


def create_aligned(
    shifts: xr.Dataset,
    layout: AlignedLayout,
    path: Path,
    units: Sequence[Unit],
    missing: Sequence[Unit],
    forget: Callable[[], None],
) -> bool:
    """Write all of the aligned store but pixels; return True if earlier shards have this layout and are kept.

    An existing store is marked incomplete first and then changed file by file, its root last: a kill at any moment
    loses no valid shard, and leaves no store that looks complete. Shards of no unit are removed; ``missing`` units have
    no valid aligned frames. ``forget`` withdraws the records of all aligned units, before shards of another layout are
    removed.
    """
    partial = write_partial(
        _coordinates(shifts, layout, missing),
        path,
        lambda store: layout.create(store, [str(name) for name in shifts.coords if shifts[name].dims == ("frame",)]),
    )
    same = _stored_layout(path) == _stored_layout(partial)
    if not same:
        for store in (partial, path):
            set_attributes(store, complete=False, missing=[str(unit) for unit in units])
        forget()
        shutil.rmtree(path / "frames", ignore_errors=True)
    if not path.exists():
        partial.rename(path)
        sync_folder(path.parent)
        return False
    set_attributes(path, complete=False)
    replace_files(partial, path)
    for stray in stray_shards(path, len(units)):
        shutil.rmtree(stray)
    return same


def _coordinates(shifts: xr.Dataset, layout: AlignedLayout, missing: Sequence[Unit]) -> xr.Dataset:
    """Return the dataset that the store holds beside the frames."""
    whole = layout.interpolation == "nearest"
    applied = (shifts["shift"].round() if whole else shifts["shift"]).assign_attrs(
        units="pixel", long_name="shift applied to the frame"
    )
    state = {"complete": False, "missing": [str(unit) for unit in missing]}
    return xr.Dataset({"applied": applied}, attrs=shifts.attrs | state)


def mark_incomplete(path: Path) -> None:
    """Mark a store of aligned frames as incomplete, if it exists."""
    set_attributes(path, complete=False)


def stray_shards(store: Path, units: int) -> list[Path]:
    """Return the shards of frames whose number is that of no unit."""
    numbers = {str(number) for number in range(units)}
    return sorted(path for path in (store / "frames" / "c").glob("*") if path.name not in numbers)


def _stored_layout(store: Path) -> dict[str, Any] | None:
    """Return the metadata that decide how frames are decoded; None if there are none, or if they are damaged."""
    try:
        return decoding_metadata((store / "frames" / "zarr.json").read_text())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def finish_aligned(path: Path, missing: Sequence[Unit], *, growing: bool = False) -> None:
    """Mark the aligned store complete, or name the missing units and set their applied shifts to NaN.

    A store that still grows is not complete.
    """
    if missing:
        applied = zarr.open_array(path / "applied", mode="r+")
        for unit in missing:
            applied[unit.start : unit.stop] = np.nan
        sync_tree(path / "applied")
    set_attributes(path, complete=not (missing or growing), missing=[str(unit) for unit in missing])


@dataclass(frozen=True)
class Draft:
    """An encoded shard, durable under a temporary name until it is moved into the store."""

    file: Path
    """Temporary file."""
    store: Path
    """Folder of the store."""
    name: str
    """Path of the shard, relative to the store."""
    checksum: Checksum
    """Size and checksum of its content."""

    def put_in_place(self) -> None:
        """Move the shard into the store, in one step and durably."""
        home = self.store / self.name
        home.parent.mkdir(parents=True, exist_ok=True)
        self.file.replace(home)
        for folder in home.relative_to(self.store).parents:
            sync_folder(self.store / folder)

    def discard(self) -> None:
        """Remove the temporary file if it was not moved into the store."""
        self.file.unlink(missing_ok=True)


def draft_unit(path: Path, unit: Unit, frames: npt.NDArray[Any], drafts: Path) -> Draft:
    """Encode one whole shard of aligned frames and write it durably beside the store.

    The shard is encoded in memory: of a last shard with fewer frames, Zarr would first read the version on disk.
    """
    memory: dict[str, Any] = {"zarr.json": Buffer.from_bytes((path / "frames" / "zarr.json").read_bytes())}
    array = zarr.open_array(MemoryStore(memory), mode="r+").with_config({"write_empty_chunks": True})
    array[unit.start : unit.stop] = frames
    key = array.metadata.encode_chunk_key((unit.number, 0, 0))
    content = np.ascontiguousarray(memory[key].as_numpy_array()).data
    file = drafts / f"{unit.number:06d}.{uuid.uuid4().hex}"
    write_draft(file, content)
    return Draft(file, path, f"frames/{key}", Checksum.of_content(content))
