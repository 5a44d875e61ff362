"""What a worker does with one unit, made durable before its task returns.

A unit's life, in this order, so that a kill at any moment leaves either a finished unit or one that is done again:
withdraw the old record; remove the old shard; write the shard; make file and folders durable; publish the record.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from stillframe.errors import hopeless
from stillframe.flags import Flag
from stillframe.frames import FrameSource, Reading
from stillframe.match import MATCH_DTYPE, Matches, match_frames, no_match
from stillframe.records import STAGES, Ledger, Seal, Stage, UnitRecord, digest_of, fingerprint, from_matches
from stillframe.reference import Reference
from stillframe.resample import Interpolation, resample_frames
from stillframe.store import ReferenceFile, write_unit
from stillframe.units import Unit
from stillframe.warm import Compile, Part

Moves = npt.NDArray[np.float64]


@dataclass(frozen=True)
class RegisterUnit:
    """The first stage, by which each frame gets a shift or a flag; small, it travels with every unit."""

    source: FrameSource
    reference: ReferenceFile
    folder: Path

    def record(self, unit: Unit, mark: str, reading: Reading) -> UnitRecord:
        """Register what was read and make it durable."""
        began = time.perf_counter()
        matches = _match_reading(reading.frames, reading.damaged, self.reference.load())
        record = _record("register", unit, mark, began, problems=reading.problems, matches=from_matches(matches))
        Ledger(self.folder).publish(record)
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

    source: FrameSource
    reference: ReferenceFile
    folder: Path
    interpolation: Interpolation
    fill: float

    def __call__(self, work: tuple[Unit, Mapping[str, Any], Moves]) -> UnitRecord:
        """Align one unit durably and return its record."""
        unit, marked, moves = work
        Ledger(self.folder).withdraw("align", unit.number)
        return self.record(unit, marked, moves, self.source.read(unit))

    def record(self, unit: Unit, marked: Mapping[str, Any], moves: Moves, reading: Reading) -> UnitRecord:
        """Align what was read and make it durable."""
        began = time.perf_counter()
        kept = np.where(reading.damaged[:, None], np.nan, moves)
        mask = self.reference.load().frame_mask
        frames = resample_frames(reading.frames, kept, mask, interpolation=self.interpolation, fill=self.fill)
        files = write_unit(self.folder / "aligned.zarr", unit, frames)
        shifts = digest_of(moves)
        mark = align_mark(marked, moves)
        record = _record("align", unit, mark, began, problems=reading.problems, files=files, shifts=shifts)
        Ledger(self.folder).publish(record)
        return record


def align_mark(marked: Mapping[str, Any], moves: Moves) -> str:
    """Fingerprint of what a unit's aligned frames depend on: the shifts, and all that was known before them."""
    return fingerprint({**marked, "shifts": digest_of(moves)})


@dataclass(frozen=True)
class BothStages:
    """Both stages at once, so that frames are read and decoded a single time."""

    register: RegisterUnit
    align: AlignUnit

    def __call__(self, work: tuple[Unit, str, Mapping[str, Any]]) -> UnitRecord:
        """Register and align one unit durably and return the record of the first stage.

        What keeps the second from being finished is left to it, except what every other unit would meet too.
        """
        unit, mark, marked = work
        for stage in STAGES:
            Ledger(self.register.folder).withdraw(stage, unit.number)
        self.register.reference.load()  # what it takes for a while is free again before the frames are read
        reading = self.register.source.read(unit)
        registered = self.register.record(unit, mark, reading)
        try:
            self.align.record(unit, marked, moves_of(registered), reading)
        except Exception as error:
            if hopeless(error):
                raise
        return registered


def moves_of(record: UnitRecord) -> Moves:
    """Return the shifts of a unit (frame, 2)."""
    matches = record.to_matches()
    return np.stack([matches["dy"], matches["dx"]], axis=1)


def _record(
    stage: Stage,
    unit: Unit,
    mark: str,
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
        fingerprint=mark,
        matches=matches,
        files=files or {},
        shifts=shifts,
        problems=problems,
        seconds=round(time.perf_counter() - began, 3),
    )
