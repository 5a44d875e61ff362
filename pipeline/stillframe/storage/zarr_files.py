"""Write Zarr stores whole and durably, or change them file by file."""

import base64
import contextlib
import json
import math
import shutil
import struct
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import xarray as xr
import zarr
from zarr.codecs import BloscCodec

from stillframe.storage.durable import make_folder, store_files, sync_folder, sync_tree, write_durably


def codec() -> BloscCodec:
    """Return the compression of pixels: fast, and effective on counts."""
    return BloscCodec(cname="lz4", clevel=5, shuffle="bitshuffle")


def write_dataset(dataset: xr.Dataset, path: Path) -> None:
    """Write a dataset durably under a temporary name, then put it in place of an older one."""
    partial = write_partial(dataset, path)
    shutil.rmtree(path, ignore_errors=True)
    partial.rename(path)
    sync_folder(path.parent)


def write_partial(dataset: xr.Dataset, path: Path, add: Callable[[Path], None] | None = None) -> Path:
    """Write a dataset durably under a temporary name and return it; ``add`` may add arrays to the store."""
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    with quiet_zarr():
        dataset.to_zarr(partial, zarr_format=3, consolidated=add is None)
        if add:
            add(partial)
            zarr.consolidate_metadata(partial)
    sync_tree(partial)
    return partial


def decoding_metadata(content: str) -> dict[str, Any]:
    """Return the metadata of an array that decide how chunks are decoded; attributes and number of frames do not."""
    metadata = json.loads(content)
    kept = metadata.keys() - {"attributes", "consolidated_metadata"}
    return {name: metadata[name] for name in sorted(kept)} | {"shape": metadata["shape"][1:]}


def set_attributes(path: Path, **attributes: Any) -> None:
    """Change attributes of the root of a store; do nothing if the root cannot be read."""
    root = path / "zarr.json"
    try:
        metadata = json.loads(root.read_text())
        metadata["attributes"] |= attributes
    except (OSError, ValueError, KeyError, TypeError):
        return
    write_durably(root, json.dumps(metadata, indent=2).encode())


def replace_files(source: Path, target: Path) -> None:
    """Move every file of a store to its place in another store, root metadata last.

    Other files of the target are removed, and then the source. Chunks of the target's array ``frames`` are not removed.
    """
    names = sorted(file.relative_to(source) for file in source.rglob("*") if file.is_file())
    for file in list(store_files(target)):
        if file.relative_to(target) not in names:
            file.unlink()
    for name in sorted(names, key=lambda name: name == Path("zarr.json")):
        make_folder((target / name).parent)
        (source / name).replace(target / name)
        sync_folder((target / name).parent)
    shutil.rmtree(source)


@contextlib.contextmanager
def quiet_zarr() -> Iterator[None]:
    """Silence Zarr's warnings about consolidated metadata and strings: xarray and Zarr read both."""
    with warnings.catch_warnings():
        for text in ("Consolidated metadata is currently not", "The codec `vlen-utf8`", "The data ?type"):
            warnings.filterwarnings("ignore", message=text)
        yield


def refuse_encoded(array: zarr.Array[Any], where: str | Path) -> None:
    """Raise ``ValueError`` if the stored numbers of an array are not its pixels: packed, or with a value for "missing".

    Source: CF conventions 1.11, sections 2.5.1 and 8.1; xarray stores the value as ``_FillValue``, in Zarr v2 as the
    array's own fill value.
    """
    attributes = dict(array.attrs)
    usual = {"scale_factor": 1, "add_offset": 0}
    changed = [f"{name} = {attributes[name]}" for name in usual if attributes.get(name, usual[name]) != usual[name]]
    if str(attributes.get("_Unsigned", "false")).lower() == "true" and array.dtype.kind == "i":
        changed.append("_Unsigned = true")
    changed += [
        f"{name} = {value:g}" for name, value in _missing_values(array, attributes) if _stands_for_counts(value)
    ]
    if changed:
        raise ValueError(
            f"{where} is stored encoded ({', '.join(changed)}): its numbers are not counts, or one of them means that "
            "a pixel is missing. Write the decoded frames once, for example with "
            "xarray.open_zarr(...).astype('float32').drop_encoding().to_zarr(...). If the attribute is wrong, or no "
            "pixel has that value, remove it."
        )


def _missing_values(array: zarr.Array[Any], attributes: dict[str, Any]) -> Iterator[tuple[str, float | None]]:
    """Yield the values that mean a missing pixel, with the name of their attribute."""
    for name in ("_FillValue", "missing_value"):
        stored = attributes.get(name)
        yield from ((name, _number(one)) for one in (stored if isinstance(stored, list) else [stored]))
    if array.metadata.zarr_format == 2 and "_ARRAY_DIMENSIONS" in attributes:
        yield "_FillValue", _number(array.fill_value)


def _number(stored: Any) -> float | None:
    """Return an attribute as a number; xarray stores those of floats in Zarr v3 as base64. None if it is none."""
    try:
        if isinstance(stored, str):
            return float(struct.unpack("<d", base64.b64decode(stored, validate=True))[0])
        return None if stored is None else float(stored)
    except (TypeError, ValueError, struct.error):
        return None


def _stands_for_counts(value: float | None) -> bool:
    """Return whether a missing pixel would be taken for counts; 0 is no count either way, and NaN is recognised."""
    return value is not None and math.isfinite(value) and value != 0
