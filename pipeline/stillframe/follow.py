"""Take the frames of an experiment that still runs: how many of them are there, and whether more will come."""

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from stillframe.average import frames_needed
from stillframe.frames import FrameSource
from stillframe.prepare import frames_asked, open_source_of, reference_indices
from stillframe.progress import log, warn
from stillframe.records import Identity
from stillframe.settings import Settings
from stillframe.units import frame_range

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
    source = open_source_of(settings, empty=True)
    while not source.finished:
        ready = replace(source, limit=seen.complete_frames(source))
        if ready.shape[0] > taken and _reference_is_there(settings, ready, needed):
            log.info("%d frames are complete", ready.shape[0])
            taken = ready.shape[0]
            yield ready
        elif stop.wait(LOOK_EVERY):
            raise KeyboardInterrupt
        source = _opened_again(settings, source)
    yield open_source_of(settings)


def _opened_again(settings: Settings, before: FrameSource) -> FrameSource:
    """Look again how many frames there are; what cannot be opened just now may be so in a while."""
    try:
        return open_source_of(settings, empty=True)
    except (OSError, ValueError) as error:
        log.warning("the frames cannot be opened just now: %s", error)
        return before


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
    told: int = -1
    """The last row that was told to be missing."""

    def complete_frames(self, source: FrameSource) -> int:
        """Count the frames from the first on whose files are all there and are not written any more.

        A file is not if two looks find it the same; one of several frames, which grows as slowly as they come, if
        there are later ones too.
        """
        step, settled = source.stored_frames, True
        rows = source.shape[0] // step
        for row in range(self.rows, rows):
            now = source.identity(row * step, (row + 1) * step)
            later = _begun(source, row + 1)
            if any(size < 0 for _, size, _ in now) and not (later and source.missing_chunks == "fill"):
                self._tell(source, row, later)
                break
            settled = settled and self.files.get(row) == now and (step == 1 or later)
            self.files[row] = now
            self.rows += settled
        return self.rows * step

    def _tell(self, source: FrameSource, row: int, later: bool) -> None:
        """Say what is waited for, if it is a hole."""
        if later and row != self.told:
            self.told = row
            first = row * source.stored_frames
            which = frame_range(first, first + source.stored_frames)
            warn(
                f"{which} of {source.path} are missing, though later ones are there: waiting for them. "
                "If their writer leaves out empty chunks, give --missing-chunks fill."
            )


def _begun(source: FrameSource, row: int) -> bool:
    """Tell whether any file of a row is there."""
    first = row * source.stored_frames
    stop = min(first + source.stored_frames, source.shape[0])
    return first < stop and any(size >= 0 for _, size, _ in source.identity(first, stop))
