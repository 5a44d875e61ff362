"""Demonstration: simulate a run, register it, and compare the shifts with the true ones and with unmasked shifts."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import xarray as xr
from rich.console import Console
from rich.table import Table

from stillframe.lazy import make_reference, open_frames
from stillframe.registration.match import match_frames
from stillframe.settings import Settings
from stillframe.simulation.experiment import Experiment
from stillframe.simulation.write import simulate
from stillframe.workflow.driver import run

EXPERIMENT = Experiment(frames=240, shape=(512, 512), dose=20.0, max_drift=12.0)
_COMPARED = 60
"""Number of frames that are also registered without a mask, to show the error that the beam-block causes."""


def demonstrate(folder: Path, console: Console) -> None:
    """Run the demonstration in a folder, or continue one that was stopped, and print its results."""
    frames, mask = folder / "frames.zarr", folder / "mask.npy"
    if not mask.exists() or not frames.exists():
        console.print(f"Simulating {EXPERIMENT.frames} frames of {EXPERIMENT.shape} with drift up to 12 px …")
        simulate(EXPERIMENT, folder)
    console.print("Registering and aligning them on a local cluster …")
    result = run(Settings(frames=frames, mask=mask, out=folder / "run"))
    with xr.open_zarr(result.shifts, chunks=None) as shifts, xr.open_zarr(frames, chunks=None) as stored:
        masked, truth = shifts["shift"].values, stored["true_shift"].values
    console.print(_table(masked, _without_mask(frames), truth))
    console.print(f"{result.good} of {result.frames} frames have a shift; the others are flagged as dark.")
    for name in ("shifts.zarr", "aligned.zarr", "shifts.png", "run.log"):
        console.print(f"  {result.folder / name}")
    console.print(f"Look again with: stillframe status {result.folder}")


def _without_mask(frames: Path) -> npt.NDArray[np.float64]:
    """Return the shifts (frame, 2) of some frames with every pixel taken as valid; NaN for the other frames."""
    stack = open_frames(frames)
    reference = make_reference(stack)
    chosen = np.linspace(0, stack.sizes["frame"] - 1, _COMPARED).astype(int)
    matches = match_frames(stack[chosen].values, reference)
    out = np.full((stack.sizes["frame"], 2), np.nan)
    out[chosen] = np.stack([matches["dy"], matches["dx"]], axis=1)
    return out


def _table(masked: npt.NDArray[np.float64], plain: npt.NDArray[np.float64], truth: npt.NDArray[np.float64]) -> Table:
    """Return a table of the rms errors; the offset of the masked shifts from the true ones is removed from both."""
    table = Table("registration", "frames", "rms error y (px)", "rms error x (px)", box=None)
    offset = np.nanmedian(masked - truth, axis=0)
    for name, shifts in (("masked (this pipeline)", masked), ("without the mask", plain)):
        error = shifts - truth - offset
        rms = np.sqrt(np.nanmean(error**2, axis=0))
        table.add_row(name, str(np.count_nonzero(np.isfinite(shifts[:, 0]))), f"{rms[0]:.3f}", f"{rms[1]:.3f}")
    return table
