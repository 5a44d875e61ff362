"""The resumable run: two stages over units, register then align, going on where the last run ended.

A unit is done again unless its record's fingerprint (input files, reference, settings of its stage, kernel) holds and
its files are as recorded. The driver alone writes metadata, before any worker starts.
"""

import errno
import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from stillframe.clusters import Executor, executor
from stillframe.errors import RunStopped
from stillframe.flags import Flag
from stillframe.frames import FrameSource, frame_coordinates, load_image, load_mask, open_source
from stillframe.lazy import align, make_reference, open_frames
from stillframe.match import KERNEL_VERSION, MATCH_DTYPE, no_match
from stillframe.ncc import Mask
from stillframe.progress import Meter, log, log_to, progress_bar, warn, write_plan
from stillframe.records import (
    Ledger,
    Stage,
    UnitRecord,
    fingerprint,
    lease,
    write_durably,
)
from stillframe.reference import Reference
from stillframe.report import plot_shifts
from stillframe.resample import check_fill, output_dtype
from stillframe.settings import SETTINGS_VERSION, Settings, make_settings, read_toml
from stillframe.store import (
    ReferenceFile,
    load_reference,
    save_reference,
    shifts_dataset,
    write_dataset,
)
from stillframe.tasks import AlignUnit, RegisterUnit
from stillframe.units import Plan, Unit, make_plan

_HOPELESS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}
"""System errors that every further unit would meet too."""


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
    _check_folder(settings)
    source = open_source(settings.frames, missing_chunks=settings.missing_chunks)
    reference = _reference(settings, source)
    check_fill(settings.fill, output_dtype(source.dtype, settings.interpolation))
    settings.out.mkdir(parents=True, exist_ok=True)
    with lease(settings.out), log_to(settings.out / "run.log"), executor(settings, client) as workers:
        write_durably(settings.out / "settings.toml", settings.to_toml().encode())
        return _Run(settings, source, reference, workers).all_stages()


def _check_folder(settings: Settings) -> None:
    """See that the folder is new, empty, or that of a run on the same frames."""
    out, stored = settings.out, settings.out / "settings.toml"
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file, but a run needs a folder for its results. Choose another --out.")
    if stored.exists():
        _same_run(read_toml(stored), settings)
        return
    strange = sorted(path.name for path in out.glob("*") if path.name not in ("lease.json", "run.log"))
    if strange:
        raise ValueError(
            f"{out} holds {', '.join(strange[:3])}, which no run wrote: nothing of it is touched. "
            "Choose an empty or a new folder."
        )


def _same_run(before: dict[str, Any], settings: Settings) -> None:
    version = before.get("version")
    if version != SETTINGS_VERSION:
        raise ValueError(
            f"{settings.out} was written with settings of version {version}, this is version {SETTINGS_VERSION}. "
            "Use the stillframe that wrote it, or another folder."
        )
    earlier = make_settings(before).frames
    if earlier != settings.frames:
        raise ValueError(
            f"{settings.out} holds the run of {earlier}, not of {settings.frames}: their results would mix. "
            "Choose another --out."
        )


def _reference(settings: Settings, source: FrameSource) -> Reference:
    """Make the reference the settings ask for."""
    mask = None if settings.mask is None else load_mask(settings.mask)
    options = {name: getattr(settings, name) for name in ("max_shift", "overlap_ratio", "saturation")}
    frames = open_frames(settings.frames, chunk_frames=1, missing_chunks=settings.missing_chunks)
    wish = settings.reference.strip()
    if re.fullmatch(r"\d+", wish):
        return make_reference(frames, mask, use=int(wish), **options)
    if re.fullmatch(r"\d*:\d*(:\d+)?", wish):
        bounds = [int(part) if part else None for part in wish.split(":")]
        return make_reference(frames, mask, use=slice(*bounds), **options)
    return _same_shape(_reference_file(Path(wish).expanduser(), mask, options), source)


def _reference_file(path: Path, mask: Mask | None, options: dict[str, Any]) -> Reference:
    if (path / "zarr.json").exists() and (path / "image").exists():
        stored = load_reference(path)
        return Reference(stored.image, stored.mask if mask is None else mask, **options)
    return make_reference(load_image(path), mask, **options)


def _same_shape(reference: Reference, source: FrameSource) -> Reference:
    if reference.shape != source.shape[1:]:
        raise ValueError(
            f"the reference has shape {reference.shape} but the frames have {source.shape[1:]}: they must come from "
            "the same detector. Crop or bin both alike."
        )
    return reference


@dataclass(frozen=True, eq=False)
class _Run:
    """One call of :func:`run`: what its steps share."""

    settings: Settings
    source: FrameSource
    reference: Reference
    workers: Executor

    def all_stages(self) -> Result:
        """Register, publish the shifts, align, draw."""
        plan = self._plan()
        self._ledger.prepare()
        write_plan(self._out, plan)
        stored = self._store_reference()
        log.info(
            "%s: %d frames in %d units on %s",
            self.source.path,
            plan.frames,
            len(plan.units),
            self.workers.name,
        )
        with progress_bar() as bar:
            failed = self._stage("register", RegisterUnit(self.source, stored, self._out), self._to_register(plan), bar)
            shifts, problems = self._collect(plan)
            failed += self._align(plan, shifts, stored, bar)
        problems = list(dict.fromkeys([*failed, *problems]))
        return self._finish(plan, shifts, problems)

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

    def _plan(self) -> Plan:
        plan = make_plan(
            self.source.layout,
            budget=self.workers.budget,
            output_itemsize=self._dtype.itemsize,
            max_shift=self.reference.max_shift,
            unit_frames=self.settings.unit_frames,
        )
        if self.source.split:
            warn(
                f"each frame is spread over several chunks {self.source.array.chunks}: units of {plan.unit_frames} "
                f"frames are put together in memory, and each chunk is decoded {plan.decodes}× per pass"
                + ("." if plan.decodes == 1 else "; more memory per worker (--memory) makes that fewer.")
            )
        return plan

    def _store_reference(self) -> ReferenceFile:
        """Keep the stored reference if it is the same, so that a resumed run changes nothing."""
        path = self._out / "reference.zarr"
        try:
            known = load_reference(path).digest
        except (ValueError, TypeError):
            known = ""
        return ReferenceFile(path, known) if known == self.reference.digest else save_reference(self.reference, path)

    def _to_register(self, plan: Plan) -> list[tuple[Unit, str]]:
        return [(unit, self._mark(unit, stage="register")) for unit in plan.units]

    def _mark(self, unit: Unit, **parts: Any) -> str:
        """Fingerprint of what a unit's result depends on in either stage."""
        common = {
            "kernel": KERNEL_VERSION,
            "reference": self.reference.digest,
            "array": self.source.description(),
            "missing_chunks": self.source.missing_chunks,
            "files": self.source.identity(unit.start, unit.stop),
            "frames": (unit.start, unit.stop),
        }
        return fingerprint(common | parts)

    def _stage(
        self, stage: Stage, work: Callable[[Any], UnitRecord], items: Sequence[tuple[Any, ...]], bar: Any
    ) -> list[str]:
        """Work on the units that are not finished; return what went wrong."""
        todo = [item for item in items if self._ledger.finished(stage, item[0], item[1]) is None]
        stale = [item[0] for item in todo if self._ledger.path(stage, item[0].number).exists()]
        if stale:
            log.info("%s: %d units are out of date or had problems and are done again", stage, len(stale))
        for unit in stale:
            self._ledger.withdraw(stage, unit.number)
        total = sum(item[0].stop - item[0].start for item in items)
        left = sum(item[0].stop - item[0].start for item in todo)
        meter = Meter(bar, stage, total, total - left)
        problems = []
        for (unit, *_), outcome in self.workers.results(work, todo):
            problems += _problems(stage, unit, outcome)
            meter.add(unit)
        return problems

    def _collect(self, plan: Plan) -> tuple[xr.Dataset, list[str]]:
        """Gather the records into the dataset of shifts and write it; units without a record are corrupt."""
        matches = np.empty(plan.frames, MATCH_DTYPE)
        matches[:] = no_match(Flag.CORRUPT)
        problems = []
        for unit, mark in self._to_register(plan):
            record = self._ledger.read("register", unit.number)
            if record is None or record.fingerprint != mark:
                problems.append(f"{unit} were not registered")
                continue
            matches[unit.start : unit.stop] = record.to_matches()
            problems += record.problems
        shifts = shifts_dataset(matches, frame_coordinates(self.source), self.reference)
        write_dataset(shifts.assign_attrs(problems=problems), self._out / "shifts.zarr")
        return shifts, problems

    def _align(self, plan: Plan, shifts: xr.Dataset, stored: ReferenceFile, bar: Any) -> list[str]:
        moves = shifts["shift"].values
        self._create_aligned(plan, shifts)
        work = AlignUnit(self.source, stored, self._out, self.settings.interpolation, self._fill)
        items = []
        for unit in plan.units:
            mine = moves[unit.start : unit.stop]
            mark = self._mark(
                unit,
                stage="align",
                shifts=hashlib.sha256(mine.tobytes()).hexdigest(),
                interpolation=self.settings.interpolation,
                fill=repr(self._fill),
                layout=(plan.frames, plan.unit_frames),
            )
            items.append((unit, mark, mine))
        return self._stage("align", work, items, bar)

    def _create_aligned(self, plan: Plan, shifts: xr.Dataset) -> None:
        """Write metadata and coordinates of the aligned store, unless they are there already."""
        path = self._out / "aligned.zarr"
        frames = open_frames(self.source.path, chunk_frames=plan.unit_frames)
        aligned = align(frames, shifts, interpolation=self.settings.interpolation, fill=self.settings.fill)
        applied = shifts["shift"].assign_attrs(units="pixel", long_name="shift applied to the frame")
        template = aligned.to_dataset().assign(applied=applied).assign_attrs(shifts.attrs)
        mark = fingerprint(
            {
                "applied": applied.values.tobytes().hex(),
                "layout": aligned.encoding["shards"],
                "attributes": [aligned.attrs, shifts.attrs],
                "array": self.source.description(),
                "coordinates": frame_coordinates(self.source).to_dict(),
            }
        )
        if _stored_mark(path) != mark:
            write_dataset(template.assign_attrs(fingerprint=mark), path, compute=False)

    def _finish(self, plan: Plan, shifts: xr.Dataset, problems: list[str]) -> Result:
        plot_shifts(shifts, self._out / "shifts.png")
        good = int((shifts["flag"] == 0).sum())
        log.info("finished: %d frames, %d with a shift and no flag, %d problems", plan.frames, good, len(problems))
        return Result(self._out, plan.frames, good, problems)


def _stored_mark(path: Path) -> str | None:
    try:
        with xr.open_zarr(path, chunks=None, consolidated=False) as stored:
            return str(stored.attrs.get("fingerprint"))
    except Exception:  # absent or damaged: written again
        return None


def _problems(stage: Stage, unit: Unit, outcome: UnitRecord | BaseException) -> list[str]:
    """Say what went wrong with a unit; stop the run where every other unit would meet the same."""
    if isinstance(outcome, UnitRecord):
        for problem in outcome.problems:
            warn(problem)
        return outcome.problems
    if isinstance(outcome, OSError) and outcome.errno in _HOPELESS:
        raise RunStopped(
            f"{stage} of {unit}: {outcome.strerror} ({outcome.filename}). Nothing further can be written; "
            "what is finished is kept. Make room or give permission there, then run the same command again."
        ) from outcome
    problem = f"{unit}: {stage} failed with {type(outcome).__name__}: {outcome}"
    warn(problem)
    return [problem]
