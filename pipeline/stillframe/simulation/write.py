"""Write a simulated experiment as a Zarr store, one output shard (unit) at a time, and its mask."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
import zarr

from stillframe.partition import Layout, Unit, make_plan
from stillframe.simulation.experiment import KINDS, Experiment
from stillframe.storage.zarr_files import codec, quiet_zarr, write_dataset

_START = np.datetime64("2026-01-01T00:00:00", "ns")


def simulate(
    experiment: Experiment, folder: Path, *, on_unit: Callable[[Unit], None] = lambda _: None
) -> tuple[Path, Path]:
    """Write ``frames.zarr`` and ``mask.npy`` to a folder, and return both paths.

    The store holds ``frames`` (frame, y, x), counts, uint16, with coordinates ``time``, ``scan``, ``delay`` (ps) and
    ``kind``; and ``true_shift`` (frame, axis), pixels, to be applied to the frame. It has a temporary name until it is
    complete, so that an interrupted simulation leaves no incomplete store. The mask is boolean (y, x), True = valid.

    Examples
    --------
    >>> import tempfile
    >>> store, mask = simulate(Experiment(frames=3, shape=(32, 32)), Path(tempfile.mkdtemp()))
    >>> store.name, mask.name
    ('frames.zarr', 'mask.npy')
    """
    store, mask = folder / "frames.zarr", folder / "mask.npy"
    if store.exists():
        raise FileExistsError(
            f"{store} exists already: real or simulated, it is not overwritten. Choose another folder."
        )
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / ".frames.zarr.partial"
    layout = Layout(experiment.frames, experiment.shape, 2, 1)
    plan = make_plan(layout, budget=2**50, output_itemsize=2, max_shift=0)
    write_dataset(_coordinates(experiment), partial)
    frames = _create(experiment, partial, plan.unit_frames)
    np.save(mask, experiment.detector.mask)
    for unit in plan.units:
        frames[unit.start : unit.stop] = np.stack([experiment.render(i) for i in range(unit.start, unit.stop)])
        on_unit(unit)
    partial.rename(store)
    return store, mask


def _coordinates(experiment: Experiment) -> xr.Dataset:
    step = np.timedelta64(round(experiment.interval * 1e9), "ns")
    meanings = {"flag_values": np.arange(len(KINDS), dtype=np.int8), "flag_meanings": " ".join(KINDS)}
    return xr.Dataset(
        {"true_shift": (("frame", "axis"), experiment.shifts, {"units": "pixel"})},
        {
            "time": ("frame", _START + step * np.arange(experiment.frames), {"long_name": "lab time"}),
            "scan": ("frame", experiment.scan, {"long_name": "number of the scan"}),
            "delay": ("frame", experiment.delay, {"units": "ps", "long_name": "pump-probe delay"}),
            "kind": ("frame", experiment.kind, meanings),
        },
    )


def _create(experiment: Experiment, store: Path, unit_frames: int) -> zarr.Array[Any]:
    array = zarr.create_array(
        store / "frames",
        shape=(experiment.frames, *experiment.shape),
        dtype=np.uint16,
        chunks=(1, *experiment.shape),
        shards=(unit_frames, *experiment.shape),
        compressors=codec(),
        dimension_names=("frame", "y", "x"),
        attributes={"units": "count", "coordinates": "time scan delay kind"},
        config={"write_empty_chunks": True},
    )
    with quiet_zarr():
        zarr.consolidate_metadata(store)
    return array
