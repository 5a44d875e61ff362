"""The whole way in a minute: simulate, run, compare with the truth and with a registration that sees the block."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import xarray as xr
from rich.console import Console
from rich.table import Table

from stillframe.batch import run
from stillframe.lazy import make_reference, open_frames
from stillframe.match import match_frames
from stillframe.scene import Experiment
from stillframe.settings import Settings
from stillframe.simulate import simulate

EXPERIMENT = Experiment(frames=240, shape=(512, 512), dose=20.0, max_drift=12.0)
_COMPARED = 60
"""Frames that are also registered without a mask: enough to see what goes wrong."""


def demonstrate(folder: Path, console: Console) -> None:
    """Run the demonstration in a folder; it goes on where it was stopped."""
    frames, mask = folder / "frames.zarr", folder / "mask.npy"
    if not mask.exists() or not frames.exists():
        console.print(f"Simulating {EXPERIMENT.frames} frames of {EXPERIMENT.shape} with drift up to 12 px …")
        simulate(EXPERIMENT, folder)
    console.print("Registering and aligning them on a local cluster …")
    result = run(Settings(frames=frames, mask=mask, out=folder / "run"))
    with xr.open_zarr(result.shifts, chunks=None) as shifts, xr.open_zarr(frames, chunks=None) as stored:
        found, truth = shifts["shift"].values, stored["true_shift"].values
    console.print(_table(found, _without_mask(frames), truth))
    console.print(f"{result.good} of {result.frames} frames have a shift; the others are dark and say so.")
    for name in ("shifts.zarr", "aligned.zarr", "shifts.png", "run.log"):
        console.print(f"  {result.folder / name}")
    console.print(f"Look again with: stillframe status {result.folder}")


def _without_mask(frames: Path) -> npt.NDArray[np.float64]:
    """Shifts of some frames, spread over the run, when every pixel counts as valid; NaN for the others."""
    stack = open_frames(frames)
    reference = make_reference(stack)
    chosen = np.linspace(0, stack.sizes["frame"] - 1, _COMPARED).astype(int)
    matches = match_frames(stack[chosen].values, reference)
    out = np.full((stack.sizes["frame"], 2), np.nan)
    out[chosen] = np.stack([matches["dy"], matches["dx"]], axis=1)
    return out


def _table(masked: npt.NDArray[np.float64], plain: npt.NDArray[np.float64], truth: npt.NDArray[np.float64]) -> Table:
    table = Table("registration", "frames", "rms error y (px)", "rms error x (px)", box=None)
    for name, found in (("masked (this pipeline)", masked), ("without the mask", plain)):
        error = found - truth
        rms = np.sqrt(np.nanmean((error - np.nanmedian(masked - truth, axis=0)) ** 2, axis=0))
        table.add_row(name, str(np.count_nonzero(np.isfinite(found[:, 0]))), f"{rms[0]:.3f}", f"{rms[1]:.3f}")
    return table
