"""Tell how a run goes: a bar on a terminal, plain lines in a log file, an answer to ``stillframe status``."""

import contextlib
import logging
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from stillframe.durable import digest_of
from stillframe.flags import Flag
from stillframe.leases import Holder, read_leases
from stillframe.plans import aligns, read_plan
from stillframe.records import Ledger, Stage, UnitRecord
from stillframe.selftest import Report
from stillframe.units import Plan, Share, Unit

if TYPE_CHECKING:
    from stillframe.forecast import Forecast

LOG_EVERY = 10.0
"""Seconds between two lines of progress in the log."""

log = logging.getLogger("stillframe")
log.addHandler(logging.NullHandler())


def log_name(share: Share | None = None) -> str:
    """Return the name of a run's log, or of that of a part of it.

    Examples
    --------
    >>> log_name(), log_name(Share(3, 16))
    ('run.log', 'run.3-of-16.log')
    """
    return f"run.{share.number}-of-{share.of}.log" if share else "run.log"


def is_log(name: str) -> bool:
    """Tell whether a file in a run's folder is a log by its name."""
    return name.startswith("run.") and name.endswith(".log")


@contextlib.contextmanager
def log_to(path: Path) -> Iterator[None]:
    """Append what a run says to its log file."""
    handler = _PatientFile(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    except BaseException as error:
        log.error("stopped: %s", str(error) or type(error).__name__)
        raise
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
        with contextlib.suppress(OSError):
            handler.close()


class _PatientFile(logging.FileHandler):
    """A log that a full disk does not stop: what matters is told elsewhere too."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Say nothing."""


def warn(message: str) -> None:
    """Tell something to act on: in the log, and where people look."""
    log.warning(message)
    say(message)


def say(message: str) -> None:
    """Tell something where people look, and nowhere else."""
    Console(stderr=True, soft_wrap=True, highlight=False).print(f"stillframe: {message}", markup=False)


class Meter:
    """Counts the frames of one stage, for a bar and for the log."""

    def __init__(self, bar: Progress, stage: str, total: int, done: int) -> None:
        self.bar, self.stage, self.total, self.before = bar, stage, total, done
        self.done = done
        self.began = self.told = time.monotonic()
        self.task = bar.add_task(stage, total=total, completed=done, rate="")
        log.info("%s: %d of %d frames are done already", stage, done, total)

    def add(self, unit: Unit) -> None:
        """Count one finished unit."""
        self.done += unit.stop - unit.start
        rate = (self.done - self.before) / max(time.monotonic() - self.began, 1e-6)
        self.bar.update(self.task, completed=self.done, rate=f"{rate:.3g} frames/s")
        if time.monotonic() - self.told > LOG_EVERY or self.done == self.total:
            self.told = time.monotonic()
            log.info(
                "%s: %d of %d frames, %s",
                self.stage,
                self.done,
                self.total,
                _pace(rate, self.total - self.done),
            )


def _pace(rate: float, left: int) -> str:
    return f"{rate:.3g} frames/s, {duration(left / rate)} left" if rate > 0 else "no rate yet"


def duration(seconds: float) -> str:
    """Write a time as people do.

    Examples
    --------
    >>> duration(42), duration(3723)
    ('42 s', '1 h 02 min')
    """
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{seconds // 60:.0f} min {seconds % 60:02.0f} s"
    return f"{seconds // 3600:.0f} h {seconds % 3600 // 60:02.0f} min"


def progress_bar() -> Progress:
    """Return a bar with rate and time left on a terminal, silent elsewhere."""
    return Progress(
        TextColumn("{task.description:8}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} frames"),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not sys.stderr.isatty(),
    )


@dataclass(frozen=True)
class StageStatus:
    """How far one stage is, from the records on disk."""

    stage: Stage
    """Name."""
    done: int
    """Frames that are finished."""
    total: int
    """All frames."""
    rate: float | None
    """Frames per second lately, if it is known."""
    problems: list[str]
    """What could not be read or done."""

    @property
    def left(self) -> str:
        """Time left, in words."""
        if self.done == self.total:
            return "finished"
        return f"{duration((self.total - self.done) / self.rate)} left" if self.rate else "unknown"


def read_status(folder: Path) -> list[StageStatus]:
    """Return how far each stage of a run is.

    Raises
    ------
    ValueError
        The folder holds no run.
    """
    plan = read_plan(folder)
    if plan is None:
        raise ValueError(f"{folder} holds no run that has begun. Give the folder that 'run --out' names.")
    ledger = Ledger(folder)
    registered = ledger.records("register")
    register = _stage_status(ledger, "register", registered, plan)
    if not aligns(folder):
        return [register]
    shifts = {record.unit: _digest(record) for record in registered if record.matches}
    aligned = [
        record for record in ledger.records("align") if not record.files or record.shifts == shifts.get(record.unit)
    ]
    return [register, _stage_status(ledger, "align", aligned, plan)]


def _digest(record: UnitRecord) -> str:
    matches = record.to_matches()
    return digest_of(np.stack([matches["dy"], matches["dx"]], axis=1))


def _stage_status(ledger: Ledger, stage: Stage, records: list[UnitRecord], plan: Plan) -> StageStatus:
    problems = [problem for record in records for problem in record.problems]
    whole = [record for record in records if record.matches or record.files]
    done = sum(record.stop - record.start for record in whole)
    return StageStatus(stage, done, plan.frames, _recent_rate(ledger, whole), problems)


def _recent_rate(ledger: Ledger, records: list[UnitRecord]) -> float | None:
    """Frames per second over the last units, from the times of their records."""
    seen = []
    for record in records:
        with contextlib.suppress(FileNotFoundError):  # it may just have been withdrawn
            seen.append((ledger.path(record.stage, record.unit).stat().st_mtime, record.stop - record.start))
    seen = sorted(seen)[-50:]
    if len(seen) < 2 or seen[-1][0] <= seen[0][0]:
        return None
    return sum(frames for _, frames in seen[1:]) / (seen[-1][0] - seen[0][0])


def flag_counts(folder: Path) -> Counter[str]:
    """Count the frames under each flag among those registered so far."""
    counts: Counter[str] = Counter()
    for record in Ledger(folder).records("register"):
        values = [int(value) for value in (record.matches or {}).get("flag", [])]
        counts.update(str(flag.name).lower() for value in values for flag in Flag if flag & value)
        counts["good"] += values.count(0)
    return counts


def print_status(folder: Path, console: Console) -> bool:
    """Print how far a run is and return whether nothing went wrong."""
    stages = read_status(folder)
    table = Table("stage", "frames", "done", "rate", "time left", box=None)
    for stage in stages:
        rate = f"{stage.rate:.3g} frames/s" if stage.rate else "–"
        part = f"{100 * stage.done / stage.total:.0f} %"
        table.add_row(stage.stage, f"{stage.done}/{stage.total}", part, rate, stage.left)
    console.print(table)
    finished = all(stage.done == stage.total for stage in stages)
    for line in _drivers(read_leases(folder), finished):
        console.print(line)
    counts = flag_counts(folder)
    console.print("frames: " + ", ".join(f"{number} {name}" for name, number in sorted(counts.items()) if number))
    problems = list(dict.fromkeys(problem for stage in stages for problem in stage.problems))
    for problem in problems:
        console.print(f"problem: {problem}", markup=False)
    return not problems


def _drivers(holders: list[Holder], finished: bool) -> list[str]:
    if holders:
        return [f"driven by {holder}" for holder in holders]
    return [
        "finished; nobody drives it" if finished else "not running: give the same 'stillframe run' command to go on"
    ]


def print_forecast(forecast: "Forecast", out: Path, console: Console) -> bool:
    """Print what a run is going to take, and return whether it fits."""
    plan = forecast.plan
    table = Table("", "", "", box=None, show_header=False)
    done = len(plan.units) - forecast.left
    size = f"of {plan.unit_frames} frames, {forecast.workers} at a time; {done} are done"
    disk = f"{'as in the pilot' if forecast.pilot else 'at most'}; {_gib(forecast.free)} are free"
    rows = (
        ("tasks", f"{forecast.left} units", size),
        ("memory", f"{_gib(forecast.memory)} per worker", f"of {_gib(forecast.allowed)}"),
        ("reads", _gib(forecast.reading), "decoded"),
        ("writes", _gib(forecast.disk), disk),
        ("time", _time(forecast), f"from {forecast.pilot} units" if forecast.pilot else "try some units: --pilot 2"),
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


def _time(forecast: "Forecast") -> str:
    return "unknown" if forecast.seconds is None else duration(forecast.seconds)


def _gib(size: float) -> str:
    return f"{size / 2**30:.3g} GiB"


def print_selftest(report: Report, console: Console) -> None:
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
