"""What a worker does with one unit, made durable before its task returns.

The order of steps, so that a kill at any moment leaves either a finished unit or one that is done again: write the
shard under another name, durably; then, while nobody can take over the run, withdraw the old record, put the shard in
its place, sync the folders, publish the record. A step done twice, or too late, gives the same bytes or nothing.
"""

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from stillframe.errors import hopeless
from stillframe.flags import Flag
from stillframe.images.resample import resample_frames
from stillframe.partition import Unit
from stillframe.registration.match import match_frames
from stillframe.registration.matches import MATCH_DTYPE, Matches, no_match
from stillframe.registration.reference import Reference
from stillframe.storage.aligned_store import draft_unit
from stillframe.storage.checksums import Checksum, fingerprint
from stillframe.storage.frames import FrameSource, Reading
from stillframe.storage.reference_store import ReferenceFile
from stillframe.workflow.lease import Claim
from stillframe.workflow.ledger import Ledger, UnitRecord, fields_of
from stillframe.workflow.precompile import Compile, Half
from stillframe.workflow.run_folder import Stage
from stillframe.workflow.staleness import INPUT_FILES, Alignment, Dependencies, Shifts, shifts_of


@dataclass(frozen=True)
class Job:
    """What the tasks of all units share; small, since it is sent with each."""

    source: FrameSource
    """The frames."""
    reference: ReferenceFile
    """The stored reference."""
    claim: Claim
    """The right to write into the run's folder."""
    contents: bool = False
    """Whether input files are identified by checksums of their contents, and not by their times."""

    @property
    def ledger(self) -> Ledger:
        """The records of the run."""
        return Ledger(self.claim.folder)

    def read(self, unit: Unit, dependencies: Dependencies) -> Reading:
        """Read a unit, and check that its files are those that its result will be recorded for.

        Raises
        ------
        InputChanged
            They are not: the result would be recorded as that of other frames.
        """
        reading = self.source.read(unit)
        files = self.source.identity(unit.start, unit.stop, contents=self.contents)
        if fingerprint({"files": files}) != dependencies.facts[INPUT_FILES]:
            raise InputChanged(
                f"the input files of {unit} changed since this run began, so that its result would be that of other "
                "frames. Run the same command again when nothing writes to them any more, or use --follow."
            )
        return reading

    def recorded(self, stage: Stage, unit: Unit, dependencies: Dependencies) -> UnitRecord | None:
        """Return the record of a unit that another worker finished, but whose result never reached the driver."""
        record = self.ledger.read(stage, unit.number)
        if record is None or record.problems or record.fingerprint != dependencies.fingerprint:
            return None
        return record if self.ledger.has_files(record) else None


class InputChanged(RuntimeError):
    """Input files were changed while a run was under way."""


@dataclass(frozen=True)
class RegisterUnit:
    """The first stage, which gives each frame a shift or a flag."""

    job: Job

    def __call__(self, work: tuple[Unit, Dependencies]) -> list[UnitRecord]:
        """Register one unit durably and return its record."""
        return [self.begin(*work)[0]]

    def begin(self, unit: Unit, dependencies: Dependencies) -> tuple[UnitRecord, Reading | None]:
        """Register one unit durably and return its record with the frames, which are None if it was finished before."""
        self.job.claim.check()
        if record := self.job.recorded("register", unit, dependencies):
            return record, None
        self.job.reference.load()  # before the frames are read, so that memory it needs for a while is free again
        began = time.perf_counter()
        reading = self.job.read(unit, dependencies)
        matches = _match_reading(reading, self.job.reference.load())
        record = _record("register", unit, dependencies, began, reading.problems, matches=fields_of(matches))
        with self.job.claim.writing():
            self.job.ledger.publish(record)
        return record, reading


@dataclass(frozen=True)
class MakeReady:
    """What every unit needs first: machine code, and the prepared reference in this process."""

    compile: Compile
    reference: ReferenceFile

    def __call__(self, half: Half) -> None:
        """Compile one half of the kernel, and prepare the reference."""
        self.compile(half)
        self.reference.load()


def _match_reading(reading: Reading, reference: Reference) -> Matches:
    """Match the frames that could be read; the others are corrupt."""
    frames, damaged = reading.frames, reading.damaged
    matches = np.empty(len(frames), MATCH_DTYPE)
    matches[damaged] = no_match(Flag.CORRUPT)
    matches[~damaged] = match_frames(frames[~damaged] if damaged.any() else frames, reference)
    return matches


@dataclass(frozen=True)
class AlignUnit:
    """The second stage, which moves each frame by its shift."""

    job: Job
    alignment: Alignment

    def __call__(self, work: tuple[Unit, Dependencies, Shifts]) -> list[UnitRecord]:
        """Align one unit durably and return its record."""
        unit, registered, shifts = work
        self.job.claim.check()
        dependencies = registered.with_alignment(self.alignment, shifts)
        if record := self.job.recorded("align", unit, dependencies):
            return [record]
        self.job.reference.load()  # before the frames are read, so that memory it needs for a while is free again
        return [self.align(unit, dependencies, shifts, self.job.read(unit, registered))]

    def align(self, unit: Unit, dependencies: Dependencies, shifts: Shifts, reading: Reading) -> UnitRecord:
        """Align frames that were read, durably."""
        began = time.perf_counter()
        frames = self._resampled(reading, shifts)
        claim, ledger = self.job.claim, self.job.ledger
        try:
            draft = draft_unit(claim.folder.aligned, unit, frames, claim.drafts)
        except OSError:
            claim.check()  # a driver that took over has removed the drafts of this one
            raise
        files = {f"{claim.folder.aligned.name}/{draft.name}": draft.checksum}
        record = _record("align", unit, dependencies, began, reading.problems, files=files)
        try:
            with claim.writing():
                ledger.withdraw("align", unit.number)
                draft.put_in_place()
                ledger.publish(record)
        finally:
            draft.discard()
        return record

    def _resampled(self, reading: Reading, shifts: Shifts) -> npt.NDArray[Any]:
        """Return the frames on the reference; nothing is observed in damaged ones."""
        kept = np.where(reading.damaged[:, None], np.nan, shifts)
        mask, how = self.job.reference.load().frame_mask, self.alignment
        return resample_frames(reading.frames, kept, mask, interpolation=how.interpolation, fill=how.fill)


@dataclass(frozen=True)
class BothStages:
    """Both stages at once, so that frames are read and decoded a single time."""

    register: RegisterUnit
    align: AlignUnit

    def __call__(self, work: tuple[Unit, Dependencies]) -> list[UnitRecord]:
        """Register and align one unit durably; after a failure of the second stage, return only the first record."""
        unit, dependencies = work
        registered, reading = self.register.begin(unit, dependencies)
        shifts = shifts_of(registered.to_matches())
        try:
            if reading is None:
                return [registered, *self.align((unit, dependencies, shifts))]
            after = dependencies.with_alignment(self.align.alignment, shifts)
            return [registered, self.align.align(unit, after, shifts, reading)]
        except Exception as error:
            if hopeless(error):  # would hit every other unit as well
                raise
            return [registered]


def _record(
    stage: Stage,
    unit: Unit,
    dependencies: Dependencies,
    began: float,
    problems: list[str],
    *,
    matches: dict[str, list[float]] | None = None,
    files: dict[str, Checksum] | None = None,
) -> UnitRecord:
    return UnitRecord(
        stage=stage,
        unit=unit.number,
        start=unit.start,
        stop=unit.stop,
        fingerprint=dependencies.fingerprint,
        facts=dependencies.facts,
        inputs=dependencies.inputs,
        matches=matches,
        files=files or {},
        problems=problems,
        seconds=round(time.perf_counter() - began, 3),
    )
