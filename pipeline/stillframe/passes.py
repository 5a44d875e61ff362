"""One pass over a stack: every unit is registered and aligned, unless what an earlier pass made of it still holds.

A unit to be registered is read once for both stages; the second then works on those whose alignment alone is missing.

A unit is done again unless its record's fingerprint (input files, reference, settings of its stage, kernel) holds and
its files are as recorded; what changed is told by name. The driver alone writes metadata, before any worker starts,
and only while its lease holds.
"""

import contextlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import dask
import numpy as np
import xarray as xr

from stillframe.doors import sweep
from stillframe.durable import write_durably
from stillframe.errors import NewerVersion, RunStopped, hopeless
from stillframe.executors import Executor, is_killed, results
from stillframe.flags import Flag
from stillframe.frames import FrameSource, frame_coordinates
from stillframe.lazy import empty_aligned
from stillframe.leases import Lease, drafts_of
from stillframe.marks import Marker, marker_of
from stillframe.match import MATCH_DTYPE, Matches, no_match
from stillframe.origin import Origin
from stillframe.outdated import Outdated, holds_aligned, holds_same_shifts, in_words, is_done, standings, surplus
from stillframe.plans import Seals, is_sealed, write_plan
from stillframe.progress import Meter, log, progress_bar, warn
from stillframe.records import STAGES, Ledger, Mark, Stage, UnitRecord
from stillframe.reference import Reference
from stillframe.report import plot_shifts
from stillframe.settings import Settings
from stillframe.store import (
    create_aligned,
    load_reference,
    mark_incomplete,
    save_reference,
    seal_aligned,
    shifts_dataset,
    store_files,
    write_dataset,
)
from stillframe.tasks import AlignUnit, BothStages, Job, MakeReady, Moves, RegisterUnit, moves_of
from stillframe.units import Plan, Share, Unit, first_few
from stillframe.warm import PARTS, Compile

_NONE_GOOD = (
    "no frame got a shift without a flag. Look at the flags in shifts.zarr, and check the mask (True where pixels are "
    "valid), the reference and --max-shift."
)

_STORES = ("reference.zarr", "shifts.zarr", "aligned.zarr")

Work = Sequence[tuple[Unit, Mark] | tuple[Unit, Mark, Moves]]
"""What each unit's task needs."""


@dataclass(frozen=True)
class Result:
    """What a run made."""

    folder: Path
    """The run's folder."""
    frames: int
    """Frames of the stack."""
    good: int
    """Frames with a shift and no flag."""
    problems: list[str] = field(default_factory=list)
    """What could not be read or done; empty for a complete run."""

    @property
    def shifts(self) -> Path:
        """Zarr store of the dataset of shifts."""
        return self.folder / "shifts.zarr"

    @property
    def aligned(self) -> Path:
        """Zarr store of the aligned frames."""
        return self.folder / "aligned.zarr"


@dataclass(frozen=True, eq=False)
class Pass:
    """One pass over what there is of a stack, or over a part of it: what its steps share."""

    source: FrameSource
    plan: Plan
    settings: Settings
    reference: Reference
    origin: Origin | None
    workers: Executor
    held: Lease
    share: Share | None = None

    def all_stages(self) -> Result:
        """Register and align, publish the shifts, draw."""
        self.begin()
        return self.put_together(self.work())

    def begin(self) -> None:
        """Write down what is going to be done, and make the stores for it."""
        with self._driving_alone():
            matches, holes, found = self._look_back()  # first, as it refuses what is newer
            self._prepare_folder(found)
            self._create_aligned(self._dataset(matches), holes)

    def work(self) -> list[str]:
        """Register and align every unit that is asked for; return what went wrong."""
        units = self._units
        to_register = self._to_register(units)
        if to_register:
            self._make_ready()
        register = RegisterUnit(self._job)
        with progress_bar() as bar:
            if not self.settings.align:
                return self._stage("register", register, to_register, bar)
            failed = self._stage("register", BothStages(register, self._align_unit), to_register, bar)
            return failed + self._stage("align", self._align_unit, list(self._to_align(units)), bar)

    def put_together(self, failed: list[str]) -> Result:
        """Publish what all units found."""
        with self._driving_alone():
            shifts, problems = self._collect()
            holes = self._holes()
            kept = self._create_aligned(shifts, holes)
            return self._finish(shifts, list(dict.fromkeys([*failed, *problems])), holes if kept else self.plan.units)

    @contextlib.contextmanager
    def _driving_alone(self) -> Iterator[None]:
        """Write as long as the lease holds, and let no cluster have a part in it, whose scheduler may die."""
        with self.held.writing(), dask.config.set(scheduler="synchronous"):
            yield

    def failures(self) -> list[str]:
        """Return why units could not be aligned."""
        return [problem for record in self._ledger.records("align") for problem in record.problems]

    def missing(self) -> list[Unit]:
        """Return the units that nobody has worked on with these settings, whatever became of them."""
        return [unit for unit in self.plan.units if not self._was_tried(unit)]

    def _was_tried(self, unit: Unit) -> bool:
        failed = any(self._has_failed(stage, unit) for stage in STAGES)
        return failed or is_done(self._ledger, unit, self._marker, align=self.settings.align)

    def _has_failed(self, stage: Stage, unit: Unit) -> bool:
        record = self._ledger.read(stage, unit.number)
        return record is not None and not record.fingerprint

    @property
    def _units(self) -> Sequence[Unit]:
        return self.share.units(self.plan.units) if self.share else self.plan.units

    @cached_property
    def _marker(self) -> Marker:
        return marker_of(self.settings, self.source, self.reference, self.plan, self.held.claim())

    @cached_property
    def _mine(self) -> Marker:
        """The same for the units that are done here: of all others, no file is looked at."""
        return replace(self._marker, units=self._units) if self.share else self._marker

    @property
    def _align_unit(self) -> AlignUnit:
        return self._marker.align_unit

    @property
    def _job(self) -> Job:
        return self._align_unit.job

    def _make_ready(self) -> None:
        """Let a worker or two compile what all of them will need.

        What fails in a worker fails in its units too, and is told there.
        """
        compile_ = Compile(self.source.dtype.newbyteorder("="), self.settings.interpolation)
        if self.workers.workers > 1:
            log.info("getting ready: the reference, and machine code where this machine has none yet")
            list(results(self.workers, MakeReady(compile_, self._job.reference), PARTS))

    @property
    def _out(self) -> Path:
        return self.settings.out

    @property
    def _ledger(self) -> Ledger:
        return Ledger(self._out)

    def _look_back(self) -> tuple[Matches, list[Unit], list[Outdated]]:
        """Look at each unit's records once: what holds, which units lack aligned frames, what is out of date.

        Frames without a record that holds are corrupt.
        """
        matches, holes, found = self._unknown(), [], surplus(self._ledger, self.plan.units)
        for one in standings(self._ledger, self.plan.units, self._marker):
            if one.matches is not None:
                matches[one.unit.start : one.unit.stop] = one.matches
            if not one.aligned:
                holes.append(one.unit)
            found += one.outdated
        return matches, holes, [one for one in found if self.settings.align or one.stage == "register"]

    def _prepare_folder(self, found: Sequence[Outdated]) -> None:
        """Write down what is going to be done, and take back what is out of date, so that status tells the truth."""
        # From the first file on, the folder is known as a run's.
        write_durably(self._out / "settings.toml", self.settings.to_toml().encode())
        self._store_reference()
        (self._out / "seals.json").unlink(missing_ok=True)
        mark_incomplete(self._out / "aligned.zarr")  # before any record of it is withdrawn
        self._sweep()
        self.held.drafts.mkdir(parents=True, exist_ok=True)
        self._ledger.prepare()
        parts = self.share.of if self.share else 0
        write_plan(self._out, self.plan, self.settings.model_dump(mode="json", exclude_none=True), parts)
        units = len(self.plan.units)
        log.info("%s: %d frames in %d units on %s", self.source.path, self.plan.frames, units, self.workers.name)
        self._take_back(found)

    def _sweep(self) -> None:
        """Remove what killed writers left."""
        shutil.rmtree(drafts_of(self._out), ignore_errors=True)
        sweep(self._out)
        for litter in (*self._out.glob(".*.json.*.partial"), *(self._out / "aligned.zarr").glob(".*.partial")):
            litter.unlink(missing_ok=True)
        for name in _STORES:
            shutil.rmtree(self._out / f".{name}.partial", ignore_errors=True)

    def _take_back(self, found: Sequence[Outdated]) -> None:
        """Withdraw every record that no longer holds, and say why."""
        if self._marker.kept:
            warn(f"input files are gone ({first_few(self._marker.kept)}): what was made of them before is kept.")
        for words, changed in in_words(found):
            (warn if changed else log.info)(words)
        for one in found:
            self._ledger.withdraw(one.stage, one.unit)

    def _store_reference(self) -> None:
        """Keep the stored reference if it is the same, byte for byte, so that a resumed run changes nothing."""
        path = self._out / "reference.zarr"
        try:
            known = load_reference(path).digest
        except NewerVersion:
            raise
        except ValueError:
            known = ""
        if known != self.reference.digest or not is_sealed(self._out, path):
            save_reference(self.reference, path, mend=known == self.reference.digest)
        if self.origin:
            self.origin.write(self._out / "reference.json")

    def _to_register(self, units: Sequence[Unit]) -> Work:
        """Return the units whose registration is not finished."""
        items = ((unit, self._mine.register(unit)) for unit in units)
        return [(unit, mark.for_task()) for unit, mark in items if not self._ledger.finished("register", unit, mark)]

    def _to_align(self, units: Sequence[Unit]) -> Iterator[tuple[Unit, Mark, Moves]]:
        """Yield the units that were registered and whose alignment is not finished.

        What could not be read when a unit was registered just now was not aligned either, and was told.
        """
        for unit in units:
            record = self._ledger.read("register", unit.number)
            if record is None or record.matches is None:
                continue
            moves = moves_of(record)
            mark = self._mine.align(unit, moves)
            if not self._ledger.finished("align", unit, mark, record.problems):
                yield unit, mark.for_task(), moves

    def _stage(self, stage: Stage, work: Callable[[Any], UnitRecord], todo: Work, bar: Any) -> list[str]:
        """Work on units; return what went wrong."""
        left = sum(item[0].stop - item[0].start for item in todo)
        total = sum(unit.stop - unit.start for unit in self._units)
        meter = Meter(bar, stage, total, total - left)
        problems = []
        for (unit, *_), outcome in results(self.workers, work, todo):
            self.held.check()
            problems += self._problems(stage, unit, outcome)
            meter.add(unit)
        return problems

    def _problems(self, stage: Stage, unit: Unit, outcome: UnitRecord | BaseException) -> list[str]:
        """Say what went wrong with a unit; stop the run where every other unit would meet the same."""
        if isinstance(outcome, BaseException) and hopeless(outcome):
            raise outcome
        problems = outcome.problems if isinstance(outcome, UnitRecord) else [_failure(stage, unit, outcome)]
        if not isinstance(outcome, UnitRecord):
            with self.held.writing():
                self._ledger.withdraw("align", unit.number)
                self._ledger.failed(stage, unit, problems[0])
            log.info("where it failed:", exc_info=outcome)
        for problem in problems:
            warn(problem)
        return problems

    def _unknown(self) -> Matches:
        return np.full(self.plan.frames, np.array(no_match(Flag.CORRUPT), MATCH_DTYPE))

    def _dataset(self, matches: Matches) -> xr.Dataset:
        return shifts_dataset(matches, frame_coordinates(self.source), self.reference)

    def _collect(self) -> tuple[xr.Dataset, list[str]]:
        """Gather the records into the dataset of shifts and write it; frames without a match are corrupt."""
        matches, problems = self._unknown(), []
        for unit in self.plan.units:
            record = self._ledger.read("register", unit.number)
            if record is None:
                raise RunStopped(
                    f"the record of {unit} is gone, though it was there when the unit was done. Look whether something "
                    f"else writes into {self._out}, then run the same command again; it does what is missing."
                )
            matches[unit.start : unit.stop] = record.to_matches()
            problems += record.problems
        shifts = self._dataset(matches)
        write_dataset(shifts.assign_attrs(problems=problems), self._out / "shifts.zarr")
        return shifts, problems

    def _create_aligned(self, shifts: xr.Dataset, holes: Sequence[Unit]) -> bool:
        """Write metadata and coordinates of the aligned store, and tell whether frames that were there still are.

        Until the end it says what may be missing.
        """
        if not self.settings.align:
            mark_incomplete(self._out / "aligned.zarr")  # until it is known which shifts are still the same
            return True
        dtype, size = self.source.dtype, self.plan.unit_frames
        aligned = empty_aligned(shifts, dtype, size, interpolation=self.settings.interpolation, fill=self.settings.fill)
        whole = self.settings.interpolation == "nearest"
        applied = (shifts["shift"].round() if whole else shifts["shift"]).assign_attrs(
            units="pixel", long_name="shift applied to the frame"
        )
        missing = [str(unit) for unit in holes]
        template = aligned.to_dataset().assign(applied=applied)
        template = template.assign_attrs(shifts.attrs, complete=False, missing=missing)
        forget = partial(self._ledger.withdraw_all, "align")
        return create_aligned(template, self._out / "aligned.zarr", self.plan.units, forget)

    @property
    def _has_aligned(self) -> bool:
        """Whether there are aligned frames, or are to be: those of an earlier run must not pass for these."""
        return self.settings.align or (self._out / "aligned.zarr").exists()

    def _holes(self) -> list[Unit]:
        """Return the units whose aligned frames are not there, or are those of another time."""
        if not self._has_aligned:
            return []
        return [unit for unit in self.plan.units if not self._holds(unit)]

    def _holds(self, unit: Unit) -> bool:
        if self.settings.align:
            return holds_aligned(self._ledger, unit, self._marker)
        return holds_same_shifts(self._ledger, unit)

    def _finish(self, shifts: xr.Dataset, problems: list[str], holes: Sequence[Unit]) -> Result:
        if self.settings.align:
            said = {problem.partition(":")[0] for problem in problems}
            unsaid = [unit for unit in holes if str(unit) not in said]
            problems += [f"{unit}: the aligned frames are gone; run the same command again" for unit in unsaid]
        elif holes:
            warn(f"--no-align: {len(holes)} units of aligned.zarr are out of date, and marked as missing there.")
            for unit in holes:
                self._ledger.withdraw("align", unit.number)
        if self._has_aligned:
            seal_aligned(self._out / "aligned.zarr", holes, growing=self.source.limit is not None)
        plot_shifts(shifts, self._out / "shifts.png")
        shutil.rmtree(drafts_of(self._out), ignore_errors=True)
        Seals.of(self._out, _sealed_files(self._out)).write(self._out)
        good = int((shifts["flag"] == 0).sum())
        if not good:
            problems = [*problems, _NONE_GOOD]
            warn(_NONE_GOOD)
        frames = self.plan.frames
        log.info("finished: %d frames, %d with a shift and no flag, %d problems", frames, good, len(problems))
        return Result(self._out, frames, good, problems)


def _sealed_files(folder: Path) -> list[Path]:
    """Return the files of a finished run that neither a record nor a checksum of their own speaks of."""
    single = (folder / name for name in ("settings.toml", "reference.json", "shifts.png"))
    stores = [folder / name for name in _STORES]
    files = (file for store in stores if store.exists() for file in store_files(store))
    return [*(file for file in single if file.exists()), *files]


def _failure(stage: Stage, unit: Unit, error: BaseException) -> str:
    if is_killed(error):
        return (
            f"{unit}: {stage} was given up: each worker that tried it died, the last time with nothing else to do. "
            "Its memory was not enough (--memory, --workers, --unit-frames), or a library crashed on these frames."
        )
    return f"{unit}: {stage} failed with {type(error).__name__}: {error}"
