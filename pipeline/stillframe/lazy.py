"""Frames, shifts and aligned frames as lazy xarray objects: the only module that builds dask graphs.

Building reads metadata and coordinates, never a pixel. The kernel enters by ``map_blocks``, one call a block of
whole frames; the reference enters as one node of the graph (or, once stored, as a path and a hash), so that it is
sent to a worker once and not with every block.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import numpy.typing as npt
import xarray as xr
from dask.base import tokenize
from dask.delayed import delayed

from stillframe.average import frames_of_kind
from stillframe.checks import as_mask, require_real
from stillframe.durable import fingerprint
from stillframe.frames import FrameSource, MissingChunks, frame_coordinates, open_source
from stillframe.iterate import build_reference
from stillframe.match import MATCH_DTYPE, Matches, match_frames
from stillframe.reference import Reference
from stillframe.resample import Interpolation, check_fill, check_interpolation, output_dtype, resample_frames
from stillframe.store import ReferenceFile, aligned_encoding, shifts_dataset
from stillframe.template import Weights
from stillframe.units import TARGET_BYTES, frame_range, make_plan

__all__ = ["align", "make_reference", "open_frames", "register"]

_ROOMY = 2**50
"""A memory budget that never decides."""


def open_frames(
    path: str | Path, *, chunk_frames: int | None = None, missing_chunks: MissingChunks = "report"
) -> xr.DataArray:
    """Open a stack of frames lazily.

    Parameters
    ----------
    path : str or Path
        A Zarr array (frame, y, x), v2 or v3, or a group with one: "frames", or the only stack in it.
    chunk_frames : int, optional
        Frames of a block; by default those of a unit, as a run would cut the stack.
    missing_chunks : {"report", "fill"}
        A chunk without a file is an error when it is read, or the array's fill value, as Zarr has it.

    Returns
    -------
    DataArray, dims (frame, y, x)
        Lazy; with the coordinates stored beside the frames (time, scan, delay, kind…).

    Raises
    ------
    FileNotFoundError, TypeError, ValueError
        Nothing there, no real pixels, or no single stack (frame, y, x).

    Examples
    --------
    >>> import numpy as np, tempfile, zarr
    >>> path = tempfile.mkdtemp() + "/frames.zarr"
    >>> zarr.save_array(path, np.ones((10, 64, 64), np.uint16))
    >>> open_frames(path).sizes["frame"]
    10
    """
    source = open_source(path, missing_chunks=missing_chunks)
    return _lazy_frames(source, chunk_frames or default_unit_frames(source))


def _lazy_frames(source: FrameSource, size: int) -> xr.DataArray:
    """Label a stack of frames, in blocks of some frames each."""
    key = {"path": source.path, "metadata": source.description(), "chunk": size}
    name = f"frames-{fingerprint(key)}"
    data = da.from_array(
        source, chunks=(size, -1, -1), name=name, asarray=False, meta=np.empty((0, 0, 0), source.dtype)
    )
    return xr.DataArray(
        data,
        dims=("frame", "y", "x"),
        coords=frame_coordinates(source).variables,
        name="frames",
        attrs={"long_name": "detector frames", "units": "count"},
    )


def default_unit_frames(source: FrameSource) -> int:
    """Return the frames of a unit when memory does not decide."""
    return make_plan(source.layout, budget=_ROOMY, output_itemsize=source.dtype.itemsize, max_shift=0).unit_frames


def make_reference(
    frames: xr.DataArray | npt.ArrayLike,
    mask: npt.ArrayLike | None = None,
    *,
    use: int | slice | None = None,
    iterations: int = 0,
    kind: str | None = None,
    max_shift: int = 32,
    overlap_ratio: float = 0.3,
    saturation: float | None = None,
    weights: Weights = "counts",
) -> Reference:
    """Make the image that frames are laid on; reads only the frames it uses, at once.

    Parameters
    ----------
    frames : DataArray or array_like
        A stack (frame, y, x), lazy or not; or an image (y, x) of any origin, which is taken as it is.
    mask : array_like of bool, shape (y, x), optional
        True = valid.
    use : int or slice, optional
        One frame, or frames to average; dark, corrupt and saturated ones are left out of an average. By default the
        first 16, or as many as there are.
    iterations : int
        How often to register those frames, average them where the reference is, and take that mean as the
        reference, at most; it ends when the reference stops moving. Frames without a shift never enter, nor do
        pixels that no noise explains.
    kind : str, optional
        Use only frames of which the coordinate ``kind`` says this, such as "unpumped"; a slice counts those.
    max_shift, overlap_ratio, saturation, weights
        See :class:`~stillframe.Reference`.

    Returns
    -------
    Reference

    Raises
    ------
    ValueError
        Fewer frames than asked for, none of them usable, no frame of that kind, or what
        :class:`~stillframe.Reference` refuses.

    Examples
    --------
    >>> import numpy as np
    >>> frames = np.random.default_rng(0).poisson(9.0, size=(20, 32, 32))
    >>> make_reference(frames, use=slice(4), max_shift=8).image.dtype
    dtype('float32')
    """
    stack: Any = frames if hasattr(frames, "ndim") else np.asarray(frames)

    options: dict[str, Any] = {"max_shift": max_shift, "overlap_ratio": overlap_ratio, "saturation": saturation}
    options["weights"] = weights
    if stack.ndim == 2 and kind is not None:
        raise ValueError(
            f"frames of the kind {kind!r} were asked for, but one image was given. Give the stack, or no kind."
        )
    if stack.ndim == 2:
        return Reference(np.asarray(stack), as_mask(mask, stack.shape), **options)

    def read(indices: Sequence[int]) -> npt.NDArray[Any]:
        return np.asarray(stack[list(indices)])

    kinds = stack["kind"].values if kind is not None and "kind" in getattr(stack, "coords", ()) else None
    indices = frames_of_kind(kind, kinds, stack.shape[0])
    return build_reference(read, indices, as_mask(mask, stack.shape[1:]), use=use, iterations=iterations, **options)


def register(frames: xr.DataArray, reference: Reference | ReferenceFile) -> xr.Dataset:
    """Register every frame, lazily.

    Parameters
    ----------
    frames : DataArray, dims (frame, y, x)
        As from :func:`open_frames`; blocks that split a frame are joined first.
    reference : Reference or ReferenceFile
        What to lay them on. On a cluster, large references are best stored first
        (:func:`~stillframe.save_reference`), where every worker can read them.

    Returns
    -------
    Dataset, dims (frame, axis)
        ``shift``, ``sigma`` (frame, axis), ``covariance``, ``score``, ``second_score``, ``overlap``,
        ``intensity``, ``flag`` (frame), the coordinates of the frames, ``reference`` and ``mask`` (y, x).
        Units and meanings are in the attributes. Compute it whole: one pass gives all variables.

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
    known = reference.load() if isinstance(reference, ReferenceFile) else reference
    if data.shape[1:] != known.shape:
        raise ValueError(
            f"the frames have shape {data.shape[1:]} but the reference has {known.shape}: they must come from the same "
            "detector. Crop or bin both alike."
        )
    matches = da.map_blocks(
        _match_block,
        data,
        reference=_node(reference),
        dtype=MATCH_DTYPE,
        drop_axis=(1, 2),
        meta=np.empty(0, MATCH_DTYPE),
        name=f"matches-{tokenize(data.name, known.digest)}",
    )
    return shifts_dataset(matches, _frame_coords(frames), known)


def _node(reference: Reference | ReferenceFile) -> Any:
    """One key in the graph, whatever the number of blocks."""
    return delayed(reference, pure=True, traverse=False)


def _match_block(block: npt.NDArray[Any], *, reference: Reference | ReferenceFile, block_info: Any = None) -> Matches:
    """Run the kernel on one block, and say which frames if it fails."""
    known = reference.load() if isinstance(reference, ReferenceFile) else reference
    return _located(lambda: match_frames(block, known), *block_info[0]["array-location"][0])


def _located(work: Callable[[], npt.NDArray[Any]], start: int, stop: int) -> npt.NDArray[Any]:
    try:
        return work()
    except Exception as error:
        raise RuntimeError(f"{frame_range(start, stop)} could not be processed: {error}") from error


def _whole_frames(frames: xr.DataArray) -> xr.DataArray:
    """Return frames in blocks that hold whole frames."""
    if not isinstance(frames, xr.DataArray):
        raise TypeError(
            f"the frames are a {type(frames).__name__}, but labelled ones are needed. Give those of open_frames, or "
            'xarray.DataArray(frames, dims=("frame", "y", "x")); match_frames takes bare arrays.'
        )
    if frames.ndim != 3:
        raise ValueError(f"the frames have dims {frames.dims}, but (frame, y, x) is needed. Select or add an axis.")
    require_real(frames.dtype, "the stack of frames")
    named = frames.rename(dict(zip(frames.dims, ("frame", "y", "x"), strict=True)))
    if named.chunks is None:
        size = max(1, TARGET_BYTES // max(1, named[:1].nbytes))
        return named.chunk(frame=size, y=-1, x=-1)
    return named.chunk(y=-1, x=-1)


def _frame_coords(frames: xr.DataArray) -> xr.Dataset:
    dim = frames.dims[0]
    coords = {str(name): coord.variable for name, coord in frames.coords.items() if coord.dims == (dim,)}
    return xr.Dataset(coords=coords).rename({dim: "frame"} if dim != "frame" else {})


def align(
    frames: xr.DataArray,
    shifts: xr.Dataset,
    *,
    interpolation: Interpolation = "nearest",
    fill: float | None = None,
) -> xr.DataArray:
    """Lay every frame on the reference, lazily.

    Parameters
    ----------
    frames : DataArray, dims (frame, y, x)
        The frames that were registered.
    shifts : Dataset
        From :func:`register`, lazy or computed; needs nothing else. ``applied`` is used where it is there,
        else ``shift``.
    interpolation : {"nearest", "linear", "cubic", "lanczos"}
        "nearest" moves by whole pixels and keeps the dtype and every count; the others hold fractions, of integer
        frames to 1/16 of a count, and are exact where the shift is whole.
    fill : float, optional
        Value of pixels nothing was observed for, frames without a shift among them: NaN for floats, 0 for
        integers by default; stated in the attribute ``fill``.

    Returns
    -------
    DataArray, dims (frame, y, x)
        Lazy, with the coordinates of the frames. ``to_zarr`` writes the layout of a run's ``aligned.zarr`` when
        all blocks have the same number of frames, as those of :func:`open_frames` have; after a selection,
        ``frames.chunk(frame=n)`` makes them so.

    Raises
    ------
    TypeError
        Frames without labels, or not real.
    ValueError
        Another number of frames or another shape than the shifts', an unknown interpolation, or a fill value
        that the dtype cannot hold.

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
    dtype = output_dtype(whole.dtype, interpolation)
    value = check_fill(fill, dtype)
    data = _resampled(whole.data, shifts, interpolation, value, dtype)
    return _labelled(data, _frame_coords(frames), int(data.chunksize[0]), interpolation, value)


def empty_aligned(
    shifts: xr.Dataset, dtype: np.dtype[Any], unit_frames: int, *, interpolation: Interpolation, fill: float | None
) -> xr.DataArray:
    """Return what :func:`align` would, for metadata alone: one task, however long the stack, that refuses to run."""
    dtype = output_dtype(dtype, interpolation)
    shape = (shifts.sizes["frame"], *shifts["mask"].shape)
    nothing = da.from_delayed(delayed(_refuse)(), shape, dtype)
    shard = min(unit_frames, shape[0])
    return _labelled(nothing, _frame_coords(shifts["score"]), shard, interpolation, check_fill(fill, dtype))


def _refuse() -> None:
    raise RuntimeError("this stands for aligned frames and holds none. Read aligned.zarr, or call stillframe.align.")


def _labelled(
    data: da.Array, coordinates: xr.Dataset, unit_frames: int, interpolation: Interpolation, fill: float
) -> xr.DataArray:
    """Say what aligned frames are and how they were made, for any reader, and how they are stored."""
    stated = "NaN" if np.isnan(fill) else fill
    attributes = {"long_name": "frames laid on the reference", "interpolation": interpolation, "fill": stated}
    aligned = xr.DataArray(data, coordinates.variables, ("frame", "y", "x"), "frames", attributes)
    aligned.encoding = aligned_encoding(data.shape, unit_frames, fill, data.dtype)
    return aligned


def _check_same(frames: xr.DataArray, shifts: xr.Dataset) -> None:
    missing = {"shift", "mask"} - set(shifts)
    if missing:
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


def _resampled(
    data: da.Array, shifts: xr.Dataset, interpolation: Interpolation, fill: float, dtype: np.dtype[Any]
) -> da.Array:
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
        interpolation=interpolation,
        fill=fill,
        concatenate=True,
        dtype=dtype,
        meta=np.empty((0, 0, 0), dtype),
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
    shape = block.shape[1], block.shape[2]
    valid = np.unpackbits(mask, count=shape[0] * shape[1]).reshape(shape).astype(np.bool_)
    first = int(moves[0, 2])
    return _located(
        lambda: resample_frames(block, moves[:, :2], valid, interpolation=interpolation, fill=fill),
        first,
        first + len(block),
    )
