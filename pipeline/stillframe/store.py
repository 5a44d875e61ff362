"""What a run writes: the dataset of shifts, the aligned frames, the reference. Plain Zarr v3 that xarray opens."""

import contextlib
import functools
import json
import os
import shutil
import threading
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xarray as xr
import zarr
from zarr.buffer.cpu import Buffer
from zarr.codecs import BloscCodec
from zarr.storage import MemoryStore

import stillframe
from stillframe.durable import Seal, make_folder, sync_folder, sync_tree, write_draft, write_durably
from stillframe.errors import NewerVersion
from stillframe.flags import cf_attributes
from stillframe.match import KERNEL_VERSION
from stillframe.noise import Noise
from stillframe.reference import Reference
from stillframe.units import Unit

FORMAT_VERSION = 1
AXES = np.array(["y", "x"], dtype=object)

_SHIFT = {
    "units": "pixel",
    "comment": "to be applied to the frame, out(p) = frame(p - shift); axis order (y, x)",
}
_ATTRIBUTES: Mapping[str, dict[str, Any]] = {
    "shift": {"long_name": "shift that lays the frame on the reference", **_SHIFT},
    "sigma": {"long_name": "standard error of the shift", "units": "pixel"},
    "covariance": {"long_name": "covariance of the errors along y and x", "units": "pixel2"},
    "score": {"long_name": "masked normalized cross-correlation at the peak", "units": "1"},
    "second_score": {
        "long_name": "highest masked normalized cross-correlation away from the peak",
        "units": "1",
    },
    "overlap": {"long_name": "part of the reference's valid pixels valid in both", "units": "1"},
    "intensity": {"long_name": "mean of the frame's valid pixels", "units": "count"},
}
_REFERENCE_LOCK = threading.Lock()


def codec() -> BloscCodec:
    """Return how pixels are compressed: fast, and good on counts."""
    return BloscCodec(cname="lz4", clevel=5, shuffle="bitshuffle")


def shifts_dataset(matches: Any, coordinates: xr.Dataset, reference: Reference) -> xr.Dataset:
    """Label the kernel's result: the same dataset from NumPy or dask arrays.

    Parameters
    ----------
    matches : array of MATCH_DTYPE, shape (frame,)
        NumPy or dask.
    coordinates : Dataset
        Variables of dimension frame that come along.
    reference : Reference
        Rides along, so that the dataset is complete by itself.
    """
    pair = ("frame", "axis")
    variables: dict[str, Any] = {
        "shift": (pair, np.stack([matches["dy"], matches["dx"]], axis=1)),
        "sigma": (pair, np.stack([matches["sigma_y"], matches["sigma_x"]], axis=1)),
        "covariance": ("frame", matches["cov_yx"]),
    }
    variables |= {name: ("frame", matches[name]) for name in ("score", "second_score", "overlap", "intensity")}
    labelled = {name: (*value, _ATTRIBUTES[name]) for name, value in variables.items()}
    labelled["flag"] = ("frame", matches["flag"], {"long_name": "why a shift is missing", **cf_attributes()})
    labelled["reference"] = (("y", "x"), reference.image, {"long_name": "image every frame is laid on"})
    labelled["mask"] = (("y", "x"), reference.frame_mask, {"long_name": "valid pixels of the detector"})
    named = {name: coordinates[name].variable for name in coordinates.variables}
    return xr.Dataset(labelled, {**named, "axis": ("axis", AXES)}, provenance(reference))


def provenance(reference: Reference) -> dict[str, Any]:
    """Return where numbers come from; no clock in it, so that equal runs give equal bytes."""
    return {
        "Conventions": "CF-1.11",
        "source": f"stillframe {stillframe.__version__}",
        "format_version": FORMAT_VERSION,
        "kernel_version": KERNEL_VERSION,
        "reference_sha256": reference.digest,
        "reference_history": reference.history,
        "max_shift": reference.max_shift,
        "overlap_ratio": reference.overlap_ratio,
    }


def write_dataset(dataset: xr.Dataset, path: Path) -> None:
    """Write a dataset whole: under another name first, durable, then in place of an older one."""
    partial = _partial(dataset, path)
    shutil.rmtree(path, ignore_errors=True)
    partial.rename(path)
    sync_folder(path.parent)


def _partial(dataset: xr.Dataset, path: Path, *, compute: bool = True) -> Path:
    """Write a dataset durably under another name and return it."""
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    with quiet_zarr():
        dataset.to_zarr(partial, zarr_format=3, consolidated=True, compute=compute)  # type: ignore[call-overload]
    sync_tree(partial)
    return partial


def create_aligned(dataset: xr.Dataset, path: Path, units: Sequence[Unit], forget: Callable[[], None]) -> bool:
    """Write all of the aligned store but the pixels, and tell whether there are some that mean the same and stay.

    If not, all units are marked as missing and what is recorded of them is forgotten, by a call, before they go.
    Shards of other units go too.

    File by file, the root last and marked incomplete before the first: whenever this is killed, no shard that counts
    is lost and nothing passes for finished.
    """
    partial = _partial(dataset, path, compute=False)
    same = _layout(path) == _layout(partial)
    if not same:
        for store in (partial, path):
            _mark(store, complete=False, missing=[str(unit) for unit in units])
        forget()
        shutil.rmtree(path / "frames", ignore_errors=True)
    if not path.exists():
        partial.rename(path)
        sync_folder(path.parent)
        return False
    _mark(path, complete=False)
    _replace_files(partial, path)
    for strange in strange_shards(path, len(units)):
        shutil.rmtree(strange)
    shutil.rmtree(partial)
    return same


def mark_incomplete(path: Path) -> None:
    """Let a store of aligned frames, where there is one, not pass for finished."""
    _mark(path, complete=False)


def _mark(path: Path, **attributes: Any) -> None:
    """Change attributes of the root of a store, if it has one that can be understood."""
    root = path / "zarr.json"
    try:
        metadata = json.loads(root.read_text())
        metadata["attributes"] |= attributes
    except (OSError, ValueError, KeyError, TypeError):
        return
    write_durably(root, json.dumps(metadata, indent=2).encode())


def _replace_files(source: Path, target: Path) -> None:
    """Move every file of a tree to its place in another, the root's metadata last; remove what is left over there."""
    names = sorted(file.relative_to(source) for file in source.rglob("*") if file.is_file())
    for file in list(store_files(target)):
        if file.relative_to(target) not in names:
            file.unlink()
    for name in sorted(names, key=lambda name: name == Path("zarr.json")):
        make_folder((target / name).parent)
        (source / name).replace(target / name)
        sync_folder((target / name).parent)


def store_files(path: Path) -> Iterator[Path]:
    """Yield every file of a store but the shards of frames, of which there are many and which records speak of."""
    for home, folders, names in os.walk(path):
        if Path(home) == path / "frames":
            folders[:] = [name for name in folders if name != "c"]
        folders.sort()
        yield from (file for name in sorted(names) if (file := Path(home) / name).is_file())


def strange_shards(store: Path, units: int) -> list[Path]:
    """Return what lies among the shards of frames and belongs to none of so many units."""
    shards = store / "frames" / "c"
    known = {str(number) for number in range(units)}
    return sorted(path for path in shards.glob("*") if path.name not in known)


def _layout(store: Path) -> dict[str, Any] | None:
    """Return what decides how chunks of frames are to be read; the number of frames does not."""
    try:
        metadata: dict[str, Any] = json.loads((store / "frames" / "zarr.json").read_text())
        return {name: value for name, value in metadata.items() if name != "attributes"} | {
            "shape": metadata["shape"][1:]
        }
    except (OSError, ValueError, KeyError, TypeError):
        return None


def seal_aligned(path: Path, holes: Sequence[Unit], *, growing: bool = False) -> None:
    """Mark the aligned store complete, or say which frames were never written and take back their shifts.

    One to which frames are still going to be added is not complete.
    """
    if holes:
        applied = zarr.open_array(path / "applied", mode="r+")
        for unit in holes:
            applied[unit.start : unit.stop] = np.nan
        sync_tree(path / "applied")
    _mark(path, complete=not (holes or growing), missing=[str(unit) for unit in holes])


@contextlib.contextmanager
def quiet_zarr() -> Iterator[None]:
    """Silence what Zarr says of consolidated metadata and of strings, which every reader we know opens."""
    with warnings.catch_warnings():
        for text in ("Consolidated metadata is currently not", "The codec `vlen-utf8`", "The data ?type"):
            warnings.filterwarnings("ignore", message=text)
        yield


def save_reference(reference: Reference, path: str | Path, *, mend: bool = False) -> "ReferenceFile":
    """Write a reference to a Zarr group and return a handle that is small to send to workers.

    Parameters
    ----------
    reference : Reference
        What to save.
    path : str or Path
        Folder to write, replacing one that is there; all workers must see it.
    mend : bool
        Whether the same reference is there already, so that its files are replaced one by one, and it is there at any
        time.

    Returns
    -------
    ReferenceFile
        Path and hash; :func:`stillframe.register` takes it in place of the reference.
    """
    folder = Path(path).expanduser().absolute()
    attributes = provenance(reference) | {
        "saturation": reference.saturation,
        "weights": reference.weights,
        "noise": reference.noise and list(reference.noise),
        "smoothing": reference.smoothing,
        "subpixel": int(reference.subpixel),
    }
    image = xr.Dataset(
        {name: (("y", "x"), getattr(reference, name)) for name in ("image", "mask", "frame_mask")},
        attrs={name: value for name, value in attributes.items() if value is not None},
    )
    if mend:
        _replace_files(partial := _partial(image, folder), folder)
        shutil.rmtree(partial)
    else:
        write_dataset(image, folder)
    return ReferenceFile(folder, reference.digest)


def load_reference(path: str | Path) -> Reference:
    """Read a reference that :func:`save_reference` or a run wrote.

    Raises
    ------
    ValueError
        Not such a group, or of a format this version does not know.
    """
    try:
        with xr.open_zarr(path, chunks=None, consolidated=False) as stored:
            refuse_newer_store(Path(path), stored.attrs)
            return _reference(stored.attrs, *(stored[name].values for name in ("image", "mask", "frame_mask")))
    except NewerVersion:
        raise
    except Exception as error:  # whatever damaged metadata, chunks and attributes make Zarr and numbers raise
        why = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} is not a stored reference ({why}). Make one with save_reference.") from error


def refuse_newer_store(path: Path, attributes: Mapping[str, Any]) -> None:
    """Raise ``NewerVersion`` if the attributes of a store tell of a format that this package does not know."""
    version = attributes.get("format_version", FORMAT_VERSION)
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise NewerVersion(
            f"{path} has format_version {version}, and this stillframe knows up to {FORMAT_VERSION}: a newer one wrote "
            "it. Use that one, or another folder; nothing was changed."
        )


def _reference(attributes: Mapping[str, Any], image: Any, mask: Any, frame_mask: Any) -> Reference:
    return Reference(
        image,
        mask,
        max_shift=int(attributes["max_shift"]),
        overlap_ratio=float(attributes["overlap_ratio"]),
        saturation=attributes.get("saturation"),
        frame_mask=frame_mask,
        weights=attributes["weights"],
        noise=Noise(*attributes["noise"]) if "noise" in attributes else None,
        smoothing=attributes.get("smoothing"),
        subpixel=bool(attributes["subpixel"]),
        history=attributes.get("reference_history", ""),
    )


@dataclass(frozen=True)
class ReferenceFile:
    """A stored reference, named by path and hash; loaded and prepared once per process."""

    path: Path
    """Folder of the reference."""
    digest: str
    """Hash it must have."""

    def load(self) -> Reference:
        """Return the reference, ready to be compared with; safe to call from several threads."""
        with _REFERENCE_LOCK:
            return _loaded(self.path, self.digest)


@functools.lru_cache(maxsize=2)
def _loaded(path: Path, digest: str) -> Reference:
    reference = load_reference(path)
    if reference.digest != digest:
        raise ValueError(f"{path} is no longer the reference this run began with. Start the run again.")
    reference.prepare()
    return reference


def aligned_encoding(shape: tuple[int, ...], unit_frames: int, fill: float, dtype: np.dtype[Any]) -> dict[str, Any]:
    """Return the layout of aligned frames: one frame a chunk, one unit a shard."""
    height, width = shape[1:]
    return {
        "chunks": (1, height, width),
        "shards": (unit_frames, height, width),
        "compressors": (codec(),),
        "fill_value": dtype.type(fill),
        "write_empty_chunks": True,
    }


@dataclass(frozen=True)
class Draft:
    """An encoded shard, durable under a name of its own until it gets its place."""

    file: Path
    """Where it lies."""
    store: Path
    """The store it belongs to."""
    name: str
    """Its place in the store."""
    seal: Seal
    """How it looks."""

    def put_in_place(self) -> None:
        """Let the store have it, in one step, durably."""
        home = self.store / self.name
        home.parent.mkdir(parents=True, exist_ok=True)
        self.file.replace(home)
        for folder in home.relative_to(self.store).parents:
            sync_folder(self.store / folder)

    def discard(self) -> None:
        """Remove it, if it did not get its place."""
        self.file.unlink(missing_ok=True)


def draft_unit(path: Path, unit: Unit, frames: npt.NDArray[Any], drafts: Path) -> Draft:
    """Encode one whole shard of the aligned frames and keep it durably aside.

    It is encoded in memory: a partly covered last shard that is there already is never read before it is written.
    """
    memory: dict[str, Any] = {"zarr.json": Buffer.from_bytes((path / "frames" / "zarr.json").read_bytes())}
    array = zarr.open_array(MemoryStore(memory), mode="r+").with_config({"write_empty_chunks": True})
    array[unit.start : unit.stop] = frames
    key = array.metadata.encode_chunk_key((unit.number, 0, 0))
    content = np.ascontiguousarray(memory[key].as_numpy_array()).data
    file = drafts / f"{unit.number:06d}.{uuid.uuid4().hex}"
    write_draft(file, content)
    return Draft(file, path, f"frames/{key}", Seal.of_content(content))
