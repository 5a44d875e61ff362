"""Progress of one stage of a run: a bar on a terminal, and plain lines in the log."""

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from stillframe.log import log
from stillframe.partition import Unit
from stillframe.wording import duration

LOG_EVERY = 10.0
"""Seconds between two lines of progress in the log."""


class Meter:
    """Counts the finished frames of one stage, for a bar and for the log."""

    def __init__(self, bar: Progress, stage: str, total: int, done: int) -> None:
        self.bar, self.stage, self.total = bar, stage, total
        self.done = self.done_at_start = done
        self.began = self.logged = time.monotonic()
        self.task = bar.add_task(stage, total=total, completed=done, rate="")
        log.info("%s: %d of %d frames are done already", stage, done, total)

    def add(self, unit: Unit) -> None:
        """Count one finished unit."""
        self.done += unit.stop - unit.start
        now = time.monotonic()
        rate = (self.done - self.done_at_start) / max(now - self.began, 1e-6)
        self.bar.update(self.task, completed=self.done, rate=f"{rate:.3g} frames/s")
        if now - self.logged > LOG_EVERY or self.done == self.total:
            self.logged = now
            pace = f"{rate:.3g} frames/s, {duration((self.total - self.done) / rate)} left" if rate else "no rate yet"
            log.info("%s: %d of %d frames, %s", self.stage, self.done, self.total, pace)


def progress_bar() -> Progress:
    """Return a bar with rate and time left, which prints nothing where standard error is no terminal."""
    return Progress(
        TextColumn("{task.description:8}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} frames {task.fields[rate]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not sys.stderr.isatty(),
    )
