"""What a worker does with one unit, made durable before its task returns.

A unit's life, in this order, so that a kill at any moment leaves either a finished unit or one that is done again:
write the shard under a name of its own, durably; then, while nobody can take over the run, withdraw the old record,
put the shard in its place, make the folders durable, publish the record. Whatever happens twice, or too late, gives
the same bytes or nothing.
"""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from stillframe.durable import Seal, digest_of, fingerprint
from stillframe.errors import hopeless
from stillframe.flags import Flag
from stillframe.frames import FrameSource, Reading
from stillframe.leases import Claim
from stillframe.match import MATCH_DTYPE, Matches, match_frames, no_match
from stillframe.records import INPUT_FILES, Ledger, Mark, Stage, UnitRecord, from_matches
from stillframe.reference import Reference
from stillframe.resample import Interpolation, resample_frames
from stillframe.store import ReferenceFile, draft_unit
from stillframe.units import Unit
from stillframe.warm import Compile, Part

Moves = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Job:
    """What every unit's task shares; small, it travels with each."""

    source: FrameSource
    """The frames."""
    reference: ReferenceFile
    """What they are laid on."""
    claim: Claim
    """The right to write into the run's folder."""
    contents: bool = False
    """Whether input files are known by their contents, and not by their times."""

    @property
    def ledger(self) -> Ledger:
        """The records of the run."""
        return Ledger(self.claim.folder)

    def read(self, unit: Unit, mark: Mark) -> Reading:
        """Read a unit, and see that its files are those that the mark speaks of.

        Raises
        ------
        InputChanged
            They are not: the result would be recorded as that of other frames.
        """
        reading = self.source.read(unit)
        files = self.source.identity(unit.start, unit.stop, contents=self.contents)
        if fingerprint({"files": files}) != mark.facts[INPUT_FILES]:
            raise InputChanged(
                f"the input files of {unit} changed since this run began, so that its result would be that of other "
                "frames. Run the same command again when nothing writes to them any more, or use --follow."
            )
        return reading


class InputChanged(RuntimeError):
    """Frames were changed under a run's hands."""


@dataclass(frozen=True)
class RegisterUnit:
    """The first stage, by which each frame gets a shift or a flag."""

    job: Job

    def __call__(self, work: tuple[Unit, Mark]) -> UnitRecord:
        """Register one unit durably and return its record."""
        return self.begin(*work)[0]

    def begin(self, unit: Unit, mark: Mark) -> tuple[UnitRecord, Reading | None]:
        """Register one unit durably and return what was read for it, too.

        A unit that is finished by now, by a worker that could not say so any more, is not read again.
        """
        self.job.claim.check()
        if known := self.job.ledger.finished("register", unit, mark):
            return known, None
        self.job.reference.load()  # what it takes for a while is free again before the frames are read
        began = time.perf_counter()
        reading = self.job.read(unit, mark)
        return self._record(unit, mark, reading, began), reading

    def _record(self, unit: Unit, mark: Mark, reading: Reading, began: float) -> UnitRecord:
        """Register what was read and make it durable."""
        matches = _match_reading(reading.frames, reading.damaged, self.job.reference.load())
        record = _record("register", unit, mark, began, problems=reading.problems, matches=from_matches(matches))
        with self.job.claim.writing():
            self.job.ledger.publish(record)
        return record


@dataclass(frozen=True)
class MakeReady:
    """What every unit needs first: machine code, and the prepared reference in this process."""

    compile: Compile
    reference: ReferenceFile

    def __call__(self, part: Part) -> None:
        """Compile one part, and prepare."""
        self.compile(part)
        self.reference.load()


def _match_reading(frames: npt.NDArray[Any], damaged: npt.NDArray[np.bool_], reference: Reference) -> Matches:
    matches = np.empty(len(frames), MATCH_DTYPE)
    matches[damaged] = no_match(Flag.CORRUPT)
    matches[~damaged] = match_frames(frames[~damaged] if damaged.any() else frames, reference)
    return matches


@dataclass(frozen=True)
class AlignUnit:
    """The second stage, by which each frame is laid on the reference."""

    job: Job
    interpolation: Interpolation
    """How frames are moved."""
    fill: float
    """Value where nothing was observed."""
    unit_frames: int
    """Frames of a whole shard."""

    def mark(self, registered: Mark, moves: Moves) -> Mark:
        """Return what a unit's aligned frames depend on: the same as its shifts, these, and more settings."""
        mine = {"interpolation": self.interpolation, "fill": repr(self.fill), "unit_frames": str(self.unit_frames)}
        return replace(registered, facts={**registered.facts, **mine, "shifts": digest_of(moves)}, older={})

    def __call__(self, work: tuple[Unit, Mark, Moves]) -> UnitRecord:
        """Align one unit durably and return its record."""
        unit, mark, moves = work
        self.job.claim.check()
        if known := self.job.ledger.finished("align", unit, mark):
            return known
        self.job.reference.load()  # what it takes for a while is free again before the frames are read
        return self.record(unit, mark, moves, self.job.read(unit, mark))

    def record(self, unit: Unit, mark: Mark, moves: Moves, reading: Reading) -> UnitRecord:
        """Align what was read and make it durable."""
        began = time.perf_counter()
        kept = np.where(reading.damaged[:, None], np.nan, moves)
        mask = self.job.reference.load().frame_mask
        frames = resample_frames(reading.frames, kept, mask, interpolation=self.interpolation, fill=self.fill)
        claim, ledger = self.job.claim, self.job.ledger
        try:
            draft = draft_unit(claim.folder / "aligned.zarr", unit, frames, claim.drafts)
        except OSError:
            claim.check()  # whoever took over has swept this one's drafts
            raise
        files, shifts = {f"aligned.zarr/{draft.name}": draft.seal}, digest_of(moves)
        record = _record("align", unit, mark, began, problems=reading.problems, files=files, shifts=shifts)
        try:
            with claim.writing():
                ledger.withdraw("align", unit.number)
                draft.put_in_place()
                ledger.publish(record)
        finally:
            draft.discard()
        return record


@dataclass(frozen=True)
class BothStages:
    """Both stages at once, so that frames are read and decoded a single time."""

    register: RegisterUnit
    align: AlignUnit

    def __call__(self, work: tuple[Unit, Mark]) -> UnitRecord:
        """Register and align one unit durably and return the record of the first stage.

        What keeps the second from being finished is left to it, except what every other unit would meet too.
        """
        unit, mark = work
        registered, reading = self.register.begin(unit, mark)
        moves = moves_of(registered)
        mark = self.align.mark(mark, moves)
        with _left_to_its_stage():
            self.align((unit, mark, moves)) if reading is None else self.align.record(unit, mark, moves, reading)
        return registered


@contextlib.contextmanager
def _left_to_its_stage() -> Iterator[None]:
    """Go on after a failure, unless every other unit would meet it too."""
    try:
        yield
    except Exception as error:
        if hopeless(error):
            raise


def moves_of(record: UnitRecord) -> Moves:
    """Return the shifts of a unit (frame, 2)."""
    matches = record.to_matches()
    return np.stack([matches["dy"], matches["dx"]], axis=1)


def _record(
    stage: Stage,
    unit: Unit,
    mark: Mark,
    began: float,
    *,
    problems: list[str],
    matches: dict[str, list[float]] | None = None,
    files: dict[str, Seal] | None = None,
    shifts: str = "",
) -> UnitRecord:
    return UnitRecord(
        stage=stage,
        unit=unit.number,
        start=unit.start,
        stop=unit.stop,
        fingerprint=mark.fingerprint,
        facts=mark.facts,
        inputs=mark.inputs,
        matches=matches,
        files=files or {},
        shifts=shifts,
        problems=problems,
        seconds=round(time.perf_counter() - began, 3),
    )
