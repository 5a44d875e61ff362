"""What a run writes: the dataset of shifts, the aligned frames, the reference. Plain Zarr v3 that xarray opens."""

import contextlib
import functools
import json
import shutil
import threading
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xarray as xr
import zarr
from zarr.codecs import BloscCodec

import stillframe
from stillframe.flags import cf_attributes
from stillframe.match import KERNEL_VERSION
from stillframe.noise import Noise
from stillframe.records import Seal, sync_file, sync_folder, write_durably
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


def write_dataset(dataset: xr.Dataset, path: Path, *, compute: bool = True) -> None:
    """Write a dataset whole: under another name first, durable, then in place of an older one.

    With ``compute=False`` lazy variables get their metadata only; chunks of ``frames`` that an older store of the
    same layout holds are kept.
    """
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    with quiet_zarr():
        dataset.to_zarr(partial, zarr_format=3, consolidated=True, compute=compute)  # type: ignore[call-overload]
    sync_tree(partial)
    if not compute and _layout(path) == _layout(partial) and (path / "frames" / "c").exists():
        (path / "frames" / "c").rename(partial / "frames" / "c")
    shutil.rmtree(path, ignore_errors=True)
    partial.rename(path)
    sync_folder(path.parent)


def _layout(store: Path) -> dict[str, Any] | None:
    """Return what decides how chunks of frames are to be read."""
    try:
        metadata: dict[str, Any] = json.loads((store / "frames" / "zarr.json").read_text())
    except (OSError, ValueError):
        return None
    return {name: value for name, value in metadata.items() if name != "attributes"}


def seal_aligned(path: Path, holes: list[Unit]) -> None:
    """Mark the aligned store complete, or say which frames were never written and take back their shifts."""
    if holes:
        applied = zarr.open_array(path / "applied", mode="r+")
        for unit in holes:
            applied[unit.start : unit.stop] = np.nan
    root = path / "zarr.json"
    metadata = json.loads(root.read_text())
    metadata["attributes"] |= {"complete": not holes, "missing": [str(unit) for unit in holes]}
    write_durably(root, json.dumps(metadata, indent=2).encode())


@contextlib.contextmanager
def quiet_zarr() -> Iterator[None]:
    """Silence what Zarr says of consolidated metadata and of strings, which every reader we know opens."""
    with warnings.catch_warnings():
        for text in ("Consolidated metadata is currently not", "The codec `vlen-utf8`", "The data ?type"):
            warnings.filterwarnings("ignore", message=text)
        yield


def sync_tree(folder: Path) -> None:
    """Make every file and name below a folder durable."""
    for path in sorted(folder.rglob("*")):
        (sync_folder if path.is_dir() else sync_file)(path)
    sync_folder(folder)


def save_reference(reference: Reference, path: str | Path) -> "ReferenceFile":
    """Write a reference to a Zarr group and return a handle that is small to send to workers.

    Parameters
    ----------
    reference : Reference
        What to save.
    path : str or Path
        Folder to write, replacing one that is there; all workers must see it.

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
            version, attributes = stored.attrs["format_version"], stored.attrs
            image, mask, frame_mask = (stored[name].values for name in ("image", "mask", "frame_mask"))
    except Exception as error:
        raise ValueError(f"{path} is not a stored reference ({error}). Make one with save_reference.") from error
    if version != FORMAT_VERSION:
        raise ValueError(f"{path} has format {version}, this is format {FORMAT_VERSION}. Update stillframe.")
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


def write_unit(path: Path, unit: Unit, frames: npt.NDArray[Any]) -> dict[str, Seal]:
    """Write one whole shard of the aligned frames durably and return the seal of its file, by its path.

    The file is removed first: a partly covered last shard would otherwise be read before it is written.
    """
    array = zarr.open_array(path / "frames", mode="r+").with_config({"write_empty_chunks": True})
    file = path / "frames" / array.metadata.encode_chunk_key((unit.number, 0, 0))
    if file.parent.exists():
        for old in file.parent.glob(f"{file.name}*"):
            old.unlink()
    array[unit.start : unit.stop] = frames
    sync_file(file)
    for folder in file.relative_to(path).parents:
        sync_folder(path / folder)
    return {str(file.relative_to(path.parent)): Seal.of(file)}
