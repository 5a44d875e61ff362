"""Take the frames of an experiment that still runs: how many of them are there, and whether more will come."""

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from stillframe.average import frames_needed
from stillframe.frames import FrameSource, open_source
from stillframe.prepare import frames_asked, reference_indices
from stillframe.progress import log
from stillframe.records import Identity
from stillframe.settings import Settings

LOOK_EVERY = 2.0
"""Seconds between two looks at the input; a file that two looks find the same is complete."""


def growing(settings: Settings, stop: threading.Event) -> Iterator[FrameSource]:
    """Yield the stack as far as it is complete, whenever it grew, until it is marked finished.

    First when the frames of the reference are there; only the last one has no limit.

    Raises
    ------
    KeyboardInterrupt
        ``stop`` was set.
    """
    asked = frames_asked(settings.reference)
    needed = 0 if isinstance(asked, Path) else frames_needed(asked)
    seen, taken = _Seen(), 0
    while not (source := _open(settings)).finished:
        ready = replace(source, limit=seen.complete_frames(source))
        if ready.shape[0] > taken and _reference_is_there(settings, ready, needed):
            log.info("%d frames are complete", ready.shape[0])
            taken = ready.shape[0]
            yield ready
        elif stop.wait(LOOK_EVERY):
            raise KeyboardInterrupt
    yield source


def _open(settings: Settings) -> FrameSource:
    return open_source(settings.frames, missing_chunks=settings.missing_chunks)


def _reference_is_there(settings: Settings, source: FrameSource, needed: int) -> bool:
    try:
        return len(reference_indices(settings, source)) >= needed
    except ValueError:  # no frame of the kind that is asked for yet
        return needed == 0


@dataclass
class _Seen:
    """What was seen of the input's files the last time."""

    rows: int = 0
    """Rows of files that were complete then."""
    files: dict[int, Identity] = field(default_factory=dict)
    """Those of later rows."""

    def complete_frames(self, source: FrameSource) -> int:
        """Count the frames from the first on whose files are all there and did not change since the last look."""
        step, settled = source.stored_frames, True
        for row in range(self.rows, source.shape[0] // step):
            now = source.identity(row * step, (row + 1) * step)
            if any(size < 0 for _, size, _ in now):
                break
            settled = settled and self.files.get(row) == now
            self.files[row] = now
            self.rows += settled
        return self.rows * step
