"""The resumable run: every unit is registered and aligned, going on where the last run ended.

A unit to be registered is read once for both stages; the second then works on those whose alignment alone is missing.

A unit is done again unless its record's fingerprint (input files, reference, settings of its stage, kernel) holds and
its files are as recorded. The driver alone writes metadata, before any worker starts.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from stillframe.clusters import Executor, executor
from stillframe.errors import RunStopped, hopeless
from stillframe.flags import Flag
from stillframe.frames import FrameSource, frame_coordinates, open_source
from stillframe.lazy import align, open_frames
from stillframe.match import KERNEL_VERSION, MATCH_DTYPE, Matches, no_match
from stillframe.origin import Origin
from stillframe.prepare import check_folder, prepare_plan, prepare_reference
from stillframe.progress import Meter, log, log_to, progress_bar, warn, write_plan
from stillframe.records import STAGES, Lease, Ledger, Stage, UnitRecord, fingerprint, lease, write_durably
from stillframe.reference import Reference
from stillframe.report import plot_shifts
from stillframe.resample import check_fill, output_dtype
from stillframe.settings import Settings
from stillframe.store import (
    ReferenceFile,
    load_reference,
    save_reference,
    seal_aligned,
    shifts_dataset,
    write_dataset,
)
from stillframe.tasks import AlignUnit, BothStages, MakeReady, Moves, RegisterUnit, align_mark, moves_of
from stillframe.units import Plan, Unit
from stillframe.warm import PARTS, Compile

_NONE_GOOD = (
    "no frame got a shift without a flag. Look at the flags in shifts.zarr, and check the mask (True where pixels are "
    "valid), the reference and --max-shift."
)


Work = Sequence[tuple[str, tuple[Any, ...]]]
"""Each unit's fingerprint, with what its task needs: the unit and more."""


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


def run(settings: Settings, client: Any = None) -> Result:
    """Register and align a stack of frames, going on where an earlier run with the same folder ended.

    Parameters
    ----------
    settings : Settings
        What to do; see :class:`~stillframe.Settings`.
    client : distributed.Client, optional
        A cluster to use; by default what the settings say, else worker processes on this machine.
        In a script, call this under ``if __name__ == "__main__":``, as for every program that starts processes.

    Returns
    -------
    Result
        Where the results are, and what went wrong: ``problems`` is empty for a complete run.

    Raises
    ------
    FileNotFoundError, TypeError, ValueError
        Input or settings that cannot be used; nothing was changed.
    LeaseError
        Another run works on this folder.
    RunStopped
        No space, no permission…: the run cannot go on now. Run it again; what is finished is kept.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> from stillframe.scene import Experiment
    >>> from stillframe.simulate import simulate
    >>> folder = Path(tempfile.mkdtemp())
    >>> frames, mask = simulate(Experiment(frames=4, shape=(64, 64)), folder)
    >>> result = run(Settings(frames=frames, mask=mask, out=folder / "run", reference="0", max_shift=12, workers=0))
    >>> result.frames, result.problems
    (4, [])
    """
    check_folder(settings)
    source = open_source(settings.frames, missing_chunks=settings.missing_chunks)
    reference, origin = prepare_reference(settings, source)
    check_fill(settings.fill, output_dtype(source.dtype, settings.interpolation))
    with executor(settings, client) as workers:
        plan = prepare_plan(settings, source, workers.budget)
        settings.out.mkdir(parents=True, exist_ok=True)
        with lease(settings.out) as held, log_to(settings.out / "run.log"):
            return _Run(settings, source, reference, origin, plan, workers, held).all_stages()


@dataclass(frozen=True, eq=False)
class _Run:
    """One call of :func:`run`: what its steps share."""

    settings: Settings
    source: FrameSource
    reference: Reference
    origin: Origin | None
    plan: Plan
    workers: Executor
    held: Lease

    def all_stages(self) -> Result:
        """Register and align, publish the shifts, draw."""
        self._begin()
        stored = self._store_reference()
        register = RegisterUnit(self.source, stored, self._out)
        align_unit = AlignUnit(self.source, stored, self._out, self.settings.interpolation, self._fill)
        items = self._to_register()
        if self._todo("register", items):
            self._make_ready(stored)
        with progress_bar() as bar:
            failed = self._stage("register", BothStages(register, align_unit), items, bar)
            shifts, problems = self._collect()
            self._create_aligned(shifts)
            failed += self._stage("align", align_unit, self._to_align(shifts["shift"].values), bar)
        return self._finish(shifts, list(dict.fromkeys([*failed, *problems])))

    def _make_ready(self, stored: ReferenceFile) -> None:
        """Create the store of aligned frames while a worker or two compile what all of them will need.

        What fails in a worker fails in its units too, and is told there.
        """
        work = MakeReady(Compile(self.source.dtype.newbyteorder("="), self.settings.interpolation), stored)
        with ThreadPoolExecutor(1) as aside:
            created = aside.submit(self._create_aligned, self._dataset(self._unknown()))
            if self.workers.many:
                log.info("getting ready: the reference, and machine code where this machine has none yet")
                list(self.workers.results(work, PARTS))
            created.result()

    @property
    def _out(self) -> Path:
        return self.settings.out

    @property
    def _ledger(self) -> Ledger:
        return Ledger(self._out)

    @property
    def _dtype(self) -> np.dtype[Any]:
        return output_dtype(self.source.dtype, self.settings.interpolation)

    @property
    def _fill(self) -> float:
        return check_fill(self.settings.fill, self._dtype)

    def _begin(self) -> None:
        """Write down what is going to be done, and take back what is out of date, so that status tells the truth."""
        write_durably(self._out / "settings.toml", self.settings.to_toml().encode())
        self._ledger.prepare()
        write_plan(self._out, self.plan)
        units = len(self.plan.units)
        log.info("%s: %d frames in %d units on %s", self.source.path, self.plan.frames, units, self.workers.name)
        stale = self._take_back()
        if stale:
            log.info("%d unit records are out of date or tell of problems: those units are done again", stale)

    def _take_back(self) -> int:
        """Withdraw every record that no longer holds; return how many."""
        units, ledger = {unit.number: unit for unit in self.plan.units}, self._ledger
        stale: list[tuple[Stage, int]] = [
            (stage, number)
            for stage in STAGES
            for number in ledger.numbers(stage)
            if number not in units or not self._holds(stage, units[number])
        ]
        for stage, number in stale:
            ledger.withdraw(stage, number)
        return len(stale)

    def _holds(self, stage: Stage, unit: Unit) -> bool:
        """Tell whether a unit's record is still good; an alignment waits for its registration to be judged."""
        registered = self._ledger.finished("register", unit, self._mark(unit))
        if stage == "register" or registered is None:
            return stage == "align" or registered is not None
        mark = align_mark(self._align_facts(unit), moves_of(registered))
        return self._ledger.finished("align", unit, mark) is not None

    def _store_reference(self) -> ReferenceFile:
        """Keep the stored reference if it is the same, so that a resumed run changes nothing."""
        path = self._out / "reference.zarr"
        try:
            known = load_reference(path).digest
        except (ValueError, TypeError):
            known = ""
        if known != self.reference.digest:
            save_reference(self.reference, path)
        if self.origin:
            self.origin.write(self._out / "reference.json")
        return ReferenceFile(path, self.reference.digest)

    def _mark(self, unit: Unit) -> str:
        """Fingerprint of what a unit's registration depends on."""
        return fingerprint(self._facts(unit))

    def _facts(self, unit: Unit) -> dict[str, Any]:
        return {
            "kernel": KERNEL_VERSION,
            "reference": self.reference.digest,
            "array": self.source.description(),
            "missing_chunks": self.source.missing_chunks,
            "files": self.source.identity(unit.start, unit.stop),
            "frames": (unit.start, unit.stop),
        }

    def _align_facts(self, unit: Unit) -> dict[str, Any]:
        """Return what a unit's aligned frames depend on besides the shifts."""
        return self._facts(unit) | {
            "interpolation": self.settings.interpolation,
            "fill": repr(self._fill),
            "layout": (self.plan.frames, self.plan.unit_frames),
        }

    def _to_register(self) -> Work:
        marks = ((unit, self._mark(unit)) for unit in self.plan.units)
        return [(mark, (unit, mark, self._align_facts(unit))) for unit, mark in marks]

    def _to_align(self, moves: Moves) -> Work:
        parts = ((unit, self._align_facts(unit), moves[unit.start : unit.stop]) for unit in self.plan.units)
        return [(align_mark(facts, mine), (unit, facts, mine)) for unit, facts, mine in parts]

    def _todo(self, stage: Stage, items: Work) -> list[tuple[Any, ...]]:
        known = self._told if stage == "align" else lambda _: []
        return [item for mark, item in items if self._ledger.finished(stage, item[0], mark, known(item[0])) is None]

    def _told(self, unit: Unit) -> list[str]:
        """Return what could not be read when a unit was registered just now, and hence not aligned either."""
        record = self._ledger.read("register", unit.number)
        return record.problems if record else []

    def _stage(self, stage: Stage, work: Callable[[Any], UnitRecord], items: Work, bar: Any) -> list[str]:
        """Work on the units that are not finished; return what went wrong."""
        todo = self._todo(stage, items)
        total = sum(item[0].stop - item[0].start for _, item in items)
        left = sum(item[0].stop - item[0].start for item in todo)
        meter = Meter(bar, stage, total, total - left)
        problems = []
        for (unit, *_), outcome in self.workers.results(work, todo):
            self.held.check()
            problems += self._problems(stage, unit, outcome)
            meter.add(unit)
        return problems

    def _problems(self, stage: Stage, unit: Unit, outcome: UnitRecord | BaseException) -> list[str]:
        """Say what went wrong with a unit; stop the run where every other unit would meet the same."""
        if isinstance(outcome, OSError) and hopeless(outcome):
            raise RunStopped(
                f"{stage} of {unit}: {outcome.strerror} ({outcome.filename}). Nothing further can be written; "
                "what is finished is kept. Make room or give permission there, then run the same command again."
            ) from outcome
        problems = outcome.problems if isinstance(outcome, UnitRecord) else [_failure(stage, unit, outcome)]
        if not isinstance(outcome, UnitRecord):
            self._ledger.failed(stage, unit, problems[0])
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
                raise RunStopped(f"the record of {unit} is gone. Run the same command again; it does what is missing.")
            matches[unit.start : unit.stop] = record.to_matches()
            problems += record.problems
        shifts = self._dataset(matches)
        write_dataset(shifts.assign_attrs(problems=problems), self._out / "shifts.zarr")
        return shifts, problems

    def _create_aligned(self, shifts: xr.Dataset) -> None:
        """Write metadata and coordinates of the aligned store, unless they are there already."""
        frames = open_frames(self.source.path, chunk_frames=self.plan.unit_frames)
        aligned = align(frames, shifts, interpolation=self.settings.interpolation, fill=self.settings.fill)
        whole = self.settings.interpolation == "nearest"
        applied = (shifts["shift"].round() if whole else shifts["shift"]).assign_attrs(
            units="pixel", long_name="shift applied to the frame"
        )
        template = aligned.to_dataset().assign(applied=applied).assign_attrs(shifts.attrs, complete=False)
        write_dataset(template, self._out / "aligned.zarr", compute=False)

    def _finish(self, shifts: xr.Dataset, problems: list[str]) -> Result:
        records = {record.unit: record for record in self._ledger.records("align")}
        holes = [unit for unit in self.plan.units if unit.number not in records or not records[unit.number].files]
        seal_aligned(self._out / "aligned.zarr", holes)
        plot_shifts(shifts, self._out / "shifts.png")
        good = int((shifts["flag"] == 0).sum())
        if not good:
            problems = [*problems, _NONE_GOOD]
            warn(_NONE_GOOD)
        frames = self.plan.frames
        log.info("finished: %d frames, %d with a shift and no flag, %d problems", frames, good, len(problems))
        return Result(self._out, frames, good, problems)


def _failure(stage: Stage, unit: Unit, error: BaseException) -> str:
    return f"{unit}: {stage} failed with {type(error).__name__}: {error}"
