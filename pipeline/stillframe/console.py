"""Print status, forecast and self-test as tables on a terminal."""

from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from stillframe.wording import duration
from stillframe.workflow.status import Status

if TYPE_CHECKING:  # both load numba, which takes longer to import than a status takes
    from stillframe.simulation.selftest import Report
    from stillframe.workflow.forecast import Forecast

_NOT_RUNNING = "not running: give the same 'stillframe run' command to go on"


def print_status(status: Status, console: Console) -> bool:
    """Print how far a run is, and return True if nothing went wrong."""
    table = Table("stage", "frames", "done", "rate", "time left", box=None)
    for stage in status.stages:
        rate = f"{stage.rate:.3g} frames/s" if stage.rate else "–"
        percent = f"{100 * stage.done / stage.total:.0f} %"
        table.add_row(stage.stage, f"{stage.done}/{stage.total}", percent, rate, stage.left)
    console.print(table)
    idle = "finished; nobody drives it" if status.finished else _NOT_RUNNING
    console.print(*([f"driven by {holder}" for holder in status.drivers] or [idle]), sep="\n")
    console.print("frames: " + ", ".join(f"{number} {name}" for name, number in sorted(status.flags.items()) if number))
    for problem in status.problems:
        console.print(f"problem: {problem}", markup=False)
    return not status.problems


def print_forecast(forecast: "Forecast", out: Path, console: Console) -> bool:
    """Print what a run is going to take, and return whether it fits."""
    plan = forecast.plan
    table = Table("", "", "", box=None, show_header=False)
    done = len(plan.units) - forecast.left
    size = f"of {plan.unit_frames} frames, {forecast.workers} at a time; {done} are done"
    disk = f"{'as in the pilot' if forecast.pilot else 'at most'}; {_gib(forecast.free)} are free"
    time = "unknown" if forecast.seconds is None else duration(forecast.seconds)
    rows = (
        ("tasks", f"{forecast.left} units", size),
        ("memory", f"{_gib(forecast.memory)} per worker", f"of {_gib(forecast.allowed)}"),
        ("reads", _gib(forecast.reading), "decoded"),
        ("writes", _gib(forecast.disk), disk),
        ("time", time, f"from {forecast.pilot} units" if forecast.pilot else "try some units: --pilot 2"),
    )
    for row in rows:
        table.add_row(*row)
    console.print(table)
    if not forecast.fits:
        console.print(
            f"The disk of {out} has no room for this. Free some, choose another --out, or the interpolation nearest, "
            "which takes the least. (A quota is not seen here.)"
        )
    return forecast.fits


def _gib(size: float) -> str:
    return f"{size / 2**30:.3g} GiB"


def print_selftest(report: "Report", console: Console) -> None:
    """Print what a self-test found, one line a figure."""
    table = Table("", "y", "x", "", box=None)
    rows = (
        ("bias (px)", report.bias, "common to all frames"),
        ("rms error (px)", report.rms, ""),
        ("claimed sigma (px)", report.claimed, ""),
        ("error / sigma", report.ratio, "1 is right"),
        ("pull towards zero", report.pull, "0 is right, -1 a lock"),
        ("pixel locking", report.locking, "0 is right, -1 whole pixels"),
    )
    for name, (y, x), remark in rows:
        table.add_row(name, f"{y:+.4f}", f"{x:+.4f}", remark)
    console.print(table)
    most = max(*report.fractions, 1)
    for tenth, number in enumerate(report.fractions):
        console.print(
            f"fraction {tenth / 10 - 0.5:+.1f}…{tenth / 10 - 0.4:+.1f}  {'#' * round(30 * number / most)} {number}"
        )
    console.print(f"{report.frames} frames, {report.failed:.1%} of them without a shift")
