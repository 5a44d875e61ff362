"""Look at a run's folder from outside: is everything there that should be, byte for byte, and what is to be done.

Nothing but the folder is needed; the frames themselves may be gone.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from stillframe.durable import Seal, digest_of
from stillframe.leases import drafts_of, lease, read_leases
from stillframe.origin import read_origin
from stillframe.outdated import surplus
from stillframe.plans import StoredPlan, aligns, read_plan, read_seals, read_stored_plan
from stillframe.records import STAGES, Ledger, Stage, UnitRecord
from stillframe.settings import Settings, make_settings, read_toml
from stillframe.store import load_reference, store_files, strange_shards
from stillframe.tasks import moves_of
from stillframe.units import Plan, Unit

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
    records' values; settings, plan, reference and metadata are as the run left them.

    Parameters
    ----------
    folder : Path
        Of a run.
    on_unit : callable
        Called after each unit.

    Raises
    ------
    ValueError
        No run has begun there, or a newer version wrote it.
    """
    folder = folder.expanduser().absolute()
    plan = known_plan(folder)
    look = _Look(folder, plan, aligns(folder))
    units = list(look.units(on_unit))
    findings = [*look.driver(), *look.plan_and_settings(), *look.reference(), *units, *look.stores()]
    return Verification(folder, plan, findings, look.files)


def known_plan(folder: Path) -> Plan:
    """Return how a run cut its stack.

    Raises
    ------
    ValueError
        No run has begun in this folder.
    """
    plan = read_plan(folder)
    if plan is None:
        raise ValueError(f"{folder} holds no run that has begun. Give the folder that 'run --out' names.")
    return plan


def repair(found: Verification, run: Callable[[Settings], Any]) -> Any:
    """Withdraw what is broken and do it again, with the settings that the run was given.

    Raises
    ------
    ValueError
        These settings cannot be known any more.
    LeaseError
        Another driver works on the folder.
    """
    settings = known_settings(found.folder)
    ledger = Ledger(found.folder)
    with lease(found.folder) as held, held.writing():
        for stage, number in dict.fromkeys(place for finding in found.findings for place in finding.broken):
            ledger.withdraw(stage, number)
    return run(settings)


def known_settings(folder: Path) -> Settings:
    """Return the settings of a run, from the copy that has a checksum, or else from the one made to be read."""
    plan, file = read_stored_plan(folder), folder / "settings.toml"
    try:
        values = plan.settings if plan and plan.settings else read_toml(file)
        return make_settings(values).model_copy(update={"out": folder})
    except (OSError, ValueError) as error:
        raise ValueError(
            f"the settings of {folder} cannot be read ({error}). Give the 'stillframe run' command that began it once "
            "more: it keeps what holds and does the rest again."
        ) from error


@dataclass
class _Look:
    """One look at a folder."""

    folder: Path
    plan: Plan
    aligns: bool
    files: int = 0

    @property
    def ledger(self) -> Ledger:
        """The records."""
        return Ledger(self.folder)

    def driver(self) -> Iterator[Finding]:
        """Tell that a run is still under way, or left drafts behind."""
        holders = read_leases(self.folder)
        if holders:
            yield Finding(f"it is not finished: {holders[0]} works on it")
        elif drafts_of(self.folder).exists() or not (self.folder / "seals.json").exists():
            yield Finding("the last run did not finish: give the same 'stillframe run' command to go on")

    def plan_and_settings(self) -> Iterator[Finding]:
        """Look at plan.json, settings.toml and reference.json."""
        stored = read_stored_plan(self.folder)
        if stored is None:
            yield Finding("plan.json is damaged or gone")
        yield from self._settings(stored)
        if (self.folder / "reference.json").exists() and read_origin(self.folder / "reference.json") is None:
            yield Finding("reference.json is damaged")

    def _settings(self, stored: StoredPlan | None) -> Iterator[Finding]:
        try:
            same = stored is None or not stored.settings or read_toml(self.folder / "settings.toml") == stored.settings
        except (OSError, ValueError):
            same = False
        if not same:
            yield Finding("settings.toml is not what the run was given")

    def reference(self) -> Iterator[Finding]:
        """Look whether the stored reference is the one that the records speak of."""
        used = {record.facts["reference"] for record in self.ledger.records("register") if record.facts}
        try:
            digest = load_reference(self.folder / "reference.zarr").digest
        except (ValueError, TypeError) as error:
            yield Finding(f"reference.zarr cannot be read: {error}")
            return
        if used - {digest}:
            yield Finding("reference.zarr is not the reference that frames were registered with")

    def units(self, on_unit: Callable[[Unit], None]) -> Iterator[Finding]:
        """Look at each unit's records and shard."""
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            for unit, found in zip(self.plan.units, pool.map(self._unit, self.plan.units), strict=True):
                yield from found
                on_unit(unit)
        for one in surplus(self.ledger, self.plan.units):
            yield Finding(f"there is a record of unit {one.unit}, which does not exist", ((one.stage, one.unit),))

    def _unit(self, unit: Unit) -> list[Finding]:
        registered, aligned = (self.ledger.read(stage, unit.number) for stage in STAGES)
        found = [*self._registered(unit, registered)]
        return [*found, *self._aligned(unit, aligned, registered)] if self.aligns else found

    def _registered(self, unit: Unit, record: UnitRecord | None) -> Iterator[Finding]:
        place: tuple[tuple[Stage, int], ...] = (("register", unit.number),)
        if record is None or (record.start, record.stop) != (unit.start, unit.stop):
            yield Finding(f"{unit}: no record of the registration, or a damaged one", place)
        elif record.problems:
            yield Finding("; ".join(record.problems), place)
        elif _without_answer(record):
            yield Finding(f"{unit}: a frame has neither a shift nor a flag", place)

    def _aligned(self, unit: Unit, record: UnitRecord | None, registered: UnitRecord | None) -> Iterator[Finding]:
        place: tuple[tuple[Stage, int], ...] = (("align", unit.number),)
        if record is None or (record.start, record.stop) != (unit.start, unit.stop):
            yield Finding(f"{unit}: no record of the alignment, or a damaged one", place)
            return
        if record.problems and not (registered and registered.problems == record.problems):
            yield Finding("; ".join(record.problems), place)
        if registered and registered.matches and record.files and record.shifts != digest_of(moves_of(registered)):
            yield Finding(f"{unit}: aligned with other shifts than those recorded", place)
        for name, seal in record.files.items():
            yield from self._file(name, seal, f" ({unit})", place)

    def _file(
        self, name: str, seal: Seal, of: str = "", broken: tuple[tuple[Stage, int], ...] = ()
    ) -> Iterator[Finding]:
        """Compare a file with its seal."""
        self.files += 1
        try:
            now = Seal.of(self.folder / name)
        except OSError as error:
            yield Finding(f"{name}{of} cannot be read: {error.strerror}", broken)
            return
        if now != seal:
            how = f"has {now.size} bytes instead of {seal.size}" if now.size != seal.size else "has other content"
            yield Finding(f"{name}{of} {how}", broken)

    def stores(self) -> Iterator[Finding]:
        """Look at every file that no record speaks of, and whether the stores hold what the records do."""
        seals = read_seals(self.folder)
        if seals is None:
            if (self.folder / "seals.json").exists():
                yield Finding("seals.json is damaged")
            return
        for name, seal in seals.files.items():
            yield from self._file(name, seal)
        stores = {Path(name).parts[0] for name in seals.files if "/" in name}
        there = (file for store in sorted(stores) for file in store_files(self.folder / store))
        for strange in (str(file.relative_to(self.folder)) for file in there):
            if strange not in seals.files:
                yield Finding(f"{strange} was not written by the run")
        for shard in strange_shards(self.folder / "aligned.zarr", len(self.plan.units)):
            yield Finding(f"{shard.relative_to(self.folder)} belongs to no unit")
        yield from self._values()

    def _values(self) -> Iterator[Finding]:
        records = self.ledger.records("register")
        try:
            with xr.open_zarr(self.folder / "shifts.zarr", chunks=None, consolidated=False) as shifts:
                found = shifts["shift"].values
            complete, missing = self._completeness()
        except Exception as error:  # whatever damaged metadata and chunks make Zarr raise
            yield Finding(f"a store cannot be read: {type(error).__name__}: {error}")
            return
        if not _hold(found, self.plan.frames, records):
            yield Finding("shifts.zarr does not hold the shifts of the records")
        if not complete and not missing:
            yield Finding("aligned.zarr is marked incomplete: frames are still to come")

    def _completeness(self) -> tuple[Any, Any]:
        """Return what the store of aligned frames says of itself."""
        if not self.aligns:
            return True, []
        with xr.open_zarr(self.folder / "aligned.zarr", chunks=None, consolidated=False) as aligned:
            return aligned.attrs.get("complete"), aligned.attrs.get("missing")


def _hold(shifts: Any, frames: int, records: Sequence[UnitRecord]) -> bool:
    if shifts.shape != (frames, 2):
        return False
    return all(np.array_equal(shifts[r.start : r.stop], moves_of(r), equal_nan=True) for r in records)


def _without_answer(record: UnitRecord) -> bool:
    matches = record.to_matches()
    return bool((~np.isfinite(moves_of(record)).all(axis=1) & (matches["flag"] == 0)).any())


def in_words(findings: Iterable[Finding]) -> list[str]:
    """Return what was found, each once."""
    return list(dict.fromkeys(finding.what for finding in findings))
