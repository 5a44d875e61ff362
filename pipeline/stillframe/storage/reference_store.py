"""Storage of a reference: written once, loaded and prepared once per process."""

import functools
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xarray as xr

from stillframe.errors import OtherVersion
from stillframe.registration.prepared_reference import prepare
from stillframe.registration.reference import Reference
from stillframe.storage.shifts_store import provenance, refuse_newer_store
from stillframe.storage.zarr_files import replace_files, write_dataset, write_partial

_ARRAYS = ("image", "mask", "frame_mask")
_CORRECTIONS = ("dark", "flat")
"""Arrays that are stored only where a reference has them."""

_REFERENCE_LOCK = threading.Lock()


def save_reference(
    reference: Reference, path: str | Path, *, mend: bool = False, origin: Mapping[str, Any] | None = None
) -> "ReferenceFile":
    """Write a reference to a Zarr group and return a small handle that can be sent to workers.

    Parameters
    ----------
    reference : Reference
        Reference to save.
    path : str or Path
        Folder to write; an existing one is replaced. All workers must have access to it.
    mend : bool
        Whether this reference is stored there already. Its files are then replaced one by one, so that it can be read
        at any time.
    origin : mapping, optional
        What the reference was made from, kept as an attribute; no shift depends on it.

    Returns
    -------
    ReferenceFile
        Path and hash; :func:`stillframe.register` accepts it in place of the reference.
    """
    folder = Path(path).expanduser().absolute()
    attributes = provenance(reference) | {
        "options": reference.options.model_dump(),
        "noise": reference.noise and list(reference.noise),
        "smoothing": reference.smoothing,
        "against_scatter": reference.against_scatter or None,
        "origin": origin,
    }
    arrays = {name: getattr(reference, name) for name in (*_ARRAYS, *_CORRECTIONS)}
    image = xr.Dataset(
        {name: (("y", "x"), array) for name, array in arrays.items() if array is not None},
        attrs={name: value for name, value in attributes.items() if value is not None},
    )
    if mend:
        replace_files(write_partial(image, folder), folder)
    else:
        write_dataset(image, folder)
    return ReferenceFile(folder, reference.digest)


def load_reference(path: str | Path) -> Reference:
    """Read a reference that :func:`save_reference` or a run wrote.

    Raises
    ------
    ValueError
        The path is no such group, or a newer version of this package wrote it.
    """
    try:
        with xr.open_zarr(path, chunks=None, consolidated=False) as stored:
            refuse_newer_store(Path(path), stored.attrs)
            image, mask, frame_mask = (stored[name].values for name in _ARRAYS)
            corrections = {name: stored[name].values for name in _CORRECTIONS if name in stored}
            options = {name: stored.attrs.get(name) for name in ("noise", "smoothing")} | stored.attrs["options"]
            options["against_scatter"] = bool(stored.attrs.get("against_scatter"))
            history = stored.attrs.get("reference_history", "")
            return Reference(image, mask, frame_mask=frame_mask, history=history, **corrections, **options)
    except OtherVersion:
        raise
    except Exception as error:  # damaged metadata, chunks and attributes raise errors of many kinds
        why = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} is not a stored reference ({why}). Make one with save_reference.") from error


@dataclass(frozen=True)
class ReferenceFile:
    """A stored reference, named by path and hash; loaded and prepared once per process."""

    path: Path
    """Folder of the reference."""
    digest: str
    """Hash of the reference when it was stored."""

    def load(self) -> Reference:
        """Return the reference, prepared for registration; safe to call from several threads."""
        with _REFERENCE_LOCK:
            return _loaded(self.path, self.digest)


@functools.lru_cache(maxsize=2)
def _loaded(path: Path, digest: str) -> Reference:
    reference = load_reference(path)
    if reference.digest != digest:
        raise ValueError(f"{path} is no longer the reference this run began with. Start the run again.")
    prepare(reference)
    return reference
