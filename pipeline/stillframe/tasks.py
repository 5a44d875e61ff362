"""What a worker does with one unit, made durable before its task returns.

A unit's life, in this order, so that a kill at any moment leaves either a finished unit or one that is done again:
withdraw the old record; remove the old shard; write the shard; make file and folders durable; publish the record.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from stillframe.flags import Flag
from stillframe.frames import FrameSource
from stillframe.match import MATCH_DTYPE, Matches, match_frames, no_match
from stillframe.records import Ledger, Seal, Stage, UnitRecord, digest_of, from_matches
from stillframe.reference import Reference
from stillframe.resample import Interpolation, resample_frames
from stillframe.store import ReferenceFile, write_unit
from stillframe.units import Unit


@dataclass(frozen=True)
class RegisterUnit:
    """The task of the first stage; small, it travels with every unit."""

    source: FrameSource
    reference: ReferenceFile
    folder: Path

    def __call__(self, work: tuple[Unit, str]) -> UnitRecord:
        """Register one unit durably and return its record."""
        unit, mark = work
        began, ledger = time.perf_counter(), Ledger(self.folder)
        ledger.withdraw("register", unit.number)
        reading = self.source.read(unit)
        matches = _match_reading(reading.frames, reading.damaged, self.reference.load())
        record = _record("register", unit, mark, began, problems=reading.problems, matches=from_matches(matches))
        ledger.publish(record)
        return record


def _match_reading(frames: npt.NDArray[Any], damaged: npt.NDArray[np.bool_], reference: Reference) -> Matches:
    matches = np.empty(len(frames), MATCH_DTYPE)
    matches[damaged] = no_match(Flag.CORRUPT)
    matches[~damaged] = match_frames(frames[~damaged] if damaged.any() else frames, reference)
    return matches


@dataclass(frozen=True)
class AlignUnit:
    """The task of the second stage."""

    source: FrameSource
    reference: ReferenceFile
    folder: Path
    interpolation: Interpolation
    fill: float

    def __call__(self, work: tuple[Unit, str, npt.NDArray[np.float64]]) -> UnitRecord:
        """Align one unit durably and return its record."""
        unit, mark, moves = work
        began, ledger = time.perf_counter(), Ledger(self.folder)
        ledger.withdraw("align", unit.number)
        reading = self.source.read(unit)
        moves = np.where(reading.damaged[:, None], np.nan, moves)
        mask = self.reference.load().frame_mask
        frames = resample_frames(reading.frames, moves, mask, interpolation=self.interpolation, fill=self.fill)
        files = write_unit(self.folder / "aligned.zarr", unit, frames)
        shifts = digest_of(work[2])
        record = _record("align", unit, mark, began, problems=reading.problems, files=files, shifts=shifts)
        ledger.publish(record)
        return record


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
