"""One pass over a stack: register and align every unit whose valid results are not there yet.

A unit that is to be registered is read once for both stages; the second stage then does the units of which only the
alignment is missing. The driver alone writes metadata, before any worker starts and after the last has ended, and only
while its lease holds.
"""

import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import xarray as xr

from stillframe.cluster.executors import Executor, is_killed, results
from stillframe.cluster.security import sweep
from stillframe.errors import OtherVersion, RunStopped, hopeless
from stillframe.log import log, warn
from stillframe.partition import Plan, Share, Unit
from stillframe.progress import Meter, progress_bar
from stillframe.report.plots import plot_shifts
from stillframe.storage.aligned_store import (
    AlignedLayout,
    create_aligned,
    finish_aligned,
    mark_incomplete,
    stray_shards,
)
from stillframe.storage.coordinates import frame_coordinates
from stillframe.storage.durable import write_durably
from stillframe.storage.reference_store import ReferenceFile, load_reference, save_reference
from stillframe.storage.shifts_store import shifts_dataset
from stillframe.storage.zarr_files import write_dataset
from stillframe.wording import first_few
from stillframe.workflow.begin import RunDependencies, RunInputs
from stillframe.workflow.lease import Lease
from stillframe.workflow.ledger import Ledger
from stillframe.workflow.outcome import NONE_GOOD, many_without_shift
from stillframe.workflow.precompile import HALVES, Compile
from stillframe.workflow.run_folder import Manifest, RunDescription, RunFolder, Stage
from stillframe.workflow.staleness import Redone, StageState, State, explain
from stillframe.workflow.unit_table import UnitTable, surplus
from stillframe.workflow.unit_tasks import AlignUnit, BothStages, Job, MakeReady, RegisterUnit


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
        return RunFolder(self.folder).shifts

    @property
    def aligned(self) -> Path:
        """Zarr store of the aligned frames."""
        return RunFolder(self.folder).aligned


@dataclass(frozen=True, eq=False)
class Pass:
    """One pass over a stack as far as it is there, or over one part of it."""

    inputs: RunInputs
    plan: Plan
    workers: Executor
    held: Lease
    share: Share | None = None
    """The part that is done here; None for all of the stack."""
    prepares: bool = True
    """Whether this process prepares the folder, for which it looks at the units of all parts."""

    def run(self) -> Result:
        """Register and align all units, then publish the shifts."""
        self.prepare()
        self.work()
        return self.finish()

    def prepare(self) -> None:
        """Write how the run begins, withdraw records that no longer hold, and make the stores."""
        with self.held.writing():
            # Before anything is written, since records of other versions are refused.
            redone = [*surplus(self._ledger, self.plan), *self.table.redone]
            self._write_beginning()
            self._withdraw(redone)
            self._create_aligned(
                [unit for unit in self.plan.units if self.table.state(unit).align.state is not State.DONE]
            )

    def _withdraw(self, redone: Sequence[Redone]) -> None:
        """Withdraw records that no longer hold, and say why.

        Without alignment, aligned frames are judged at the end. Of other parts, what could not be done stays as it is,
        since only they try it again.
        """
        own = {unit.number for unit in self._units}
        beyond = len(self.plan.units)
        wanted = [
            one
            for one in redone
            if one.unit >= beyond
            or ((self._aligns or one.stage == "register") and (one.why.changed or one.unit in own))
        ]
        for words, changed in explain(wanted):
            (warn if changed else log.info)(words)
        for one in wanted:
            self._ledger.withdraw(one.stage, one.unit)
            if one.unit < beyond:
                self.table.withdraw(one.stage, self.plan.units[one.unit])

    def work(self) -> None:
        """Register and align every unit that was asked for."""
        to_register = list(self.table.to_register(self._units))
        if to_register:
            self._make_ready()
        job = self._job
        register = RegisterUnit(job)
        with progress_bar() as bar:
            if not self._aligns:
                self._do("register", register, to_register, bar)
                return
            align = AlignUnit(job, self._dependencies.alignment)
            self._do("register", BothStages(register, align), to_register, bar)
            self._do("align", align, list(self.table.to_align(self._units)), bar)

    def finish(self) -> Result:
        """Publish the shifts of all units, say which aligned frames are missing, and write the manifest."""
        with self.held.writing():
            self._refuse_lost_records()
            shifts = self._dataset.assign_attrs(problems=self.table.problems(self.plan.units, align=False))
            write_dataset(shifts, self._folder.shifts)
            missing = self._missing()
            if not self._create_aligned(missing):
                missing = self.plan.units
            problems = self.problems + self._say_missing(missing)
            if self._has_aligned:
                stray = stray_shards(self._folder.aligned, len(self.plan.units))  # of a stack that was longer
                unfinished = self.inputs.source.limit is not None or bool(stray)
                finish_aligned(self._folder.aligned, missing, growing=unfinished)
            plot_shifts(shifts, self._folder.picture)
            shutil.rmtree(self._folder.drafts, ignore_errors=True)
            Manifest.of(self._folder).write(self._folder.manifest)
            return self._result(int((shifts["flag"] == 0).sum()), problems + self._say_many_without_shift(shifts))

    @cached_property
    def table(self) -> UnitTable:
        """How far each unit is, as this run found it and as its tasks returned."""
        units = self.plan.units if self.prepares else self._units
        return UnitTable.read(self._ledger, self.plan, units, self._dependencies, align=self._aligns)

    @property
    def problems(self) -> list[str]:
        """What could not be read or done of the units that are done here."""
        return self.table.problems(self._units, align=self._aligns)

    @property
    def _units(self) -> Sequence[Unit]:
        return self.share.units(self.plan.units) if self.share else self.plan.units

    @cached_property
    def _dependencies(self) -> RunDependencies:
        return self.inputs.dependencies(self.plan)

    @property
    def _aligns(self) -> bool:
        return self.inputs.settings.align

    @property
    def _has_aligned(self) -> bool:
        """Whether the folder holds aligned frames or will; old ones must not be mistaken for this run's."""
        return self._aligns or self._folder.aligned.exists()

    @property
    def _folder(self) -> RunFolder:
        return self.inputs.folder

    @property
    def _ledger(self) -> Ledger:
        return Ledger(self._folder)

    @property
    def _job(self) -> Job:
        stored = ReferenceFile(self._folder.reference, self.inputs.reference.digest)
        return Job(self.inputs.source, stored, self.held.claim(), self._dependencies.contents)

    def _write_beginning(self) -> None:
        """Write settings, reference and ``run.json``, and remove what killed writers left."""
        folder, settings = self._folder, self.inputs.settings
        # settings.toml comes first: a folder that holds it is known to be a run's.
        write_durably(folder.settings, settings.to_toml().encode())
        self._store_reference()
        folder.manifest.unlink(missing_ok=True)
        mark_incomplete(folder.aligned)  # before any record of it is withdrawn
        self._sweep()
        self.held.drafts.mkdir(parents=True, exist_ok=True)
        self._ledger.prepare()
        parts = self.share.of if self.share else 0
        RunDescription.of(self.plan, settings, self.inputs.origin, parts).write(folder.description)
        units = len(self.plan.units)
        log.info("%s: %d frames in %d units on %s", self.inputs.source.path, self.plan.frames, units, self.workers.name)
        if gone := self.table.gone:
            warn(f"input files are gone ({first_few(gone)}): what was made of them before is kept.")

    def _sweep(self) -> None:
        """Remove what killed writers left."""
        shutil.rmtree(self._folder.drafts, ignore_errors=True)
        sweep(self._folder.path)
        for litter in self._folder.litter():
            shutil.rmtree(litter) if litter.is_dir() else litter.unlink(missing_ok=True)

    def _store_reference(self) -> None:
        """Keep a stored reference that is byte for byte the same, so that a resumed run changes nothing."""
        path, reference = self._folder.reference, self.inputs.reference
        try:
            stored = load_reference(path).digest
        except OtherVersion:
            raise
        except ValueError:
            stored = ""
        manifest = Manifest.read(self._folder.manifest)
        if stored != reference.digest or not (manifest and manifest.describes(self._folder, path)):
            origin = self.inputs.origin.model_dump(mode="json") if self.inputs.origin else None
            save_reference(reference, path, mend=stored == reference.digest, origin=origin)

    def _make_ready(self) -> None:
        """Let one or two workers compile what all of them need; what fails there fails in the units too."""
        corrected = self.inputs.reference.corrections is not None
        dtype, how = self.inputs.source.dtype.newbyteorder("="), self.inputs.settings.interpolation
        compile_ = Compile(dtype, how, corrected)
        if self.workers.workers > 1:
            log.info("getting ready: the reference, and machine code where this machine has none yet")
            list(results(self.workers, MakeReady(compile_, self._job.reference), HALVES))

    def _do(self, stage: Stage, work: Callable[[Any], Any], todo: Sequence[tuple[Any, ...]], bar: Any) -> None:
        """Let the workers do these units, and enter the results into the table."""
        left = sum(item[0].stop - item[0].start for item in todo)
        total = sum(unit.stop - unit.start for unit in self._units)
        meter = Meter(bar, stage, total, total - left)
        for (unit, *_), outcome in results(self.workers, work, todo):
            self.held.check()
            self._enter(stage, unit, outcome)
            meter.add(unit)

    def _enter(self, stage: Stage, unit: Unit, outcome: Any) -> None:
        """Enter what came of a unit; stop the run where every other unit would fail as well."""
        if isinstance(outcome, BaseException):
            self._fail(stage, unit, outcome)
            return
        self.table.enter(unit, outcome)
        for problem in outcome[0].problems:
            warn(problem)

    def _fail(self, stage: Stage, unit: Unit, error: BaseException) -> None:
        if hopeless(error):
            raise error
        if is_killed(error) and self._was_published(stage, unit):
            return
        problem = _failure(stage, unit, error)
        with self.held.writing():
            self._ledger.withdraw("align", unit.number)
            self._ledger.fail(stage, unit, problem)
        self.table.fail(stage, unit, problem)
        log.info("where it failed:", exc_info=error)
        warn(problem)

    def _was_published(self, stage: Stage, unit: Unit) -> bool:
        """Enter what a worker published before it died, if that is the result of this stage; return whether it is."""
        found = UnitTable.read(self._ledger, self.plan, [unit], self._dependencies, align=self._aligns)
        published: StageState = getattr(found.state(unit), stage)
        if published.has_result:
            self.table.take(found, unit)
        return published.has_result

    def _refuse_lost_records(self) -> None:
        """Raise ``RunStopped`` if a record is gone that was there when its unit was done."""
        there = self._ledger.listing()["register"]
        lost = next((unit for unit in self.plan.units if unit.number not in there), None)
        if lost:
            raise RunStopped(
                f"the record of {lost} is gone, though it was there when the unit was done. Look whether something "
                f"else writes into {self._folder.path}, then run the same command again; it does what is missing."
            )

    @property
    def _dataset(self) -> xr.Dataset:
        """The dataset of shifts as far as they are known."""
        return shifts_dataset(self.table.matches, self._coordinates, self.inputs.reference)

    @cached_property
    def _coordinates(self) -> xr.Dataset:
        return frame_coordinates(self.inputs.source)

    def _create_aligned(self, missing: Sequence[Unit]) -> bool:
        """Write metadata and coordinates of the aligned store; return whether frames that were there still are.

        Until the end, the store says which frames are missing.
        """
        if not self._aligns:
            mark_incomplete(self._folder.aligned)  # until it is known which shifts are still the same
            return True
        settings, shape = self.inputs.settings, (self.plan.frames, *self.inputs.reference.shape)
        dtype, size = self.inputs.source.dtype, self.plan.unit_frames
        layout = AlignedLayout.of(shape, dtype, size, settings.interpolation, settings.fill)
        forget = partial(self._ledger.withdraw_all, "align")
        kept = create_aligned(self._dataset, layout, self._folder.aligned, self.plan.units, missing, forget)
        if not kept:
            self.table.forget_aligned()
        return kept

    def _missing(self) -> list[Unit]:
        """Return the units whose aligned frames are missing or were moved by other shifts."""
        if not self._has_aligned:
            return []
        recorded = self._ledger.listing()["align"]
        return [unit for unit in self.plan.units if unit.number not in recorded or not self._is_aligned(unit)]

    def _is_aligned(self, unit: Unit) -> bool:
        valid = self.table.state(unit).align.has_result if self._aligns else self.table.is_applied(unit)
        files = self.table.rows[unit.number].files
        return valid and bool(files) and self._folder.has_files(files)

    def _say_missing(self, missing: Iterable[Unit]) -> list[str]:
        """Return a problem for each missing unit that has none yet; without alignment, withdraw their records."""
        missing = list(missing)
        if self._aligns:
            named = {problem.partition(":")[0] for problem in self.problems}
            unnamed = [unit for unit in missing if str(unit) not in named]
            return [f"{unit}: the aligned frames are gone; run the same command again" for unit in unnamed]
        if missing:
            warn(f"--no-align: {len(missing)} units of aligned.zarr are out of date, and marked as missing there.")
            for unit in missing:
                self._ledger.withdraw("align", unit.number)
        return []

    def _say_many_without_shift(self, shifts: xr.Dataset) -> list[str]:
        """Return a problem where half of the frames, or all, have no shift; not while the stack still grows."""
        flags = shifts["flag"].values
        words = NONE_GOOD if flags.all() else None
        if words is None and self.inputs.source.limit is None:
            words = many_without_shift(shifts["shift"].values, flags, self.inputs.settings.max_shift)
        if words is None:
            return []
        warn(words)
        return [words]

    def _result(self, good: int, problems: list[str]) -> Result:
        frames = self.plan.frames
        log.info("finished: %d frames, %d with a shift and no flag, %d problems", frames, good, len(problems))
        return Result(self._folder.path, frames, good, problems)


def _failure(stage: Stage, unit: Unit, error: BaseException) -> str:
    if is_killed(error):
        return (
            f"{unit}: {stage} was given up: each worker that tried it died, the last time with nothing else to do. "
            "Its memory was not enough (--memory, --workers, --unit-frames), or a library crashed on these frames."
        )
    return f"{unit}: {stage} failed with {type(error).__name__}: {error}"
