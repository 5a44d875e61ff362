"""Compare every byte of a run's folder with what was recorded of it, and repair what differs.

Nothing but the folder is needed; the frames themselves may be gone.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from stillframe.partition import Plan, Unit
from stillframe.settings import Settings, read_toml
from stillframe.storage.aligned_store import stray_shards
from stillframe.storage.checksums import Checksum
from stillframe.storage.durable import store_files
from stillframe.storage.reference_store import load_reference
from stillframe.workflow.lease import lease, read_leases
from stillframe.workflow.ledger import Ledger, plan_of
from stillframe.workflow.run_folder import (
    STAGES,
    Manifest,
    RunDescription,
    RunFolder,
    Stage,
    read_settings,
)
from stillframe.workflow.staleness import State, shifts_of
from stillframe.workflow.unit_table import UnitTable, surplus

_AT_ONCE = 8
"""Files that are read at a time."""


@dataclass(frozen=True)
class Finding:
    """Something that is not as it should be."""

    what: str
    """In words, with the file or the frames."""
    broken: tuple[tuple[Stage, int], ...] = ()
    """Records that must be withdrawn for the next run to mend it."""


@dataclass(frozen=True)
class Verification:
    """What a look at a run's folder found."""

    folder: Path
    """The run's folder."""
    plan: Plan
    """Its units."""
    findings: list[Finding]
    """What is wrong; empty where all is well."""
    files: int
    """Files whose checksums were compared."""


def verify(folder: Path, on_unit: Callable[[Unit], None] = lambda _: None) -> Verification:
    """Compare everything in a run's folder with what was recorded of it.

    Every unit has a record, every frame a shift or a flag, every shard its size and checksum; the stores hold the
    values of the records; settings, reference and metadata are as the run left them.

    Parameters
    ----------
    folder : Path
        Of a run.
    on_unit : callable
        Called after each unit.

    Raises
    ------
    ValueError
        No run has begun there, or another version wrote it.
    """
    run_folder = RunFolder(folder.expanduser().absolute())
    plan = plan_of(run_folder)
    table = UnitTable.read(Ledger(run_folder), plan, plan.units)
    look = _Look(run_folder, RunDescription.read(run_folder.description), table)
    units = list(look.units(on_unit))
    findings = [*look.driver(), *look.beginning(), *look.reference(), *units, *look.stores()]
    return Verification(run_folder.path, plan, findings, look.files)


def repair(verification: Verification, run: Callable[[Settings], Any]) -> Any:
    """Withdraw the records of what is broken and do it again, with the settings that the run was given.

    Raises
    ------
    ValueError
        These settings cannot be read any more.
    LeaseError
        Another driver works on the folder.
    """
    folder = RunFolder(verification.folder)
    settings, ledger = read_settings(folder), Ledger(folder)
    with lease(folder) as held, held.writing():
        for stage, number in dict.fromkeys(place for one in verification.findings for place in one.broken):
            ledger.withdraw(stage, number)
    return run(settings)


@dataclass
class _Look:
    """One look at a folder."""

    folder: RunFolder
    description: RunDescription | None
    table: UnitTable
    files: int = 0
    """Files whose checksums were compared."""

    @property
    def aligns(self) -> bool:
        """Whether the run aligns frames."""
        return self.description is None or self.description.aligns

    def driver(self) -> Iterator[Finding]:
        """Report a run that is still under way, or did not finish."""
        if holders := read_leases(self.folder):
            yield Finding(f"it is not finished: {holders[0]} works on it")
        elif self.folder.drafts.exists() or not self.folder.manifest.exists():
            yield Finding("the last run did not finish: give the same 'stillframe run' command to go on")

    def beginning(self) -> Iterator[Finding]:
        """Look at run.json and settings.toml."""
        if self.description is None:
            yield Finding(f"{self.folder.description.name} is damaged or gone")
            return
        try:
            same = read_toml(self.folder.settings) == self.description.settings
        except (OSError, ValueError):
            same = False
        if not same:
            yield Finding(f"{self.folder.settings.name} is not what the run was given")

    def reference(self) -> Iterator[Finding]:
        """Compare the stored reference with the one that the records name."""
        try:
            digest = load_reference(self.folder.reference).digest
        except (ValueError, TypeError) as error:
            yield Finding(f"{self.folder.reference.name} cannot be read: {error}")
            return
        if {row.reference for row in self.table.rows.values() if row.reference} - {digest}:
            yield Finding(f"{self.folder.reference.name} is not the reference that frames were registered with")

    def units(self, on_unit: Callable[[Unit], None]) -> Iterator[Finding]:
        """Look at each unit's records and shard."""
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            found = pool.map(lambda unit: [*self._registered(unit), *self._aligned(unit)], self.table.plan.units)
            for unit, findings in zip(self.table.plan.units, found, strict=True):
                yield from findings
                on_unit(unit)
        for one in surplus(Ledger(self.folder), self.table.plan):
            yield Finding(f"there is a record of unit {one.unit}, which does not exist", ((one.stage, one.unit),))

    def _registered(self, unit: Unit) -> Iterator[Finding]:
        state, place = self.table.state(unit).register, ((STAGES[0], unit.number),)
        matches = self.table.matches[unit.start : unit.stop]
        if state.state in (State.PARTIAL, State.FAILED):
            yield Finding("; ".join(self.table.rows[unit.number].register_problems), place)
        elif state.state is not State.DONE:
            yield Finding(f"{unit}: no record of the registration, or a damaged one", place)
        elif (~np.isfinite(shifts_of(matches)).all(axis=1) & (matches["flag"] == 0)).any():
            yield Finding(f"{unit}: a frame has neither a shift nor a flag", place)

    def _aligned(self, unit: Unit) -> Iterator[Finding]:
        if not self.aligns:
            return
        state, row, place = self.table.state(unit).align, self.table.rows[unit.number], ((STAGES[1], unit.number),)
        if state.state is State.FAILED:
            yield Finding("; ".join(row.align_problems), place)
        elif state.state is State.OUTDATED:
            yield Finding(f"{unit}: {state.reason}", place)
        elif not row.files:
            yield Finding(f"{unit}: no record of the alignment, or a damaged one", place)
        for name, checksum in row.files.items():
            yield from self._file(name, checksum, f" ({unit})", place)

    def _file(
        self, name: str, checksum: Checksum, of: str = "", broken: tuple[tuple[Stage, int], ...] = ()
    ) -> Iterator[Finding]:
        """Compare a file with its checksum."""
        self.files += 1
        try:
            now = Checksum.of(self.folder.path / name)
        except OSError as error:
            yield Finding(f"{name}{of} cannot be read: {error.strerror}", broken)
            return
        if now != checksum:
            how = (
                f"has {now.size} bytes instead of {checksum.size}" if now.size != checksum.size else "has other content"
            )
            yield Finding(f"{name}{of} {how}", broken)

    def stores(self) -> Iterator[Finding]:
        """Check the files that the manifest lists, find those it does not list, and compare values with the records."""
        manifest = Manifest.read(self.folder.manifest)
        if manifest is None:
            if self.folder.manifest.exists():
                yield Finding(f"{self.folder.manifest.name} is damaged")
            return
        for name, checksum in manifest.files.items():
            yield from self._file(name, checksum)
        stores = {Path(name).parts[0] for name in manifest.files if "/" in name}
        there = (file for store in sorted(stores) for file in store_files(self.folder.path / store))
        for stray in (str(file.relative_to(self.folder.path)) for file in there):
            if stray not in manifest.files:
                yield Finding(f"{stray} was not written by the run")
        for shard in stray_shards(self.folder.aligned, len(self.table.plan.units)):
            yield Finding(f"{shard.relative_to(self.folder.path)} belongs to no unit")
        yield from self._values()

    def _values(self) -> Iterator[Finding]:
        try:
            with xr.open_zarr(self.folder.shifts, chunks=None, consolidated=False) as stored:
                shifts = stored["shift"].values
            complete, missing = self._completeness()
        except Exception as error:  # damaged metadata and chunks make Zarr raise errors of many kinds
            yield Finding(f"a store cannot be read: {type(error).__name__}: {error}")
            return
        if not np.array_equal(shifts, shifts_of(self.table.matches), equal_nan=True):
            yield Finding("shifts.zarr does not hold the shifts of the records")
        if not complete and not missing:
            yield Finding("aligned.zarr is marked incomplete: frames are still to come")

    def _completeness(self) -> tuple[Any, Any]:
        """Return whether the store of aligned frames is marked complete, and which frames it says are missing."""
        if not self.aligns:
            return True, []
        with xr.open_zarr(self.folder.aligned, chunks=None, consolidated=False) as aligned:
            return aligned.attrs.get("complete"), aligned.attrs.get("missing")


def in_words(findings: Iterable[Finding]) -> list[str]:
    """Return the findings in words, each once."""
    return list(dict.fromkeys(finding.what for finding in findings))
