"""Follow an experiment that still writes frames: how many are complete, and whether more will come."""

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from stillframe.log import log, warn
from stillframe.registration.reference_frames import frames_needed
from stillframe.settings import Settings
from stillframe.storage.frames import FrameSource
from stillframe.wording import frame_range
from stillframe.workflow.begin import open_source_of
from stillframe.workflow.ledger import FileIdentities
from stillframe.workflow.run_reference import reference_indices, requested_frames

LOOK_EVERY = 2.0
"""Seconds between two looks at the input. A file that did not change between two looks is complete."""


def growing(settings: Settings, stop: threading.Event) -> Iterator[FrameSource]:
    """Yield the stack as far as it is complete, each time it has grown, until its writer marks it finished.

    The first time when the frames of the reference are there. Only the last one has no limit.

    Raises
    ------
    KeyboardInterrupt
        ``stop`` was set.
    """
    requested = requested_frames(settings.reference)
    needed = 0 if isinstance(requested, Path) else frames_needed(requested)
    files, taken = _FilesBefore(), 0
    source = open_source_of(settings, empty=True)
    while not source.finished:
        ready = replace(source, limit=files.complete_frames(source))
        if ready.shape[0] > taken and _reference_is_there(settings, ready, needed):
            log.info("%d frames are complete", ready.shape[0])
            taken = ready.shape[0]
            yield ready
        elif stop.wait(LOOK_EVERY):
            raise KeyboardInterrupt
        source = _opened_again(settings, source)
    yield open_source_of(settings)


def _opened_again(settings: Settings, before: FrameSource) -> FrameSource:
    """Open the frames again; if they cannot be opened just now, return them as they were."""
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
class _FilesBefore:
    """Names, sizes and times of the input files at the last look."""

    rows: int = 0
    """Rows of files that were complete."""
    files: dict[int, FileIdentities] = field(default_factory=dict)
    """Files of later rows."""
    reported: int = -1
    """The last row that was reported as missing."""

    def complete_frames(self, source: FrameSource) -> int:
        """Count the frames, from the first on, whose files are all there and complete.

        A file of one frame is complete if it did not change between two looks. A file of several frames grows as they
        come, and is complete only when a later file is there, too.
        """
        step, settled = source.stored_frames, True
        rows = source.shape[0] // step
        for row in range(self.rows, rows):
            now = source.identity(row * step, (row + 1) * step)
            later = _begun(source, row + 1)
            if any(size < 0 for _, size, _ in now) and not (later and source.missing_chunks == "fill"):
                self._report_hole(source, row, later)
                break
            settled = settled and self.files.get(row) == now and (step == 1 or later)
            self.files[row] = now
            self.rows += settled
        return self.rows * step

    def _report_hole(self, source: FrameSource, row: int, later: bool) -> None:
        """Report missing frames, once, if later ones are there."""
        if later and row != self.reported:
            self.reported = row
            first = row * source.stored_frames
            which = frame_range(first, first + source.stored_frames)
            warn(
                f"{which} of {source.path} are missing, though later ones are there: waiting for them. "
                "If their writer leaves out empty chunks, give --missing-chunks fill."
            )


def _begun(source: FrameSource, row: int) -> bool:
    """Return True if any file of a row is there."""
    first = row * source.stored_frames
    stop = min(first + source.stored_frames, source.shape[0])
    return first < stop and any(size >= 0 for _, size, _ in source.identity(first, stop))
