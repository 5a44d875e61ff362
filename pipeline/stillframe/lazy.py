"""Frames, shifts and aligned frames as lazy xarray objects; the only module that builds dask graphs.

Building a graph reads metadata and coordinates, never a pixel. ``map_blocks`` calls the kernel once for each block of
whole frames. The reference is one node of the graph (or, once stored, a path and a hash), so that it is sent once to
each worker and not with every block.
"""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import numpy.typing as npt
import xarray as xr
from dask.base import tokenize
from dask.delayed import delayed

from stillframe.images.arrays import as_mask, require_real
from stillframe.images.resample import check_interpolation, resample_frames
from stillframe.options import Interpolation, MissingChunks
from stillframe.partition import TARGET_BYTES, make_plan
from stillframe.registration.build_reference import build_reference
from stillframe.registration.match import match_frames
from stillframe.registration.matches import MATCH_DTYPE, Matches
from stillframe.registration.reference import Reference
from stillframe.registration.reference_frames import BATCH, Read, frames_of_kind
from stillframe.storage.aligned_store import AlignedLayout
from stillframe.storage.checksums import fingerprint
from stillframe.storage.coordinates import frame_coordinates
from stillframe.storage.frames import open_source
from stillframe.storage.reference_store import ReferenceFile
from stillframe.storage.shifts_store import shifts_dataset
from stillframe.wording import frame_range

__all__ = ["align", "make_reference", "open_frames", "register"]

_UNLIMITED = 2**50
"""Memory of a worker, bytes, where memory must not decide how a stack is cut."""


def open_frames(
    path: str | Path, *, chunk_frames: int | None = None, missing_chunks: MissingChunks = "report"
) -> xr.DataArray:
    """Open a stack of frames lazily.

    Parameters
    ----------
    path : str or Path
        A Zarr array (frame, y, x), v2 or v3, or a group with an array "frames" or with only one stack.
    chunk_frames : int, optional
        Frames of a block; by default those of a unit, as a run would cut the stack.
    missing_chunks : {"report", "fill"}
        Whether reading a chunk without a file raises an error, or gives the array's fill value.

    Returns
    -------
    DataArray, dims (frame, y, x)
        Lazy; with the coordinates stored beside the frames (time, scan, delay, kind…).

    Raises
    ------
    FileNotFoundError, TypeError, ValueError
        The path does not exist, pixels are not real numbers, or there is no stack (frame, y, x), or several.

    Examples
    --------
    >>> import numpy as np, tempfile, zarr
    >>> path = tempfile.mkdtemp() + "/frames.zarr"
    >>> zarr.save_array(path, np.ones((10, 64, 64), np.uint16))
    >>> open_frames(path).sizes["frame"]
    10
    """
    source = open_source(path, missing_chunks=missing_chunks)
    plan = make_plan(source.layout, budget=_UNLIMITED, output_itemsize=source.dtype.itemsize, max_shift=0)
    size = chunk_frames or plan.unit_frames
    name = f"frames-{fingerprint({'path': source.path, 'metadata': source.stored_metadata(), 'chunk': size})}"
    meta = np.empty((0, 0, 0), source.dtype)
    data = da.from_array(source, chunks=(size, -1, -1), name=name, asarray=False, meta=meta)
    attributes = {"long_name": "detector frames", "units": "count"}
    return xr.DataArray(data, frame_coordinates(source).variables, ("frame", "y", "x"), "frames", attributes)


def make_reference(
    frames: xr.DataArray | npt.ArrayLike,
    mask: npt.ArrayLike | None = None,
    *,
    use: int | slice | None = None,
    iterations: int = 3,
    detector_map: bool = True,
    kind: str | None = None,
    max_shift: int = 32,
    overlap_ratio: float = 0.3,
    saturation: float | None = None,
    dark: npt.ArrayLike | None = None,
    flat: npt.ArrayLike | None = None,
) -> Reference:
    """Make the reference, the image that all frames are shifted to match; reads the frames that it needs at once.

    Parameters
    ----------
    frames : DataArray or array_like
        A stack (frame, y, x) as recorded, lazy or not; or an image (y, x) of any origin, which becomes the reference
        unchanged: with ``dark`` or ``flat`` it must be corrected already.
    mask : array_like of bool, shape (y, x), optional
        True = valid.
    use : int or slice, optional
        One frame, or frames to average; dark, corrupt and saturated frames are left out of an average. By default
        16 usable frames that are spread over the stack, or all frames of a shorter one: what stays where it is on the
        detector is smeared out of their aligned mean.
    iterations : int
        Largest number of rounds. Each round registers those frames and takes the mean of the aligned frames as the
        new reference; rounds end when the reference stops moving. Frames without a shift are left out, and so are
        pixels that differ by more than noise can. With 0 the reference is the plain mean, by default of 16 neighbours
        in the middle of the stack, smeared by their drift.
    detector_map : bool
        Whether pixels that do not follow the pattern, as the frames drift, are left out, and gains and offsets of the
        others corrected where that matters: see :mod:`~stillframe.registration.detector_map`. They become part of
        ``flat`` and ``dark``.
    kind : str, optional
        Use only frames whose coordinate ``kind`` has this value, such as "unpumped"; ``use`` then counts only those.
    max_shift, overlap_ratio, saturation, dark, flat
        See :class:`~stillframe.Reference`.

    Returns
    -------
    Reference

    Raises
    ------
    ValueError
        There are fewer frames than ``use`` asks for, none is usable or of that kind, they cannot be aligned with one
        another, an unsigned subtraction wrapped around in them, or :class:`~stillframe.Reference` refuses the image.

    Examples
    --------
    >>> import numpy as np
    >>> frames = np.random.default_rng(0).poisson(9.0, size=(20, 32, 32))
    >>> make_reference(frames, use=slice(4), iterations=0, max_shift=8).image.dtype
    dtype('float32')
    """
    stack: Any = frames if hasattr(frames, "ndim") else np.asarray(frames)
    options: dict[str, Any] = {
        "max_shift": max_shift,
        "overlap_ratio": overlap_ratio,
        "saturation": saturation,
        "dark": dark,
        "flat": flat,
    }
    if stack.ndim == 2:
        if kind is not None:
            raise ValueError(
                f"frames of the kind {kind!r} were asked for, but one image was given. Give the stack, or no kind."
            )
        return Reference(np.asarray(stack), as_mask(mask, stack.shape), **options)

    read = _remembering(lambda indices: np.asarray(stack[list(indices)]))
    kinds = stack["kind"].values if kind is not None and "kind" in getattr(stack, "coords", ()) else None
    indices = frames_of_kind(kind, kinds, stack.shape[0])
    valid = as_mask(mask, stack.shape[1:])
    return build_reference(read, indices, valid, use=use, iterations=iterations, detector_map=detector_map, **options)


def _remembering(read: Read) -> Read:
    """Return a reader that keeps the last 16 frames in memory: each may lie in a chunk of many frames of its own."""
    kept: dict[int, npt.NDArray[Any]] = {}

    def remembering(indices: Sequence[int]) -> npt.NDArray[Any]:
        missing = [index for index in indices if index not in kept]
        new = dict(zip(missing, read(missing), strict=True)) if missing else {}
        frames = np.stack([new[index] if index in new else kept[index] for index in indices])
        for index in missing:
            kept[index] = new[index]
            if len(kept) > BATCH:
                del kept[next(iter(kept))]
        return frames

    return remembering


def register(frames: xr.DataArray, reference: Reference | ReferenceFile) -> xr.Dataset:
    """Find the shift of every frame, lazily.

    Parameters
    ----------
    frames : DataArray, dims (frame, y, x)
        As from :func:`open_frames`; blocks that split a frame are joined first.
    reference : Reference or ReferenceFile
        The image to match. For a cluster, store large references first (:func:`~stillframe.save_reference`), where
        every worker can read them.

    Returns
    -------
    Dataset, dims (frame, axis)
        ``shift``, ``sigma`` (frame, axis), ``covariance``, ``score``, ``second_score``, ``overlap``,
        ``intensity``, ``flag`` (frame), the coordinates of the frames, ``reference`` and ``mask`` (y, x).
        The attributes state units and meanings. Compute the whole dataset at once: one pass gives all variables.

    Raises
    ------
    TypeError, ValueError
        The frames are not a DataArray (frame, y, x), not real, or of another shape than the reference.

    Examples
    --------
    >>> import numpy as np, xarray as xr
    >>> picture = np.random.default_rng(0).poisson(50.0, size=(64, 64))
    >>> stack = xr.DataArray(np.stack([picture, np.roll(picture, 2, axis=0)]), dims=("frame", "y", "x"))
    >>> register(stack, make_reference(stack, use=0, max_shift=8))["shift"].values
    array([[ 0.,  0.],
           [-2.,  0.]])
    """
    data = _whole_frames(frames).data
    loaded = _loaded(reference)
    if data.shape[1:] != loaded.shape:
        raise ValueError(
            f"the frames have shape {data.shape[1:]} but the reference has {loaded.shape}: they must come from the "
            "same detector. Crop or bin both alike."
        )
    matches = da.map_blocks(
        _match_block,
        data,
        reference=delayed(reference, pure=True, traverse=False),  # one node, whatever the number of blocks
        dtype=MATCH_DTYPE,
        drop_axis=(1, 2),
        meta=np.empty(0, MATCH_DTYPE),
        name=f"matches-{tokenize(data.name, loaded.digest)}",
    )
    return shifts_dataset(matches, _frame_coords(frames), loaded)


def _loaded(reference: Reference | ReferenceFile) -> Reference:
    return reference.load() if isinstance(reference, ReferenceFile) else reference


def _match_block(block: npt.NDArray[Any], *, reference: Reference | ReferenceFile, block_info: Any = None) -> Matches:
    """Run the kernel on one block."""
    with _frames_named(*block_info[0]["array-location"][0]):
        return match_frames(block, _loaded(reference))


@contextlib.contextmanager
def _frames_named(start: int, stop: int) -> Iterator[None]:
    """Raise any error again with the frames of the block in its message."""
    try:
        yield
    except Exception as error:
        raise RuntimeError(f"{frame_range(start, stop)} could not be processed: {error}") from error


def _whole_frames(frames: xr.DataArray) -> xr.DataArray:
    """Return frames with dims (frame, y, x), in blocks of whole frames."""
    if not isinstance(frames, xr.DataArray):
        raise TypeError(
            f"the frames are a {type(frames).__name__}, but labelled ones are needed. Use open_frames, or "
            'xarray.DataArray(frames, dims=("frame", "y", "x")); match_frames takes bare arrays.'
        )
    if frames.ndim != 3:
        raise ValueError(f"the frames have dims {frames.dims}, but (frame, y, x) is needed. Select or add an axis.")
    require_real(frames.dtype, "the stack of frames")
    named = frames.rename(dict(zip(frames.dims, ("frame", "y", "x"), strict=True)))
    size = {} if named.chunks else {"frame": max(1, TARGET_BYTES // max(1, named[:1].nbytes))}
    return named.chunk(size | {"y": -1, "x": -1})


def _frame_coords(frames: xr.DataArray) -> xr.Dataset:
    """Return the coordinates along the axis of frames, which is called frame in the result."""
    dim = frames.dims[0]
    coords = {str(name): coord.variable for name, coord in frames.coords.items() if coord.dims == (dim,)}
    return xr.Dataset(coords=coords).rename({dim: "frame"} if dim != "frame" else {})


def align(
    frames: xr.DataArray, shifts: xr.Dataset, *, interpolation: Interpolation = "nearest", fill: float | None = None
) -> xr.DataArray:
    """Move every frame by its shift onto the reference, lazily.

    Parameters
    ----------
    frames : DataArray, dims (frame, y, x)
        The frames that were registered. They are moved as they are: ``dark`` and ``flat`` of the reference are not
        applied to them.
    shifts : Dataset
        From :func:`register`, lazy or computed. The variable ``applied`` is used if it exists, else ``shift``.
    interpolation : {"nearest", "linear", "cubic", "lanczos"}
        "nearest" moves by whole pixels and keeps the dtype and every count. The others give floats, rounded to 1/16
        of a count for integer frames, and are exact where the shift is whole.
    fill : float, optional
        Value of pixels for which nothing was observed, and of all pixels of frames without a shift. By default NaN
        for floats and 0 for integers; stored in the attribute ``fill``.

    Returns
    -------
    DataArray, dims (frame, y, x)
        Lazy, with the coordinates of the frames. ``to_zarr`` writes the layout of a run's ``aligned.zarr`` if all
        blocks have equally many frames, as from :func:`open_frames`. After a selection, restore that with
        ``frames.chunk(frame=n)``.

    Raises
    ------
    TypeError
        The frames are not a DataArray, or not real.
    ValueError
        Frames and shifts differ in number of frames, shape or coordinates; the interpolation does not exist; or the
        dtype cannot hold the fill value.

    Examples
    --------
    >>> import numpy as np, xarray as xr
    >>> picture = np.random.default_rng(0).poisson(50.0, size=(64, 64))
    >>> stack = xr.DataArray(np.stack([picture, np.roll(picture, 2, axis=0)]), dims=("frame", "y", "x"))
    >>> aligned = align(stack, register(stack, make_reference(stack, use=0, max_shift=8)))
    >>> bool((aligned[1, :-2] == picture[:-2]).all())
    True
    """
    check_interpolation(interpolation)
    whole = _whole_frames(frames)
    _check_same(whole, shifts)
    layout = AlignedLayout.of(whole.shape, whole.dtype, int(whole.data.chunksize[0]), interpolation, fill)
    data, coordinates = _resampled(whole.data, shifts, layout), _frame_coords(frames).variables
    aligned = xr.DataArray(data, coordinates, ("frame", "y", "x"), "frames", layout.attributes)
    aligned.encoding = layout.encoding | {"write_empty_chunks": True}
    return aligned


def _check_same(frames: xr.DataArray, shifts: xr.Dataset) -> None:
    """Raise ``ValueError`` unless the shifts are those of the frames."""
    if missing := {"shift", "mask"} - set(shifts):
        raise ValueError(
            f"the shifts lack {', '.join(sorted(missing))}. Give the dataset that register returned, whole."
        )
    if shifts.sizes["frame"] != frames.sizes["frame"] or shifts["mask"].shape != frames.shape[1:]:
        raise ValueError(
            f"the frames have shape {frames.shape} but the shifts belong to {shifts.sizes['frame']} frames of "
            f"{shifts['mask'].shape}: each frame needs its own. Select the same frames from both."
        )
    for name in sorted(set(_frame_coords(frames).coords) & set(shifts.coords), key=str):
        if not frames[name].variable.equals(shifts[name].variable):  # type: ignore[no-untyped-call]
            raise ValueError(
                f"the coordinate {name} of the frames differs from that of the shifts: they are not the same frames. "
                "Select the same frames from both."
            )


def _resampled(data: da.Array, shifts: xr.Dataset, layout: AlignedLayout) -> da.Array:
    """Return the moved frames. A row of ``moves`` is (y, x, frame): errors name the frame."""
    applied = shifts["applied" if "applied" in shifts else "shift"].transpose("frame", "axis").sel(axis=["y", "x"])
    numbers = da.arange(len(data), chunks=(data.chunks[0],), dtype=np.float64)
    moves = da.concatenate([da.asarray(applied.data), numbers[:, None]], axis=1).rechunk((data.chunks[0], (3,)))
    aligned: da.Array = da.blockwise(
        _resample_block,
        "fyx",
        data,
        "fyx",
        moves,
        "fa",
        mask=delayed(np.packbits)(shifts["mask"].data.astype(np.bool_), pure=True),
        interpolation=layout.interpolation,
        fill=layout.fill,
        concatenate=True,
        dtype=layout.dtype,
        meta=np.empty((0, 0, 0), layout.dtype),
    )
    return aligned


def _resample_block(
    block: npt.NDArray[Any],
    moves: npt.NDArray[np.float64],
    *,
    mask: npt.NDArray[np.uint8],
    interpolation: Interpolation,
    fill: float,
) -> npt.NDArray[Any]:
    """Resample one block; the mask has one bit per pixel, which keeps the graph small."""
    shape = block.shape[1], block.shape[2]
    valid = np.unpackbits(mask, count=shape[0] * shape[1]).reshape(shape).astype(np.bool_)
    first = int(moves[0, 2])
    with _frames_named(first, first + len(block)):
        return resample_frames(block, moves[:, :2], valid, interpolation=interpolation, fill=fill)
