"""Plots of the results of a run, for a first look and for the logbook."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from stillframe.flags import Flag

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MARGINS = {"left": 0.14, "right": 0.98, "bottom": 0.08, "top": 0.95, "hspace": 0.08}
"""Margins of the figure that hold the longest name of a flag; to have them computed takes as long as all the rest."""


def plot_shifts(shifts: xr.Dataset, path: Path) -> None:
    """Plot the shifts, the scores and the flags of all frames over lab time.

    Parameters
    ----------
    shifts : Dataset
        Shifts of a run, in memory.
    path : Path
        The PNG file to write.
    """
    # Imported here because matplotlib is slow to import and only the end of a run needs it.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7))
    FigureCanvasAgg(figure)
    top, middle, bottom = figure.subplots(3, 1, sharex=True, height_ratios=[3, 1.5, 1.5], gridspec_kw=_MARGINS)
    time, label = _time_axis(shifts)
    for column, axis in enumerate("yx"):
        top.plot(time, shifts["shift"].values[:, column], ".", markersize=3, label=f"along {axis}")
    top.set(ylabel="shift to apply (px)", title=_headline(shifts))
    top.legend(loc="best", markerscale=3)
    middle.plot(time, shifts["score"].values, ".", color="0.3", markersize=3)
    middle.set(ylabel="score")
    _plot_flags(bottom, time, shifts["flag"].values)
    bottom.set(xlabel=label, ylabel="flag")
    figure.savefig(path, dpi=120, metadata={"Software": None})


def _time_axis(shifts: xr.Dataset) -> tuple[np.ndarray, str]:
    """Return time since the first frame in hours, or frame numbers if no time is stored, and the axis label."""
    if "time" in shifts.coords and shifts["time"].dtype.kind == "M":
        elapsed = shifts["time"].values - shifts["time"].values.min()
        return elapsed / np.timedelta64(1, "h"), "lab time (h)"
    return np.arange(shifts.sizes["frame"]), "frame"


def _headline(shifts: xr.Dataset) -> str:
    """Return the title: how many frames there are, and how many of them are good."""
    good = int((shifts["flag"] == 0).sum())
    return f"{shifts.sizes['frame']} frames, {good} with a shift and no flag"


def _plot_flags(axes: "Axes", time: np.ndarray, values: np.ndarray) -> None:
    """Plot one row of ticks for each flag that occurs, at the times of the frames that have it."""
    present = [flag for flag in Flag if (values & flag.value).any()]
    for row, flag in enumerate(present):
        flagged = time[(values & flag.value) != 0]
        axes.plot(flagged, np.full(len(flagged), row), "|", color="C3")
    axes.set_yticks(range(len(present)), [str(flag.name).lower() for flag in present])
    axes.set_ylim(-0.5, max(len(present), 1) - 0.5)
    if not present:
        axes.text(0.5, 0.5, "no frame is flagged", ha="center", va="center", transform=axes.transAxes)
